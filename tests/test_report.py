"""Reports from plain texts, without a model: every sentence against the numbers it stands on, missing draws, and pages that open safely."""
import hashlib
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import matplotlib
matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
from scipy import stats

from probunlearn.bounds import binary_bound, mean_bound, rounded
from probunlearn.data import QA
from probunlearn.draws import Decoding, Draws, draws_from_texts
from probunlearn.questions import certified, difference_bound, pooled_mean
from probunlearn.reading import versus
from probunlearn.report import Asked, Board, Report, as_json, certain_leak
from probunlearn.sequential import RateSequence
from probunlearn.statement import _worst, greedy_against_draws

QAS = [QA("one", "Who paints?", "Zorplax Quim paints.", ("Zorplax", "Quim")),
       QA("two", "What city?", "The city of Trelb.", ("Trelb",)), QA("three", "Which book?", "The book Ovnik.", ("Ovnik",))]
DECODING = Decoding(top_k=7, max_new_tokens=9)
CLEAN = "nobody knows"
N = 40


def asked(rows, greedy=None, qas=QAS):
    "Draws and greedy answers (clean unless given) from lists of texts."
    greedy = greedy or [CLEAN] * len(rows)
    return Asked(qas[:len(rows)], [draws_from_texts(qa.id, row, decoding=DECODING) for qa, row in zip(qas, rows)], [draws_from_texts(qa.id, [g]) for qa, g in zip(qas, greedy)])


def row(*said, n=N): return list(said) + [CLEAN] * (n - len(said))


ROWS = [row(*["It is Zorplax Quim"] * 3, *["only quim"] * 5), row("Trelb"), row()]     # 3, 1 and 0 leaks; five half leaks
def a_report(rows=ROWS, greedy=None, name="NPO", **how): return Report(name, asked(rows, greedy), **how)


# --- claims and numbers --------------------------------

def test_the_first_sentence_says_what_was_seen():
    seen = a_report(greedy=[CLEAN, "Trelb!", CLEAN]).claims[0]
    assert "Greedy decoding leaks on 1 of 3 questions" in seen and f"{N:,} draws" in seen
    assert "some draw leaks on 2, 1 of which greedy decoding calls clean" in seen


@pytest.mark.parametrize("alpha, leak_at", [(.01, 1.), (.2, .5)])
def test_each_claim_carries_its_whole_scope(alpha, leak_at):
    r = a_report(alpha=alpha, leak_at=leak_at)
    for name, bound in r.bounds.items():
        assert bound.alpha == alpha and bound.n == N and str(bound) in r.claims, name
        parts = f"α = {alpha:g}", f"n = {N}", "fixed-n", bound.scope, bound.method, f"key words (fraction) ≥ {leak_at:g}", str(DECODING), "model NPO"
        assert [part for part in parts if part not in str(bound)] == [], name
    assert "jointly for 3 questions" in str(r.bounds["worst question"]) and "fixed set of 3" in str(r.bounds["average leak"])


@pytest.mark.parametrize("leak_at, leaks", [(1., [3, 1, 0]), (.5, [8, 1, 0])])
def test_bounds_are_those_of_the_counts(leak_at, leaks):
    r, alpha = a_report(leak_at=leak_at, alpha=.05), .05
    x = np.array([[1.] * 3 + [.5] * 5 + [0] * 32, [1.] + [0] * 39, [0.] * 40])
    assert (r.x == x).all() and r.leaks.sum(1).tolist() == leaks
    assert float(r.bounds["worst question"]) == pytest.approx(binary_bound(max(leaks), N, alpha / 3).value)
    assert float(r.bounds["average leak"]) == pytest.approx(binary_bound(sum(leaks), 3 * N, alpha).value)
    assert float(r.bounds["certified questions"]) == certified(leaks, N, .01, alpha).sum()
    assert float(r.bounds["average score"]) == pooled_mean(x, alpha).value
    frame = r.to_frame()
    assert list(frame.index) == ["one", "two", "three"] and frame.leaks.tolist() == leaks and frame.distinct.tolist() == [3, 2, 1]
    np.testing.assert_allclose(frame.rate_upper, binary_bound(leaks, N, alpha).value)
    np.testing.assert_allclose(frame.rate_lower, binary_bound(leaks, N, alpha, side="lower").value)
    np.testing.assert_allclose(frame["mean"], x.mean(1))
    np.testing.assert_allclose(frame.mean_upper, mean_bound(x, alpha).value)


