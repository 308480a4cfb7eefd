"""Plots from plain arrays: what their titles claim, what they draw, and what they leave alone."""
import subprocess
import sys

import matplotlib
matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from scipy import stats

from probunlearn.bounds import StoppedScores, leaked, mean_bound, survival_bound
from probunlearn.plots import (
    COLOURS, _band as band, answer_tree, bound_by_draws, method_board, score_density, style, survival_band)

RNG = np.random.default_rng(0)
SAMPLES = {
    "zeros": np.zeros(200),
    "ones": np.ones(200),
    "one draw": np.array([.3]),
    "rare": np.r_[np.zeros(199), 1],
    "smooth": RNG.beta(2, 5, 300),
    "atoms": np.where(RNG.random(300) < .5, 0, RNG.random(300)),
    "missing": np.r_[np.nan, RNG.random(50)],
}
BOARD = pd.DataFrame(
    {"greedy": [1.0, 0], "mean": [.9, .01], "bound": [.95, .02], "retain": [.99, .98]}, index=["full", "NPO"])
PLOTS = {
    "density": lambda x, ax: score_density(x, greedy=.2, bound=.4, ax=ax),
    "survival": lambda x, ax: survival_band(x, ax=ax),
    "by draws": lambda x, ax: bound_by_draws(x, methods=("dkw",), ax=ax),
    "board": lambda x, ax: method_board(BOARD, ax=ax),
    "tree": lambda x, ax: answer_tree(["a b", "a c"], [3, 1], [0, 1], ax=ax),
}


def title(ax): return ax.get_title().replace("\n", " ")


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("plot", PLOTS)
@pytest.mark.parametrize("width", (6, 3.3))
@pytest.mark.filterwarnings("error")
def test_plots_draw_on_the_axes_given_at_any_width(plot, sample, width):
    with style(): ax = plt.subplots(figsize=(width, 3))[1]
    assert PLOTS[plot](SAMPLES[sample], ax) is ax
    assert plt.get_fignums() == [ax.figure.number] and ax.get_title() and ax.get_xlabel()
    ax.figure.canvas.draw()
    assert ax.bbox.height > 40


def test_a_plot_of_its_own_is_small_and_keeps_the_settings():
    before = dict(plt.rcParams)
    ax = score_density(SAMPLES["smooth"])
    assert tuple(ax.figure.get_size_inches()) <= (6, 3.2) and dict(plt.rcParams) == before


def test_density_holds_every_draw_once():
    for x in SAMPLES.values():
        ax = score_density(x)
        needles = [segment[1][1] for segment in ax.collections[0].get_segments()]
        assert sum(bar.get_height() for bar in ax.patches) + sum(needles) == pytest.approx(1)


def test_titles_say_what_the_data_show():
    rare, zeros = (score_density(SAMPLES[name], greedy=0) for name in ("rare", "zeros"))
    assert title(rare) == "Greedy scores 0, yet 0.5 % of 200 draws score higher, up to 1"
    assert title(zeros) == "Greedy scores 0; none of 200 draws scores higher"
    assert "(1 missing)" in title(score_density(SAMPLES["missing"]))
    lowest = "NPO has the lowest bound of 2 (0.02 at retain score 0.98)"
    assert title(method_board(BOARD)) == f"{lowest}; draw it again before claiming it"
    alone = method_board(BOARD, reference=["NPO"])
    assert title(alone) == "full: mean leak at most 0.95 at retain score 0.99; greedy shows 1"


def test_numbers_of_bounds_are_rounded_outward():
    assert "at most 0.0124" in [line.get_label() for line in score_density(SAMPLES["rare"], bound=.01231).lines][-1]
    tiny = survival_band(SAMPLES["zeros"], alpha=1e-5)
    assert "confidence 1 - 1e-05" in title(tiny) and "100 %" not in title(tiny)
    assert "0.0082" in method_board(BOARD.assign(bound=[.95, .00811])).get_title()


