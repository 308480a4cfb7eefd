"""Claims about a set of questions, from both sides: the worst, the average, a count, a share of a population."""
import math

import numpy as np
import pytest
from scipy import stats

from probunlearn.bounds import binary_bound
from probunlearn.questions import (certified, difference_bound, few_chance, many_chance, pooled_rate, step_up,
                                   tolerance_bound, worst_question)

RUNS = 400


def allowed(alpha, runs=RUNS): return alpha + 3 * math.sqrt(alpha * (1 - alpha) / runs)


SETS = {"all equal": np.full(20, .1), "one bad": np.r_[.1, np.zeros(19)], "half bad": np.repeat([.1, 0], 10)}


@pytest.mark.parametrize("rates", SETS.values(), ids=SETS)
@pytest.mark.parametrize("anytime", [False, True])
def test_the_worst_leaks_at_least_so_much(rates, anytime):
    dice = np.random.default_rng(0)
    runs = RUNS // (4 if anytime else 1)
    lows = [float(worst_question(dice.binomial(60, rates), 60, .1, "lower", anytime=anytime)) for _ in range(runs)]
    assert np.mean(np.array(lows) > .1) <= allowed(.1, runs)


@pytest.mark.parametrize("method, parts", [("bonferroni", 5), ("intersection-union", 1)])
def test_ends_of_the_worst_are_the_largest_of_single_ends(method, parts):
    leaks = [0, 3, 1, 9, 9]
    low, high = worst_question(leaks, 50, .02, "two-sided", method=method).value
    assert low == float(binary_bound(9, 50, .01 / 5, "lower")) and high == float(binary_bound(9, 50, .01 / parts))


@pytest.mark.parametrize("rates", SETS.values(), ids=SETS)
def test_questions_that_leak_just_so_much_are_seldom_called_more(rates):
    dice = np.random.default_rng(1)
    wrong = [certified(dice.binomial(60, rates), 60, .1, .1, "lower").any() for _ in range(RUNS)]
    assert np.mean(wrong) <= allowed(.1)


@pytest.mark.parametrize("side", ["upper", "lower"])
@pytest.mark.parametrize("p", [(.3, .3, .3), (.3, .3, 0), (.3, .3, 1), (.3, 0, 1)], ids=str)
def test_the_chance_of_a_wrong_list_is_at_most_alpha(p, side):
    p = np.array(p)
    for n, alpha in (6, .3), (11, .2), (14, .1):                    # without simulation: all counts of three questions
        counts = np.indices([n + 1] * 3).reshape(3, -1).T
        mass = stats.binom.pmf(counts, n, p).prod(1)
        chances = few_chance(counts, n, .3) if side == "upper" else many_chance(counts, n, .3)
        wrong = p >= .3 if side == "upper" else p <= .3
        listed = np.array([step_up(row, alpha) for row in chances])
        assert mass @ listed[:, wrong].any(1) <= alpha * (1 + 1e-9)


@pytest.mark.parametrize("rates", SETS.values(), ids=SETS)
def test_a_list_that_is_watched_is_seldom_ever_wrong(rates):
    dice, n = np.random.default_rng(4), np.arange(20, 201, 20)
    def ever_wrong():
        counts = dice.binomial(20, rates, (len(n), 20)).cumsum(0)
        return any(certified(row, m, .1, .1, anytime=True)[rates >= .1].any() for row, m in zip(counts, n))
    assert np.mean([ever_wrong() for _ in range(RUNS // 4)]) <= allowed(.1, RUNS // 4)


def test_more_leaks_certify_more():
    counts = [int(certified([0, s, 2 * s], 100, .05, side="lower").sum()) for s in range(51)]
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] == 2
    assert not (certified([0, 5, 50], 100, .05, side="lower") & certified([0, 5, 50], 100, .05)).any()
    assert certified([10], 3 * 10**9, .5).all()                     # beyond the whole numbers of C


@pytest.mark.parametrize("p", [np.full(12, .1), np.repeat([.5, 0], 6), np.r_[.9, np.zeros(11)]])
def test_the_average_is_covered_from_both_sides(p):
    dice = np.random.default_rng(2)
    ends = np.array([pooled_rate(dice.binomial(20, p), 20, .1, "two-sided").value for _ in range(RUNS)])
    assert ((ends[:, 0] > p.mean()) | (ends[:, 1] < p.mean())).mean() <= allowed(.1)


def test_ends_of_the_average_mirror_each_other():
    for s in (0, 1, 7, 99, 100):
        low, high = float(pooled_rate([s], 100, side="lower")), float(pooled_rate([100 - s], 100))
        assert low == pytest.approx(1 - high)
    lows = [float(pooled_rate([s, 0], 50, side="lower")) for s in range(51)]
    assert lows == sorted(lows) and lows[0] == 0


@pytest.mark.parametrize(
    "share, p, side", [(0.1, (0.1, 0), "upper"), (0.5, (0.1, 0.09), "upper"), (0.2, (0.6, 0.0999), "lower")]
)
def test_the_share_of_a_population_is_covered(share, p, side):
    dice = np.random.default_rng(3)
    def wrong():
        leaks = dice.binomial(80, np.where(dice.random(30) < share, *p))
        found = float(tolerance_bound(leaks, 80, .1, .1, side, beta=.05))
        return found < share if side == "upper" else found > share
    assert np.mean([wrong() for _ in range(RUNS)]) <= allowed(.1)


def test_a_clean_sample_bounds_the_share_in_closed_form():
    for questions in (10, 400):
        found = tolerance_bound(np.zeros(questions), 1024, alpha=.05, beta=.02)
        assert float(found) == pytest.approx((1 - .05**(1 / questions)) / .98) and found.n == questions
    assert "random sample" in found.scope and "0.01 or more" in str(found)
    shares = [float(tolerance_bound([1024] * k + [0] * (50 - k), 1024)) for k in range(51)]
    assert shares == sorted(shares) and shares[-1] == 1


@pytest.mark.parametrize("pooled", [False, True])
def test_two_equal_models_are_seldom_told_apart_at_any_look(pooled):
    def apart(seed):
        a, b = (np.random.default_rng(seed).random((2, 3, 200)) < .3) * 1.
        ends = [difference_bound(a[:, :n], b[:, :n], .2, pooled=pooled, anytime=True).value for n in (25, 50, 100, 200)]
        return not all(low <= 0 <= high for low, high in (np.atleast_2d(e)[0] for e in ends))
    assert np.mean([apart(seed) for seed in range(100)]) <= allowed(.2, 100)
