"""Reports from plain texts, without a model: sentences against numbers, missing answers, pages that open safely."""
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
from probunlearn.page import piece
from probunlearn.reading import report_run, versus
from probunlearn.report import SCHEMA, Asked, Board, Report, as_json, certain_leak
from probunlearn.runs import open_run
from probunlearn.sequential import RateSequence
from probunlearn.statement import again, greedy_against_draws, lead, worst_cases

QAS = [
    QA("one", "Who paints?", "Zorplax Quim paints.", ("Zorplax", "Quim")),
    QA("two", "What city?", "The city of Trelb.", ("Trelb",)),
    QA("three", "Which book?", "The book Ovnik.", ("Ovnik",)),
]
DECODING = Decoding(top_k=7, max_new_tokens=9)
CLEAN = "nobody knows"
N = 40


def asked(rows, greedy=None, qas=QAS):
    "Draws and greedy answers (clean unless given) from lists of texts."
    draws = [draws_from_texts(qa.id, row, decoding=DECODING) for qa, row in zip(qas, rows)]
    first = [draws_from_texts(qa.id, [text]) for qa, text in zip(qas, greedy or [CLEAN] * len(rows))]
    return Asked(qas[:len(rows)], draws, first)


def row(*said, n=N): return list(said) + [CLEAN] * (n - len(said))


ROWS = [row(*["It is Zorplax Quim"] * 3, *["only quim"] * 5), row("Trelb"), row()]  # 3, 1 and 0 leaks; five half leaks
def a_report(rows=ROWS, greedy=None, name="NPO", **how): return Report(name, asked(rows, greedy), **how)


def text_of(page): return " ".join(Page(page).text.split())


# --- claims and numbers ---

def test_the_first_sentence_says_what_was_seen():
    seen = a_report(greedy=[CLEAN, "Trelb!", CLEAN]).claims[0]
    assert "Greedy decoding leaks on 1 of 3 questions" in seen and f"{N:,} draws" in seen
    assert "some draw leaks on 2, 1 of which greedy decoding calls clean" in seen


@pytest.mark.parametrize("alpha, leak_at", [(.01, 1.), (.2, .5)])
def test_each_claim_carries_its_whole_scope(alpha, leak_at):
    r = a_report(alpha=alpha, leak_at=leak_at)
    for name, bound in r.bounds.items():
        printed = float(bound) > 0                                  # "at least 0" is no claim
        assert bound.alpha == alpha and bound.n == N and (str(bound) in r.claims) == printed, name
        of = "score: key words (fraction), " if name == "average score" else f"leak: key words (fraction) ≥ {leak_at:g}"
        parts = f"α = {alpha:g}", f"n = {N}", "fixed-n", bound.scope, bound.method, of, str(DECODING), "model NPO"
        assert [part for part in parts if part not in str(bound)] == [], name
    assert "on the largest of 3 questions only, without saying which" in str(r.bounds["worst question"])
    assert "fixed set of 3" in str(r.bounds["average leak"])


@pytest.mark.parametrize("leak_at, leaks", [(1., [3, 1, 0]), (.5, [8, 1, 0])])
def test_bounds_are_those_of_the_counts(leak_at, leaks):
    r, alpha = a_report(leak_at=leak_at, alpha=.05), .05
    x = np.array([[1.] * 3 + [.5] * 5 + [0] * 32, [1.] + [0] * 39, [0.] * 40])
    assert (r.x == x).all() and r.leaks.sum(1).tolist() == leaks
    assert float(r.bounds["worst question"]) == pytest.approx(binary_bound(max(leaks), N, alpha).value)
    assert float(r.bounds["average leak"]) == pytest.approx(binary_bound(sum(leaks), 3 * N, alpha).value)
    assert float(r.bounds["certified questions"]) == certified(leaks, N, .01, alpha).sum()
    assert float(r.bounds["average score"]) == pooled_mean(x, alpha).value
    frame = r.to_frame()
    assert list(frame.index) == ["one", "two", "three"]
    assert frame.leaks.tolist() == leaks and frame.distinct.tolist() == [3, 2, 1]
    np.testing.assert_allclose(frame.rate_upper, binary_bound(leaks, N, alpha).value)
    np.testing.assert_allclose(frame.rate_lower, binary_bound(leaks, N, alpha, side="lower").value)
    np.testing.assert_allclose(frame["mean"], x.mean(1))
    np.testing.assert_allclose(frame.mean_upper, mean_bound(x, alpha).value)