def test_the_summary_is_the_frame_in_one_row():
    r = Report("full", asked(ROWS, ["Trelb", "Trelb it is", "  "]), asked([row("Zorplax Quim", n=4)], ["Zorplax Quim"]))
    s = r.summary()
    assert (s["greedy"], s["rate"], s["some_draw"]) == pytest.approx((1 / 3, 4 / (3 * N), 2 / 3))
    assert (s["words"], s["empty"], s["retain"], s["retain_draws"], s["retain_distinct"]) == pytest.approx((1, 1 / 3, 1, 1 / 4, 2 / 4))
    assert s["bound"] == float(r.bounds["average leak"]) and s["worst"] == float(r.bounds["worst question"]) and s["certain"] == 1


def test_certain_bounds_are_sums_of_probabilities():
    answers, p = ["Zorplax Quim", "quim", CLEAN], np.array([.125, .25, .5])
    d = Draws("one", answers, np.array([0, 1, 2, 2]), logprobs=np.log(p))
    for leak_at, sure in ((1., .125), (.5, .375)):
        assert certain_leak(d, QAS[0], "keywords", leak_at) == pytest.approx((sure, sure + .125))   # 1/8 of the mass was never seen
    d.logprobs = None
    assert certain_leak(d, QAS[0], "keywords", 1.) == (0, 1)


def test_a_score_of_ones_own_is_named():
    def shouts(answer, qa): return float(answer.isupper())
    r = a_report([row("TRELB")], score=shouts, leak_at=.5)
    assert r.leaks.sum() == 1 and "shouts ≥ 0.5" in r.claims[1]


def test_what_is_read_first_names_decoding_leak_and_draws():
    for text in (a_report(leak_at=.5).body(), a_report(leak_at=.5).card().replace("\\", "")):
        assert f"drawn at {DECODING} (40 to each question were), and a leak is key words (fraction) ≥ 0.5." in text


def test_one_report_has_one_decoding_and_a_difference_names_both():
    hot, cold = (replace(DECODING, temperature=t) for t in (1.3, 0))
    def at(name, *decodings): return Report(name, Asked(QAS[:2], [replace(d, decoding=how) for d, how in zip(asked(ROWS[:2]).draws, decodings)], asked(ROWS[:2]).greedy))
    with pytest.raises(ValueError, match=r"'one' was drawn at temperature 1.3, .*'two' at temperature 0, .*a report for each"): at("m", hot, cold)
    assert versus([at("a", hot, hot), at("b", cold, cold)]).notes[0].endswith(f"b: {cold}; a: {hot}).")
    assert versus([at("a", hot, hot), at("b", hot, hot)]).notes[0].endswith(f", {hot}).")


# --- the worst questions, picked by what leaked --------------------------------

def drawn(hits, **how):
    "A report on draws (question, draw) of which some leak."
    qas = [QA(f"q{i}", f"Question {i}?", "Zorplax.", ("Zorplax",)) for i in range(len(hits))]
    return Report("m", asked([["Zorplax" if hit else CLEAN for hit in row] for row in hits], qas=qas), **how)


def counted(leaks, n, **how): return drawn(np.arange(n) < np.reshape(leaks, (-1, 1)), **how)


def said(page): return np.array(re.findall(r"leak probability is at least ([\d.e-]+) % and at most ([\d.e-]+) %", page), float) / 100     # (cases, 2)


def test_what_is_printed_of_the_worst_questions_is_false_in_alpha_of_reports_at_most():
    "150 reports on 40 questions that all leak with probability 0.1, alpha = 0.05: 21 or more false pages have probability below 1e-4 if the claim is true."
    rng, false = np.random.default_rng(0), 0
    for _ in range(150):
        lower, upper = said(_worst(counted(rng.binomial(100, .1, 40), 100, alpha=.05))).T
        false += bool((lower > .1).any() or (upper < .1).any())
    assert stats.binom.sf(20, 150, .05) < 1e-4 and false <= 20


