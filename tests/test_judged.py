"""Bounds on the true rate of harm when a judge errs: closed forms, and simulated coverage for many kinds of judges."""
import math

import numpy as np
import pytest

from probunlearn.bounds import binary_bound
from probunlearn.judged import Calibration, calibrate, judged_bound, prediction_powered
from probunlearn.questions import pooled_rate

RUNS, ALPHA = 1000, .05
# the share of misses that 1,000 valid bounds exceed in about one test of 700
ALLOWED = ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / RUNS)
RATES = (.6, .7, .8, .9, .95, 1.)


def simulated(rng, p, sensitivity, specificity, n=400, known=100):
    "(flags, caught, alarms) of `RUNS` experiments."
    harmful = rng.binomial(n, p, RUNS)
    flags = rng.binomial(harmful, sensitivity) + rng.binomial(n - harmful, 1 - specificity)
    return flags, rng.binomial(known, sensitivity, RUNS), rng.binomial(known, 1 - specificity, RUNS)


def misses(rng, p, sensitivity, specificity, side):
    "How many of `RUNS` bounds miss `p`; those of one calibration are computed together."
    runs, count = {}, 0
    for flags, *calibration in zip(*(v.tolist() for v in simulated(rng, p, sensitivity, specificity))):
        runs.setdefault(tuple(calibration), []).append(flags)
    for (caught, alarms), flags in runs.items():
        value = judged_bound(
            flags, 400, Calibration(caught, 100 - caught, alarms, 100 - alarms), ALPHA, side=side
        ).value
        low, high = np.moveaxis(value, -1, 0) if side == "two-sided" else (value, 1) if side == "lower" else (0, value)
        count += np.sum((low > p) | (high < p))
    return count


@pytest.mark.parametrize("p", [.002, .05, .4])
@pytest.mark.parametrize("side", ["upper", "lower", "two-sided"])
def test_corrected_bounds_cover(p, side):
    "For every pair of sensitivity and specificity: 324 cells in all, none of them left out."
    rng = np.random.default_rng([int(1000 * p), len(side)])
    for sensitivity in RATES:
        for specificity in RATES:
            assert misses(rng, p, sensitivity, specificity, side) / RUNS <= ALLOWED, (sensitivity, specificity)


def test_believing_the_judge_fails():
    "The same simulation without the correction: it misses far more often than it may."
    flags, *_ = simulated(np.random.default_rng(0), .05, .7, 1.)
    assert np.mean(binary_bound(flags, 400, ALPHA).value < .05) > 3 * ALPHA
    flags, *_ = simulated(np.random.default_rng(1), .05, 1., .9)
    assert np.mean(binary_bound(flags, 400, ALPHA, "lower").value > .05) > 3 * ALPHA


@pytest.mark.parametrize("over", ["jointly", "average"])
def test_many_questions_cover(over):
    rng, p, missed = np.random.default_rng(5), np.array([0, .01, .1]), 0
    for _ in range(RUNS):
        harmful = rng.binomial(200, p)
        flags = rng.binomial(harmful, .8) + rng.binomial(200 - harmful, .05)
        caught, alarms = rng.binomial(60, .8), rng.binomial(60, .05)
        bound = judged_bound(flags, 200, Calibration(caught, 60 - caught, alarms, 60 - alarms), ALPHA, over=over).value
        missed += np.any(bound < (p if over == "jointly" else p.mean()))
    assert missed / RUNS <= ALLOWED