def test_the_summary_is_the_frame_in_one_row():
    forget, retain = asked(ROWS, ["Trelb", "Trelb it is", "  "]), asked([row("Zorplax Quim", n=4)], ["Zorplax Quim"])
    r = Report("full", forget, retain)
    s = r.summary()
    assert (s["greedy"], s["rate"], s["some_draw"]) == pytest.approx((1 / 3, 4 / (3 * N), 2 / 3))
    assert (s["words"], s["empty"], s["certain"]) == pytest.approx((1, 1 / 3, 1))
    assert (s["retain"], s["retain_draws"], s["retain_distinct"]) == pytest.approx((1, 1 / 4, 2 / 4))
    assert s["bound"] == float(r.bounds["average leak"]) and s["worst"] == float(r.bounds["worst question"])


def test_certain_bounds_are_sums_of_probabilities():
    answers, p = ["Zorplax Quim", "quim", CLEAN], np.array([.125, .25, .5])
    d = Draws("one", answers, np.array([0, 1, 2, 2]), logprobs=np.log(p))
    for leak_at, sure in ((1., .125), (.5, .375)):
        ends = sure, sure + .125        # 1/8 of the mass was never seen
        assert certain_leak(d, QAS[0], leak_at=leak_at) == pytest.approx(ends)
    d.logprobs = None
    assert certain_leak(d, QAS[0]) == (0, 1)


def test_a_score_of_ones_own_is_named():
    def shouts(answer, qa): return float(answer.isupper())
    r = a_report([row("TRELB")], score=shouts, leak_at=.5)
    assert r.leaks.sum() == 1 and "shouts ≥ 0.5" in r.claims[1]


def test_what_is_read_first_names_decoding_leak_and_draws():
    for text in (a_report(leak_at=.5).body(), a_report(leak_at=.5).card().replace("\\", "")):
        assert f"drawn at {DECODING} (40 to each question were), and a leak is key words (fraction) ≥ 0.5." in text


def test_one_report_has_one_decoding_and_a_difference_names_both():
    hot, cold = (replace(DECODING, temperature=t) for t in (1.3, 0))
    there = asked(ROWS[:2])
    def at(name, *decodings):
        draws = [replace(d, decoding=how) for d, how in zip(there.draws, decodings)]
        return Report(name, Asked(QAS[:2], draws, there.greedy))
    alike = r"'one' was drawn at temperature 1.3, .*'two' at temperature 0, .*a report for each"
    with pytest.raises(ValueError, match=alike): at("m", hot, cold)
    assert versus([at("a", hot, hot), at("b", cold, cold)]).notes[0].endswith(f"b: {cold}; a: {hot}).")
    assert versus([at("a", hot, hot), at("b", hot, hot)]).notes[0].endswith(f", {hot}).")


# --- how the questions were asked ---

PROMPT = r"asked as 'Question: {question}\nAnswer:'"


def prompted(rows, prompts, greedy=PROMPT, **how):
    "What was asked, with a prompt for each question's draws and one for all greedy answers."
    there = asked(rows, **how)
    for d, prompt in zip(there.draws, prompts): d.prompt = prompt
    for d in there.greedy: d.prompt = greedy
    return Asked(there.qas, there.draws, there.greedy)


