"""Widgets: their claims hold wherever the controls stand, and follow every control."""
import re
import subprocess
import sys

import matplotlib
matplotlib.use("Agg")

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
from scipy import stats

from cells import NBS
from probunlearn.bounds import survival_bound
from probunlearn.data import QA
from probunlearn.draws import Decoding, draws_from_texts
from probunlearn.plots import survival_band
from probunlearn.views import branch_claim, branches, guess_figure, leak_claim, marked, top_answers
from probunlearn.widgets import bound_explorer, leak_explorer, predict, temperature_explorer, training_board, tree_browser

QAS = [QA(f"q{i}", f"Who is <{i}>?", f"It is Ann {i}.", keywords=[f"Ann {i}"]) for i in range(3)]


def ask(qas, n, decoding, confidence=None):
    "Answers that leak more at a higher temperature, and less under a rule."
    def texts(qa):
        rng = np.random.default_rng([n, int(qa.id[1:]), int(100*decoding.temperature)])
        rate = .3*decoding.temperature*decoding.top_p*(1 if confidence is None else 1 - confidence)
        return [qa.answer if leak else f"I cannot say {word}." for leak, word in zip(rng.random(n) < rate, rng.choice(["this", "that", "<b>"], n))]
    return [draws_from_texts(qa.id, texts(qa), decoding=decoding) for qa in qas]


def coins():
    "A bound explorer where every repetition differs."
    box = bound_explorer()
    box.controls["law"].value = "a coin"
    return box


BOXES = {"bound-explorer": coins, "leak-explorer": lambda: leak_explorer(QAS, ask, n=(64, 128)), "temperature-explorer": lambda: temperature_explorer(QAS, ask, n=64),
         "tree-browser": lambda: tree_browser(ask(QAS[:1], 200, Decoding())[0], QAS[0]), "predict": lambda: predict({"a": .1, "b": .2}), "training-board": lambda: training_board(lambda look: None)}


def other(control):
    "A value that the control doesn't have now."
    if hasattr(control, "options"): return [value for *_, value in (option if isinstance(option, tuple) else (option,) for option in control.options) if value != control.value][-1]
    return control.min if control.value != control.min else control.max


@pytest.mark.parametrize("name", BOXES)
def test_every_control_changes_what_is_shown(name):
    box = BOXES[name]()
    assert name in box._dom_classes
    for key, control in reversed(box.controls.items()):
        before = box.claim.value, box.picture.value
        control.value = other(control)
        if (name, key) != ("predict", "guess"): assert (box.claim.value, box.picture.value) != before, key
    assert not plt.get_fignums()


@pytest.mark.parametrize("name", ["bound-explorer", "leak-explorer", "predict"])
def test_a_page_without_widgets_shows_the_picture(name):
    box = BOXES[name]()
    bundle = box._repr_mimebundle_()
    assert bundle["text/html"] == box.picture.value + box.claim.value and "application/vnd.jupyter.widget-view+json" in bundle
    assert "src='data:image/png;base64,iVBOR" in box.picture.value and "alt='" in box.picture.value


@pytest.mark.parametrize("name", ["leak-explorer", "temperature-explorer"])
def test_the_claim_names_every_position_of_the_controls(name):
    box = BOXES[name]()
    settings = {"leak-explorer": 3*2*4*3, "temperature-explorer": 4*5}[name]
    claims = set()
    for key, control in box.controls.items():
        control.value = other(control)
        claims.add(box.claim.value)
        assert f"all {settings} settings" in box.claim.value and "99 %" in box.claim.value
    assert len(claims) == len(box.controls)


