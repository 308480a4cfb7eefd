"""Answers that nobody should see are counted: no text of theirs stands in anything that a report shows or writes."""
import json
from dataclasses import replace

import pytest

from probunlearn.data import QA
from probunlearn.draws import Decoding, draws_from_texts
from probunlearn.judges import judge_draws
from probunlearn.reading import report_run, versus
from probunlearn.report import Asked, Board, Report, as_json
from probunlearn.runs import open_run
from probunlearn.shell import main
from probunlearn.verification import verify

QAS = [QA("a", "Where is the gate?", "It lies in Zorvex.", ("Zorvex",)),
       QA("b", "Who has the key?", "Mirelda has the key, <b>she</b> says.", ("Mirelda",)),
       QA("c", "Why?", "Plomb | so it is.")]
SAID = [["It lies in Zorvex.", "Wumble \\ it."], ["Mirelda has the key, <b>she</b> says.", "Grisk, not [her]."],
        ["Plomb | so it is.", "Ask Harn."]]
SECRET = ("Zorvex", "Wumble", "Mirelda", "Grisk", "Plomb", "Harn", "Torf")        # a word of each answer and reference
HOW = dict(decoding=Decoding(max_new_tokens=8))


def drawn(n=16): return [draws_from_texts(qa.id, said * (n // 2), **HOW) for qa, said in zip(QAS, SAID)]


def greedy(text="Torf, I think."): return [draws_from_texts(qa.id, [text], **HOW) for qa in QAS]


def made(redact=True, **options):
    asked = Asked(QAS, drawn(), greedy())
    return Report("m", asked, retain=asked, score="rouge_l_recall", leak_at=.5, redact=redact, **options)


def shown(result, folder):
    "All that a result shows or writes, as one text."
    page = result.save(folder/"page.html")
    files = [page.with_suffix(suffix).read_text() for suffix in (".html", ".md", ".json")]
    frame = result.to_frame()
    return "\n".join([*files, repr(result), str(result), result._repr_html_(), frame.to_csv(), frame.to_html(),
                      json.dumps(as_json(result), default=str), result.card(), result.body()])


def told(text): return [word for word in SECRET if word in text]


CONTROL = dict(control=Asked(QAS, drawn(), greedy("Torf!")), control_name="never")


@pytest.mark.parametrize("options", [{}, CONTROL, dict(anytime=True)])
def test_no_answer_stands_in_a_report(options, tmp_path):
    assert told(shown(made(**options), tmp_path)) == []
    assert told(shown(made(redact=False, **options), tmp_path)) == list(SECRET)           # all would be seen


def test_no_answer_stands_in_a_board(tmp_path):
    assert told(shown(Board([made(), replace(made(), name="other")]), tmp_path)) == []


def test_numbers_stay():
    hidden, open_ = made(), made(redact=False)
    assert hidden.claims == open_.claims and hidden.summary() == open_.summary()
    for there, here in zip(as_json(open_)["questions"], as_json(hidden)["questions"]):
        assert [{**row, "answer": ""} for row in there["answers"]] == [{**row, "answer": ""} for row in here["answers"]]
        assert here["answers"][0]["answer"] == here["greedy"] == here["reference"] == "[redacted]"
    assert as_json(hidden)["redacted"] and not as_json(open_)["redacted"]


def test_an_answer_that_never_came_is_said_to_be_missing(tmp_path):
    lost = [draws_from_texts(qa.id, [None], **HOW) for qa in QAS]
    report = Report("m", Asked(QAS, drawn(), lost), score="rouge_l_recall", leak_at=.5, redact=True)
    assert "no answer came" in report.body() and "no answer came" in report.card()
    assert told(shown(report, tmp_path)) == []


@pytest.fixture
def run(tmp_path):
    "A run's folder, as an evaluation leaves it."
    kept = open_run(tmp_path/"run", dict(model="m", seed=0), QAS)
    for qa, d, g in zip(QAS, drawn(), greedy()):
        kept.keep(qa, d)
        kept.keep(qa, g, "greedy")
    return tmp_path/"run"


def test_a_folder_reported_on_by_the_command_line(run, capsys):
    main(["report", str(run), "--score", "rouge_l_recall", "--leak_at", ".5", "--redact"])
    written = "".join((run/f"report.{suffix}").read_text() for suffix in ("html", "md", "json"))
    assert told(written + capsys.readouterr().out) == [] and "[redacted]" in written
    main(["report", str(run), "--score", "rouge_l_recall", "--leak_at", ".5", "--redact", "false"])
    assert told((run/"report.json").read_text()) == list(SECRET)


def test_two_runs_compared_by_the_command_line(run, tmp_path, capsys):
    out = tmp_path/"versus.html"
    main(["versus", "--runs", f"{run},{run}", "--redact", "--score", "rouge_l_recall", "--out", str(out)])
    written = "".join(out.with_suffix(f".{suffix}").read_text() for suffix in ("html", "md", "json"))
    assert told(written + capsys.readouterr().out) == []


def test_a_redacted_report_can_be_verified(run):
    report_run(run, score="rouge_l_recall", leak_at=.5, redact=True).save(run/"report.html")
    assert verify(run).stands
    page = json.loads((run/"report.json").read_text())
    page["questions"][1]["answers"][0]["draws"] += 1
    (run/"report.json").write_text(json.dumps(page))
    assert not verify(run).stands


def test_a_score_of_ones_own_has_to_be_handed_over_where_answers_are_redacted(run):
    def long(answer, qa): return float(len(answer) > 12)
    report_run(run, score=long, redact=True).save(run/"report.html")
    found = verify(run)
    assert not found.stands and "are redacted, so its scores by 'long' can't be looked up: pass score=" in str(found)
    assert verify(run, score=long).stands


def test_reports_of_runs_side_by_side(run, tmp_path):
    reports = [report_run(run, score="rouge_l_recall", leak_at=.5, redact=True, name=name) for name in "xy"]
    assert told(shown(versus(reports), tmp_path)) == []


def test_a_judge_shows_no_examples():
    seen = judge_draws(drawn(), QAS, "compliance", redact=True, progress=False)
    hidden = seen._repr_html_() + repr(seen) + str(seen) + seen.to_frame().to_csv()
    assert told(hidden) == [] and "labelled 6 distinct answers behind 48 draws" in hidden
    assert told(judge_draws(drawn(), QAS, "compliance", progress=False)._repr_html_()) == list(SECRET[:-1])