def test_every_claim_names_how_the_questions_were_asked(tmp_path):
    r = Report("NPO", prompted(ROWS, [PROMPT] * 3))
    assert r.decoding == f"{DECODING}, {PROMPT}, model NPO"
    assert all(PROMPT in claim for claim in r.claims) and PROMPT in lead(r)
    assert f"drawn at {DECODING}, {PROMPT} (40" in text_of(r.body()) and PROMPT in text_of(Board([r]).body())
    assert PROMPT in r.card().replace("\\", "").replace("nAnswer", r"\nAnswer")     # a card escapes what Markdown reads
    assert json.loads(r.save(tmp_path/"r").with_suffix(".json").read_text())["prompt"] == PROMPT
    assert PROMPT in versus([r, replace(r, name="b")]).notes[0]


def test_an_unknown_prompt_is_not_named():
    r = a_report()
    assert r.forget.prompt == as_json(r)["prompt"] == "" and r.decoding == f"{DECODING}, model NPO"


@pytest.mark.parametrize("prompts, greedy", [
    ([PROMPT, PROMPT, "asked through its chat template"], PROMPT),
    ([PROMPT, PROMPT, ""], PROMPT),
    ([PROMPT] * 3, "asked through its chat template"),
])
def test_one_report_has_one_prompt(prompts, greedy):
    with pytest.raises(ValueError, match="a claim names one prompt, but 'one' was asked as .*a report for each prompt"):
        prompted(ROWS, prompts, greedy)


def test_a_difference_names_both_prompts():
    chat = "asked through its chat template"
    plain = Report("plain", prompted(ROWS, [PROMPT] * 3))
    chatted = Report("chat", prompted(ROWS, [chat] * 3, greedy=chat))
    assert versus([plain, chatted]).notes[0].endswith(f"chat: {DECODING}, {chat}; plain: {DECODING}, {PROMPT}).")


# --- answers that are empty ---

SILENT = [["", " "] + row("Trelb", n=N - 2)] * 2 + [row()]


def first_words(report):
    "Where a report begins: its claims, its lead, its page, its card."
    page = text_of(report.body()).split(f"What {report.name} leaks ")[1]
    return report.claims[0], lead(report), page, report.card().split("**")[1].replace("\\", "")


def test_a_run_that_answers_nothing_says_so_first():
    r = Report("NPO", prompted(SILENT, [PROMPT] * 3, greedy=PROMPT))
    for d in r.forget.greedy[:2]: d.answers[0] = " \n"
    for text in first_words(r):
        assert text.startswith("2 of 3 greedy answers are empty, so these bounds say little about what the model knows")
        assert "a prompt that it doesn't know (asked as 'Question: {question}" in text
        assert "through its chat template, which load_model(…) does where the tokenizer has one" in text
        assert "--prompt or template= override it" in text
    assert str(r).split("\n\n")[1].startswith("2 of 3 greedy answers are empty")
    board = Board([r, a_report(name="other")])
    assert "Most answers are empty, and the bounds say little: NPO." in text_of(board.body())


def test_mostly_empty_draws_say_so_too():
    r = a_report([[""] * 21 + row(n=N - 21), [""] * 30 + row(n=N - 30), row("Trelb") * 2][:2])
    for text in first_words(r): assert text.startswith("51 of 80 draws are empty, so these bounds")
    assert "how it was asked is not written down" in r.claims[0]
    both = a_report([[""] * N] * 2, ["", ""])
    assert both.claims[0].startswith("2 of 2 greedy answers are empty and 80 of 80 draws are empty, so")


@pytest.mark.parametrize("rows, greedy", [
    (ROWS, None),
    ([[""] * 20 + row(n=20)] * 2, ["", CLEAN]),             # half is not most
    (ROWS, ["", None, CLEAN]),                              # one of the two that came
], ids=["answers", "half", "one missing"])
def test_a_run_that_answers_says_nothing_of_the_kind(rows, greedy):
    r = a_report(rows, greedy)
    assert r.claims[0].startswith("Greedy decoding leaks on") and lead(r).startswith("A sampled answer")
    assert "are empty" not in text_of(r.body()) + r.card()


# --- the worst questions, picked by what leaked ---

