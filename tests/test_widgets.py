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
from probunlearn.page import with_marks
from probunlearn.plots import just_below, survival_band
from probunlearn.scores import score_draws
from probunlearn.views import branch_claim, branches, guess_figure, leak_claim, top_answers
from probunlearn.widgets import (
    bound_explorer, leak_explorer, predict, temperature_explorer, training_board, tree_browser)

QAS = [QA(f"q{i}", f"Who is <{i}>?", f"It is Ann {i}.", keywords=(f"Ann {i}",)) for i in range(3)]


class Model:
    "Answers that leak more at a higher temperature, and less under a rule; it counts how often it is asked."
    def __init__(self, weights=0, confidence=None, calls=None):
        self.weights, self.confidence, self.calls = weights, confidence, [] if calls is None else calls

    @property
    def identity(self): return dict(weights=self.weights)

    def adaptive(self, confidence): return type(self)(self.weights, confidence, self.calls)

    def draw(self, qas, n, decoding=Decoding(), seed=0, *, start=0):
        self.calls.append(([qa.id for qa in qas], n, decoding, self.confidence, seed))
        return [draws_from_texts(qa.id, self.texts(qa, n, decoding), decoding=decoding) for qa in qas]

    def texts(self, qa, n, decoding):
        rng = np.random.default_rng([n, int(qa.id[1:]), int(100 * decoding.temperature), self.weights])
        rule = 1 if self.confidence is None else 1 - self.confidence
        leaks = rng.random(n) < .3 * decoding.temperature * decoding.top_p * rule
        words = rng.choice(["this", "that", "<b>"], n)
        return [qa.answer if leak else f"I cannot say {word}." for leak, word in zip(leaks, words)]


def coins():
    "A bound explorer where every repetition differs."
    box = bound_explorer()
    box.controls["law"].value = "a coin"
    return box


BOXES = {
    "bound-explorer": coins,
    "leak-explorer": lambda: leak_explorer(Model(), QAS, n=(64, 128)),
    "temperature-explorer": lambda: temperature_explorer(Model(), QAS, n=64),
    "tree-browser": lambda: tree_browser(Model().draw(QAS[:1], 200)[0], QAS[0]),
    "predict": lambda: predict({"a": .1, "b": .2}),
    "training-board": lambda: training_board(lambda look: None),
}


def values(control):
    "What a control with options can be set to."
    return [option[1] if isinstance(option, tuple) else option for option in control.options]


def other(control):
    "A value that the control doesn't have now."
    if hasattr(control, "options"): return [value for value in values(control) if value != control.value][-1]
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
    assert bundle["text/html"] == box.picture.value + box.claim.value
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert "src='data:image/png;base64,iVBOR" in box.picture.value and "alt='" in box.picture.value


@pytest.mark.parametrize("name", ["leak-explorer", "temperature-explorer"])
def test_the_claim_names_every_position_of_the_controls(name):
    box = BOXES[name]()
    settings = {"leak-explorer": 3 * 2 * 4 * 3, "temperature-explorer": 4 * 5}[name]
    claims = set()
    for key, control in box.controls.items():
        control.value = other(control)
        claims.add(box.claim.value)
        assert f"all {settings} settings" in box.claim.value and "99 %" in box.claim.value
    assert len(claims) == len(box.controls)


def misses(alpha, settings, share, runs):
    "In how many simulated sessions some claim, at some setting and threshold, is false; `share` settings share alpha."
    rng, at = np.random.default_rng(0), np.array([.05, .2, .5, .8, 1])
    truth = .4 * (1 - at) + .2                      # 40 % score 0, 20 % score 1, the rest are uniform: P(score >= at)
    wrong = 0
    for _ in range(runs):
        kind = rng.random((settings, 64))
        x = np.where(kind < .4, 0, np.where(kind < .6, 1, rng.random((settings, 64))))
        made = [leak_claim(row, t, alpha=alpha, settings=share).value for row in x for t in at]
        ends = np.array(made).reshape(settings, len(at), 2)
        wrong += bool(((ends[..., 0] > truth) | (ends[..., 1] < truth)).any())
    return wrong


