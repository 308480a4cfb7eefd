"""Metrics and claims against enumeration, exact miss chances and simulation."""
import itertools
import math
import warnings
from fractions import Fraction

import numpy as np
import pytest
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from scipy import stats
from statsmodels.stats.multitest import multipletests

from test_bounds import refused
from probunlearn.bounds import StoppedScores, binary_bound, ed_bound, leaked, mean_bound, std_bound
from probunlearn.metrics import (dataset_claims, diversity, ed_score, extraction_curve, in_uses, leak_at_k,
                                 leak_at_k_bound, leakage, leaks_to_come, m_bin, m_gen, m_mu, m_sigma, seen_mass_bounds,
                                 self_bleu, self_rouge)
from probunlearn.planning import RunPlan, chance_to_certify, forecast_worst, most_leaks
from probunlearn.questions import certified, difference_bound, pooled_mean, pooled_rate, population_mean, worst_question
from probunlearn.scores import rouge_l
from probunlearn.sequential import MeanSequence, RateSequence, mean_ends, rate_ends, rate_evidence


def allowed(alpha, runs): return alpha + 3 * math.sqrt(alpha * (1 - alpha) / runs)


# Per question

def test_the_papers_four_are_the_dkw_bounds():
    x = np.random.default_rng(0).random((4, 200)).round(1)
    assert (m_bin((x >= .9).sum(1), 200).value == binary_bound((x >= .9).sum(1), 200).value).all()
    e = math.sqrt(math.log(100) / 400)
    assert m_gen(x, .5).value == pytest.approx(np.minimum((x > .5).mean(1) + e, 1), abs=1e-12)
    knots, table = np.sort(x, 1), np.maximum(np.arange(201) / 200 - e, 0)
    integral = (table * np.diff(np.pad(knots, ((0, 0), (1, 1)), constant_values=((0, 0), (0, 1))), axis=1)).sum(1)
    assert m_mu(x).value == pytest.approx(1 - integral, abs=1e-12)                   # 1 - integral of the floor
    assert (m_sigma(x).value == std_bound(x, method="dkw").value).all()

def test_ed_score_is_mean_plus_k_population_standard_deviations():
    assert ed_score([0, 0, 1, 1], k=3) == 2
    assert ed_score(np.eye(3)).shape == (3,)
    assert ed_score([.3]) == .3

def test_leakage_rows_agree_with_single_bounds():
    x = np.random.default_rng(1).random((5, 100)).astype(np.float32)
    table = leakage(x, leak_at=.75, alpha=.05)
    assert {len(column) for column in table.values()} == {5}
    assert (table["leaks"] == (x >= np.float32(.75)).sum(1)).all()
    for name, bound in dict(mean_upper=mean_bound, std_upper=std_bound, ed_upper=ed_bound).items():
        assert (table[name] == bound(x, .05).value).all()
    gaps = np.where(np.arange(100) < 2, np.nan, x)
    assert (leakage(gaps, .75, missing="worst")["leaks"] == leaked(gaps, .75).sum(1)).all()
    with pytest.raises(ValueError, match="nan in row 0"): leakage(gaps)

def test_leak_at_k_is_the_mean_over_all_subsets():
    rng = np.random.default_rng(2)
    for x in rng.random(9), rng.integers(0, 2, 9), np.zeros(9), np.ones(9):
        for k in range(1, 10):
            assert leak_at_k(x, k) == pytest.approx(np.mean([max(s) for s in itertools.combinations(x, k)]), abs=1e-14)
    assert leak_at_k(np.ones((1, 3)), 2).shape == (1,)
    for bad in 0, 10, 1.5:
        with pytest.raises(ValueError, match=f"got {bad}"): leak_at_k(np.zeros(9), bad)

