"""No bound with a fixed number of draws depends on the order in which a table holds its scores."""
import numpy as np
import pytest
from scipy import special

from test_bounds import ALLOWED, ALPHA, LAWS, MEAN_METHODS, SPREADS, misses
from probunlearn.bounds import FileScores, ed_bound, mean_bound, std_bound, variance_bound
from probunlearn.judged import prediction_powered
from probunlearn.means import betting, cautious_stake, coin_stake, constant_stakes, dealt, even_order, learner, log_most
from probunlearn.metrics import dataset_claims, leakage
from probunlearn.questions import difference_bound, phrasings_bound, pooled_mean, population_mean
from probunlearn.sequential import Claim, MeanSequence, RateSequence, certify, plan_looks
from probunlearn.tables import plain_table, scores_from_table


def blocked(x): return np.concatenate([part for part in np.array_split(np.sort(x, -1), 4, -1)][::-1], -1)
def odd_first(x): return np.concatenate([np.sort(x, -1)[..., 1::2], np.sort(x, -1)[..., ::2]], -1)

ORDERS = {"sorted": lambda x: np.sort(x, -1), "reversed": lambda x: np.sort(x, -1)[..., ::-1], "blocked": blocked,
          "odd first": odd_first}
FIXED_N = {
    **{method: lambda x, side, m=method: mean_bound(x, ALPHA, side, method=m) for method in MEAN_METHODS},
    **{f"std {method}": lambda x, side, m=method: std_bound(x, ALPHA, side, method=m) for method in SPREADS},
    **{f"ED {method}": lambda x, _, m=method: ed_bound(x, ALPHA, method=m) for method in SPREADS},
    "pooled": lambda x, side: pooled_mean(x, ALPHA, side),
    "pooled kl": lambda x, side: pooled_mean(x, ALPHA, side, method="kl"),
    "listed phrasings": lambda x, side: phrasings_bound(x, "listed", ALPHA, side),
    "apart": lambda x, side: difference_bound(x, x[::-1], ALPHA, side, paired=False),
    "apart, pooled": lambda x, side: difference_bound(x, x[::-1], ALPHA, side, paired=False, pooled=True),
}


@pytest.mark.parametrize("name", FIXED_N)
def test_a_bound_is_a_function_of_the_values(name):
    rng, bound = np.random.default_rng(0), FIXED_N[name]
    for x in rng.beta(2, 8, (3, 200)), (rng.random((3, 200)) < .02) * 1., rng.integers(0, 11, (3, 200)) / 10:
        for side in "upper", "lower":
            want = np.asarray(bound(x, side).value)
            for order in [*ORDERS.values(), lambda x: rng.permuted(x, axis=-1)]:
                assert (np.asarray(bound(order(x), side).value) == want).all(), (name, side)

def test_the_order_of_questions_is_none_either():
    rng = np.random.default_rng(1)
    x = rng.beta(2, 8, (12, 50)).round(1)
    mixed = x[rng.permutation(12)]
    assert float(pooled_mean(x)) == float(pooled_mean(mixed))
    assert float(population_mean(x)) == pytest.approx(float(population_mean(mixed)), abs=1e-12)
    pairs = rng.random((2, 80)).round(1)
    want = float(prediction_powered(x[0], *pairs, method="betting"))
    assert float(prediction_powered(np.sort(x[0]), *pairs[:, ::-1], method="betting")) == pytest.approx(want, abs=1e-12)

@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("law", ["Bernoulli(0.01)", "Bernoulli(0.3)", "Beta(2, 8)", "ROUGE-like", "half zeros"])
def test_a_file_in_any_order_is_covered(law, order):
    draw, _, mean, variance = LAWS[law]
    x = ORDERS[order](draw(np.random.default_rng(len(law)), (2000, 64)))
    for side in "upper", "lower":
        assert misses(mean_bound(x, ALPHA, side), mean, side) <= ALLOWED, side
        assert misses(std_bound(x, ALPHA, side), variance**.5, side) <= ALLOWED, side
    assert misses(ed_bound(x, ALPHA), mean + 2 * variance**.5, "upper") <= ALLOWED

def test_a_set_is_covered_and_the_order_of_its_draws_changes_nothing():
    rates, runs = np.array([0, .02, .3, .9])[:, None], 1000
    x = (np.random.default_rng(3).random((runs, 4, 60)) < rates) * 1.
    for side in "upper", "lower":
        found = np.array([float(pooled_mean(rows, ALPHA, side)) for rows in x])
        missed = (found < rates.mean() if side == "upper" else found > rates.mean()).mean()
        assert missed <= ALPHA + 3 * np.sqrt(ALPHA * (1 - ALPHA) / runs)
        for order in "sorted", "reversed", "blocked":
            again = [float(pooled_mean(ORDERS[order](rows), ALPHA, side)) for rows in x[:50]]
            assert again == pytest.approx(found[:50], abs=1e-12), order

