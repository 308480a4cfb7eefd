"""Bounds against closed forms, other people's code, linear programmes, and simulation."""
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conbo import expectation_bounds, std_bounds, survival_bounds, variance_bounds
from scipy import special, stats
from scipy.optimize import linprog, minimize_scalar
from statsmodels.stats.proportion import proportion_confint

from probunlearn.bands import (FLOORS, cdf_ceiling, cdf_floor, crossing_chance, local_level, mean_ceiling, mean_floor,
                               spread_ceiling, variance_floor)
from probunlearn.bounds import (MEANS, Bound, StoppedScores, as_scores, binary_bound, conbo_alpha, confidence,
                                draws_needed, ed_bound, jointly, leaked, mean_bound, rounded, std_bound, survival_bound,
                                variance_bound)
from probunlearn.questions import (difference_bound, phrasings_bound, pooled_mean, pooled_rate, population_mean,
                                   worst_question)

BANDS = list(FLOORS)
MEAN_METHODS = [*MEANS, *BANDS]
SPREADS = ["betting", *BANDS]


# Laws of scores: name -> (draw, P(X <= t), mean, variance)
def discrete(values, chances):
    values, chances = np.array(values, float), np.array(chances, float)
    edges, mean = np.cumsum(chances), values @ chances
    def draw(rng, size):
        place = np.searchsorted(edges, rng.random(size), side="right")
        return values[np.minimum(place, len(values) - 1)]
    return draw, lambda t: chances[values <= t].sum(), mean, chances @ (values - mean)**2

ROUGE = np.r_[.6, np.full(19, .38 / 19), .02]
LAWS = {"point 0": discrete([0], [1]), "point 0.5": discrete([.5], [1]), "point 1": discrete([1], [1]),
        "Bernoulli(0.01)": discrete([0, 1], [.99, .01]), "Bernoulli(0.3)": discrete([0, 1], [.7, .3]),
        "Bernoulli(0.5)": discrete([0, 1], [.5, .5]),
        "uniform": (lambda rng, size: rng.random(size), lambda t: t, 1 / 2, 1 / 12),
        "Beta(2, 8)": (lambda rng, size: rng.beta(2, 8, size), lambda t: special.betainc(2, 8, t), 1 / 5, 16 / 1100),
        "ROUGE-like": discrete(np.arange(21) / 20, ROUGE),
        "half zeros": (lambda rng, size: np.where(rng.random(size) < .5, 0, rng.uniform(.7, 1, size)),
                       lambda t: .5 + .5 * np.clip((t - .7) / .3, 0, 1), .425, .365 - .425**2)}
RUNS, ALPHA = 2000, 0.05
ALLOWED = ALPHA + 3 * np.sqrt(ALPHA * (1 - ALPHA) / RUNS)  # a valid bound misses more often than this with chance 0.1 %
ROUNDING = 1e-9


def misses(bound, truth, side):
    if side == "two-sided":
        return ((bound.value[..., 0] > truth + ROUNDING) | (bound.value[..., 1] < truth - ROUNDING)).mean()
    return (bound.value < truth - ROUNDING if side == "upper" else bound.value > truth + ROUNDING).mean()


@pytest.mark.parametrize("n", [32, 128, pytest.param(1024, marks=pytest.mark.slow)])
@pytest.mark.parametrize("law", LAWS)
def test_coverage(law, n):
    draw, cdf, mean, variance = LAWS[law]
    x = draw(np.random.default_rng([n, len(law)]), (RUNS, n))
    for side in "upper", "lower":
        for method in MEAN_METHODS:
            assert misses(mean_bound(x, ALPHA, side, method=method), mean, side) <= ALLOWED, (method, side)
        for method in SPREADS:
            assert misses(std_bound(x, ALPHA, side, method=method), variance**.5, side) <= ALLOWED, (method, side)
        leaks, p = (x > .5).sum(1), 1 - cdf(.5)
        assert misses(binary_bound(leaks, n, ALPHA, side), p, side) <= ALLOWED
        assert misses(survival_bound(x, .5, ALPHA, side, method="clopper-pearson"), p, side) <= ALLOWED
    for method in SPREADS:
        assert misses(ed_bound(x, ALPHA, method=method), mean + 2 * variance**.5, "upper") <= ALLOWED, method


