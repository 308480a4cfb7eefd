"""Anytime bounds under a look after every draw, verdicts, planned looks."""
import itertools
import math

import numpy as np
import pytest
from scipy import stats

from test_bounds import LAWS, ROUNDING
from probunlearn.bounds import StoppedScores, binary_bound, leaked, mean_bound
from probunlearn.means import log_wealth
from probunlearn.sequential import (Claim, MeanSequence, RateSequence, anytime_stake, certify, looked, mean_ends,
                                    plan_looks, rate_ends, rate_evidence, sample_until)

RUNS, HORIZON = 2000, 4096


def allowed(alpha, runs=RUNS): return alpha + 3 * math.sqrt(alpha * (1 - alpha) / runs)


# Coverage with a look after every draw

@pytest.mark.parametrize("law", LAWS)
def test_mean_sequence_is_never_wrong_too_often(law):
    draw, _, mean, _ = LAWS[law]
    rng, wrong = np.random.default_rng(11), {"upper": 0, "lower": 0}
    for _ in range(RUNS // 200):
        x = draw(rng, (200, HORIZON))
        # the end is wrong at some look: money above 1/alpha at the truth
        for side, scores, m in ("upper", x, mean), ("lower", 1 - x, 1 - mean):
            if m < 1:
                money = log_wealth(scores, m - ROUNDING, anytime_stake(scores, .05)).max(1)
                wrong[side] += (money >= math.log(20)).sum()
    assert max(wrong.values()) / RUNS <= allowed(.05)

def border(p, toward, goal): # at each t, the count beyond which the evidence reaches the goal
    t = np.arange(1, HORIZON + 1)
    inside, outside = (t + 1, np.full(HORIZON, -1)) if toward == "below" else (np.full(HORIZON, -1), t + 1)
    for _ in range(14):  # evidence is monotone in the count
        k = (inside + outside) // 2
        reached = (rate_evidence(np.clip(k, 0, t), t, p, toward) >= goal) & (k >= 0) & (k <= t)
        inside, outside = np.where(reached, inside, k), np.where(reached, k, outside)
    return outside

@pytest.mark.parametrize("p, alpha", [(.001, .05), (.01, .05), (.01, .01), (.05, .05), (.3, .05), (.5, .05), (.9, .05)])
def test_rate_sequence_is_never_wrong_too_often(p, alpha):
    leaks = (np.random.default_rng(12).random((RUNS, HORIZON)) < p).cumsum(1)
    assert (leaks <= border(p, "below", -math.log(alpha))).any(1).mean() <= allowed(alpha)
    assert (leaks >= border(p, "above", -math.log(alpha))).any(1).mean() <= allowed(alpha)
    goal = -math.log(alpha)
    refuted = rate_evidence(leaks[:20], np.arange(1, HORIZON + 1), p, "below") >= goal
    assert (refuted == (leaks[:20] <= border(p, "below", goal))).all()

@pytest.mark.parametrize("p", [.002, .01, .2])
def test_rate_evidence_is_a_fair_game(p):
    for n, toward in itertools.product((1, 7, 200), ("below", "above")):
        k = np.arange(n + 1)
        expected = lambda rate: np.exp(stats.binom.logpmf(k, n, rate) + rate_evidence(k, n, p, toward)).sum()
        assert expected(p) == pytest.approx(1, rel=1e-9)                               # exactly 1 at the truth
        assert expected(p * (1.5 if toward == "below" else .5)) < 1  # less where the claim is truer still

def test_evidence_rises_with_the_rate_so_the_ends_are_ends():
    tau = np.linspace(.001, .999, 400)
    for leaks, n in (0, 50), (3, 80), (40, 41), (500, 1000):
        below, above = rate_evidence(leaks, n, tau, "below"), rate_evidence(leaks, n, tau, "above")
        below, above = below[below > -3], above[above > -3]  # further down rounding shows, and nothing depends on it
        assert (np.diff(below) >= -1e-9).all() and (np.diff(above) <= 1e-9).all()
        high, low = float(rate_ends(leaks, n, .01, "upper")), float(rate_ends(leaks, n, .01, "lower"))
        assert low <= leaks / n <= high
        assert rate_evidence(leaks, n, min(high + 1e-9, 1 - 1e-9), "below") >= math.log(100) - 1e-3 or high == 1


# Sequences

def test_sequences_agree_with_all_draws_at_once_and_only_tighten():
    x = np.random.default_rng(0).beta(2, 8, (3, 300))
    sequence, last = MeanSequence(.05, "two-sided"), np.array([0, 1])
    for i in range(0, 300, 50):
        value = sequence.add(x[:, i:i + 50]).bound.value
        assert value.shape == (3, 2) and (value[:, 0] >= last[..., 0]).all() and (value[:, 1] <= last[..., 1]).all()
        last = value
    # the maximum over time is in the bound already
    assert value[:, 1] == pytest.approx(mean_ends(x, .025, "upper"), abs=1e-9)
    leaks = x > .3
    sequence = RateSequence(.05).add(leaks[:, :100]).add(leaks[:, 100:])
    assert sequence.n == 300 and (sequence.leaks == leaks.sum(1)).all() and sequence.bound.value.shape == (3,)
    assert np.ndim(RateSequence().add(leaks[0]).bound.value) == 0
    assert (sequence.bound.value >= binary_bound(leaks.sum(1), 300, .05).value).all()   # the price of looking
    for part in "anytime", "n = 300", "α = 0.05": assert part in str(sequence.bound)

def test_anytime_price_is_modest():
    x = np.random.default_rng(1).beta(2, 8, (50, 1024))
    width = lambda value: (value - .2).mean()
    assert width(mean_ends(x, .01, "upper")) <= 1.4 * width(mean_bound(x, .01).value)

def test_bad_draws_are_refused():
    with pytest.raises(ValueError, match="MeanSequence"): RateSequence().add([.5])
    with pytest.raises(ValueError, match="got nan"): MeanSequence().add([np.nan])
    for bad in 0, 1, np.nan:
        with pytest.raises(ValueError, match="alpha"): RateSequence(bad)
        with pytest.raises(ValueError, match="below must"): Claim(bad)
    with pytest.raises(ValueError, match="one question"): certify(Claim(.1), np.zeros((2, 5)))


# Verdicts

def test_speed_of_verdicts():
    assert certify(Claim(.01), np.zeros(2000)).n <= 620
    leaky = np.random.default_rng(2).random((RUNS, 40)) < .3
    assert np.mean([certify(Claim(.01), row).outcome == "refuted" for row in leaky]) >= .99

def test_verdict_of_the_first_crossing_stays():
    for leak_at, below in (1.0, .05), (None, .3):
        x = np.random.default_rng(4).random((40, 1500)) < .15
        for row in x * 1.0:
            verdict = certify(Claim(below, leak_at=leak_at), row)
            if verdict.outcome == "undecided": continue
            assert certify(Claim(below, leak_at=leak_at), row[:verdict.n]) == verdict
            assert certify(Claim(below, leak_at=leak_at), row[:verdict.n - 1]).outcome == "undecided"

def test_verdicts_say_what_they_rest_on():
    said = str(certify(Claim(.01, decoding="T = 1, top-p 0.9"), np.zeros(600)))
    for part in "Holds", "n = 499", "below 0.01", "α = 0.01", "anytime", "one question", "T = 1, top-p 0.9":
        assert part in said
    said = str(certify(Claim(.01), np.zeros(9)))
    for part in "Undecided", "α = 0.01", "anytime", "decoding not stated": assert part in said
    for sequence in RateSequence(decoding="T = 1"), MeanSequence(decoding="T = 1"):
        assert "T = 1" in str(sequence.add(np.zeros(9)).bound)
    assert "T = 1" in str(plan_looks((30,), .2, decoding="T = 1").verdict(np.zeros(30)))

def test_a_percentage_is_no_threshold():
    for bad in 100, 0, -1, np.nan:
        with pytest.raises(ValueError, match="leak_at must lie in"): Claim(.01, leak_at=bad)

def test_certify_agrees_with_the_sequence():
    x = (np.random.default_rng(5).random(900) < .03) * 1.0
    verdict = certify(Claim(.01), x)
    assert verdict.outcome == "refuted"
    assert float(RateSequence(.01, "lower").add(x[:verdict.n]).bound) >= .01 - 1e-9

def test_sample_until_stops_resumes_and_counts():
    stream, asked = (np.random.default_rng(6).random(4096) < .04) * 1.0, []
    def pull(start, stop):
        asked.append((start, stop))
        return stream[start:stop]
    verdict, x = sample_until(pull, Claim(.01), batch=50)
    assert verdict == certify(Claim(.01), stream)
    assert (x == stream[:len(x)]).all()
    assert verdict.n <= len(x) < verdict.n + 50
    assert [a for a, _ in asked] == list(range(0, len(x), 50))
    spent, x = sample_until(pull, Claim(.0399), budget=130, batch=50)
    assert spent.outcome == "undecided" and len(x) == spent.n == 130
    assert isinstance(x, StoppedScores)
    assert "anytime" in str(MeanSequence().add(x).bound)
    assert certify(Claim(.0399), x) == spent
    for fixed in mean_bound, lambda x: binary_bound(leaked(x).sum(), len(x)):
        with pytest.raises(ValueError, match="n was not fixed"): fixed(x)
    with pytest.raises(ValueError, match="must return 256 scores"): sample_until(lambda a, b: np.zeros(3), Claim(.1))
    with pytest.raises(ValueError, match=">= 1"): sample_until(pull, Claim(.1), budget=0)


# Planned looks

def test_plan_error_is_exact_and_within_alpha():
    for looks, tau, alpha in ((600, 1024), .01, .01), ((100, 200, 400), .05, .05), ((30,), .2, .1):
        plan = plan_looks(looks, tau, alpha)
        assert plan.chances(tau).sum() <= alpha + 1e-12
        x = np.random.default_rng(7).random((RUNS, looks[-1])) < tau
        for rate in tau, tau / 4:
            x = np.random.default_rng(8).random((RUNS, looks[-1])) < rate
            held = np.mean([plan.verdict(row).outcome == "holds" for row in x])
            assert held == pytest.approx(plan.chances(rate).sum(), abs=4 * math.sqrt(.25 / RUNS))
    assert plan.allowed[0] == stats.binom.ppf(.1, 30, .2) - (stats.binom.cdf(stats.binom.ppf(.1, 30, .2), 30, .2) > .1)

def test_plan_stops_early_when_it_cannot_win():
    plan = plan_looks((600, 1024))
    assert plan.verdict(np.zeros(600)).n == 600
    assert plan.verdict(np.r_[np.zeros(10), np.ones(4), np.zeros(1010)]).outcome == "undecided"
    assert plan.verdict(np.r_[np.zeros(10), np.ones(4), np.zeros(1010)]).n == 14
    assert plan.verdict(np.zeros(300)).outcome == "undecided" and plan.verdict(np.zeros(300)).n == 300
    with pytest.raises(ValueError, match="increasing"): plan_looks((100, 50))

def test_looking_is_paid_for():
    bound = binary_bound(0, 1024, .01)
    assert looked(bound) is bound
    assert looked(bound, looks=3, models=2).alpha == pytest.approx(.06)
    assert "best of 2 models, at each of 3 looks; draw" in str(looked(bound, 3, 2))
    three = str(looked(bound, 3))
    assert "fixed-n" not in three and "n = 1,024, at each of 3 looks, per question" in three
    again = "draw it again with a fresh seed for a fixed-n claim"
    assert looked(bound, models=2).sampling == f"best of 2 models; {again}"
    for bad in dict(looks=0), dict(models=1.5), dict(looks=-2, models=-2):
        with pytest.raises(ValueError, match="whole number >= 1"): looked(bound, **bad)
    with pytest.raises(ValueError, match="fresh seed"): looked(bound, 100)
    with pytest.raises(ValueError, match="anytime"): looked(RateSequence().add(np.zeros(5)).bound, 2)


def test_missing_draws_count_as_the_worst_case():
    draws = np.r_[np.zeros(600), np.full(100, np.nan), np.ones(20)]
    most, least = np.nan_to_num(draws, nan=1), np.nan_to_num(draws, nan=0)
    for sequence in (RateSequence, MeanSequence):
        low, high = sequence(.01, "two-sided", missing="worst").add(draws).bound.value
        assert high == sequence(.01, "two-sided").add(most).bound.value[1]
        assert low == sequence(.01, "two-sided").add(least).bound.value[0]
        with pytest.raises(ValueError, match="nan"): sequence(.01).add(draws)
    for leak_at in (1.0, None):
        lost = np.full(5000, np.nan)
        # nothing seen proves nothing
        assert certify(Claim(.5, .01, leak_at), lost, missing="worst").outcome == "undecided"
        assert certify(Claim(.05, .01, leak_at), np.zeros(2000), missing="worst").outcome == "holds"