def test_claims_hold_at_all_settings_and_thresholds_at_once():
    """Binomial test at level 0.001 that a session has a false claim with a chance of at most alpha = 0.2; claims at a
    level that doesn't pay for the settings fail it."""
    joint, naive = misses(.2, 30, 30, 60), misses(.2, 30, 1, 60)
    assert stats.binomtest(joint, 60, .2, alternative="greater").pvalue > .001
    assert stats.binomtest(naive, 60, .2, alternative="greater").pvalue < .001


def test_the_claim_is_the_band_of_the_package_and_of_the_picture():
    x = np.random.default_rng(3).random(100)
    bound = leak_claim(x, .3, alpha=.05, settings=10)
    band = survival_bound(x, at=just_below(.3, x), alpha=.005, side="two-sided", method="bj")
    assert bound.alpha == .05 and list(bound.value) == list(band.value)
    ax = survival_band(x, .05, leak_at=.3, method="bj", among=10)
    assert ax.lines[-1].get_ydata()[1] == bound.value[1]
    assert "(all 10 settings)" in ax.get_title().replace("\n", " ")


def test_a_draw_on_the_threshold_leaks():
    "Half of the key words found leaks at 0.5 and not above, as in a report."
    qa = QA("q0", "Who?", "Ann Lee.", keywords=("Ann", "Lee"))
    draws = draws_from_texts("q0", ["Ann", "nobody", "nobody"])
    x = score_draws([draws], [qa], "keywords")[0]
    assert "an answer with score of at least 0.5 is between" in str(leak_claim(x, .5))
    assert leak_claim(x, .5).value[0] > leak_claim(x, .55).value[0] == 0
    assert ["<mark>" in top_answers(draws, qa, leak_at=at) for at in (.5, .55)] == [True, False]


def test_the_threshold_slider_says_what_leaks():
    box = BOXES["leak-explorer"]()
    slider = box.controls["leak_at"]
    assert slider.description == "leaks at ≥" and slider.value == 1 and min(values(slider)) == .05
    assert "key words (fraction) of at least 1 is between" in box.claim.value
    assert "score at least 1;" in box.picture.value


# --- a model behind a widget ---

def test_what_was_drawn_is_kept():
    model = Model()
    box = leak_explorer(model, QAS, n=(64, 128), seed=5)
    assert [call[1:] for call in model.calls] == [
        (128, Decoding(max_new_tokens=48), None, 5), (1, Decoding(0, max_new_tokens=48), None, 5)]
    box.controls["leak_at"].value = .5              # the same draws, read another way
    box.controls["n"].value = 64
    box.controls["n"].value = 128
    assert [call[1] for call in model.calls] == [128, 1, 64]


def test_another_model_is_asked_anew():
    model = Model()
    box = leak_explorer(model, QAS, n=(64, 128))
    before = box.claim.value
    model.weights = 1                               # trained meanwhile
    box.controls["leak_at"].value = .5
    box.controls["leak_at"].value = 1.0
    assert box.claim.value == before and len(model.calls) == 2      # what stands there is what was drawn
    box.controls["n"].value = 64
    box.controls["n"].value = 128
    assert [call[1] for call in model.calls] == [128, 1, 64, 1, 128] and box.claim.value != before


def test_draws_with_and_without_the_rule_come_from_one_model():
    "New draws with the rule must not stand beside old ones without it."
    model = Model()
    box = temperature_explorer(model, QAS, n=64)
    assert [call[3] for call in model.calls] == [None, .95]
    box.controls["confidence"].value = .9
    assert [call[3] for call in model.calls] == [None, .95, .9]
    model.weights = 1
    box.controls["confidence"].value = .8
    assert [call[3] for call in model.calls] == [None, .95, .9, None, .8]