@pytest.mark.slow
@pytest.mark.parametrize("n", [32, 128, 1024])
@pytest.mark.parametrize("law", LAWS)
def test_two_sided_coverage(law, n):
    draw, cdf, mean, variance = LAWS[law]
    x = draw(np.random.default_rng([n, len(law), 2]), (RUNS, n))
    for method in MEAN_METHODS:
        assert misses(mean_bound(x, ALPHA, "two-sided", method=method), mean, "two-sided") <= ALLOWED, method
    for method in SPREADS:
        assert misses(variance_bound(x, ALPHA, "two-sided", method=method), variance, "two-sided") <= ALLOWED, method
    assert misses(binary_bound((x > .5).sum(1), n, ALPHA, "two-sided"), 1 - cdf(.5), "two-sided") <= ALLOWED

@pytest.mark.parametrize("n", [32, 128, pytest.param(1024, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", BANDS)
@pytest.mark.parametrize("law", LAWS)
def test_survival_band_covers_everywhere_at_once(law, method, n):
    draw, cdf, *_ = LAWS[law]
    at = np.linspace(0, 1, 41)
    truth = np.array([1 - cdf(t) for t in at])
    x = draw(np.random.default_rng(7), (RUNS, n))
    assert (survival_bound(x, at, ALPHA, method=method).value < truth - ROUNDING).any(1).mean() <= ALLOWED
    both = survival_bound(x, at, ALPHA, "two-sided", method=method).value
    assert ((both[..., 0] > truth + ROUNDING) | (both[..., 1] < truth - ROUNDING)).any(1).mean() <= ALLOWED


# Clopper-Pearson

def test_clopper_pearson_equals_statsmodels():
    for n in 1, 2, 7, 1024, 100_000:
        leaks = np.unique(np.linspace(0, n, 50).astype(int))
        for alpha in 1e-6, .01, .2, .7:
            low, high = proportion_confint(leaks, n, alpha=alpha, method="beta")
            assert np.abs(binary_bound(leaks, n, alpha, "two-sided").value - np.stack([low, high], -1)).max() <= 1e-12
            if alpha < .5:
                low, high = proportion_confint(leaks, n, alpha=2 * alpha, method="beta")
                assert np.abs(binary_bound(leaks, n, alpha).value - high).max() <= 1e-12
                assert np.abs(binary_bound(leaks, n, alpha, "lower").value - low).max() <= 1e-12

def test_clopper_pearson_coverage_is_exact():
    n, k = 50, np.arange(51)
    upper = binary_bound(k, n, .05).value
    for p in np.linspace(.001, .999, 500): assert stats.binom.pmf(k, n, p)[upper < p].sum() <= .05 + 1e-12

def test_tiny_alpha_is_finite_and_right():
    x, truth = np.zeros(1024), -np.expm1(np.log(1e-30) / 1024)
    assert float(binary_bound(0, 1024, 1e-30)) == pytest.approx(truth, rel=1e-12)
    for method in "kl", "hoeffding-bentkus":
        assert float(mean_bound(x, 1e-30, method=method)) == pytest.approx(truth, abs=2e-12)
    assert truth < float(survival_bound(x, .5, 1e-30, method="bj")) < float(mean_bound(x, 1e-30, method="dkw")) < 1
    assert .999e-30 <= crossing_chance(cdf_floor(1024, 1e-30)) <= 1e-30 * (1 + 1e-9)
    assert np.isfinite([float(f(x, 1e-30)) for f in (mean_bound, std_bound, ed_bound)]).all()

def test_zero_leaks_in_1024_draws():
    x = np.zeros(1024)
    assert float(binary_bound(0, 1024)) <= .0045
    assert float(mean_bound(x)) <= .0052 and float(mean_bound(x[:128])) <= .0400
    assert float(mean_bound(x, binary=True)) == float(binary_bound(0, 1024))
    assert float(survival_bound(x, .5, method="bj")) <= .0084

def test_draws_needed_is_smallest():
    for p in .3, .01, 1e-5:
        for leaks in 0, 1, 7:
            n = draws_needed(p, .01, leaks=leaks)
            assert float(binary_bound(leaks, n)) <= p + 1e-15
            assert n == leaks + 1 or float(binary_bound(leaks, n - 1)) > p
    assert draws_needed(.01, .01 / 400) == 1055


# Bands

@pytest.mark.parametrize("n, alpha", [(8, .05), (128, .01), (1024, .01), (1024, 1e-12)])
def test_crossing_chance_agrees_with_smirnov(n, alpha):
    floor = np.maximum(np.arange(n + 1) / n - special.smirnovi(n, alpha), 1e-300)
    floor[0] = 0
    assert crossing_chance(floor) == pytest.approx(alpha, rel=1e-9)

@pytest.mark.parametrize("n", [1, 2, 3, 10, 300, 5000])
@pytest.mark.parametrize("alpha", [1e-20, 1e-3, .05, .5, .95])
def test_berk_jones_spends_alpha_and_never_more(n, alpha):
    assert .9989 * alpha <= crossing_chance(cdf_floor(n, alpha)) <= alpha * (1 + 1e-9)
    assert alpha / n * (1 - 1e-2) <= local_level(n, alpha) <= alpha * (1 + 1e-12)

def test_bands_of_long_runs():
    rng, n = np.random.default_rng(0), 30_000
    u = np.sort(rng.random((300, n)), 1)
    for method in BANDS: assert (u < cdf_floor(n, .05, method)[1:]).any(1).mean() <= .05 + 3 * np.sqrt(.05 * .95 / 300)
    assert 1 - cdf_floor(n, .01)[-1] < .0006 < 1 - cdf_floor(n, .01, "dkw")[-1]

def fits(x, band, extra=()): # support points and linear constraints of all distributions inside the band
    points = np.unique(np.r_[0, x, 1, extra])
    seen = np.searchsorted(x, points, side="right")
    below = np.tril(np.ones((len(points), len(points))))
    return points, np.r_[-below, below], np.r_[-band[0][seen], band[1][seen]]

def optimum(objective, matrix, limits, points, mean=None): # largest expected objective
    equal = [np.ones(len(points))] + ([points] if mean is not None else [])
    total = [1.0] + ([mean] if mean is not None else [])
    found = linprog(-objective, matrix, limits + 1e-13, equal, total, method="highs")
    return -found.fun if found.success else -np.inf

@pytest.mark.parametrize("cases", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_exact_optima_agree_with_linear_programmes(cases):
    rng, search = np.random.default_rng(cases), dict(method="bounded", options=dict(xatol=1e-9))
    for case in range(cases):
        n, alpha, method = int(rng.integers(1, 9)), rng.choice([.02, .1, .5]), BANDS[case % 3]
        x = np.sort([rng.random(n), rng.integers(0, 4, n) / 3, rng.choice([0, .5, 1], n)][case % 3 if case % 2 else 1])
        band = cdf_floor(n, alpha, method), cdf_ceiling(n, rng.choice([alpha, alpha / 2]), method)
        k, row = rng.uniform(.2, 5), x[None]
        points, matrix, limits = fits(x, band, rng.random(3))
        low, high = float(mean_floor(row, band[1])[0]), float(mean_ceiling(row, band[0])[0])
        assert high == pytest.approx(optimum(points, matrix, limits, points), abs=1e-6)
        assert low == pytest.approx(-optimum(-points, matrix, limits, points), abs=1e-6)
        variance_at = lambda m: optimum(points**2, matrix, limits, points, m) - m * m
        both = lambda m: -(m + k * np.sqrt(max(variance_at(m), 0)))
        mean, variance = (float(v[0]) for v in spread_ceiling(row, row, *band, k))
        best = -minimize_scalar(both, bounds=(low, high), **search).fun
        assert mean + k * variance**.5 == pytest.approx(best, abs=1e-6)
        largest = -minimize_scalar(lambda m: -variance_at(m), bounds=(low, high), **search).fun
        assert float(spread_ceiling(row, row, *band)[1][0]) == pytest.approx(largest, abs=1e-6)
        def around(c):
            points, matrix, limits = fits(x, band, [c])
            return -optimum(-(points - c)**2, matrix, limits, points)
        smallest = minimize_scalar(around, bounds=(0, 1), **search).fun
        assert float(variance_floor(row, *band)[0]) == pytest.approx(smallest, abs=1e-6)

def test_constant_scores_have_closed_forms():
    e = np.sqrt(np.log(2 / .01) / 2048)
    for c in 0, .25, .5, 1:
        value = float(variance_bound(np.full(1024, c), method="dkw"))
        assert value == pytest.approx(e * (c * c + (1 - c)**2) - e * e * (1 - 2 * c)**2, abs=1e-12)
        assert float(variance_bound(np.full(1024, c), side="lower", method="dkw")) == pytest.approx(0, abs=1e-12)
    # one draw: the largest possible value
    assert float(ed_bound([0.5], alpha=.01)) == pytest.approx((1 + 5**.5) / 2, abs=1e-3)

def test_more_draws_less_alpha_larger_scores():
    x = np.random.default_rng(0).beta(2, 8, 512)
    for f in mean_bound, std_bound, ed_bound:
        assert float(f(np.tile(x, 4))) < float(f(x))
        assert float(f(x, .05)) < float(f(x, .01)) < float(f(x, 1e-6))
    for method in MEAN_METHODS:
        if method != "maurer-pontil":
            assert float(mean_bound(x, method=method)) <= float(mean_bound(np.minimum(x + .1, 1), method=method))

def test_band_bounds_ignore_order_and_rows_do_not_mix():
    x = np.random.default_rng(0).beta(2, 8, (5, 300)).round(2)
    mixed = np.random.default_rng(1).permuted(x, axis=1)
    means = [lambda x, m=m: mean_bound(x, method=m) for m in BANDS]
    for f in [*means, std_bound, ed_bound, lambda x: survival_bound(x, .2, method="bj")]:
        assert (f(x).value == f(mixed).value).all()
        assert f(x).value == pytest.approx([float(f(row)) for row in x], abs=1e-15)


# conbo 0.1.1, where it is valid

@pytest.mark.parametrize("n", [16, 128, 600])
def test_never_looser_than_conbo_and_within_its_grid(n):
    rng = np.random.default_rng(n)
    # no mass at 0; three sizes: 1,002 samples
    x = np.clip(rng.beta(*rng.uniform(.3, 6, (2, 334, 1)), (334, n)), 1e-6, 1)
    x[::3] = np.ceil(x[::3] * 10) / 10                                            # ties and atoms
    low, high = expectation_bounds(x, alpha=conbo_alpha(.01, "mean"))[1:]
    ours = mean_bound(x, .01, method="dkw").value
    assert (ours <= high + 1e-12).all() and (high - ours <= 1 / 99 + 1e-12).all()
    assert (mean_bound(x, .01, "lower", method="dkw").value >= low - 1e-12).all()
    theirs = variance_bounds(x, alpha=conbo_alpha(.01, "variance"))[2]
    assert (variance_bound(x, .01, method="dkw").value <= theirs + 1e-12).all()
    both = expectation_bounds(x, alpha=.01)[2] + 2 * std_bounds(x, alpha=.01)[2]
    assert (ed_bound(x, .01, method="dkw").value <= both + 1e-12).all()
    at = np.array([.1, .25, .8])
    theirs = survival_bounds(x, at, alpha=conbo_alpha(.01, "survival"))[2]
    assert survival_bound(x, at, .01).value == pytest.approx(theirs, abs=1e-12)

def test_standard_deviation_of_coins():
    coins = (np.random.default_rng(0).random((300, 1024)) < .5) * 1.0
    assert (std_bounds(coins, alpha=.01)[2] >= .5).sum() == 0  # the fault this package set out to mend
    for method in "dkw", "bj": assert (std_bound(coins, .01, method=method).value >= .5 - ROUNDING).mean() >= .98
    tilted = (np.random.default_rng(1).random((300, 1024)) < .3) * 1.0
    for method in "dkw", "bj": assert std_bound(tilted, .01, method=method).value.mean() <= .48


# Input and output

def test_shapes_and_number_types():
    import torch
    x = np.random.default_rng(0).random((3, 64)).astype(np.float16)
    functions = [*(lambda x, m=m: mean_bound(x, method=m) for m in MEAN_METHODS), std_bound, ed_bound]
    for f in functions:
        want = f(x.astype(np.float64)).value
        assert want.shape == (3,) and f(x[:1]).value.shape == (1,) and np.shape(f(x[0]).value) == ()
        for same in x, x.astype(np.float32), x.tolist(), torch.tensor(x), torch.tensor(x).float():
            assert (f(same).value == want).all()
        assert (f(x > .5).value == f((x > .5).astype(float)).value).all()
        assert (f((x > .5).astype(np.uint8)).value == f((x > .5).astype(float)).value).all()
    assert survival_bound(x, [.1, .2]).value.shape == (3, 2)
    assert survival_bound(x[0], [.1, .2], side="two-sided").value.shape == (2, 2)
    assert mean_bound(x, side="two-sided").value.shape == (3, 2)
    assert binary_bound([1, 2], 5).value.shape == (2,) and np.ndim(binary_bound(1, 5).value) == 0

def test_thresholds_are_compared_in_the_scores_own_type():
    x = np.array([.1, .1, .3], np.float32)
    for scores, above in (x, 1), (x.astype(float), 3):
        bound = survival_bound(scores, .1, side="lower", method="clopper-pearson")
        assert float(bound) == float(binary_bound(above, 3, side="lower"))

def test_missing_draws_count_as_the_worst_case():
    x = np.r_[np.full(5, np.nan), np.random.default_rng(0).random(95)]
    ones, zeros = np.nan_to_num(x, nan=1), np.nan_to_num(x, nan=0)
    for method in MEAN_METHODS:
        assert float(mean_bound(x, method=method, missing="worst")) == float(mean_bound(ones, method=method))
        lower = mean_bound(x, side="lower", method=method, missing="worst")
        assert float(lower) == float(mean_bound(zeros, side="lower", method=method))
    assert float(survival_bound(x, .5, method="bj", missing="worst")) == float(survival_bound(ones, .5, method="bj"))
    for fill in 0, .5, 1:
        filled = np.nan_to_num(x, nan=fill)
        for f in std_bound, ed_bound: assert float(f(x, missing="worst")) >= float(f(filled)) - 1e-12

BAD = """
import numpy as np
from probunlearn.bounds import *
from probunlearn.bounds import StoppedScores
x = np.linspace(0, 1, 9)
calls = {
    "[0, 1], got nan": lambda: mean_bound([0.1, np.nan]),
    "got inf": lambda: std_bound([0.1, np.inf]),
    "got 1.5": lambda: ed_bound([[0.1], [1.5]]),
    "row 1, column 0": lambda: ed_bound([[0.1], [1.5]]),
    "got -0.1": lambda: survival_bound([-.1], .5),
    "got (0,)": lambda: mean_bound([]),
    "got (1, 1, 1)": lambda: mean_bound([[[.5]]]),
    "got 0": lambda: mean_bound(x, 0),
    "got 1": lambda: std_bound(x, 1),
    "got -1": lambda: ed_bound(x, -1),
    "got nan": lambda: survival_bound(x, .5, np.nan),
    "alpha <= 1/2, got 0.6": lambda: mean_bound(x, .6, method="dkw"),
    "got 'both'": lambda: mean_bound(x, side="both"),
    "'upper', 'lower', 'two-sided'": lambda: std_bound(x, side="both"),
    "got 'wald'": lambda: binary_bound(0, 5, method="wald"),
    "'betting', 'constant-stakes'": lambda: mean_bound(x, method="normal"),
    "'betting', 'dkw', 'smirnov', 'bj'": lambda: std_bound(x, method="kl"),
    "one threshold": lambda: survival_bound(x, [.1, .2], method="clopper-pearson"),
    "at least 1, got 0": lambda: binary_bound(0, 0),
    "whole numbers in 0..n, got 6": lambda: binary_bound(6, 5),
    "got 0.5": lambda: binary_bound(.5, 5),
    "got nan ": lambda: binary_bound(np.nan, 5),
    "above 0, got 0": lambda: ed_bound(x, k=0),
    "between 0 and 1, got 2": lambda: draws_needed(2),
    "got 'mode'": lambda: conbo_alpha(.1, "mode"),
    "got [0.1 0.2]": lambda: mean_bound(x, np.array([.1, .2])),
    "real numbers": lambda: mean_bound([.1, .2j]),
    "at must hold finite thresholds, got nan": lambda: survival_bound(x, np.nan),
    "leak_at must lie in (0, 1], got 100": lambda: leaked(x, 100),
    "(0, 1], got 0": lambda: leaked(x, 0),
    "(0, 1], got nan": lambda: leaked(x, np.nan),
    "leaks must be a whole number >= 0, got -1": lambda: draws_needed(.1, leaks=-1),
    ">= 0, got 0.5": lambda: draws_needed(.1, leaks=.5),
    "got none": lambda: binary_bound([], 5),
    "got shape (0,)": lambda: jointly(mean_bound, []),
    "got shape ()": lambda: jointly(binary_bound, 3, n=5),
    "n was not fixed": lambda: mean_bound(x.view(StoppedScores)),
    "'error' or 'worst'": lambda: mean_bound(x, missing="drop"),
    "needs every score": lambda: std_bound([.1, np.nan], side="lower", missing="worst"),
}
"""
ALL_REFUSED = """
for words, call in calls.items():
    try: call()
    except ValueError as error:
        if words.strip() not in str(error): raise SystemExit(f"{words!r} not in {error}")
    else: raise SystemExit(f"no ValueError for {words!r}")
"""

def refused(calls, *flags): # runs the calls in an interpreter of their own and returns what is wrong
    return subprocess.run([sys.executable, *flags, "-c", calls + ALL_REFUSED], capture_output=True, text=True).stderr

@pytest.mark.parametrize("flags", [[], ["-O"]])
def test_bad_input_is_refused_by_name(flags): assert refused(BAD, *flags) == ""

def test_import_is_light():
    heavy = "torch", "pandas", "seaborn", "scipy.stats", "fastcore"
    code = f"import sys, probunlearn.bounds, probunlearn.metrics; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"

def test_claims_say_what_they_rest_on():
    said = str(mean_bound(np.zeros(1024)))
    for part in "mean score", "at most 0.00501", "99 %", "α = 0.01", "n = 1,024", "fixed-n", "per question", "betting":
        assert part in said
    many = jointly(mean_bound, np.zeros((3, 8)))
    assert "jointly for 3 questions" in str(many) and many.alpha == .01 and "<table>" in many._repr_html_()
    assert (many.value == mean_bound(np.zeros((3, 8)), .01 / 3).value).all()
    assert "&lt;b&gt;" in Bound(.5, .01, "upper", "<b>", 8)._repr_html_()
    with pytest.raises(TypeError): float(many)

def test_printed_bounds_never_promise_more_than_was_proved():
    for leaks in range(100):
        upper, (low, high) = float(binary_bound(leaks, 1024)), binary_bound(leaks, 1024, side="two-sided").value
        assert upper <= float(str(binary_bound(leaks, 1024)).split("at most ")[1].split()[0]) <= upper * 1.001
        words = str(binary_bound(leaks, 1024, side="two-sided")).split("between ")[1].split()
        assert float(words[0]) <= low and high <= float(words[2])
        lower = binary_bound(leaks, 1024, side="lower")
        assert float(str(lower).split("at least ")[1].split()[0]) <= float(lower)
    table = binary_bound(np.arange(100), 1024, side="two-sided")
    texts = table._repr_html_().replace("</td>", "<td>").split("<td>")[3::4]
    cells = [tuple(map(float, text.split(", "))) for text in texts]
    assert len(cells) == 100 and all(a <= low and high <= b for (a, b), (low, high) in zip(cells, table.value))
    rng = np.random.default_rng(0)
    for value in np.r_[rng.random(500), -rng.random(500), rng.random(500) * 1e-12, 0, .1, .3, 1]:
        for digits in 2, 3, 4:
            assert float(rounded(value, "lower", digits)) <= value <= float(rounded(value, "upper", digits))
    # no digit without need
    assert [rounded(v) for v in (.1, .3, .0045, 0, 1, -.25)] == ["0.1", "0.3", "0.0045", "0", "1", "-0.25"]

def test_confidence_is_never_rounded_up():
    for alpha, percent in {.05: "95", .01: "99", .07: "93", .001: "99.9", 1e-4: "99.99"}.items():
        assert confidence(alpha) == f"confidence {percent} %"
    assert confidence(.01 / 3) == "confidence 99.6666 %" and confidence(0) == "certainty"
    for alpha in 1e-5, 1e-30: assert confidence(alpha) == f"confidence 1 - {alpha:g}"
    assert "confidence 1 - 1e-05" in str(binary_bound(0, 9, 1e-5)) and "100 %" not in str(binary_bound(0, 9, 1e-5))

def test_a_stopped_run_is_never_reported_as_fixed():
    x = np.zeros(600).view(StoppedScores)
    x[:3] = 1
    again = np.r_[x, np.zeros(424)]                                                    # extended, too
    for f in (mean_bound, std_bound, variance_bound, ed_bound, lambda x: survival_bound(x, .5),
              lambda x: jointly(mean_bound, x), lambda x: mean_bound(x, missing="worst")):
        for stopped in x, again, x[None], [x, x], np.stack([x, x]), x > .5:
            with pytest.raises(ValueError, match="fresh seed"): f(stopped)
    with pytest.raises(ValueError, match="fresh seed"): binary_bound(leaked(x, .5).sum(), 600)
    with pytest.raises(ValueError, match="fresh seed"): binary_bound(leaked(x[None], .5).sum(1), 600)
    assert type(as_scores(x, anytime=True)) is np.ndarray and float(mean_bound(np.asarray(x))) > 0

def test_claims_without_a_decoding_say_so():
    assert "decoding not stated" in str(binary_bound(0, 9))
    assert "T = 1" in str(Bound(.5, .01, "upper", "x", 8, decoding="T = 1"))
    assert "not stated" not in str(Bound(.5, .01, "upper", "x", 8, decoding="T = 1"))

@pytest.mark.slow
def test_benchmark_runs():
    script = Path(__file__).parents[1] / "benchmarks" / "bounds.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 0 and "ratio" in done.stdout, done.stderr


def test_tensors_of_every_kind():
    torch = pytest.importorskip("torch")
    x = torch.tensor([0., .25, 1.])
    want = float(mean_bound(x.numpy()))
    assert float(mean_bound(x.bfloat16())) == float(mean_bound(x.requires_grad_())) == want


SEVERAL = np.random.default_rng(0).random((5, 64))

def test_several_claims_do_not_read_like_an_interval():
    for side in "upper", "lower", "two-sided":
        said = str(mean_bound(SEVERAL, side=side))
        assert "a bound from 0." in said and "over 5 questions with" in said and "–" not in said
    assert "is at most 0.06943 over 4 questions with" in str(binary_bound([0] * 4, 64))
    assert "n = 64 to 128," in str(binary_bound([0, 0], [64, 128]))

def test_thresholds_are_named():
    said = str(survival_bound(SEVERAL, [.25, .5, .75], method="bj"))
    assert said.startswith("P(score > x), at every x at once, here above 0.25, 0.5, 0.75, is at most")
    assert "over 5 questions and 3 thresholds with" in said
    assert "over 3 thresholds with" in str(survival_bound(SEVERAL[0], [.25, .5, .75], side="two-sided"))
    for method in BANDS + ["clopper-pearson"]: assert "every x" not in str(survival_bound(SEVERAL, .5, method=method))

@pytest.mark.parametrize("bound, options", [
    (population_mean, {}), (pooled_mean, {}), (phrasings_bound, dict(phrasings="listed")),
    (phrasings_bound, dict(phrasings="sampled")), (difference_bound, dict(b=SEVERAL, pooled=True))])
def test_jointly_refuses_what_is_no_claim_per_question(bound, options):
    with pytest.raises(ValueError, match="needs a bound for each question, got a claim "):
        jointly(bound, SEVERAL, **options)
    for pooled in pooled_rate, worst_question:
        with pytest.raises(ValueError, match="got a claim "): jointly(pooled, [0, 1, 2], n=64)
    assert "jointly for 5 questions" in str(jointly(difference_bound, SEVERAL, b=SEVERAL))

@pytest.mark.parametrize("method", [*BANDS, "clopper-pearson"])
def test_no_score_is_above_one(method):
    x = np.r_[np.ones(40), np.nan]
    for side in "upper", "lower":
        assert float(survival_bound(x, 1., side=side, method=method, missing="worst")) == 0
        assert float(survival_bound(x, -.01, side=side, method=method, missing="worst")) == 1
    assert float(survival_bound(x, .99, method=method, missing="worst")) > 0

@pytest.mark.parametrize("leaks", [0, 1, 7])
def test_draws_needed_for_tiny_rates(leaks):
    for p in .3, 1e-3, 1e-9, 1e-12:
        n = draws_needed(p, leaks=leaks)
        assert special.pdtr(leaks, n * p) == pytest.approx(.01, rel=.02) or p > .01         # Poisson's law
        assert special.betaincc(leaks + 1, n - leaks, p) <= .01 < special.betaincc(leaks + 1, n - 1 - leaks, p)
    for p in .3, .01, 1e-4:
        n = draws_needed(p, leaks=leaks)
        assert stats.binom.cdf(leaks, n, p) <= .01 < stats.binom.cdf(leaks, n - 1, p)

def test_stopped_scores_stay_stopped():
    x = np.zeros(600).view(StoppedScores)
    for same in list(x), np.copy(x), np.where(x > .5, 1, 0), x.copy(), x.reshape(2, 300):
        with pytest.raises(ValueError, match="fresh seed"): mean_bound(same)
    with pytest.raises(ValueError, match="fresh seed"): binary_bound(sum(x), 600)
    with pytest.raises(ValueError, match="fresh seed"): binary_bound(int(leaked(x).sum()), 600)
    assert f"{x.mean():.2f}" == "0.00" and float(x.mean()) == 0

def test_a_masked_score_is_missing():
    x = np.ma.masked_greater([0, .25, .5, 1.], .4)
    gaps = [0, .25, np.nan, np.nan]
    calls = (mean_bound, std_bound, ed_bound, lambda x, **how: survival_bound(x, .3, **how),
             lambda x, **how: pooled_mean([x, x], **how), lambda x, **how: phrasings_bound([x, x], "listed", **how))
    for bound in calls:
        assert float(bound(x, missing="worst")) == float(bound(gaps, missing="worst"))
        with pytest.raises(ValueError, match="got nan in row 0, column 2"): bound(x)
    assert list(leaked(x)) == [False, False, True, True] and type(leaked(x)) is np.ndarray
    with pytest.raises(ValueError, match="whole numbers in 0..n"): binary_bound(np.ma.masked_equal([1, 2], 2), 9)

def test_tensors_of_sixteen_bits_are_compared_in_their_own_type():
    torch = pytest.importorskip("torch")
    for kind in torch.bfloat16, torch.float16, torch.float32, torch.float64:
        x = torch.tensor([.1, .3, .8], dtype=kind)
        assert [list(leaked(x, at)) for at in (.1, .3, .8)] == [[True] * 3, [False, True, True], [False, False, True]]
        least = survival_bound(x.requires_grad_(), .1, side="lower", method="clopper-pearson")
        assert float(least) == float(binary_bound(2, 3, side="lower"))
    assert list(leaked(torch.tensor([0, 1]))) == list(leaked(torch.tensor([False, True]))) == [False, True]
