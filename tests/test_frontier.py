"""A frontier says what leaks least for what is kept: by hand, in order, with joint bounds and intervals that cover."""
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from probunlearn.grid import Frontier, Grid, frontier
from probunlearn.questions import pooled_rate

START = dict(leak_rate=1., draws=100, drawn_retain=.8)


def look(name, seed, rate, retain, draws=100, **more):
    return dict(name=name, seed=seed, leak_rate=rate, draws=draws, drawn_retain=retain, **more)


def by_hand(*points, start=1., control=None, floor=.5, alpha=.05):
    "A frontier of given (name, seed, kept, bound)."
    return Frontier(pd.DataFrame(points, columns=["name", "seed", "kept", "bound"]), start, control, floor, alpha)


TWO = by_hand(("a", 0, .9, .5), ("a", 0, .7, .2), ("a", 1, .8, .4), ("a + own", 0, .95, .4), ("a + own", 0, .6, .1),
              ("a + own", 1, .9, .3))


# --- by hand ----------------------------------------------------------------------------------------------------------

def test_the_area_is_the_mean_height_of_the_staircase():
    areas = {name: [(.1 + .2 * .5 + .2 * .2) / .5, (.2 + .3 * .4) / .5] for name in "a"}
    areas["a + own"] = [(.05 + .35 * .4 + .1 * .1) / .5, (.1 + .4 * .3) / .5]
    found = TWO.areas()
    for name, values in areas.items():
        half = 12.7062047361747 * abs(values[0] - values[1]) / 2                # t quantile .975, one degree of freedom
        row = found.loc[name]
        assert row.area == pytest.approx(np.mean(values))
        assert row.low == pytest.approx(max(0, np.mean(values) - half))
        assert row.high == pytest.approx(min(1, np.mean(values) + half))


def test_the_least_bound_at_equal_utility():
    rows = {share: TWO.compare(share).loc["a + own"] for share in (1, .95, .9, .8, .6, .1)}
    assert [tuple(rows[share][["without", "with"]]) for share in rows] == [
        (1, 1), (1, pytest.approx(.7)), (.75, pytest.approx(.35)), (.45, pytest.approx(.35)),
        (pytest.approx(.3), pytest.approx(.2)), (pytest.approx(.3), pytest.approx(.2))]
    assert rows[.9].seeds == 2 and rows[.9]["low"] < -.4 < rows[.9]["high"]
    table = TWO.table(.9)
    assert list(table["seeds that keep it"]) == ["1 of 2", "2 of 2"] and list(table.looks) == [3, 3]


def test_another_floor():
    one = by_hand(("a", 0, .9, .5), ("a", 0, .7, .2), floor=.8)
    assert one.areas().area["a"] == pytest.approx((.1 + .1 * .5) / .2)
    whole = by_hand(("a", 0, .9, .5), floor=0)
    assert whole.areas().area["a"] == pytest.approx(.1 + .9 * .5)


def test_more_kept_than_at_the_start_counts_as_all_of_it():
    one = by_hand(("a", 0, 1.2, .3))
    assert one.table(1)["P(leak) ≤ at 1"].iloc[0] == .3 and one.areas().area["a"] == pytest.approx(.3)


# --- looks ------------------------------------------------------------------------------------------------------------

def test_bounds_hold_together_and_pay_for_every_look():
    looks = [look("a", seed, .3, .7) for seed in range(3)]
    control = dict(leak_rate=0., draws=100, drawn_retain=.8)
    found = frontier(looks, START, control=control, alpha=.1)
    assert list(found.points.bound) == [float(pooled_rate([30], 100, .1 / 5))] * 3
    assert found.control == float(pooled_rate([0], 100, .1 / 5)) and found.start == 1
    assert list(found.points.kept) == [.7 / .8] * 3
    assert frontier(looks[:1], START, alpha=.1).points.bound[0] == float(pooled_rate([30], 100, .1 / 2))
    assert frontier(looks[:1], START).control is None


def test_each_seed_is_measured_by_its_own_draws():
    starts = pd.DataFrame([START | dict(seed=0), START | dict(seed=1, leak_rate=.9, drawn_retain=.4)])
    found = frontier([look("a", seed, .3, .4) for seed in (0, 1, 2)], starts)
    assert list(found.points.kept) == pytest.approx([.5, 1, .4 / .6])
    assert found.start == float(pooled_rate([190], 200, .05 / 4))
    with pytest.raises(ValueError, match="nothing to keep"): frontier([look("a", 0, .3, .4)], starts * 0)


def test_all_bounds_hold_at_once_as_often_as_promised():
    rng, wrong = np.random.default_rng(0), 0
    truth = rng.uniform(0, .5, 40)
    for _ in range(400):
        rates = rng.binomial(200, truth) / 200
        found = frontier([look("a", 0, rate, .5, draws=200) for rate in rates], START | {"draws": 200}, alpha=.2)
        wrong += bool((found.points.bound < truth).any())
    assert wrong <= 400 * .2 + 3 * math.sqrt(400 * .2 * .8)