@pytest.mark.parametrize("anytime", [False, True], ids=["fixed n", "anytime"])
def test_ends_of_the_worst_questions_are_those_for_all_questions(anytime):
    leaks, alpha = [9, 0, 4, 1, 0, 0, 2], .02
    r, x = counted(leaks, 60, alpha=alpha, anytime=anytime), np.array([[1.] * k + [0] * (60 - k) for k in leaks])
    low, high = (RateSequence(alpha / 7, "two-sided").add(x).bound if anytime else binary_bound(leaks, 60, alpha / 7, "two-sided")).value.T
    picked = [0, 2, 6, 3, 1, 4, 5]
    np.testing.assert_allclose(said(_worst(r)), np.stack([low, high], 1)[picked[:3]], rtol=.011)       # three digits
    assert (np.array(re.findall(r"([\d.e-]+) % to ([\d.e-]+) %", r.card()), float) / 100 == said(_worst(r))).all()
    assert all("both ends jointly for 7 questions, confidence 98 %" in text for text in (_worst(r), r.card()))
    ax = greedy_against_draws(r)
    np.testing.assert_allclose([line[:, 0] for line in ax.collections[0].get_segments()], np.stack([low, high], 1)[picked])
    assert "jointly for 7 questions, confidence 98 %" in ax.get_xlabel()
    plt.close(ax.figure)


# --- missing draws --------------------------------

MISSING = [[None] * 4 + row("Zorplax Quim", n=N - 4), [None] * 2 + row(n=N - 2), row()]    # real leaks 1, 0, 0; missing 4, 2, 0

def test_missing_draws_are_leaks_in_every_upper_bound():
    r, frame = a_report(MISSING), a_report(MISSING).to_frame()
    worst = [5, 2, 0]
    np.testing.assert_allclose(frame.rate_upper, binary_bound(worst, N).value)
    np.testing.assert_allclose(frame.mean_upper, mean_bound(np.nan_to_num(r.x, nan=1)).value)
    assert float(r.bounds["worst question"]) == pytest.approx(binary_bound(5, N, .01 / 3).value)
    assert float(r.bounds["average leak"]) == pytest.approx(binary_bound(7, 3 * N).value)
    assert float(r.bounds["average score"]) == pooled_mean(np.nan_to_num(r.x, nan=1)).value


def test_missing_draws_are_no_leaks_in_lower_bounds_or_in_what_was_seen():
    r = a_report(MISSING)
    np.testing.assert_allclose(r.to_frame().rate_lower, binary_bound([1, 0, 0], N, side="lower").value)
    assert "some draw leaks on 1, 1 of which" in r.claims[0] and r.summary()["some_draw"] == pytest.approx(1 / 3)


def test_missing_draws_still_make_a_page(tmp_path): assert a_report(MISSING).save(tmp_path/"r.html").exists()


@pytest.mark.parametrize("rows, greedy", [(ROWS, [CLEAN, None, CLEAN]), ([ROWS[0], [None] * N, ROWS[2]], None)], ids=["greedy", "all draws"])
def test_nothing_to_report_on_is_refused_by_name(rows, greedy):
    with pytest.raises(ValueError, match="two"): a_report(rows, greedy)


# --- bad input --------------------------------

@pytest.mark.parametrize("how, match", [(dict(score="bleu"), "bleu"), (dict(leak_at=0), "leak_at"), (dict(leak_at=1.5), "leak_at"), (dict(leak_at=math.nan), "leak_at"),
                                        (dict(looks=0), "looks"), (dict(models=0), "models")], ids=str)
def test_bad_settings_are_refused(how, match):
    with pytest.raises(ValueError, match=match): a_report(**how).bounds


def test_draws_of_other_questions_are_refused():
    good = asked(ROWS)
    with pytest.raises(ValueError, match="draws belong to"): Asked(QAS, good.draws[::-1], good.greedy)
    with pytest.raises(ValueError, match="greedy belong to"): Asked(QAS, good.draws, good.greedy[:2])
    with pytest.raises(ValueError, match="duplicate"): Asked([QAS[0]] * 2, good.draws[:1] * 2, good.greedy[:1] * 2)


# --- pages --------------------------------

NASTY = ["<script>alert('Zorplax Quim')</script>", "</td></table></details>&amp; <b>Zorplax</b> & Quim", "<img src=http://leak.example/x onerror=alert(1)>", "</body><!-- \"'"]

SVG = "path", "use"     # drawn with or without an end tag