def test_the_identity_is_asked_for_only_when_draws_are_needed():
    asked = []
    class Slow(Model):
        @property
        def identity(self):
            asked.append(1)
            return super().identity
    box = leak_explorer(Slow(), QAS, n=(64, 128))
    before = len(asked)
    for value in (.5, .7, 1.0): box.controls["leak_at"].value = value
    assert len(asked) == before


def test_a_claim_names_the_prompt_where_the_draws_know_it():
    class Named(Model):
        def draw(self, *args, **how):
            drawn = super().draw(*args, **how)
            for d in drawn: d.prompt = "asked through its chat template"
            return drawn
    for box in (leak_explorer(Named(), QAS, n=(64,)), temperature_explorer(Named(), QAS, n=64)):
        assert "at most 48 tokens, asked through its chat template)" in box.claim.value


def test_a_withheld_greedy_answer_is_said():
    class Silent(Model):
        def texts(self, qa, n, decoding): return super().texts(qa, n, decoding) if decoding.temperature else [None] * n
    box = leak_explorer(Silent(), QAS, n=(64,))
    assert "no greedy answer came" in box.claim.value and "Greedy scores" not in box.picture.value


# --- what is shown ---

def test_what_a_model_says_is_escaped():
    qa = QA("q", "?", "<i>Ann</i>", keywords=("<i>Ann</i>",))
    assert with_marks("so: <i>ann</i>!", qa) == "so: <mark>&lt;i&gt;ann&lt;/i&gt;</mark>!"
    draws = draws_from_texts("q", ["<script>1</script>", "<i>Ann</i>"])
    assert "<script>" not in top_answers(draws, qa) and "<script>" not in tree_browser(draws, qa).claim.value


def test_branches_share_out_all_draws():
    draws = draws_from_texts("q", ["a b c"] * 5 + ["a b d"] * 3 + ["a e"] + [None])
    assert branches(draws) == {"": .9, "a": .9, "a b": pytest.approx(.8)}
    x = np.array([1, 0, 0])
    assert branch_claim(draws, x, "a b").startswith("8 of 10 draws begin “a b”; 5 of these")
    assert "certainty" not in branch_claim(draws, x)


def test_guesses_are_recorded_once_and_only_then_compared():
    box = predict({"a": .01, "b": lambda: .3})
    assert guess_figure(box.record).axes[0].get_title() == "No guess yet"
    box.controls["guess"].value = .02
    for _ in range(2): box.button.click()
    box.controls["asked"].value = "b"
    box.button.click()                                  # the slider stands where it stood before anybody touched it
    assert len(box.record) == 1 and "An untouched slider is no guess" in box.claim.value
    box.controls["guess"].value = .02
    assert box.record == [("a", .02, .01)] and ".3" not in box.claim.value
    box.button.click()
    assert box.record[1] == ("b", .02, .3) and "1 of 2 guesses" in box.picture.value
    plt.close("all")


def test_import_loads_no_torch():
    heavy = "{'torch', 'transformers', 'scipy.stats', 'jinja2'}"
    code = f"import sys, probunlearn.widgets; print(*{heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def both(path):
    "Whether a lesson shows a widget and draws figures of its own."
    text = path.read_text(encoding="utf-8")
    return ".widgets import" in text and "with style():" in text


LESSONS = sorted(path.stem for path in (NBS/"tutorials").glob("*.ipynb") if both(path))


def shows_figure(cell): return any("image/png" in output.get("data", {}) for output in cell.outputs)


@pytest.mark.parametrize("lesson", LESSONS)
def test_figures_after_a_widget_are_shown(lesson):
    "A widget that is the first to draw must not switch off the figures of the cells below it."
    cells = nbformat.read(NBS/"tutorials"/f"{lesson}.ipynb", as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    drawing = [cell for cell in code if cell.source.startswith("with style():") or "plt.subplots(" in cell.source]
    assert drawing and all(map(shows_figure, drawing))