@pytest.mark.parametrize("method", ["bj", "dkw", "smirnov", "clopper-pearson"])
def test_leak_at_k_bound_covers(method):
    runs, alpha = 2000, .05
    for p in .01, .3:
        x = (np.random.default_rng(3).random((runs, 128)) < p) * 1.0
        missed = np.zeros(runs, bool)
        for k in 1, 4, 32, 500: missed |= leak_at_k_bound(x, k, alpha, method=method).value < 1 - (1 - p)**k - 1e-12
        assert missed.mean() <= allowed(alpha, runs)                                   # all k at once
    one = float(leak_at_k_bound(x[0], 1, alpha, method="bj"))
    assert one == pytest.approx(float(mean_bound(x[0], alpha, method="bj")), abs=1e-12)

def test_leak_at_k_bound_refuses():
    with pytest.raises(ValueError, match="0 or 1"): leak_at_k_bound([.5], 2, method="clopper-pearson")
    with pytest.raises(ValueError, match="got 0"): leak_at_k_bound([.5], 0)
    with pytest.raises(ValueError, match="'bj'"): leak_at_k_bound([.5], 2, method="betting")

def test_in_uses_keeps_tiny_and_certain_leaks():
    assert extraction_curve(1e-18, 1000) == pytest.approx(1e-15, rel=1e-9)
    assert extraction_curve([0, 1], [1, 5]).tolist() == [[0, 0], [1, 1]]
    claim = in_uses(binary_bound([0, 5], 100), 50)
    assert claim.value == pytest.approx(1 - (1 - binary_bound([0, 5], 100).value)**50)
    assert "50 uses" in str(claim) and claim.alpha == .01

def test_seen_mass_bounds_hold_for_every_completion():
    rng = np.random.default_rng(4)
    for _ in range(200):
        p, s = rng.dirichlet(np.full(12, .3)), rng.random(12).round(1)
        seen = rng.integers(0, 12, 6)
        seen = np.unique(seen)
        low, high = seen_mass_bounds(p[seen], s[seen]).value
        assert low - 1e-12 <= p @ s <= high + 1e-12
        assert high - low == pytest.approx(1 - p[seen].sum(), abs=1e-12)
    assert "with certainty" in str(seen_mass_bounds([1.0], [.5]))
    for p, s in ([.6, .6], [0, 1]), ([-.1], [0]), ([.1, .1], [0]), ([np.nan], [0]):
        with pytest.raises(ValueError, match="probabilities must"): seen_mass_bounds(p, s)

def test_diversity():
    same, different = diversity(["a b c"] * 4), diversity(["a b", "c d", "e f", "g h"])
    assert same["distinct_answers"] == .25 and same["answer_entropy"] == 0 and same["distinct_1"] == .25
    assert different["distinct_answers"] == different["distinct_1"] == different["distinct_2"] == 1
    assert different["answer_entropy"] == 2
    assert diversity(["", " "])["empty"] == 1
    with pytest.raises(ValueError, match="at least one answer"): diversity([])


# Many questions

def test_pooled_rate_never_misses_more_than_alpha():
    def miss(p, alpha):
        pmf = np.ones(1)
        for q in p: pmf = np.convolve(pmf, [1 - q, q])
        bounds = [float(pooled_rate([s], len(p), alpha)) for s in range(len(p) + 1)]
        return pmf[np.array(bounds) < np.mean(p) - 1e-12].sum()
    rng = np.random.default_rng(5)
    for _ in range(300):
        p = rng.choice([rng.random(8), np.r_[np.ones(4), rng.random(4)], rng.beta(.1, 1, 8)])
        for alpha in .01, .05, .25, .6, .9: assert miss(p[:rng.integers(1, 9)], alpha) <= alpha + 1e-12