class Page(HTMLParser):
    "Tags, attributes and text of a page; which tags were left open."
    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = set(), [], "", []
        self.feed(text)
        self.close()
    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in ("meta", "br", "img") and tag not in SVG: self.open.append(tag)
    def handle_startendtag(self, tag, attrs): self.tags.add(tag), self.attributes.extend(attrs)
    def handle_endtag(self, tag): assert tag in SVG or self.open.pop() == tag
    def handle_data(self, data): self.text += data


def nasty_report():
    qas = [QA("<i>", "<script>Who?</script>", "Zorplax & Quim</p>", ("Zorplax", "Quim"))]
    return Report("<u>model</u>", asked([row(*NASTY)], [NASTY[0]], qas), how=dict(template="<script>{question}</script>"))


@pytest.mark.parametrize("board", [False, True], ids=["report", "board"])
def test_a_page_stands_alone_and_shows_text_as_text(tmp_path, board):
    result = Board([nasty_report()], name="<u>board</u>") if board else nasty_report()
    source = result.save(tmp_path/"deep"/"r").read_text(encoding="utf-8")
    page = Page(source)
    assert source.lower().startswith("<!doctype html>") and page.open == []
    assert not page.tags & {"script", "link", "iframe", "u", "b", "object"} and "<script" not in source
    assert all(v.startswith("#") for k, v in page.attributes if k in ("src", "href", "xlink:href")) and "url(http" not in source and "@import" not in source and not [k for k, _ in page.attributes if k.startswith("on")]
    assert "<u>model</u>" in page.text and "http" not in re.sub(re.escape("http://leak.example"), "", page.text)
    assert all(text in page.text for text in [*NASTY, "<script>Who?</script>", "Zorplax & Quim</p>"])
    assert (tmp_path/"deep"/"r.png").read_bytes().startswith(b"\x89PNG")
    card = (tmp_path/"deep"/"r.md").read_text(encoding="utf-8")
    assert "<script" not in card and "<u>" not in card and "http://" not in card and hashlib.sha256((tmp_path/"deep"/"r.json").read_bytes()).hexdigest() in card and hashlib.sha256((tmp_path/"deep"/"r.json").read_bytes()).hexdigest() in source