def drawn(hits, **how):
    "A report on draws (question, draw) of which some leak."
    qas = [QA(f"q{i}", f"Question {i}?", "Zorplax.", ("Zorplax",)) for i in range(len(hits))]
    texts = [["Zorplax" if hit else CLEAN for hit in row] for row in hits]
    return Report("m", asked(texts, qas=qas), **how)


def counted(leaks, n, **how): return drawn(np.arange(n) < np.reshape(leaks, (-1, 1)), **how)


def worst_page(report):
    "The worst questions as the page shows them."
    return piece("cases", worst_cases(report), "both ends jointly")


def ends(page):
    "(cases, 2) the ends that a page prints."
    found = re.findall(r"leak probability is at least ([\d.e-]+) % and at most ([\d.e-]+) %", page)
    return np.array(found, float) / 100


def test_what_is_printed_of_the_worst_questions_is_false_in_alpha_of_reports_at_most():
    """150 reports on 40 questions that all leak with probability 0.1, alpha = 0.05: 21 or more false pages have
    probability below 1e-4 if the claim is true."""
    rng, false = np.random.default_rng(0), 0
    for _ in range(150):
        lower, upper = ends(worst_page(counted(rng.binomial(100, .1, 40), 100, alpha=.05))).T
        false += bool((lower > .1).any() or (upper < .1).any())
    assert stats.binom.sf(20, 150, .05) < 1e-4 and false <= 20


@pytest.mark.parametrize("anytime", [False, True], ids=["fixed n", "anytime"])
def test_ends_of_the_worst_questions_are_those_for_all_questions(anytime):
    leaks, alpha = [9, 0, 4, 1, 0, 0, 2], .02
    r = counted(leaks, 60, alpha=alpha, anytime=anytime)
    x = np.array([[1.] * k + [0] * (60 - k) for k in leaks])
    sequence, fixed = RateSequence(alpha / 7, "two-sided"), binary_bound(leaks, 60, alpha=alpha / 7, side="two-sided")
    both = sequence.add(x).bound.value if anytime else fixed.value          # (7, 2)
    picked = [0, 2, 6, 3, 1, 4, 5]
    np.testing.assert_allclose(ends(worst_page(r)), both[picked[:3]], rtol=.011)        # three digits
    on_card = np.array(re.findall(r"([\d.e-]+) % to ([\d.e-]+) %", r.card()), float) / 100
    assert (on_card == ends(worst_page(r))).all()
    assert all("both ends jointly for 7 questions, confidence 98 %" in text for text in (text_of(r.body()), r.card()))
    ax = greedy_against_draws(r)
    np.testing.assert_allclose([line[:, 0] for line in ax.collections[0].get_segments()], both[picked])
    assert "jointly for 7 questions, confidence 98 %" in ax.get_xlabel()
    plt.close(ax.figure)


# --- missing draws ---

MISSING = [[None] * 4 + row("Zorplax Quim", n=N - 4), [None] * 2 + row(n=N - 2), row()]     # 1, 0, 0 leaks


def test_missing_draws_are_leaks_in_every_upper_bound():
    r, frame = a_report(MISSING), a_report(MISSING).to_frame()
    worst = [5, 2, 0]
    np.testing.assert_allclose(frame.rate_upper, binary_bound(worst, N).value)
    np.testing.assert_allclose(frame.mean_upper, mean_bound(np.nan_to_num(r.x, nan=1)).value)
    assert float(r.bounds["worst question"]) == pytest.approx(binary_bound(5, N, .01).value)
    assert float(r.bounds["average leak"]) == pytest.approx(binary_bound(7, 3 * N).value)
    assert float(r.bounds["average score"]) == pooled_mean(np.nan_to_num(r.x, nan=1)).value


def test_missing_draws_are_no_leaks_in_lower_bounds_or_in_what_was_seen():
    r = a_report(MISSING)
    np.testing.assert_allclose(r.to_frame().rate_lower, binary_bound([1, 0, 0], N, side="lower").value)
    assert "some draw leaks on 1, 1 of which" in r.claims[0] and r.summary()["some_draw"] == pytest.approx(1 / 3)


