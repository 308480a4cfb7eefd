"""Verification: an honest report stands, and whatever is changed in it, in its files or in its draws is found."""
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from probunlearn.bounds import rounded
from probunlearn.data import QA
from probunlearn.draws import draws_digest, draws_from_texts, first_draws
from probunlearn.reading import report_run, versus
from probunlearn.report import Board
from probunlearn.runs import open_run, read_run
from probunlearn.verification import verify

QAS = [QA(f"q{i}", f"What is {i}?", f"It is Zorp{i}.", (f"Zorp{i}",)) for i in range(3)]
KEPT = [QA(f"k{i}", f"What was {i}?", f"It was Quim{i}.", (f"Quim{i}",)) for i in range(2)]
SETTINGS = dict(model="verified", decoding=dict(top_k=0), seed=0)
BEFORE = Path(__file__).parent/"before"


def filled(folder, n=64, leaks=(5, 1, 0), retain=(), **how):
    "A run with draws whose probabilities are known."
    run = open_run(folder, SETTINGS, QAS, list(retain), **how)
    for qa, k in zip([*QAS, *retain], [*leaks, n, n]):
        d = draws_from_texts(qa.id, ["no idea"] * (n - k) + [qa.answer] * k)
        p = [.9, .05] if len(d.answers) == 2 else [.5]
        run.keep(qa, replace(d, logprobs=np.log(p)))
        run.keep(qa, draws_from_texts(qa.id, ["no idea"]), "greedy")
    return run


def made(folder, n=None, retain=KEPT, **how):
    "A run with a saved report."
    if not (folder/"run.json").exists(): filled(folder, retain=retain)
    return report_run(folder, n, name="NPO", **how).save(folder/"report.html")


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")/"run"
    made(folder)
    return folder


@pytest.fixture
def run(honest, tmp_path): return Path(shutil.copytree(honest, tmp_path/"run"))


def wrong(folder, **how):
    "What doesn't stand, as text."
    found = verify(folder, **how)
    assert not found.stands
    return "\n".join(str(check) for check in found.checks if check.stands is False)


def tamper(folder, change, hashes=True):
    "Change the JSON of a report; with `hashes`, page and card name the new SHA-256."
    path = folder/"report.json"
    old = path.read_bytes()
    data = json.loads(old)
    change(data)
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False))
    digests = [sha256(text).hexdigest() for text in (old, path.read_bytes())]
    if hashes:
        for page in (folder/"report.html", folder/"report.md"): page.write_text(page.read_text().replace(*digests))


# --- what is honest stands ---

@pytest.mark.parametrize(
    "how",
    [dict(), dict(n=16), dict(score="exact_match"), dict(score="rouge_l_recall", leak_at=0.5), dict(alpha=0.2)],
    ids=str,
)
def test_an_honest_report_stands_word_by_word(tmp_path, how):
    made(tmp_path/"run", **how)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    found = verify(tmp_path/"run")
    assert found.stands and {check.stands for check in found.checks} == {True}
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before  # no look is written down
    claims = json.loads((tmp_path/"run"/"report.json").read_text())["claims"]
    assert [check.said for check in found.checks if check.part == "sentence"] == claims
    assert f"{len(claims)} of {len(claims)} sentences stand, nothing contradicts the draws" in str(found)


def test_missing_draws_and_reports_after_looks_stand(tmp_path):
    run = filled(tmp_path/"run", planned=[16, 64])
    run.keep(
        QAS[2], draws_from_texts("q2", ["no idea"] * 60 + [None] * 4, lost=dict.fromkeys(range(60, 64), "filtered"))
    )
    for n in (16, 64, 20):
        made(tmp_path/"run", n)
        assert verify(tmp_path/"run").stands, n