def misses(alpha, settings, share, runs):
    "In how many simulated sessions some claim, at some setting and some threshold, is false; each claim is made at `alpha` shared by `share` settings."
    rng, at = np.random.default_rng(0), np.array([0, .2, .5, .8])
    truth = np.array([.6, .4*.8 + .2, .4*.5 + .2, .4*.2 + .2])         # 40 % score 0, 20 % score 1, the rest are uniform
    wrong = 0
    for _ in range(runs):
        kind = rng.random((settings, 64))
        x = np.where(kind < .4, 0, np.where(kind < .6, 1, rng.random((settings, 64))))
        ends = np.array([leak_claim(row, t, alpha, share).value for row in x for t in at]).reshape(settings, len(at), 2)
        wrong += bool(((ends[..., 0] > truth) | (ends[..., 1] < truth)).any())
    return wrong


def test_claims_hold_at_all_settings_and_thresholds_at_once():
    "Binomial test at level 0.001 that a session has a false claim with a chance of at most alpha = 0.2; claims at a level that doesn't pay for the settings fail it."
    joint, naive = misses(.2, 30, 30, 60), misses(.2, 30, 1, 60)
    assert stats.binomtest(joint, 60, .2, alternative="greater").pvalue > .001
    assert stats.binomtest(naive, 60, .2, alternative="greater").pvalue < .001


def test_the_claim_is_the_band_of_the_package_and_of_the_picture():
    x = np.random.default_rng(3).random(100)
    bound = leak_claim(x, .3, .05, 10)
    assert bound.alpha == .05 and list(bound.value) == list(survival_bound(x, .3, .005, "two-sided", method="bj").value)
    ax = survival_band(x, .05, .3, method="bj", among=10)
    assert ax.lines[-1].get_ydata()[1] == bound.value[1] and "(all 10 settings)" in ax.get_title().replace("\n", " ")
    plt.close("all")


def test_what_a_model_says_is_escaped():
    qa = QA("q", "?", "<i>Ann</i>", keywords=["<i>Ann</i>"])
    assert marked("so: <i>ann</i>!", qa.keywords) == "so: <mark>&lt;i&gt;ann&lt;/i&gt;</mark>!"
    draws = draws_from_texts("q", ["<script>1</script>", "<i>Ann</i>"])
    assert "<script>" not in top_answers(draws, qa) and "<script>" not in tree_browser(draws, qa).claim.value


def test_branches_share_out_all_draws():
    draws = draws_from_texts("q", ["a b c"]*5 + ["a b d"]*3 + ["a e"] + [None])
    assert branches(draws) == {"": .9, "a": .9, "a b": pytest.approx(.8)}
    x = np.array([1, 0, 0])
    assert branch_claim(draws, x, "a b").startswith("8 of 10 draws begin “a b”; 5 of these")
    assert "certainty" not in branch_claim(draws, x)


def test_guesses_are_recorded_once_and_only_then_compared():
    box = predict({"a": .01, "b": lambda: .3})
    assert guess_figure(box.record).axes[0].get_title() == "No guess yet"
    box.controls["guess"].value = .02
    box.button.click(); box.button.click()
    box.controls["asked"].value = "b"
    assert box.record == [("a", .02, .01)] and ".3" not in box.claim.value
    box.button.click()
    assert box.record[1] == ("b", .02, .3) and "1 of 2 guesses" in box.picture.value
    plt.close("all")


def test_import_loads_no_torch():
    code = "import sys, probunlearn.widgets; print(*{'torch', 'transformers', 'scipy.stats'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""


@pytest.mark.parametrize("lesson", sorted(path.stem for path in (NBS/"tutorials").glob("*.ipynb") if {".widgets import", "with style():"} <= set(re.findall(r"\.widgets import|with style\(\):", path.read_text(encoding="utf-8")))))
def test_figures_after_a_widget_are_shown(lesson):
    "A widget that is the first to draw must not switch off the figures of the cells below it."
    cells = nbformat.read(NBS/"tutorials"/f"{lesson}.ipynb", as_version=4).cells
    drawing = [cell for cell in cells if cell.cell_type == "code" and cell.source.startswith("with style():") or "plt.subplots(" in cell.source]
    assert drawing and all(any("image/png" in output.get("data", {}) for output in cell.outputs) for cell in drawing)