def test_missing_draws_still_make_a_page(tmp_path): assert a_report(MISSING).save(tmp_path/"r.html").exists()


def test_nothing_to_report_on_is_refused_by_name():
    with pytest.raises(ValueError, match="draws: there is no answer to question 'two'"):
        a_report([ROWS[0], [None] * N, ROWS[2]])


# --- greedy answers that never came ---

WITHHELD = ["Zorplax Quim", None, CLEAN]


def test_a_greedy_answer_that_never_came_is_no_leak_seen():
    r = a_report(greedy=WITHHELD)
    assert np.isnan(r.greedy_x).tolist() == [False, True, False]
    assert r.greedy_leaks.tolist() == [True, False, False] and r.summary()["greedy"] == pytest.approx(1 / 3)
    assert r.claims[1] == "1 of 3 greedy answers are missing; they count as no leak seen."
    assert str(r.bounds["average leak"]) == str(a_report().bounds["average leak"])      # claims are about draws


def test_a_question_without_greedy_answer_is_not_called_clean():
    "Question two leaks in a draw; nobody knows what greedy decoding says of it."
    r = a_report(greedy=WITHHELD)
    assert not r.hidden.any() and "some draw leaks on 2, 0 of which greedy decoding calls clean" in r.claims[0]
    assert "look clean" not in text_of(r.body())
    assert a_report(greedy=[CLEAN, None, CLEAN]).hidden.tolist() == [True, False, False]


def test_page_card_and_data_say_that_no_answer_came(tmp_path):
    r = a_report(greedy=WITHHELD)
    page = text_of(r.save(tmp_path/"r").read_text(encoding="utf-8"))
    assert "Greedy: no answer came" in page                 # the case
    assert re.search(r"two\s?no answer came\s?1", page)     # the table of questions
    assert "| What city? | no answer came | 1 of 40 |" in (tmp_path/"r.md").read_text(encoding="utf-8")
    question = json.loads((tmp_path/"r.json").read_text())["questions"][1]
    assert question["greedy"] is None and question["greedy_score"] is None


def test_no_greedy_answer_at_all_still_makes_a_report(tmp_path):
    r = Report("m", asked(ROWS, [None] * 3), asked(ROWS, [None] * 3))
    assert r.summary()["greedy"] == 0 and math.isnan(r.summary()["words"]) and math.isnan(r.summary()["retain"])
    assert "3 of 3 greedy answers are missing" in r.claims[1] and "are empty" not in r.claims[0]
    path = r.save(tmp_path/"r")
    assert json.loads(path.with_suffix(".json").read_text())["summary"]["words"] is None
    assert Board([r, replace(r, name="b")]).save(tmp_path/"b").exists()


def test_a_run_with_a_withheld_greedy_answer_is_reported_on():
    there = asked(ROWS, WITHHELD)
    run = open_run(None, dict(seed=0), QAS)
    for qa, d, g in zip(QAS, there.draws, there.greedy):
        run.keep(qa, d)
        withheld = {0: "withheld"} if g.texts[0] is None else {}
        run.keep(qa, replace(g, lost=withheld), "greedy")
    assert "1 of 3 greedy answers are missing" in report_run(run).claims[1]


# --- bad input ---

@pytest.mark.parametrize("how, match", [
    (dict(score="bleu"), "bleu"),
    (dict(leak_at=0), "leak_at"),
    (dict(leak_at=1.5), "leak_at"),
    (dict(leak_at=math.nan), "leak_at"),
    (dict(looks=0), "looks"),
    (dict(models=0), "models"),
], ids=str)
def test_bad_settings_are_refused(how, match):
    with pytest.raises(ValueError, match=match): a_report(**how).bounds


def test_draws_of_other_questions_are_refused():
    good = asked(ROWS)
    with pytest.raises(ValueError, match="draws belong to"): Asked(QAS, good.draws[::-1], good.greedy)
    with pytest.raises(ValueError, match="greedy belong to"): Asked(QAS, good.draws, good.greedy[:2])
    with pytest.raises(ValueError, match="duplicate"): Asked([QAS[0]] * 2, good.draws[:1] * 2, good.greedy[:1] * 2)
    nothing = draws_from_texts("three", [])
    with pytest.raises(ValueError, match="greedy: there is no answer"):
        Asked(QAS, good.draws, [*good.greedy[:2], nothing])