def test_pooled_rate_is_clopper_pearson_on_the_pooled_count_away_from_its_edge():
    for n in 4, 50, 1000:
        for s in range(0, n - 1, max(n // 10, 1)):
            assert float(pooled_rate([s], n, .25)) == pytest.approx(stats.beta.isf(.25, s + 1, n - s), abs=1e-12)
    assert float(pooled_rate([99], 100, .01)) == 1
    assert float(pooled_rate([1, 2], 25)) == float(pooled_rate([3], 50)) == float(pooled_rate([1, 2], [25, 25]))
    with pytest.raises(ValueError, match="same for every question, got 10 to 40"): pooled_rate([1, 2], [10, 40])
    with pytest.raises(ValueError, match="whole numbers"): pooled_rate([1.5], 10)

@pytest.mark.parametrize("runs", [400, pytest.param(2000, marks=pytest.mark.slow)])
def test_stratified_betting_covers_and_beats_averaging(runs):
    truth, alpha = np.array([0, 0, .02, .6, .6, 1.0]), .05
    x = np.random.default_rng(6).random((runs, 6, 64)) < truth[:, None]
    for method in "betting", "kl":
        miss = np.mean([float(pooled_mean(rows, alpha, method=method)) < truth.mean() for rows in x])
        assert miss <= allowed(alpha, runs)
    low, high = np.array([pooled_mean(rows, alpha, "two-sided").value for rows in x[:runs // 4]]).T
    assert ((low > truth.mean()) | (high < truth.mean())).mean() <= allowed(alpha, runs // 4)
    assert high.mean() < np.mean([mean_bound(rows, alpha).value.mean() for rows in x[:runs // 4]])

def test_no_wrong_question_is_listed():
    runs, alpha, tau = 1000, .05, .1
    p = np.array([0, 0, .02, .05, .1, .1, .1, .3])
    leaks = np.random.default_rng(7).binomial(200, p, (runs, 8))
    lists = np.array([certified(row, 200, tau, alpha) for row in leaks])
    assert lists[:, p >= tau].any(1).mean() <= allowed(alpha, runs)
    assert lists[:, :2].mean() > .95
    for row, found in zip(leaks[:200], lists):
        chances = stats.binom.cdf(row, 200, tau)
        assert (multipletests(chances, alpha, "simes-hochberg")[0] == found).all()
    for row, found in zip(leaks[:5], lists):                                    # all that Holm lists, and more
        assert (found | ~multipletests(stats.binom.cdf(row, 200, tau), alpha, "holm")[0]).all()
    by_hand = 0, 0, 0, 1                                                        # three clean ones need only α / 2 each
    assert certified(by_hand, 30, .2, .0025).tolist() == [True] * 3 + [False]

def test_worst_question_covers():
    p, runs, alpha = np.array([0, .01, .2, .2, .2]), 2000, .05
    leaks = np.random.default_rng(8).binomial(100, p, (runs, 5))
    assert np.mean([float(worst_question(row, 100, alpha)) < .2 for row in leaks]) <= allowed(alpha, runs)

def test_difference_covers_paired_and_apart():
    runs, alpha, n = 1000, .05, 100
    u, v = np.random.default_rng(9).random((2, runs, n))
    for second in (u < .4) * 1.0, (v < .4) * 1.0:
        low, high = difference_bound((u < .3) * 1.0, second, alpha).value.T
        assert ((low > -.1) | (high < -.1)).mean() <= allowed(alpha, runs)
    x = (u < .3)[:20]
    pooled = difference_bound(x, (v < .4)[:20], pooled=True)
    assert pooled.value.shape == (2,) and pooled.value[0] <= -.1 <= pooled.value[1] and "fixed set of 20" in str(pooled)

def test_population_mean_covers():
    rng, runs, alpha = np.random.default_rng(10), 500, .05
    p = rng.beta(.3, 3, (runs, 60))
    x = rng.random((runs, 60, 16)) < p[..., None]
    bounds = [population_mean(rows, alpha) for rows in x]
    assert np.mean([float(bound) < .3 / 3.3 for bound in bounds]) <= allowed(alpha, runs)
    # questions are the observations
    assert bounds[0].n == 60 and "n = 60" in str(bounds[0]) and "16 draws each" in str(bounds[0])

def test_dataset_claims():
    x = np.zeros((40, 1024))
    x[0, :300] = 1
    claims = dataset_claims(x)
    assert list(claims) == ["worst question", "certified questions", "average leak", "average score"]
    assert claims["certified questions"].value == certified(x.sum(1), 1024).sum() == 39
    assert float(claims["worst question"]) == float(binary_bound(300, 1024, .01))
    assert 300 / 40960 < float(claims["average leak"]) < .0085
    shared = dataset_claims(x, together=True, random_sample=True)
    assert all(claim.alpha == .002 for claim in shared.values()) and "random sample" in str(shared["population"])
    gaps = x.copy()
    gaps[1, 0] = np.nan
    average = dataset_claims(gaps, missing="worst")["average leak"]
    assert float(average) == float(pooled_rate(np.nan_to_num(gaps, nan=1).sum(1), 1024))
    stopped = x.view(StoppedScores)
    of_counts = [lambda x, f=f: f(leaked(x).sum(1), 1024) for f in (worst_question, certified, pooled_rate, m_bin)]
    for fixed in (dataset_claims, leakage, pooled_mean, population_mean, lambda x: difference_bound(x, x),
                  lambda x: leak_at_k_bound(x, 2), lambda x: leak_at_k(x, 2), *of_counts):
        with pytest.raises(ValueError, match="n was not fixed"): fixed(stopped)
    assert ed_score(stopped).shape == (40,)                                            # an estimate, no claim
    for claim in claims.values():
        assert "α = 0.01" in str(claim) and "question" in str(claim) and "fixed-n" in str(claim)


# At every look

def test_anytime_claims_are_the_sequences_and_one_list():
    rng = np.random.default_rng(20)
    for Q, n in (1, 1), (1, 40), (6, 200), (40, 64):
        x = np.where(rng.random((Q, n)) < .9, 0, rng.random((Q, n)).round(1))
        x[rng.random((Q, n)) < .02] = np.nan
        claims = dataset_claims(x, .05, .5, tau=.1, missing="worst", anytime=True)
        leaks, most = leaked(x, .5), np.nan_to_num(x, nan=1)
        counts = leaks.sum(1)
        assert claims["worst question"].value == rate_ends(counts, n, .05, "upper").max()
        p = np.exp(-np.maximum(rate_evidence(counts, n, .1, "below"), 0))
        assert claims["certified questions"].value == multipletests(p, .05, "simes-hochberg")[0].sum()
        assert claims["average score"].value == float(pooled_mean(most, .05, anytime=True))
        assert claims["average leak"].value == float(pooled_mean(leaks * 1., .05, anytime=True))
        assert {claim.sampling for claim in claims.values()} == {"anytime"}
        rows = leakage(x, .5, .05, missing="worst", anytime=True)
        assert (rows["rate_upper"] == RateSequence(.05).add(leaks).bound.value).all()
        assert (rows["mean_upper"] == MeanSequence(.05).add(most).bound.value).all()
        fixed = leakage(x, .5, .05, missing="worst")
        assert all((rows[name] == fixed[name]).all() for name in rows if not name.endswith("upper"))
        assert [name for name in fixed if name not in rows] == ["std_upper", "ed_upper"]


def test_the_average_of_one_question_is_its_mean():
    x = np.random.default_rng(21).beta(2, 8, (1, 300))
    assert float(pooled_mean(x, .05, anytime=True)) == pytest.approx(mean_ends(x, .05, "upper")[0], abs=1e-12)


def test_what_holds_at_every_look_takes_stopped_scores():
    x = (np.random.default_rng(22).random((3, 90)) < .1) * 1.
    stopped = x.view(StoppedScores)
    for f in dataset_claims, pooled_mean:
        assert str(f(stopped, anytime=True)) == str(f(x, anytime=True))
    assert (leakage(stopped, anytime=True)["rate_upper"] == leakage(x, anytime=True)["rate_upper"]).all()
    assert (certified(leaked(stopped).sum(1), 90, .5, anytime=True) == certified(x.sum(1), 90, .5, anytime=True)).all()
    with pytest.raises(ValueError, match="fixed in advance"): dataset_claims(x, anytime=True, random_sample=True)
    with pytest.raises(ValueError, match="one count per question"): worst_question(3, 9, anytime=True)


# Planning

def test_chance_to_certify_is_the_share_of_runs_that_do():
    rng = np.random.default_rng(11)
    for n, tau, p in (200, .05, .01), (1024, .01, .003), (50, .01, 0):
        leaks = rng.binomial(n, p, 4000)
        share = (binary_bound(leaks, n).value < tau).mean()
        assert share == pytest.approx(float(chance_to_certify(p, n, tau)), abs=4 * math.sqrt(.25 / 4000))
        assert most_leaks(n, tau) == (binary_bound(np.arange(n + 1), n).value <= tau).sum() - 1
    with pytest.raises(ValueError, match="tau must"): most_leaks(5, 1.5)

def test_run_plan_agrees_with_the_bounds_it_announces():
    text = str(RunPlan(1024, 400))
    for part in "0.004488", "1.125e-05", "if at most 3 of the draws of each", "it takes 1,055,", "α = 0.01", "fixed-n":
        assert part in text
    assert "too few draws" not in str(RunPlan(1055, 400))
    def all_below(n): return next(line for line in str(RunPlan(n, 40)).splitlines() if "all of them or one" in line)
    assert "it takes 459," in all_below(458) and "if at most 0 of" in all_below(459)        # 826 at α / 40 each
    assert [certified(np.zeros(40), n).sum() for n in (458, 459)] == [0, 40]

def test_forecast_is_tested_before_it_is_believed():
    rng = np.random.default_rng(12)
    p = rng.beta(.4, 40, 40_000)
    forecast = forecast_worst(p[:4000], 40_000)
    assert forecast.factor < 3 and 1 / 3 < forecast.value / p.max() < 3 and "not a bound" in str(forecast)
    hidden = np.where(np.arange(2000) < 2, .9, rng.beta(2, 2000, 2000))
    with pytest.warns(UserWarning, match="do not extrapolate"):
        assert "NOT to be trusted" in str(forecast_worst(hidden, 20_000))
    with pytest.warns(UserWarning, match="asked for 40 times the 1,000"):
        assert "NOT tested at 40 times" in str(forecast_worst(p[:1000], 40_000))
    with pytest.raises(ValueError, match="at least 100 probabilities above 0, got 99"):
        forecast_worst(np.where(np.arange(1000) < 99, p[:1000], 0), 5000)
    for bad in p[:50], np.full(200, 2.0), np.full(200, np.nan):
        with pytest.raises(ValueError, match="p must be"): forecast_worst(bad, 10**6)
    with pytest.raises(ValueError, match="at least the 1000"): forecast_worst(p[:1000], 10)


# Bad input

BAD = """
import numpy as np
from probunlearn.bounds import binary_bound, mean_bound
from probunlearn.sequential import *
from probunlearn.questions import *
from probunlearn.planning import *
from probunlearn.metrics import *
x = np.linspace(0, 1, 9)
bound = binary_bound(0, 9)
calls = {
    "leak_at must lie in (0, 1], got 100": lambda: Claim(.1, leak_at=100),
    "(0, 1], got nan": lambda: Claim(.1, leak_at=np.nan),
    "below must": lambda: Claim(1),
    "between 0 and 1, got 7": lambda: RateSequence(7),
    "'two-sided', got 'both'": lambda: MeanSequence(side="both"),
    "use MeanSequence": lambda: RateSequence().add(x),
    "new ones of 3": lambda: MeanSequence().add(np.zeros((2, 4))).add(np.zeros((3, 4))),
    "new ones (3,)": lambda: RateSequence().add(np.zeros((2, 4))).add(np.zeros((3, 4))),
    "got 2 rows": lambda: certify(Claim(.1), [x, x]),
    "batch must be a whole number >= 1, got 0": lambda: sample_until(lambda a, b: x, Claim(.1), batch=0),
    "budget must be a whole number >= 1, got 0.5": lambda: sample_until(lambda a, b: x, Claim(.1), budget=.5),
    "must return 256 scores": lambda: sample_until(lambda a, b: x, Claim(.1)),
    "increasing": lambda: plan_looks((9, 5)),
    "a look must be a whole": lambda: plan_looks((9.5, 12)),
    "leaks must be 0 or 1": lambda: plan_looks((5,), .5).verdict(x),
    "looks must be a whole number >= 1, got -2": lambda: looked(bound, -2),
    "models must be a whole number >= 1, got 1.5": lambda: looked(bound, 1, 1.5),
    "after 100 looks at 1 model:": lambda: looked(bound, 100),
    "at least one count, got none": lambda: worst_question([], 9),
    "leaks must be whole numbers in 0..n, got [12]": lambda: certified([12], 9),
    "tau must": lambda: certified([1], 9, 2),
    "got none": lambda: certified([], 9),
    "one count per question": lambda: certified(3, 9),
    "same for every question": lambda: pooled_rate([1, 2], [4, 5]),
    "'kl', got 'bj'": lambda: pooled_mean(x, method="bj"),
    "got nan": lambda: population_mean([[np.nan]]),
    "same questions": lambda: difference_bound(x, x[:3]),
    "n must be a whole number >= 1, got 0": lambda: most_leaks(0),
    ">= 1, got 2.5": lambda: most_leaks(2.5),
    "[0, 1], got 1.5": lambda: chance_to_certify(1.5, 9),
    "questions must be a whole number >= 1, got 0": lambda: RunPlan(9, 0),
    "got -1": lambda: RunPlan(-1),
    "p must be": lambda: forecast_worst([.1], 9),
    "above 0, got 0": lambda: forecast_worst(np.zeros(200), 900),
    "k must be at least 0, got -1": lambda: ed_score(x, -1),
    "between 1 and the 9": lambda: leak_at_k(x, 10),
    ">= 1, got 0 ": lambda: leak_at_k_bound(x, 0),
    "p must hold probabilities in [0, 1], got 2": lambda: extraction_curve(2, 1),
    "got nan ": lambda: extraction_curve(np.nan, 1),
    "uses must be at least 0, got -1": lambda: extraction_curve(.1, -1),
    "uses must be a whole number >= 1, got 0": lambda: in_uses(bound, 0),
    "got 'the mean score'": lambda: in_uses(mean_bound(x), 5),
    "probabilities must": lambda: seen_mass_bounds([2], [1]),
    "at least one answer": lambda: diversity([]),
    "alpha must": lambda: dataset_claims(x, alpha=2),
    "leak_at must": lambda: leakage([x], leak_at=2),
}
"""

@pytest.mark.parametrize("flags", [[], ["-O"]])
def test_bad_input_is_refused_by_name(flags): assert refused(BAD, *flags) == ""


def test_missing_draws_widen_population_and_difference_bounds():
    x = np.random.default_rng(0).random((200, 16)) * .5
    y, holes = x / 2, x.copy()
    holes[:, 3] = np.nan
    most, least = np.nan_to_num(holes, nan=1), np.nan_to_num(holes, nan=0)
    low, high = population_mean(holes, .01, "two-sided", missing="worst").value
    assert high == population_mean(most, .01, "two-sided").value[1]
    assert low == population_mean(least, .01, "two-sided").value[0]
    wide, narrow = difference_bound(holes, y, .01, missing="worst").value, difference_bound(x, y, .01).value
    assert (wide[:, 0] <= narrow[:, 0]).all() and (wide[:, 1] >= narrow[:, 1]).all()
    for bound in (population_mean, lambda z: difference_bound(z, y)):
        with pytest.raises(ValueError, match="nan"): bound(holes)


# Self-BLEU and self-ROUGE, against nltk and against all pairs

WORDS = "the a town sea born Lisbon Rome writes writing wrote".split()


def answers(rng, n, repeats=True):
    "n answers of up to nine words, some of them repeated."
    first = [" ".join(rng.choice(WORDS, rng.integers(1, 10))) for _ in range(n)]
    return list(rng.choice(first, n)) if repeats else first


def test_self_bleu_is_nltks_bleu_against_all_others():
    rng, smooth = np.random.default_rng(0), SmoothingFunction().method1
    for case in range(60):
        texts = answers(rng, rng.integers(2, 12), repeats=case % 2)
        words = [t.lower().split() for t in texts]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = [sentence_bleu(words[:i] + words[i + 1:], own, smoothing_function=smooth)
                      for i, own in enumerate(words)]
        assert self_bleu(texts) == pytest.approx(np.mean(theirs), abs=1e-12)


def test_self_rouge_is_the_mean_over_all_pairs_of_draws():
    rng = np.random.default_rng(1)
    for case in range(60):
        texts = answers(rng, rng.integers(2, 12), repeats=case % 2)
        pairs = [rouge_l(a, b).f1 for a, b in itertools.permutations(texts, 2)]
        assert self_rouge(texts) == pytest.approx(np.mean(pairs), abs=1e-12)


def test_silence_and_repetition_are_not_variety():
    for measure in self_bleu, self_rouge:
        assert measure([""] * 5) == measure(["one two three four"] * 5) == 1
        assert measure(["alpha", "beta", "gamma"]) == 0
        with pytest.raises(ValueError, match="at least two, got 1"): measure(["alone"])


def test_diversity_reports_them_when_asked():
    texts = ["a b c", "a b d", "a b c"]
    plain, full = diversity(texts), diversity(texts, pairs=True)
    assert {k: full[k] for k in plain} == plain and set(full) - set(plain) == {"self_bleu", "self_rouge"}
    assert full["self_bleu"] == self_bleu(texts) and full["self_rouge"] == self_rouge(texts)
    alone = diversity(["a b"], pairs=True)
    assert np.isnan([alone["self_bleu"], alone["self_rouge"]]).all()


# The worst question

def too_low(p, upper, n):
    "Exact chance that the largest of all bounds is below the largest probability: counts are independent."
    return np.prod([stats.binom.pmf(np.flatnonzero(upper < max(p)), n, q).sum() for q in p])


SETS = {"all equal": lambda p: [p] * 6, "one bad": lambda p: [p] + [0] * 5, "half bad": lambda p: [p] * 3 + [0] * 3,
        "graded": lambda p: p * np.linspace(0, 1, 6)}


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("n, alpha", [(5, .2), (32, .05), (64, .01)])
def test_the_largest_leak_probability_needs_no_bonferroni(name, n, alpha):
    rates = np.r_[np.linspace(.002, .998, 150), [float(binary_bound(s, n, alpha)) + 1e-12 for s in range(n)]]
    upper = np.array([float(worst_question([s], n, alpha)) for s in range(n + 1)])
    chances = [too_low(SETS[name](p), upper, n) for p in rates]
    assert max(chances) <= alpha * (1 + 1e-9)
    if name == "one bad": assert max(chances) > .99 * alpha                    # the level can't be raised


def test_the_two_claims_on_the_worst_question():
    counts = [0, 3, 1, 0]
    both = [worst_question(counts, 64, .05, method=m) for m in ("bonferroni", "intersection-union")]
    assert [float(b) for b in both] == [float(binary_bound(3, 64, a)) for a in (.05 / 4, .05)]
    assert both[0].scope == "jointly for 4 questions" and "without saying which" in both[1].scope
    assert str(worst_question(counts, 64, .05)) == str(both[1])                # what the sentence says, and no more
    assert float(worst_question(np.zeros(400), 1024)) == pytest.approx(1 - .01**(1 / 1024), rel=1e-12)     # .0045
    low = [worst_question(counts, 64, .05, "lower", method=m) for m in ("bonferroni", "intersection-union")]
    assert str(low[0]) == str(low[1]) and low[0].scope == "jointly for 4 questions"     # a lower end names its question
    late = worst_question(counts, 64, .05, anytime=True)
    assert float(late) == rate_ends(3, 64, .05, "upper") and late.sampling == "anytime"
    with pytest.raises(ValueError, match="got 'each'"): worst_question(counts, 64, method="each")


# Leaks to come

def most_in_fractions(leaks, n, uses, alpha):
    "The largest number of further leaks not refuted, in whole numbers; alpha is no tie."
    def chance(more):
        ways = sum(math.comb(n, i) * math.comb(uses, leaks + more - i) for i in range(leaks + 1) if leaks + more >= i)
        return Fraction(ways, math.comb(n + uses, leaks + more))
    return max(more for more in range(uses + 1) if chance(more) > alpha)


def test_leaks_to_come_against_whole_numbers():
    for n, uses, alpha in itertools.product((1, 2, 9, 24), (1, 3, 17), (.011, .13, .47)):
        found = leaks_to_come(np.arange(n + 1), n, uses, alpha).value
        assert found.tolist() == [most_in_fractions(s, n, uses, Fraction(alpha)) for s in range(n + 1)]


@pytest.mark.parametrize("n, uses", [(1024, 1000), (50, 10**6), (10**6, 50), (2**33, 2**33)])
def test_leaks_to_come_without_a_leak_in_closed_form(n, uses):
    "All further leaks lie among the uses: product of (uses - i) / (n + uses - i)."
    refuted, chance = 0, 1.
    while chance > .01: chance, refuted = chance * (uses - refuted) / (n + uses - refuted), refuted + 1
    assert int(leaks_to_come(0, n, uses).value) == refuted - 1
    if n == 1024: assert refuted - 1 == 6


def test_leaks_to_come_is_monotone_and_shaped():
    table = np.stack([leaks_to_come(np.arange(65), 64, uses, .05).value for uses in (1, 10, 100, 1000)])
    assert (np.diff(table, axis=0) >= 0).all() and (np.diff(table, axis=1) >= 0).all()
    assert (table <= [[1], [10], [100], [1000]]).all() and (table[:, -1] == [1, 10, 100, 1000]).all()
    strict, loose = (leaks_to_come([0, 5], 64, 100, alpha).value for alpha in (1e-6, .5))
    assert (strict > loose).all()
    unequal = leaks_to_come([3, 3, 3], [10, 100, 10], 50)
    assert unequal.value.tolist() == [int(leaks_to_come(3, n, 50).value) for n in (10, 100, 10)]
    said = str(leaks_to_come(0, 1024, 1000))
    assert said.startswith("The number of leaks in the next 1,000 uses is at most 6 with confidence 99 % (")
    for bad in (lambda: leaks_to_come(2, 1, 9), lambda: leaks_to_come(0, 9, 0), lambda: leaks_to_come(0, 9, 9, 0),
                lambda: leaks_to_come(np.zeros(9).view(StoppedScores), 9, 9)):
        with pytest.raises(ValueError): bad()


@pytest.mark.parametrize("n, uses, alpha", [(8, 5, .1), (30, 60, .05), (64, 8, .01)])
def test_leaks_to_come_misses_at_most_alpha_exactly(n, uses, alpha):
    most, counts = leaks_to_come(np.arange(n + 1), n, uses, alpha).value, np.arange(n + 1)
    rates = np.r_[np.linspace(.001, .999, 300), 1e-9, 1 - 1e-9]
    wrong = [stats.binom.pmf(counts, n, p) @ stats.binom.sf(most, uses, p) for p in rates]
    assert max(wrong) <= alpha * (1 + 1e-9) and max(wrong) > alpha / 3


def test_leaks_to_come_in_simulated_deployments():
    "Fails by chance in one of 10,000 runs at most, if the claim were wrong with probability alpha."
    rng, n, uses, alpha, runs = np.random.default_rng(0), 256, 500, .05, 20_000
    for p in 0, .002, .02, .3:
        seen, came = rng.binomial(n, p, runs), rng.binomial(uses, p, runs)
        assert (came > leaks_to_come(seen, n, uses, alpha).value).sum() <= stats.binom.isf(1e-4 / 4, runs, alpha), p