def test_a_report_stands_after_the_run_has_grown_and_others_have_come(tmp_path):
    run = filled(tmp_path/"run")
    made(tmp_path/"run", 32)
    for qa in QAS:
        run.add(qa, replace(draws_from_texts(qa.id, ["no idea"] * 64), logprobs=np.log([.9])), 64)
    assert verify(tmp_path/"run").stands
    report_run(tmp_path/"run", 128)
    other = open_run(tmp_path/"other", SETTINGS | dict(seed=1), QAS)
    for qa in QAS:
        other.keep(qa, draws_from_texts(qa.id, ["no idea"] * 8))
        other.keep(qa, draws_from_texts(qa.id, ["no idea"]), "greedy")
    report_run(tmp_path/"other")
    found = verify(tmp_path/"run")
    assert found.stands and "1 of other runs beside this one are not named; they may have come later" in str(found)


def test_a_score_of_ones_own_is_taken_as_recorded_or_computed(tmp_path):
    def zorps(answer, qa): return float("Zorp" in answer)
    filled(tmp_path/"run")
    made(tmp_path/"run", score=zorps)
    found = verify(tmp_path/"run")
    assert found.stands and "taken as they are recorded" in str(found)
    assert {c.stands for c in verify(tmp_path/"run", score=zorps).checks} == {True}
    with_retain = tmp_path/"retain"
    made(with_retain, score=zorps)
    assert verify(with_retain).stands and verify(with_retain, score=zorps).stands


def test_no_torch_is_needed(run):
    code = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "accelerate"): raise ImportError(f"{{name}} isn't here")