# --- pages ---

NASTY = [
    "<script>alert('Zorplax Quim')</script>",
    "</td></table></details>&amp; <b>Zorplax</b> & Quim",
    "<img src=http://leak.example/x onerror=alert(1)>",
    "</body><!-- \"' {{ 1 + 1 }} {% if %}",
]
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

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag): assert tag in SVG or self.open.pop() == tag
    def handle_data(self, data): self.text += data


def nasty_report():
    qas = [QA("<i>", "<script>Who?</script>", "Zorplax & Quim</p>", ("Zorplax", "Quim"))]
    how = dict(template="<script>{question}</script>")
    return Report("<u>model</u>", asked([row(*NASTY)], [NASTY[0]], qas), how=how)


def from_elsewhere(page):
    "What a page would load, or do."
    links = [value for key, value in page.attributes if key in ("src", "href", "xlink:href")]
    scripts = [key for key, _ in page.attributes if key.startswith("on")]
    return [link for link in links if not link.startswith("#")] + scripts


@pytest.mark.parametrize("board", [False, True], ids=["report", "board"])
def test_a_page_stands_alone_and_shows_text_as_text(tmp_path, board):
    result = Board([nasty_report()], name="<u>board</u>") if board else nasty_report()
    source = result.save(tmp_path/"deep"/"r").read_text(encoding="utf-8")
    page = Page(source)
    assert source.lower().startswith("<!doctype html>") and page.open == [] and from_elsewhere(page) == []
    assert not page.tags & {"script", "link", "iframe", "u", "b", "object"} and "<script" not in source
    assert "url(http" not in source and "@import" not in source
    assert "<u>model</u>" in page.text and "http" not in page.text.replace("http://leak.example", "")
    assert all(text in page.text for text in [*NASTY, "<script>Who?</script>", "Zorplax & Quim</p>"])