def lumpy(rng, Q, K, p, n=128, m=200):
    """One verdict per text, wrong on 10 % of harmful and 5 % of harmless ones, K texts of each kind per question:
    said (Q n,), where the m labelled draws are, and their truth."""
    says, q = rng.random((2, Q, K)) < np.reshape([.05, .9], (2, 1, 1)), np.repeat(np.arange(Q), n)
    y = (rng.random(Q * n) < p).astype(int)
    at = rng.choice(Q * n, min(m, Q * n // 2), replace=False)
    return says[y, q, rng.integers(K, size=Q * n)].astype(float), at, y[at]


def outside(bound, p):
    low, high = bound.value.T
    return not ((low <= p) & (p <= high)).all()


@pytest.mark.parametrize("Q,K,p", [(1, 1, .5), (10, 1, .05), (10, 3, .05), (10, 10, .3), (40, 2, .02)])
def test_lumpy_errors_are_paid_for_by_labels_of_these_draws(Q, K, p):
    """Whatever texts the judge misjudges: 400 runs each of the claim on the average and of both prediction-powered ends,
    from labels of random draws among those that are judged."""
    rng, runs, misses = np.random.default_rng([Q, K]), 400, np.zeros(3)
    for _ in range(runs):
        said, at, truth = lumpy(rng, Q, K, p)
        flags, judge = said.reshape(Q, -1).sum(1).astype(int), calibrate(truth, said[at])
        misses[0] += outside(judged_bound(flags, 128, judge, ALPHA, side="two-sided", over="average"), p)
        misses[1] += prediction_powered(said, truth, said[at], ALPHA).value < p
        misses[2] += prediction_powered(said, truth, said[at], ALPHA, side="lower").value > p
    assert (misses / runs <= ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / runs)).all()


def test_labels_of_other_texts_and_claims_per_question_do_not():
    """The same judge calibrated on 200 + 200 other texts, and the joint claim whatever is labelled: both miss far more
    often than alpha, so a claim must name its condition."""
    rng, runs, misses = np.random.default_rng(0), 200, np.zeros(3)
    for _ in range(runs):
        said, at, truth = lumpy(rng, 10, 1, .05)
        flags = said.reshape(10, -1).sum(1).astype(int)
        other = calibrate(np.repeat([1, 0], 200), rng.random(400) < np.repeat([.9, .05], 200))
        claims = (other, "average"), (other, "jointly"), (calibrate(truth, said[at]), "jointly")
        bounds = [judged_bound(flags, 128, judge, ALPHA, side="two-sided", over=over) for judge, over in claims]
        misses += [outside(bound, .05) for bound in bounds]
    assert (misses / runs > 3 * ALPHA).all()
    condition = "the judge errs at the rates of the answers from which the labelled ones were picked at random"
    each = "on each question's draws"
    for over, where in ("average", "over all their draws together"), ("each", each), ("jointly", each):
        assert f"if {where} {condition}" in str(judged_bound([1, 2], 9, Calibration(9, 1, 1, 9), over=over))
    assert "of which the labelled ones are a random sample" in str(prediction_powered([1, 0], [1], [1]))


def test_a_calibration_knows_judge_and_threshold():
    made = calibrate([1, 0], [.7, .7], .9, "stern")
    assert (made.judge, made.harm_at, made.missed, made.passed) == ("stern", .9, 1, 1)
    assert calibrate([1], [1]).harm_at == .5


def test_a_perfect_judge_costs_little():
    """200 labels, nine tenths of α for the draws: for every count, what an upper or a lower bound leaves open grows by
    less than 12 %."""
    flags, judge = np.arange(1025), Calibration(100, 0, 0, 100)
    plain, judged = binary_bound(flags, 1024).value, judged_bound(flags, 1024, judge).value
    assert (plain[:1000] < judged[:1000]).all()
    assert (judged <= 1.12 * plain).all()
    assert .1 < judged[0] / plain[0] - 1 < .11
    plain, judged = binary_bound(flags, 1024, side="lower").value, judged_bound(flags, 1024, judge, side="lower").value
    assert (plain[1:] > judged[1:]).all() and (1 - judged <= 1.12 * (1 - plain)).all()


def test_what_few_harmless_labels_cost_the_lower_end():
    """No division of α helps: 100 labels without a false alarm allow a rate of 1 - α^(1/100), so no count whose lower
    bound is below that proves any harm; 5,000 labels do."""
    flags, allowed = np.arange(1025), 1 - .005**(1/100)
    for share in (.1, .5, .9):
        low = judged_bound(flags, 1024, Calibration(100, 0, 0, 100), side="two-sided", share=share).value[:, 0]
        assert not low[binary_bound(flags, 1024, .005, "lower").value < allowed].any()
    assert judged_bound(30, 1024, Calibration(100, 0, 0, 5000), side="two-sided").value[0] > .01


def test_closed_forms():
    judge = Calibration(80, 20, 2, 98)
    def rates(end): return float(binary_bound(80, 100, .0005, end)), float(binary_bound(2, 100, .0005, end))
    (s_low, f_low), (s_high, f_high) = rates("lower"), rates("upper")
    q = float(binary_bound(30, 1024, .009))
    assert float(judged_bound(30, 1024, judge)) == pytest.approx((q - f_low) / (s_low - f_low))
    q = float(binary_bound(300, 1024, .009, "lower"))
    assert float(judged_bound(300, 1024, judge, side="lower")) == pytest.approx((q - f_high) / (s_high - f_high))
    two = judged_bound(300, 1024, judge, side="two-sided").value
    assert two[0] == float(judged_bound(300, 1024, judge, ALPHA / 10, side="lower"))
    assert two[1] == float(judged_bound(300, 1024, judge, ALPHA / 10))
    q = float(pooled_rate([3, 4], 1024, .009))
    average = float(judged_bound([3, 4], 1024, judge, over="average"))
    assert average == pytest.approx((q - f_low) / (s_low - f_low))
    # a coin proves nothing
    assert float(judged_bound(0, 1024, Calibration(50, 50, 50, 50))) == 1
    assert float(judged_bound(900, 1024, Calibration(50, 50, 50, 50), side="lower")) == 0


def test_more_labels_less_width_and_never_less_than_the_draws_allow():
    bounds = [float(judged_bound(0, 1024, Calibration(m, 0, 0, m))) for m in (10, 100, 1000, 10**5)]
    assert bounds == sorted(bounds, reverse=True) and bounds[-1] > float(binary_bound(0, 1024, .01))
    # a fifth of harmless draws is flagged
    judge = Calibration(10**5, 0, 2 * 10**4, 8 * 10**4)
    noisy = [float(judged_bound(flags, 1024, judge)) for flags in (0, 100, 200, 250)]
    assert noisy[0] == noisy[1] == float(binary_bound(0, 1024, .009)) < noisy[2] < noisy[3]


def test_lost_verdicts_widen_both_ends():
    judge = Calibration(90, 10, 5, 95)
    plain = judged_bound(50, 1000, judge, side="two-sided").value
    lost = judged_bound(50, 1000, judge, side="two-sided", lost=100).value
    assert lost[0] == plain[0] and lost[1] == judged_bound(150, 1000, judge, side="two-sided").value[1] > plain[1]
    failing = Calibration(85, 10, 5, 90, 5, 5)
    assert failing.sensitivity(side="lower").value == binary_bound(85, 100, side="lower").value
    assert failing.sensitivity(side="upper").value == binary_bound(90, 100).value
    assert failing.false_alarms(side="upper").value == binary_bound(10, 100).value


@pytest.mark.parametrize("fails", ["at random", "on harm"])
def test_a_judge_that_fails_covers(fails):
    "A tenth of verdicts is lost, or a third of those on harm: on the draws and in the calibration alike."
    rng, p, missed = np.random.default_rng(len(fails)), .1, np.zeros(2)
    for _ in range(RUNS):
        def judged(truth):
            said = (rng.random(len(truth)) < np.where(truth, .8, .1)).astype(float)
            lost = rng.random(len(truth)) < (.1 if fails == "at random" else np.where(truth, .3, 0))
            return np.where(lost, np.nan, said)
        said, truth = judged(rng.random(400) < p), np.repeat([1, 0], 80)
        flags, lost = int((said == 1).sum()), int(np.isnan(said).sum())
        judge = calibrate(truth, judged(truth))
        bound = judged_bound(flags, 400, judge, ALPHA, side="two-sided", lost=lost).value
        missed += p < bound[0], p > bound[1]
    assert missed.sum() / RUNS <= ALLOWED


@pytest.mark.parametrize("method", ["clopper-pearson", "betting"])
@pytest.mark.parametrize("side", ["upper", "lower"])
def test_prediction_powered_covers(method, side):
    "For a judge that errs in its own way, and whose failures hide harm."
    rng, p, runs, misses = np.random.default_rng(7), .15, 1000 if method == "clopper-pearson" else 250, 0
    for _ in range(runs):
        def judged(y):
            lost, dice = rng.random(len(y)) < .05, rng.random(len(y))
            return np.where(lost, np.nan, dice < np.where(y, .6, .1))
        rest, there = rng.random(500) < p, rng.random(120) < p
        bound = float(
            prediction_powered(judged(rest), there.astype(float), judged(there), ALPHA, side=side, method=method)
        )
        misses += bound < p if side == "upper" else bound > p
    assert misses / runs <= ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / runs)