def test_a_grid_tells_its_looks():
    path = [dict(step=s, leak_rate=1 / s, draws=100, drawn_retain=.8 - s / 10) for s in (1, 2)]
    rows = [dict(name="a", split="s", seed=0, bound=.5, retain=1., path=path),
            dict(name="a", split="s", seed=1, failed="the loss is nan"),
            dict(name="b", split="s", seed=0, bound=.5, retain=1., path=[])]
    grid = Grid(rows)
    assert len(grid.looks()) == 3 and list(grid.looks().columns[:4]) == ["name", "split", "seed", "step"]
    found = frontier(grid, START)
    assert found.names() == ["a"] and found.table(.8)["seeds that keep it"].iloc[0] == "1 of 2"
    assert found.areas().area["a"] == pytest.approx((1 + found.seeds("a")[0][1] @ [.125, .125, .25] / .5) / 2)
    for rows in ([look("a", 0, .5, .5, split="x"), look("a", 0, .5, .5, split="y")], [dict(name="a", seed=0)]):
        with pytest.raises(ValueError, match="2 splits have no frontier|the looks don't tell 'leak_rate'"):
            frontier(rows, START)


@pytest.mark.parametrize("how, says", [(dict(floor=1), "floor must be a share"), (dict(alpha=0), "alpha must lie"),
                                       (dict(start=START | {"drawn_retain": 0}), "nothing to keep")])
def test_what_is_no_frontier_is_refused(how, says):
    with pytest.raises(ValueError, match=says): frontier(**dict(looks=[look("a", 0, .5, .5)], start=START) | how)


# --- order ------------------------------------------------------------------------------------------------------------

def test_more_looks_never_raise_a_staircase_and_more_leak_never_lowers_it():
    rng = np.random.default_rng(1)
    points = [("a", 0, *rng.uniform(size=2)) for _ in range(20)]
    areas = [by_hand(*points[:k]).areas().area["a"] for k in range(1, 21)]
    assert (np.diff(areas) <= 1e-12).all()
    leaky = [(name, seed, kept, min(1, bound + .1)) for name, seed, kept, bound in points]
    dull = [(name, seed, kept - .1, bound) for name, seed, kept, bound in points]
    assert min(by_hand(*worse).areas().area["a"] for worse in (leaky, dull)) >= areas[-1]
    at = [by_hand(*points).table(share)[f"P(leak) ≤ at {share:g}"].iloc[0] for share in np.linspace(0, 1, 30)]
    assert (np.diff(at) >= 0).all()


def test_the_order_of_looks_means_nothing():
    shuffled = by_hand(*TWO.points.sample(frac=1, random_state=0).itertuples(index=False))
    pd.testing.assert_frame_equal(shuffled.areas().sort_index(), TWO.areas().sort_index())


# --- sentences --------------------------------------------------------------------------------------------------------

def three(name, bounds, kept=.95): return [(name, seed, kept, bound) for seed, bound in enumerate(bounds)]


@pytest.mark.parametrize("bounds, says", [
    ((.10, .11, .12), "the bound falls from 0.52 to 0.11"), ((.8, .81, .85), "rises from 0.52 to 0.82"),
    ((.1, .5, .9), "can't tell from no change")])
def test_a_change_is_said_as_its_interval_allows(bounds, says):
    made = by_hand(*three("npo", (.5, .51, .53)), *three("npo + own", bounds))
    text = made.sentence("npo", "npo + own")
    assert says in text and text.startswith("Where draws keep 0.9 of the start's retain score, with npo + own instead")


def test_utility_that_nothing_reaches():
    lost = three("a", (.125, .125, .125), kept=.5) + three("a + own", (.125, .125, .125))
    says = "no weights of a keep that much; with a + own the bound falls to 0.13."
    for pair in (("a", "a + own"), ("a + own", "a")): assert says in by_hand(*lost).sentence(*pair)
    none = by_hand(*lost).sentence("a", "a + own", .99)
    assert "no weights of a and none of a + own keep that much" in none
    own = [("a + own", seed, kept, .1) for seed, kept in enumerate((.95, .5, .5))]
    some = by_hand(*lost[:3], ("a", 0, .95, .3), *own)
    says = "(1 of 3 seeds of a keep that much) (1 of 3 seeds of a + own keep that much)"
    assert says in some.sentence("a", "a + own")


def test_one_seed_has_no_interval():
    one = by_hand(("a", 0, .95, .5), ("a + own", 0, .95, .1))
    assert "one training seed, which says nothing about another" in one.sentence("a", "a + own")
    assert one.areas()[["low", "high"]].isna().all(axis=None) and one.compare()[["low", "high"]].isna().all(axis=None)