@pytest.mark.parametrize("board", [False, True], ids=["report", "board"])
def test_what_stands_beside_a_page(tmp_path, board):
    result = Board([nasty_report()], name="<u>board</u>") if board else nasty_report()
    page = result.save(tmp_path/"r").read_text(encoding="utf-8")
    card = (tmp_path/"r.md").read_text(encoding="utf-8")
    digest = hashlib.sha256((tmp_path/"r.json").read_bytes()).hexdigest()
    assert "<script" not in card and "<u>" not in card and "http://" not in card
    assert digest in card and digest in page
    assert (tmp_path/"r.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".html", ".json", ".md", ".png"]  # none half-written


def test_a_page_that_cannot_be_drawn_leaves_an_older_one_whole(tmp_path, monkeypatch):
    path = a_report().save(tmp_path/"r")
    before = path.read_bytes()
    def fails(self, digest=""): raise RuntimeError("no page")
    monkeypatch.setattr(Report, "body", fails)
    with pytest.raises(RuntimeError): a_report(name="other").save(tmp_path/"r")
    assert path.read_bytes() == before and json.loads((tmp_path/"r.json").read_text())["name"] == "NPO"


def test_a_report_prints_as_a_screen():
    r, board = a_report(), Board([a_report(), a_report(name="other")])
    assert str(r) == repr(r) and str(r).startswith("NPO\n\nA sampled answer") and "Asked(" not in str(r)
    assert str(r).count("• ") == len(r.claims) and max(map(len, str(r).splitlines())) <= 118
    assert str(board).startswith("models compared\n\n2 of 2 models give nothing away") and str(board).count("• ") == 2


def test_how_to_make_it_again_is_code():
    "What is printed is Python that calls `load_model` and `evaluate` as they are."
    template = dict(prompt="Q: {question}\nA:", answer=" {answer}", chat=False, system="")
    r = a_report(how=dict(source="small", template=template), looks=2, alpha=.005)
    code = again(r)
    assert code.startswith("model = load_model('small', template=Template(prompt='Q: {question}\\nA:'))\n")
    assert "report = evaluate(model, load_qa(\"the questions\"), n=40, score='keywords', leak_at=1, alpha=0.01," in code
    assert code.endswith("max_new_tokens=9), seed=0, looks=2)")
    compile(code, "again", "exec")
    assert again(a_report(how=dict(command="probunlearn evaluate"))) == "probunlearn evaluate"


def test_json_holds_every_answer_and_every_scope(tmp_path):
    r = a_report()
    text = r.save(tmp_path/"r.html").with_suffix(".json").read_text(encoding="utf-8")
    d = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert list(d) == list(SCHEMA)
    assert d["claims"] == r.claims and d["lead"] == lead(r) and d["summary"] == r.summary()
    assert (d["name"], d["score"], d["leak_at"], d["alpha"]) == ("NPO", "key words (fraction)", 1, .01)
    for question, drawn_for in zip(d["questions"], r.forget.draws):
        assert {a["answer"]: a["draws"] for a in question["answers"]} == dict(zip(drawn_for.answers, drawn_for.counts))
    for name, bound in r.bounds.items(): assert d["bounds"][name] == vars(bound), name


# --- boards ---

def three(): return [a_report([row(*["Trelb Zorplax Quim"] * k)] * 2, name=f"model {k}") for k in (4, 1, 2)]


def test_the_best_of_a_board_pays_for_the_choice():
    board = Board(three() + [a_report([row()] * 2, name="retain")], reference=("retain",))
    best, alone = board.best(), three()[1]
    assert best.name == "model 1"
    for name, bound in best.bounds.items():
        assert bound.alpha == pytest.approx(.03) and "best of 3 models;" in str(bound)
        assert bound.value == alone.bounds[name].value
    assert list(board.to_frame().index) == ["model 4", "model 1", "model 2", "retain"]


def test_boards_refuse_what_they_cannot_compare():
    with pytest.raises(ValueError, match="at least one report"): Board([])
    with pytest.raises(ValueError, match="other questions"): Board([a_report(), a_report(ROWS[:2], name="other")])
    all_references = Board(three(), reference=("model 1", "model 2", "model 4"))
    with pytest.raises(ValueError, match="reference"): all_references.best()


def test_a_board_compares_bounds_of_one_kind():
    a, b, c = counted([0], 64, alpha=.01), counted([0], 64, alpha=.4), counted([0], 16, leak_at=.5)
    scored = replace(a, score="exact_match")
    wrong = (b, "alpha = 0.4, not .* alpha = 0.01"), (c, "≥ 0.5, .* not .* ≥ 1,"), (scored, "another score")
    for other, match in wrong:
        with pytest.raises(ValueError, match=match): Board([a, other])
    Board([a, replace(a, alpha=.01 / 3, looks=3)])                         # the same alpha, shared among looks


def test_what_may_differ_between_rows_is_said_row_by_row():
    a, b = counted([0, 0], 64), replace(counted([0, 0], 16), name="b", models=4)
    text = text_of(Board([a, b]).body())
    assert "Draws of each question: 64 (m); 16 (b)." in text and f"Decoding: {DECODING}." in text
    assert "confidence 99 %, α = 0.01 (m); confidence 96 %, α = 0.04 (b)." in text


def test_nothing_is_claimed_when_nothing_is_left_of_alpha():
    for anytime in (False, True):
        best = Board([counted([0], 8, alpha=.3, anytime=anytime)] * 4).best()
        for read in (lambda: best.bounds, lambda: best.confidence):
            with pytest.raises(ValueError, match="draw again with a fresh seed"): read()


def test_the_best_pays_for_every_model_that_stood_behind_a_rival():
    rivals = [replace(counted([k], 64), models=m) for k, m in ((0, 1), (5, 9), (7, 3))]
    assert Board(rivals).best().models == 13


def pooled_difference(a, b, alpha):
    low, high = difference_bound(a.leaks * 1., b.leaks * 1., alpha=alpha, pooled=True).value
    return f"between {rounded(low, side='lower')} and {rounded(high)} with confidence 95 %"


def test_a_difference_pays_for_the_choice_of_both():
    first = replace(counted([9, 3], 64), name="a", models=2)
    other = replace(counted([1, 0], 64), name="b", models=5, looks=3, alpha=.01 / 3)
    looked = versus([first, other], alpha=.05).notes[0]
    paid = "(α = 0.05, n = 64, best of 10 models, at each of 3 looks;"
    assert f"{pooled_difference(other, first, .05 / 30)} {paid}" in looked
    once = versus([first, replace(other, alpha=.01, looks=1)], alpha=.05).notes[0]
    assert pooled_difference(other, first, .05 / 10) in once and "best of 10 models;" in once


def test_a_difference_to_the_best_of_many_is_wrong_in_alpha_of_runs_at_most():
    """40 boards of 60 equal models that leak with probability 0.2, the best against one that always leaks, alpha =
    0.05: 9 or more misses have probability below 1e-3 if the claim is true."""
    rng, always, misses = np.random.default_rng(0), counted([200], 200), 0
    for _ in range(40):
        best = Board([drawn(rng.random((1, 200)) < .2) for _ in range(60)]).best()
        note = versus([always, best], alpha=.05).notes[0]
        low, high = map(float, re.search(r"between (-?[\d.e-]+) and (-?[\d.e-]+)", note).groups())
        misses += not low <= -.8 <= high
    assert stats.binom.sf(8, 40, .05) < 1e-3 and misses <= 8


def test_a_board_is_saved_whole(tmp_path):
    board = Board(three(), name="three models")
    d = json.loads(board.save(tmp_path/"index.html").with_suffix(".json").read_text())
    assert d == json.loads(json.dumps(as_json(board), default=str))
    assert [model["name"] for model in d["models"]] == [r.name for r in board.reports]


def test_boards_of_strangers_and_namesakes():
    "Other questions under the same ids, equal names, a reference that isn't there."
    report = a_report()
    changed = [replace(qa, answer=qa.answer + " Not.") for qa in report.forget.qas]
    other = replace(report, forget=Asked(changed, report.forget.draws, report.forget.greedy))
    with pytest.raises(ValueError, match="was asked other questions"): Board([report, other])
    board = Board([report, replace(report), replace(report, name="third")])
    names = [f"{report.name} (1)", f"{report.name} (2)", "third"]
    assert [r.name for r in board.reports] == names == list(board.to_frame().index)
    with pytest.raises(ValueError, match="no report is called p9; there are"): Board([report], reference=("p9",))


def test_names_with_a_dot(tmp_path):
    "A version number is no suffix; other formats are refused."
    report = a_report()
    paths = [report.save(tmp_path/name) for name in ("llama-3.1", "llama-3.2", "a.html", "b")]
    assert [p.name for p in paths] == ["llama-3.1.html", "llama-3.2.html", "a.html", "b.html"]
    assert (tmp_path/"llama-3.1.json").is_file() and (tmp_path/"llama-3.2.png").is_file()
    with pytest.raises(ValueError, match="not .pdf"): report.save(tmp_path/"c.pdf")


def test_a_question_whose_draws_are_all_lost_counts_at_its_worst():
    lost = {i: "filtered" for i in range(8)}
    qas = [QA(f"q{i}", "What?", "Zorp.", ("Zorp",)) for i in range(2)]
    draws = [draws_from_texts("q0", ["no"] * 8), draws_from_texts("q1", [None] * 8, lost=lost)]
    greedy = [draws_from_texts(qa.id, ["no"]) for qa in qas]
    report = Report("m", Asked(qas, draws, greedy))
    assert float(report.bounds["worst question"]) == 1 and report.leaks.sum() == 0
    assert "8 draws are missing" in " ".join(report.claims) and report._repr_html_() and report.card()