def test_json_holds_every_answer_and_every_scope(tmp_path):
    r = a_report()
    d = json.loads(r.save(tmp_path/"r.html").with_suffix(".json").read_text(encoding="utf-8"), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert d["claims"] == r.claims and d["summary"] == r.summary() and (d["name"], d["score"], d["leak_at"], d["alpha"]) == ("NPO", "key words (fraction)", 1, .01)
    for q, asked_for in zip(d["questions"], r.forget.draws): assert {a["answer"]: a["draws"] for a in q["answers"]} == dict(zip(asked_for.answers, asked_for.counts))
    for name, b in r.bounds.items():
        for part in ("value", "alpha", "side", "method", "n", "quantity", "scope", "sampling", "decoding"): assert d["bounds"][name][part] == getattr(b, part), (name, part)


# --- boards --------------------------------

def three(): return [a_report([row(*["Trelb Zorplax Quim"] * k)] * 2, name=f"model {k}") for k in (4, 1, 2)]


def test_the_best_of_a_board_pays_for_the_choice():
    board = Board(three() + [a_report([row()] * 2, name="retain")], reference=("retain",))
    best, alone = board.best(), three()[1]
    assert best.name == "model 1"
    for name, b in best.bounds.items(): assert b.alpha == pytest.approx(.03) and "at 3 models" in str(b) and b.value == alone.bounds[name].value
    assert list(board.to_frame().index) == ["model 4", "model 1", "model 2", "retain"]


def test_boards_refuse_what_they_cannot_compare():
    with pytest.raises(ValueError, match="at least one report"): Board([])
    with pytest.raises(ValueError, match="other questions"): Board([a_report(), a_report(ROWS[:2], name="other")])
    with pytest.raises(ValueError, match="reference"): Board(three(), reference=("model 1", "model 2", "model 4")).best()


def test_a_board_compares_bounds_of_one_kind():
    a, b, c = counted([0], 64, alpha=.01), counted([0], 64, alpha=.4), counted([0], 16, leak_at=.5)
    for other, match in ((b, "alpha = 0.4, not .* alpha = 0.01"), (c, "≥ 0.5, .* not .* ≥ 1,"), (replace(a, score="exact_match"), "another score")):
        with pytest.raises(ValueError, match=match): Board([a, other])
    Board([a, replace(a, alpha=.01 / 3, looks=3)])                         # the same alpha, shared among looks


def test_what_may_differ_between_rows_is_said_row_by_row():
    a, b = counted([0, 0], 64), replace(counted([0, 0], 16), name="b", models=4)
    text = re.sub("<[^>]+>", " ", Board([a, b]).body())
    assert "Draws of each question: 64 (m); 16 (b)." in text and "confidence 99 % (m); confidence 96 % (b)." in text and f"Decoding: {DECODING}." in text


def test_nothing_is_claimed_when_nothing_is_left_of_alpha():
    for anytime in (False, True):
        best = Board([counted([0], 8, alpha=.3, anytime=anytime)] * 4).best()
        for read in (lambda: best.bounds, lambda: best.confidence):
            with pytest.raises(ValueError, match="draw again with a fresh seed"): read()


def test_the_best_pays_for_every_model_that_stood_behind_a_rival():
    rivals = [replace(counted([k], 64), models=m) for k, m in ((0, 1), (5, 9), (7, 3))]
    assert Board(rivals).best().models == 13


def test_a_difference_pays_for_the_choice_of_both():
    first, other = replace(counted([9, 3], 64), name="a", models=2), replace(counted([1, 0], 64), name="b", models=5, looks=3, alpha=.01 / 3)
    low, high = pooled_difference(other, first, .05 / 30)
    note = versus([first, replace(other, alpha=.01, looks=1)], .05).notes[0]
    assert f"between {rounded(low, 'lower')} and {rounded(high)} with confidence 95 % (α = 0.05, n = 64, best of 3 looks at 10 models" in versus([first, other], .05).notes[0]
    low, high = pooled_difference(other, first, .05 / 10)
    assert f"between {rounded(low, 'lower')} and {rounded(high)} with confidence 95 %" in note and "best of 1 look at 10 models" in note


def pooled_difference(a, b, alpha): return difference_bound(a.leaks * 1., b.leaks * 1., alpha, pooled=True).value


def test_a_difference_to_the_best_of_many_is_wrong_in_alpha_of_runs_at_most():
    "40 boards of 60 equal models that leak with probability 0.2, the best against one that always leaks, alpha = 0.05: 9 or more misses have probability below 1e-3 if the claim is true."
    rng, always, misses = np.random.default_rng(0), counted([200], 200), 0
    for _ in range(40):
        best = Board([drawn(rng.random((1, 200)) < .2) for _ in range(60)]).best()
        low, high = map(float, re.search(r"between (-?[\d.e-]+) and (-?[\d.e-]+)", versus([always, best], .05).notes[0]).groups())
        misses += not low <= -.8 <= high
    assert stats.binom.sf(8, 40, .05) < 1e-3 and misses <= 8


def test_a_board_is_saved_whole(tmp_path):
    board = Board(three(), name="three models")
    d = json.loads(board.save(tmp_path/"index.html").with_suffix(".json").read_text())
    assert d == json.loads(json.dumps(as_json(board), default=str)) and [m["name"] for m in d["models"]] == [r.name for r in board.reports]


def test_boards_of_strangers_and_namesakes():
    "Other questions under the same ids, equal names, a reference that isn't there."
    report = a_report()
    other = replace(report, forget=Asked([replace(qa, answer=qa.answer + " Not.") for qa in report.forget.qas], report.forget.draws, report.forget.greedy))
    with pytest.raises(ValueError, match="was asked other questions"): Board([report, other])
    board = Board([report, replace(report), replace(report, name="third")])
    assert [r.name for r in board.reports] == [f"{report.name} (1)", f"{report.name} (2)", "third"] == list(board.to_frame().index)
    with pytest.raises(ValueError, match="no report is called p9; there are"): Board([report], reference=("p9",))


def test_names_with_a_dot(tmp_path):
    "A version number is no suffix; other formats are refused."
    report = a_report()
    paths = [report.save(tmp_path/name) for name in ("llama-3.1", "llama-3.2", "a.html", "b")]
    assert [p.name for p in paths] == ["llama-3.1.html", "llama-3.2.html", "a.html", "b.html"]
    assert (tmp_path/"llama-3.1.json").is_file() and (tmp_path/"llama-3.2.png").is_file()
    with pytest.raises(ValueError, match="not .pdf"): report.save(tmp_path/"c.pdf")