def largest_miss(bound, n, alpha, low, high):   # exact, for scores that are `low` or `high`: (chance, count)
    count = np.arange(n) if n <= 128 else np.unique(np.r_[:60, np.linspace(60, n - 1, 40).astype(int), n - 30:n])
    x = np.where(np.arange(n) >= n - count[:, None], float(high), float(low))
    p = np.clip((bound(x, alpha) - low) / (high - low) + 1e-7, 0, 1)
    return max(np.where(p < 1, special.bdtr(count, n, np.minimum(p, 1 - 1e-12)), 0))

VALUES = [(0, 1), (0, .02), (0, .3), (0, .9), (.1, 1), (.5, 1), (.9, 1), (.45, .5), (.01, .99)]

def slow(*numbers): return [pytest.param(n, marks=pytest.mark.slow) for n in numbers]

@pytest.mark.parametrize("n", [1, 2, 5, 7, 11, 16, 33, 64, 128, *slow(100, 200, 256, 500, 512, 1000, 1024, 2048)])
def test_laws_on_two_values_miss_at_most_alpha_exactly(n):
    for low, high in VALUES if n <= 512 else VALUES[:2]:
        for alpha in .2, .05, .01, .001, 2.5e-5, 1e-6:
            for bound in betting, constant_stakes:
                assert largest_miss(bound, n, alpha, low, high) <= alpha * (1 + 1e-6), (low, high, alpha, bound)

def test_coins_miss_at_most_alpha_at_every_small_n():
    for n in range(2, 80):
        count = np.arange(min(n, 7))
        x = (np.arange(n) >= n - count[:, None]) * 1.
        for alpha in .05, .01:
            p = np.minimum(betting(x, alpha) + 1e-7, 1)
            assert np.where(p < 1, special.bdtr(count, n, np.minimum(p, 1 - 1e-12)), 0).max() <= alpha, (n, alpha)

def test_stakes_grow_as_the_spread_proves_small():
    m = np.array([[.5]])                        # a coin whose rarer side came up 12 times was tossed 24 times
    coin, same, heads = coin_stake(m, .01)[0, 0], np.full((1, 4), .5), np.array([[0., 1, 0, 1]])
    assert learner(same, .01)(m, slice(None))[0] == pytest.approx(coin * np.sqrt(np.array([24, 25, 26, 27]) / 24))
    tosses = np.array([0, 0, 1, 13 / 9])        # squared distances from the mean so far, over 1/4
    assert learner(heads, .01)(m, slice(None))[0] == pytest.approx(coin * np.sqrt(np.arange(24, 28) / (24 + tosses)))
    assert learner(same, 1)(m, slice(None)).max() == pytest.approx(2) == coin_stake(m, 1)[0, 0]    # and not beyond

def test_no_mean_above_the_bound_is_refuted_no_more():
    rng = np.random.default_rng(8)
    near = [.3 + 0 * rng.random((4, 64)), rng.normal(.95, .001, (4, 64)), rng.normal(.45, .04, (4, 64)).clip(0, 1)]
    for x in (rng.random((4, 64)) < .02) * 1., (rng.random((4, 64)) < .3) * 1., rng.beta(2, 8, (4, 64)), *near:
        for alpha in .2, .01, 1e-6:
            rows, bound = dealt(x, alpha), betting(x, alpha)
            cautious, learnt = cautious_stake(rows, alpha), learner(rows, -np.log(alpha) / 64)
            for m in np.linspace(.01, .99, 99)[:, None, None] + np.zeros((4, 1)):
                stakes = np.minimum(cautious, .75 / (1 - m)), learnt(m, slice(None))
                refuted = log_most(rows, m, stakes) >= -np.log(alpha)
                assert (refuted == (m[:, 0] >= bound)).all(), (alpha, m[0])

def test_one_shuffle_for_each_n_does_not():     # why the order is even, not pseudo-random
    from probunlearn.means import bets_in_order
    def shuffled(x, alpha):
        order = np.argsort(np.random.PCG64(x.shape[1]).random_raw(x.shape[1]))
        return bets_in_order(np.sort(x, 1)[:, order], alpha, caps=(.75, .97), coin=False)
    assert largest_miss(shuffled, 512, .01, 0, 1) > .1

def test_an_even_order_is_one():
    for n in 1, 2, 3, 10, 513:
        for start in .25, .75: assert sorted(even_order(n, start)) == list(range(n))
    assert np.isnan(dealt(np.array([[np.nan, .2, .1]]), .01)).sum() == 1
    for share in .01, .1, .5:                   # any number of the largest scores is spread over the bets
        place = np.flatnonzero(even_order(4096, .75) >= 4096 * (1 - share)) / 4096
        assert np.abs(np.arange(len(place)) / len(place) - place).max() < .06


# Differences

def test_differences_of_sorted_files_are_covered():
    runs, p = 1000, np.array([.5, .4])
    x = np.sort(np.random.default_rng(5).random((2, runs, 100)) < p[:, None, None], -1) * 1.
    def missed(**how): return (difference_bound(*x, ALPHA, "lower", **how).value > .1).mean()
    assert missed(paired=False) <= ALLOWED and missed() <= ALLOWED < missed(paired=True)