def test_prediction_powered_gains_where_the_judge_is_good():
    rng = np.random.default_rng(3)
    y = rng.random(20_000) < .3
    said = np.where(rng.random(20_000) < .97, y, ~y).astype(float)
    bound = prediction_powered(said, y[:400].astype(float), said[:400])
    assert float(bound) < float(binary_bound(int(y[:400].sum()), 400))


@pytest.mark.parametrize("seed", range(3))
def test_kappa_is_observed_beyond_chance(seed):
    "Against the definition, counted pair by pair."
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 2, 50), rng.integers(0, 2, 50)
    chance = np.mean([x == y for x in a for y in b])
    judge = calibrate(a, b)
    assert judge.agreement == np.mean(a == b)
    assert judge.kappa == pytest.approx((np.mean(a == b) - chance) / (1 - chance))


def test_refusals():
    for bad in (lambda: Calibration(-1, 1, 0, 0), lambda: Calibration(.5, 1, 0, 0)):
        with pytest.raises(ValueError, match="whole numbers of answers"): bad()
    with pytest.raises(ValueError, match="over must be one of"): judged_bound(0, 9, Calibration(1, 0, 0, 1), over="all")
    with pytest.raises(ValueError, match="leaks must be whole numbers"): judged_bound(10, 9, Calibration(1, 0, 0, 1))
    with pytest.raises(ValueError, match="alpha must lie"): prediction_powered([1], [1], [1], alpha=2)
    with pytest.raises(ValueError, match="side must be one of"): prediction_powered([1], [1], [1], side="two-sided")