def test_collapsed_models_and_runs_that_broke_down_lower_nothing():
    made = by_hand(("a", 0, 0., .001), ("a", 1, math.nan, math.nan))
    assert made.areas().area["a"] == 1 and "no weights of a" in by_hand(*three("a + own", (.1, .1)), ("a", 0, 0, 0.), (
        "a", 1, math.nan, math.nan)).sentence("a", "a + own")


def test_seeds_are_compared_with_themselves():
    "A shift that is the same for each seed is seen, however much the seeds differ."
    made = by_hand(*three("a", (.2, .5, .8)), *three("a + own", (.1, .401, .7)))
    row = made.compare().loc["a + own"]
    assert row["high"] < -.09 and row["area high"] < -.08


def test_methods_without_a_common_seed_are_not_compared():
    apart = by_hand(("a", 0, .9, .5), ("a + own", 1, .9, .3))
    with pytest.raises(ValueError, match="a and a . own have no training seed in common"):
        apart.sentence("a", "a + own")


@pytest.mark.parametrize("name", START)
def test_a_start_tells_what_it_is_asked(name):
    less = {key: value for key, value in START.items() if key != name}
    with pytest.raises(ValueError, match=f"the start doesn't tell '{name}'"): frontier([look("a", 0, .1, .8)], less)


def test_starts_of_seeds_tell_their_seeds():
    with pytest.raises(ValueError, match="the start doesn't tell 'seed'"):
        frontier([look("a", 0, .1, .8)], pd.DataFrame([START, START]))


def test_a_frontier_shows_itself():
    import matplotlib.pyplot as plt
    text = repr(TWO)
    assert "The bounds of all 6 looks hold together with confidence 95 %" in text and "P(leak) ≤ at 0.9" in text
    assert "Student's interval over training seeds" in TWO._repr_html_()
    figure = TWO.plot()
    shown = [t.get_text() for t in figure.legends[0].get_texts()]
    assert shown == ["without", "+ own", "before unlearning"] and figure.axes[0].get_title() == "a"
    plt.close(figure)


# --- coverage ---------------------------------------------------------------------------------------------------------

def run(rng, name, effect, n=320):
    "Looks along a run of one training seed: how fast it forgets and what that costs differ by seed."
    speed, cost = np.exp(rng.normal(effect, .25)), np.exp(rng.normal(-1, .25))
    at = np.arange(1, 9) / 4
    truth, kept = np.exp(-speed * at), .95 * np.exp(-cost * at * .5)
    return [look(name, 0, rate / n, k, draws=n) for rate, k in zip(rng.binomial(n, truth), kept)]


def areas(rng, seeds, effect=.3):
    "A frontier of two methods with so many training seeds."
    looks = [of | dict(seed=seed) for seed in range(seeds)
             for name, push in (("a", 0), ("a + own", effect)) for of in run(rng, name, push)]
    return frontier(looks, dict(leak_rate=1., draws=320, drawn_retain=.95))


SLOW = [pytest.param(seeds, 150, 133, marks=pytest.mark.slow) for seeds in (3, 5)]


@pytest.mark.parametrize("seeds, trials, least", [(3, 60, 51), *SLOW])
def test_intervals_cover_the_mean_over_training_seeds(seeds, trials, least):
    """With bounds that pay for as many looks as in the trials, for what they cover is the mean of these areas. Fewer
    hits than the least would be seen once in a thousand times at 95 %, be it of 60 or of 150 trials."""
    rng = np.random.default_rng(seeds)
    many = [areas(rng, seeds) for _ in range(trials)]
    truth = np.mean([[*of.areas().area, of.compare()["area with"].iloc[0] - of.compare()["area without"].iloc[0]]
                     for of in many], axis=0)
    hits = np.zeros(3)
    for of in many:
        ends = [tuple(of.areas().loc[name, ["low", "high"]]) for name in ("a", "a + own")]
        ends.append(tuple(of.compare()[["area low", "area high"]].iloc[0]))
        hits += [low <= true <= high for (low, high), true in zip(ends, truth)]
    assert (hits >= least).all(), hits


# --- what is packaged -------------------------------------------------------------------------------------------------

DATA = Path(__file__).parents[1]/"data"
LOOKS = ["leak_rate", "leak_bound", "drawn_forget", "greedy_forget", "drawn_retain", "greedy_retain"]


def test_the_packaged_runs_are_whole():
    looks = pd.read_csv(DATA/"frontier.csv")
    runs = looks[looks.step > 0]
    methods = {f"{m}{form}" for m in ("grad_ascent", "grad_diff", "npo", "simnpo", "rmu", "idk")
               for form in ("", " + answer", " + own")}
    assert set(runs.name) == methods and set(looks.name) - methods == {"before unlearning", "never saw them"}
    full = runs[runs.strength == 1].groupby(["name", "seed"]).step.agg(list)
    assert all(steps == [4, 8, 12, 16, 20] for steps in full) and len(full) == 18 * 3
    assert looks[LOOKS].stack().between(0, 1).all() and (looks.leak_bound >= looks.leak_rate).all()