@pytest.mark.parametrize("sample", ("atoms", "missing", "rare"))
@pytest.mark.parametrize("method", ("dkw", "bj"))
def test_survival_band_is_the_bound_of_the_package(sample, method):
    x = SAMPLES[sample]
    ax = survival_band(x, alpha=.05, leak_at=.25, method=method)
    below = np.nextafter(.25, 0)        # P(score >= t) is P(score > the number just below t)
    low, high = survival_bound(x, at=below, alpha=.05, side="two-sided", method=method, missing="worst").value
    assert ax.lines[-1].get_ydata()[1] == high
    bottom = ax.collections[0].get_paths()[0].vertices
    assert np.isclose(bottom[:, 1], low).any()


@pytest.mark.parametrize("kind", (np.float32, np.float64))
@pytest.mark.parametrize("leak_at", (.3, .7, 1.0))
def test_a_draw_on_the_threshold_counts_as_everywhere_else(leak_at, kind):
    x = np.array([0, .3, .7, .7, 1], dtype=kind)
    ax = survival_band(x, leak_at=leak_at)
    assert ax.lines[-1].get_ydata()[0] == pytest.approx(leaked(x, leak_at).mean())
    assert f"score at least {leak_at:g};" in title(ax)


@pytest.mark.parametrize("method", ("dkw", "bj"))
def test_the_band_holds_for_all_thresholds_at_once(method):
    "400 bands at alpha = 0.2 over scores with atoms: 103 or more that miss have probability below 0.005 if it is true."
    rng, grid = np.random.default_rng(0), np.linspace(0, 1, 21)
    truth = np.where(grid > 0, .6 - .4 * grid, 1)               # 40 % score 0, 20 % score 1, the rest are uniform
    missed = 0
    for _ in range(400):
        kind, value = rng.random((2, 64))
        x = np.where(kind < .4, 0, np.where(kind < .6, 1, value))
        low, high = band(x, grid, .2, method)
        missed += bool(((low > truth) | (high < truth)).any())
    assert stats.binom.sf(102, 400, .2) < .005 and missed <= 102


def test_bound_by_draws_ends_at_the_bound_of_all_draws():
    x = SAMPLES["atoms"]
    lines = bound_by_draws(x, alpha=.05, methods=("betting", "dkw")).lines
    bounds = [float(mean_bound(x, alpha=.05, method=method)) for method in ("betting", "dkw")]
    assert [line.get_ydata()[-1] for line in lines] == [*bounds, x.mean()]
    assert lines[0].get_color() == COLOURS["bound"] and lines[-1].get_color() == COLOURS["draws"]


def test_bound_by_draws_leaves_a_mean_of_0_off_a_log_axis():
    with style(): ax = plt.subplots()[1]
    ax.set_yscale("log")
    means = bound_by_draws(np.r_[np.zeros(63), 1], ax=ax).lines[-1].get_ydata()
    assert np.isnan(means[:-1]).all() and means[-1] == 1 / 64
    assert ax.get_yscale() == "log" and ax.get_ylim()[0] > 0


@pytest.mark.parametrize("call", [
    lambda: score_density([.2, 1.5]),
    lambda: score_density([[.2]]),
    lambda: survival_band([.2], alpha=0),
    lambda: survival_band([.2], method="x"),
    lambda: bound_by_draws([.2] * 20, methods=("x",)),
    lambda: method_board(BOARD[["mean"]]),
    lambda: survival_band(np.zeros(9).view(StoppedScores)),
    lambda: bound_by_draws(np.zeros(20).view(StoppedScores)),
])
def test_bad_input_is_refused_before_a_figure_is_made(call):
    with pytest.raises(ValueError): call()
    assert not plt.get_fignums()


def test_import_is_light():
    heavy = "{'torch', 'seaborn', 'pandas', 'scipy.stats', 'jinja2'}"
    code = f"import sys, probunlearn.plots; print(*{heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("width", np.linspace(3, 7, 17))
def test_a_title_never_parts_a_number_from_its_per_cent(width):
    figure, ax = plt.subplots(figsize=(width, 3))
    words = survival_band(np.r_[np.zeros(90), np.ones(10)], ax=ax).get_title()
    assert "\n%" not in words and words.count(" %") == 3
    plt.close(figure)