@pytest.mark.parametrize("mirrored", [False, True])
def test_differences_of_one_stream_are_covered(mirrored):   # also where one model leaks when the other doesn't
    u = np.random.default_rng(6).random((1000, 100))
    first, second = (u < .3) * 1., ((u > .6) if mirrored else (u < .4)) * 1.
    for how in dict(), dict(paired=True):
        low, high = difference_bound(first, second, ALPHA, **how).value.T
        assert ((low > -.1) | (high < -.1)).mean() <= ALLOWED
    if not mirrored:
        wide, narrow = (difference_bound(first, second, paired=how).value for how in (None, True))
        assert (wide[:, 1] - wide[:, 0]).mean() > (narrow[:, 1] - narrow[:, 0]).mean()

def test_who_says_nothing_of_pairs_gets_the_wider_bound():
    a, b = np.random.default_rng(7).random((2, 5, 64))
    for pooled in False, True:
        value = [difference_bound(a, b, paired=how, pooled=pooled).value for how in (None, True, False)]
        assert (value[0][..., 0] == np.minimum(value[1], value[2])[..., 0]).all()
        assert (value[0][..., 1] == np.maximum(value[1], value[2])[..., 1]).all()


# Scores that are 0 or 1 by definition

def test_exact_ends_come_by_declaration_never_by_a_look():
    x = (np.random.default_rng(8).random((5, 300)) < .02) * 1.
    assert (mean_bound(x).value != mean_bound(x, binary=True).value).all()
    assert mean_bound(x, binary=True).method == "clopper-pearson" and mean_bound(x).method == "betting"
    assert (mean_bound(x, binary=True, method="kl").value == mean_bound(x, method="kl").value).all()
    assert pooled_mean(x, side="two-sided", binary=True).method == "pooled clopper-pearson"
    for bound in mean_bound, pooled_mean:
        with pytest.raises(ValueError, match="needs scores that are 0 or 1"): bound(x / 2 + .1, binary=True)

@pytest.mark.parametrize("side", ["upper", "lower"])
def test_exact_pooled_ends_cover(side):
    rates, runs = np.array([0, .02, .3, .9])[:, None], 1000
    x = np.random.default_rng(9).random((runs, 4, 60)) < rates
    found = np.array([float(pooled_mean(rows, ALPHA, side, binary=True)) for rows in x])
    missed = (found < rates.mean() if side == "upper" else found > rates.mean()).mean()
    assert missed <= ALPHA + 3 * np.sqrt(ALPHA * (1 - ALPHA) / runs)


# Spreads by betting

def test_missing_scores_widen_spreads():
    x = np.random.default_rng(10).random((4, 60))
    gaps = np.where(np.arange(60) % 10 == 3, np.nan, x)
    for fill in 0, .5, 1:
        full = np.nan_to_num(gaps, nan=fill)
        for bound in variance_bound, ed_bound:
            assert (bound(gaps, missing="worst").value >= bound(full).value - 1e-9).all(), (bound, fill)

def test_two_sides_of_a_spread_share_alpha():
    x = np.random.default_rng(11).random((3, 100))
    both = variance_bound(x, side="two-sided")
    assert (both.value[:, 1] == variance_bound(x, .005).value).all() and both.method == "betting, lower end bj"
    assert (both.value[:, 0] == variance_bound(x, .005, "lower", method="bj").value).all()
    assert variance_bound(x, side="lower").method == "bj"
    band = variance_bound(x, side="two-sided", method="bj").value
    assert (band == np.stack([variance_bound(x, side=s, method="bj").value for s in ("lower", "upper")], -1)).all()


# What bets in the order of drawing

def test_what_may_stop_at_any_time_refuses_a_table_without_an_order():
    x = np.sort(np.random.default_rng(12).random((3, 64))).view(FileScores)
    calls = (lambda x: MeanSequence().add(x), lambda x: RateSequence().add(x > .5), lambda x: certify(Claim(.5), x[0]),
             lambda x: plan_looks([8, 32]).verdict(x[0] > .5), lambda x: pooled_mean(x, anytime=True),
             lambda x: leakage(x, anytime=True), lambda x: dataset_claims(x, anytime=True))
    for call in calls:
        for same in x, x.copy(), np.where(x > 2, 0, x), x * 1.:
            with pytest.raises(ValueError, match="doesn't number its draws"): call(same)
        call(np.asarray(x))
    for bound in mean_bound, std_bound, ed_bound, pooled_mean: assert type(bound(x).value) is not FileScores
    assert set(leakage(x)) >= {"mean_upper", "ed_upper"}

def test_a_table_says_whether_it_numbers_its_draws():
    rows = [dict(question="q", answer="a", score=s) for s in (.1, .2, .9)]
    plain = plain_table(rows, "x.jsonl")
    assert type(scores_from_table(plain, "score")) is FileScores
    assert type(scores_from_table(plain[plain.score < .5], "score")) is FileScores
    numbered = plain_table([row | dict(draw=i) for i, row in enumerate(rows)], "x.jsonl")
    assert type(scores_from_table(numbered, "score")) is np.ndarray