sys.meta_path.insert(0, Blocked())
from probunlearn.shell import main
sys.exit(main(["verify", {str(run)!r}]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "nothing contradicts the draws" in done.stdout, done.stderr


# --- a tampered report ---

def smaller(data):
    "Every number of the average leak, ten times smaller."
    data["bounds"]["average leak"]["value"] /= 10
    data["claims"] = [
        re.sub(r"(average leak probability is at most )0\.0?", r"\g<1>0.00", claim) for claim in data["claims"]
    ]


TAMPERED = {
    "a sentence": (
        lambda d: d["claims"].__setitem__(1, d["claims"][1].replace("99 %", "99.9 %")),
        "with confidence 99 %",
    ),
    "what was seen": (
        lambda d: d["claims"].__setitem__(0, d["claims"][0].replace("leaks on 2", "leaks on 0")),
        "leaks on 2",
    ),
    "a bound and its sentence": (smaller, "average leak probability"),
    "alpha of a sentence": (
        lambda d: d["claims"].__setitem__(2, d["claims"][2].replace("α = 0.01", "α = 0.001")),
        "α = 0.01",
    ),
    "a sentence too many": (lambda d: d["claims"].append("The model never leaks."), "The model never leaks."),
    "a count": (lambda d: d["questions"][0].__setitem__("leaks", 0), "1, leaks: 0 there, 5 by the draws"),
    "an answer": (lambda d: d["questions"][0]["answers"].pop(), "answers"),
    "a probability": (lambda d: d["questions"][0]["answers"][0].__setitem__("logprob", -9.0), "logprob"),
    "the summary": (
        lambda d: d["summary"].__setitem__("retain_draws", 0.1),
        "retain_draws: 0.1 there, 1.0 by the draws",
    ),
    "the lead": (lambda d: d.__setitem__("lead", "All is well."), "lead"),
    "the threshold": (lambda d: d.__setitem__("leak_at", 0.5), "this report itself isn't among the looks"),
    "the score": (lambda d: d.__setitem__("score", "exact match"), "this report itself isn't among the looks"),
    "alpha": (lambda d: d.__setitem__("alpha", 0.05), "this report itself isn't among the looks"),
    "the digest": (lambda d: d.__setitem__("draws", "0" * 64), "draws"),
    "a setting": (lambda d: d["how"].__setitem__("model", "another"), "not those of run.json: model"),
    "the seed": (lambda d: d["how"].__setitem__("seed", 5), "not those of run.json: seed"),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_a_changed_report_is_found_although_its_hashes_agree(run, name):
    change, says = TAMPERED[name]
    tamper(run, change)
    assert says in wrong(run)


def test_a_changed_hash_is_found(run):
    tamper(run, lambda data: data.__setitem__("note", 1), hashes=False)
    assert "report.html" in wrong(run) and "doesn't name the SHA-256" in wrong(run)


@pytest.mark.parametrize("file", ["report.html", "report.md"])
def test_a_page_that_says_something_else_is_found(run, file):
    text = (run/file).read_text()
    assert text.count("at most") > 3
    (run/file).write_text(text.replace("leak probability", "risk"))
    assert f"{file}\n    not by the draws" in wrong(run)
    (run/file).write_text(text.replace("leaks on 2", "leaks on 0", 1))
    assert file in wrong(run)


def test_another_picture_is_not_called_right(run):
    (run/"report.png").write_bytes(b"png")
    picture, = [check for check in verify(run).checks if check.said == "report.png"]
    assert picture.stands is None and verify(run).stands


# --- the ledger ---

def test_an_extension_that_is_hidden_is_found(tmp_path):
    filled(tmp_path/"run", retain=KEPT)
    report_run(tmp_path/"run", 16)
    made(tmp_path/"run", 64)
    assert verify(tmp_path/"run").stands
    tamper(tmp_path/"run", lambda d: d.update(anytime=False))
    assert "claims at α / 1, at fixed n; run.json asks for α / 1, at all times" in wrong(tmp_path/"run")
    def never_looked(data): data["how"]["ledger"] = data["how"]["ledger"][1:]
    tamper(tmp_path/"run", never_looked)
    assert "the report knows other looks than run.json" in wrong(tmp_path/"run")


def test_an_earlier_report_that_is_not_named_is_found(tmp_path):
    filled(tmp_path/"run", retain=KEPT)
    report_run(tmp_path/"run", score="exact_match")
    made(tmp_path/"run")
    assert verify(tmp_path/"run").stands
    def alone(data):
        data["known"] = []
        data["claims"] = [
            re.sub(", one of 2 known .*? together", "", c) for c in data["claims"] if "are known" not in c
        ]

    tamper(tmp_path/"run", alone)
    assert "other reports that are known\n    not named" in wrong(tmp_path/"run")


def test_a_warning_that_is_left_out_is_found(tmp_path):
    filled(tmp_path/"run", retain=KEPT)
    report_run(tmp_path/"run", 16)
    made(tmp_path/"run", 64)
    tamper(tmp_path/"run", lambda d: d.update(claims=[c for c in d["claims"] if "reported on before" not in c]))
    assert "the report leaves this out" in wrong(tmp_path/"run")


# --- tampered draws ---

def test_draws_that_were_exchanged_are_found(run):
    there = read_run(run)
    there.keep(QAS[0], replace(draws_from_texts("q0", ["no idea"] * 64), logprobs=np.log([.9])))
    text = wrong(run)
    assert "leaks: 5 there, 0 by the draws" in text and "average leak probability is at most" in text


def test_draws_in_another_order_are_found(run):
    there = read_run(run)
    d = there.draws(QAS[0])
    there.keep(QAS[0], first_draws(replace(d, index=d.index[::-1].copy()), d.n))
    found = verify(run)
    assert not found.stands and [check.said for check in found.checks if check.part == "draws"] == ["draws"]
    assert draws_digest([d]) != draws_digest([there.draws(QAS[0])]) == draws_digest([there.draws(QAS[0])])


@pytest.mark.parametrize("kind", ["draws", "greedy"])
def test_a_broken_and_a_missing_file_of_draws(run, kind):
    file = run/f"{kind}-q1.parquet"
    data = file.read_bytes()
    file.write_bytes(data[:-20])
    assert f"{file} is not a whole file of draws" in wrong(run)
    assert b"no idea" in data
    file.write_bytes(data.replace(b"no idea", b"No idea"))          # as many letters, so that only a checksum tells
    assert f"{file} is not a whole file of draws (could not verify page integrity" in wrong(run)
    file.unlink()
    text = wrong(run)
    assert "don't have 64 draws" in text and text.count("it can't be made again") == len(verify(run).checks) - 4


def test_a_file_of_another_run_is_no_draw_of_this_one(run, tmp_path):
    other = open_run(tmp_path/"x"/"other", SETTINGS | dict(seed=9), QAS)
    other.keep(QAS[0], draws_from_texts("q0", ["no idea"] * 64))
    shutil.copy(other.path("draws", QAS[0]), run/"draws-q0.parquet")
    assert "holds draws of another run" in wrong(run)


# --- a board ---

@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    "Three runs, and a board of them beside."
    folder = tmp_path_factory.mktemp("board")
    for i, leaks in enumerate([(40, 20, 3), (5, 1, 0), (0, 0, 0)]):
        run = open_run(folder/f"run{i}", SETTINGS | dict(model=f"model {i}"), QAS)
        for qa, k in zip(QAS, leaks):
            run.keep(qa, draws_from_texts(qa.id, ["no idea"] * (64 - k) + [qa.answer] * k))
            run.keep(qa, draws_from_texts(qa.id, ["no idea"]), "greedy")
    rows = [report_run(folder/f"run{i}", name="NPO") for i in range(3)]
    versus(rows, reference=("NPO (3)",)).save(folder/"board.html")
    return folder


@pytest.fixture
def board(compared, tmp_path): return Path(shutil.copytree(compared, tmp_path/"board"))


def of_board(folder, order=(0, 1, 2)): return verify([folder/f"run{i}" for i in order], folder/"board.json")


def not_standing(found): return "\n".join(str(check) for check in found.checks if check.stands is False)


def test_an_honest_board_stands_row_by_row_and_compared(compared):
    found = of_board(compared)
    assert found.stands and {check.stands for check in found.checks} == {True}
    said = [check.said for check in found.checks if check.part == "sentence"]
    assert said[:3] == json.loads((compared/"board.json").read_text())["notes"]
    assert sum(line.startswith("NPO (2): ") for line in said) == sum(line.startswith("NPO (1): ") for line in said) > 5
    assert [check.said for check in found.checks if check.part == "file"] == ["board.html", "board.md", "board.png"]


def test_each_number_that_is_changed_on_a_board_is_found(board):
    data = json.loads((board/"board.json").read_text())
    last = data["notes"].pop()
    data["notes"][0] = data["notes"][0].replace("α = 0.01", "α = 0.001")
    data["models"][0]["summary"]["worst"] /= 2
    data["models"][1]["bounds"]["average leak"]["value"] /= 10
    data["models"][1]["questions"][0]["leaks"] = 4
    data["models"][2]["draws"] = "0" * 64
    (board/"board.json").write_text(json.dumps(data))
    found = of_board(board)
    text = not_standing(found)
    for says in (
        f"{data['notes'][0]}\n    the draws say otherwise", f"{last}\n    the board leaves this out",
        "NPO (1): summary\n    worst: ", "NPO (2): bounds\n    average leak, value: ",
        "NPO (2): questions\n    1, leaks: 4 there, 5 by the draws", "NPO (3): draws",
        "board.html\n    it doesn't name the SHA-256", "board.md\n    it doesn't name the SHA-256",
    ):
        assert f"DOESN'T STAND: {says}" in text, says
    assert sum(check.stands is False for check in found.checks) == 9 and not found.stands


def test_a_page_a_comparison_and_draws_that_were_changed_are_found(board):
    def change(data): data["how"]["alpha"] = .05
    data = json.loads((board/"board.json").read_text())
    change(data)
    digest = sha256((board/"board.json").read_bytes()).hexdigest()
    (board/"board.json").write_text(json.dumps(data))
    for name in ("board.html", "board.md"):
        page = (board/name).read_text().replace(digest, sha256((board/"board.json").read_bytes()).hexdigest())
        (board/name).write_text(page.replace("NPO (2)", "NPO 2"))
    read_run(board/"run2").keep(QAS[0], draws_from_texts("q0", ["no idea"] * 63 + [QAS[0].answer]))
    text = not_standing(of_board(board))
    assert text.count("the draws say otherwise") == 3 and text.count("the board leaves this out") == 3
    assert "NPO (3): questions\n    1, leaks: 0 there, 1 by the draws" in text
    assert "board.html\n    not by the draws" in text and "board.md\n    not by the draws" in text


def test_a_board_needs_the_runs_of_its_rows(board):
    with pytest.raises(ValueError, match=r"each of its rows in their order \(NPO \(1\), NPO \(2\), NPO \(3\)\), got 1"):
        verify(board/"run0", board/"board.html")
    text = not_standing(of_board(board, (1, 0, 2)))
    assert "NPO (1): settings of the run\n    not those of run.json: model" in text
    assert "DOESN'T STAND: NPO (2): " in text and "DOESN'T STAND: NPO (3): " not in text


def test_sentences_that_versus_did_not_make_are_not_checked(board):
    reports = [report_run(board/f"run{i}", name=f"m{i}") for i in range(2)]
    Board(reports, notes=["The first is worse."]).save(board/"board.html")
    found = of_board(board, (0, 1))
    note = found.checks[0]
    assert (note.said, note.stands) == ("The first is worse.", None) and not found.stands and not not_standing(found)


# --- what isn't there, and other versions ---

def test_missing_files(run):
    for name in ("report.html", "report.md", "report.png"): (run/name).unlink()
    found = verify(run)
    assert found.stands and [c.why for c in found.checks if c.stands is None] == ["it isn't there"] * 3
    with pytest.raises(FileNotFoundError, match="no-run holds no run"): verify(run/"no-run", run/"report.json")
    (run/"report.json").unlink()
    with pytest.raises(FileNotFoundError, match="report.json"): verify(run)


def test_a_report_that_lies_elsewhere(run, tmp_path):
    shutil.move(run/"report.json", tmp_path/"signed.json")
    assert verify(run, tmp_path/"signed.json").stands and verify(run, tmp_path/"signed.html").stands


@pytest.mark.parametrize(
    "text, says",
    [
        ("{", "is not JSON"),
        ("[]", "schema is None"),
        ('{"schema": "probunlearn.board/1"}', "board"),
        ('{"schema": "probunlearn.report/2"}', "reads probunlearn.report/1"),
        ('{"schema": "probunlearn.report/1"}', "it lacks bounds, claims"),
    ],
    ids=str,
)
def test_what_is_no_report_of_this_kind(run, text, says):
    (run/"report.json").write_text(text)
    with pytest.raises(ValueError, match=says): verify(run)


def older(data):
    "A report as an earlier version wrote it: no version, no digest, other words, and a looser bound."
    for name in ("version", "draws", "known"): del data[name]
    del data["how"]["ledger"]
    for bound in data["bounds"].values(): bound["scope"] = bound["scope"].split(", leak")[0].split(", score")[0]
    name = "average score"
    looser, digits = (
        data["bounds"][name]["value"] * 1.25,
        re.search(r"average score is at most ([\d.]+)", str(data["claims"]))[1],
    )
    data["bounds"][name]["value"] = looser
    data["claims"] = [c.split(", leak: ")[0].split(", score: ")[0].replace(digits, rounded(looser, "upper")) + ")."
                      if "with confidence" in c else c for c in data["claims"]]


def test_a_report_of_an_earlier_version_stands_by_its_numbers(run):
    tamper(run, older)
    found = verify(run)
    assert found.stands and "in words of probunlearn" in str(found) and "another version" in str(found)
    tamper(run, smaller)
    assert "average leak probability" in wrong(run)


def test_a_report_on_the_disk_since_long(tmp_path):
    shutil.copytree(BEFORE/"run", tmp_path/"run")
    shutil.copy(BEFORE/"report.json", tmp_path/"run"/"report.json")
    text = str(verify(tmp_path/"run"))
    assert "DOESN'T STAND: average" not in text and text.count("stands: ") > 4
