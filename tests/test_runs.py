"""Run folders without a model: whole or not at all, grown but never mixed, looks written down, a disk that is full."""
import json
import math
import os
import resource
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binom

from probunlearn.data import QA
from probunlearn.draws import Decoding, Draws, draws_from_texts, first_draws, join_draws, save_draws
from probunlearn.questions import stratified_betting
from probunlearn.reading import report_run, versus
from probunlearn.runs import clear_leftovers, look, open_run, price, read_run
from probunlearn.sequential import rate_evidence

QAS = [QA(f"q{i}", f"What is {i}?", f"It is Zorp{i}.", (f"Zorp{i}",)) for i in range(4)]
SETTINGS = dict(model="abc", template=dict(prompt="{question}"), decoding=dict(top_k=0), seed=0)


def filled(folder, n=40, leaks=(3, 0, 0, 0), qas=QAS, settings=SETTINGS, **how):
    "A run whose first questions leak now and then."
    run = open_run(folder, settings, qas, **how)
    for qa, k in zip(qas, leaks):
        run.keep(qa, draws_from_texts(qa.id, [qa.answer] * k + ["no idea"] * (n - k)))
        run.keep(qa, draws_from_texts(qa.id, ["no idea"]), "greedy")
    return run


# --- draws joined --------------------------------

def random_draws(rng, n):
    "Draws of random token sequences, some of which decode to the same text."
    tokens = [(int(rng.integers(3)), int(rng.integers(3)), 9) for _ in range(9)]
    tokens = list(dict.fromkeys(tokens))
    index = rng.integers(-1, len(tokens), n)
    first = list(dict.fromkeys(index[index >= 0].tolist()))
    new = {old: i for i, old in enumerate(first)} | {-1: -1}
    return Draws(
        "q",
        [str(tokens[i][0]) for i in first],
        np.array([new[i] for i in index.tolist()]),
        np.array([-1.0 - sum(tokens[i]) for i in first]),
        [tokens[i] for i in first],
        np.array([i % 2 == 0 for i in first]),
    )


def facts(d):
    return d.texts, d.index.tolist(), d.answers, d.logprobs.tolist(), [tuple(t) for t in d.tokens], d.finished.tolist()


@pytest.mark.parametrize("seed", range(20))
def test_parts_joined_are_the_whole(seed):
    rng = np.random.default_rng(seed)
    d = random_draws(rng, 60)
    cut = int(rng.integers(1, 60))
    later = Draws("q", d.answers, d.index[cut:], d.logprobs, d.tokens, d.finished)
    rest = first_draws(later, later.n)        # its answers renumbered by first appearance
    assert facts(join_draws(first_draws(d, cut), rest)) == facts(d)


@pytest.mark.parametrize(
    "change",
    [
        dict(id="other"),
        dict(seed=1),
        dict(decoding=Decoding(top_k=1)),
        dict(run="x"),
        dict(source="x"),
        dict(logprobs=None),
    ],
    ids=lambda c: next(iter(c)),
)
def test_draws_of_two_kinds_are_not_joined(change):
    d = random_draws(np.random.default_rng(0), 20)
    with pytest.raises(ValueError, match=next(iter(change))): join_draws(d, replace(d, **change))


# --- whole or not at all --------------------------------

FULL_DISK = """
import resource, signal, sys
from probunlearn.draws import draws_from_texts
from probunlearn.runs import read_run
run = read_run(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
run.keep(run.questions["forget"][1], draws_from_texts("q1", [f"answer {i}" for i in range(9999)]))
"""

def test_a_full_disk_is_said_and_nothing_is_lost(tmp_path):
    filled(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    done = subprocess.run([sys.executable, "-c", FULL_DISK, tmp_path], capture_output=True, text=True)
    assert (
        done.returncode
        and "OSError" in done.stderr
        and "q1.parquet could not be written" in done.stderr
        and "make room and go on" in done.stderr
    )
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before       # no half-written file either
    assert report_run(tmp_path).x.shape == (4, 40)


def test_run_json_on_a_full_disk(tmp_path):
    run, limit = filled(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    before = (tmp_path/"run.json").read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
    try:
        with pytest.raises(OSError, match="run.json could not be written"): look(run, 40)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert (tmp_path/"run.json").read_bytes() == before and read_run(tmp_path).looks == []


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"settings": {}}', "null"], ids=["empty", "cut", "list", "lacking", "null"]
)
def test_a_broken_description_is_named_and_left_alone(tmp_path, text):
    filled(tmp_path)
    (tmp_path/"run.json").write_text(text)
    with pytest.raises(ValueError, match="run.json is not a run's description"): open_run(tmp_path, SETTINGS, QAS)
    assert (tmp_path/"run.json").read_text() == text and len(list(tmp_path.glob("*.parquet"))) == 8


def test_a_flipped_bit_in_a_description_is_named_or_changes_nothing(tmp_path):
    "Blanks and the checksum's own name may flip; what the run says may not."
    filled(tmp_path)
    report_run(tmp_path, n=8)
    file, right = tmp_path/"run.json", read_run(tmp_path)
    whole, found = file.read_bytes(), []
    for at in range(0, len(whole), 7):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1:])
        try: assert read_run(tmp_path) == right
        except ValueError as error: found.append(str(error))
    assert all(str(file) in said and "nothing was changed" in said for said in found)
    assert sum("its checksum isn't that of its content" in said for said in found) > 20


def test_a_description_without_checksum_is_of_an_earlier_version(tmp_path):
    filled(tmp_path)
    right = read_run(tmp_path)
    there = json.loads((tmp_path/"run.json").read_text())
    assert there.pop("checksum")
    (tmp_path/"run.json").write_text(json.dumps(there))
    assert read_run(tmp_path) == right
    report_run(tmp_path, n=8)                       # a look is written down, and sealed from now on
    assert "checksum" in json.loads((tmp_path/"run.json").read_text())


def test_a_foreign_parquet_file_is_named(tmp_path):
    import pyarrow as pa, pyarrow.parquet as pq
    run = filled(tmp_path)
    pq.write_table(pa.table({"a": range(99)}), run.path("draws", QAS[0]))
    with pytest.raises(ValueError, match="draws-q0.parquet is not a whole file of draws"): report_run(tmp_path, n=40)


def test_two_processes_that_write_the_same_draws_do_not_meet(tmp_path):
    d, pids = draws_from_texts("q", ["a", "b"]), []
    for pid in (1, 2):
        with pytest.MonkeyPatch.context() as m:
            m.setattr(os, "getpid", lambda: pid)
            m.setattr(os, "replace", lambda a, b: pids.append(a))               # killed before the last step
            save_draws(d, tmp_path/"q.parquet")
    assert len({str(p) for p in pids}) == 2 and not (tmp_path/"q.parquet").exists()
    run = replace(open_run(tmp_path/"run", SETTINGS, QAS), folder=tmp_path)
    clear_leftovers(run)
    assert all(p.exists() for p in pids)                                        # too young to be left behind
    clear_leftovers(run, older=-1)
    assert not any(p.exists() for p in pids)


# --- grown, never mixed --------------------------------

@pytest.mark.parametrize("name", SETTINGS)
def test_another_setting_is_named(tmp_path, name):
    filled(tmp_path)
    with pytest.raises(ValueError, match=f"another {name}"): open_run(tmp_path, SETTINGS | {name: "changed"}, QAS)


def test_a_question_with_another_text_has_another_key(tmp_path):
    run = filled(tmp_path/"a")
    other = open_run(tmp_path/"b", SETTINGS, [replace(QAS[0], question="Who?")])
    os.link(run.path("draws", QAS[0]), other.path("draws", QAS[0]))
    with pytest.raises(ValueError, match="draws of another run"): other.draws(replace(QAS[0], question="Who?"))


def test_the_first_draws_are_those_of_a_shorter_run(tmp_path):
    filled(tmp_path)
    assert report_run(tmp_path, n=2).leaks.sum() == 2 and report_run(tmp_path).leaks.sum() == 3


def test_memory_and_folder_agree(tmp_path):
    ram, disk = (
        filled(None, settings=SETTINGS | dict(seed=77)),
        filled(tmp_path / "run", settings=SETTINGS | dict(seed=77)),
    )
    assert report_run(ram).claims == report_run(disk).claims and [qa.id for qa in ram.lacking(41)] == [
        qa.id for qa in disk.lacking(41)
    ]


# --- looks --------------------------------

@pytest.mark.parametrize(
    "planned, looks, expected",
    [
        (1, [(9, 4)], (1, False)),
        (3, [(9, 4)], (3, False)),
        (3, [(9, 4), (18, 4), (36, 4)], (3, False)),
        ([7, 8, 9], [(9, 4), (8, 4)], (3, False)),
        (2, [(9, 4), (18, 4), (36, 4)], (2, True)),
        (2, [(9, 4), (10, 4)], (2, True)),
        ([7, 8], [(9, 4)], (2, True)),
        (3, [(9, 4), (18, 5)], (6, True)),
        ("anytime", [(9, 4)], (1, True)),
        (1, [(9, 4), (9, 5)], (6, True)),
        (1, [(9, 4), (8, 5), (8, 6)], (12, True)),
    ],
    ids=str,
)
def test_the_price_of_looks(planned, looks, expected):
    assert price(looks, planned) == expected


def test_what_all_sets_of_questions_cost_together():
    "After the first, each set of questions pays with α / m(m + 1): less than half of one α for all of them."
    parts = [price([(9, q) for q in range(m)], 1)[0] for m in range(2, 2000)]
    assert sum(1 / p for p in parts) < .5


def test_a_second_look_whose_n_is_free_keeps_alpha():
    """Two planned looks at a leak probability of 30 %, the second at whatever n first signs a wrong bound.

    With α = 0.05 at most 5 % of 20,000 runs may sign one; a right price fails here less than once in 10,000.
    With both bounds at fixed n and α / 2 it were 24 %.
    """
    rng, p, first, alpha, runs = np.random.default_rng(3), .3, 64, .05, 20_000
    parts, anytime = price([(first, 3)], 2)
    leaks = rng.binomial(first, p, runs)
    wrong = binom.cdf(leaks, first, p) <= alpha / parts
    assert not anytime and 0 < wrong.sum()
    times = np.unique(np.geomspace(first, 256 * first, 200).astype(int))
    for before, n in zip(times, times[1:]):
        leaks = leaks + rng.binomial(n - before, p, runs)
        parts, anytime = price([(first, 3), (n, 3)], 2)
        seen = np.arange(leaks.max() + 1)
        signed = (
            rate_evidence(seen * 1.0, float(n), p, "below") >= np.log(parts / alpha)
            if anytime
            else binom.cdf(seen, n, p) <= alpha / parts
        )
        wrong |= signed[leaks]
    assert wrong.sum() <= binom.ppf(1 - 1e-4, runs, alpha)


def in_memory(qas, n, seed, **how): return look(open_run(None, SETTINGS | dict(seed=seed), qas, **how), n)


def test_questions_chosen_after_a_look_are_paid_for():
    many = [QA(f"q{i}", f"What is {i}?", "x") for i in range(40)]
    assert in_memory(many, 128, "all") == (1, False) == in_memory(many, 128, "all")
    with pytest.warns(RuntimeWarning, match="8 of the 40 questions .* all 7.69e.07 choices"):
        assert in_memory(many[:8], 128, "all") == (6 * math.comb(40, 8), True)
    with pytest.warns(RuntimeWarning, match="3 of the 40"):
        assert in_memory(many[5:8] + [QA("new", "New?", "x")], 128, "all") == (12 * math.comb(40, 3), True)
    with pytest.raises(ValueError, match="1,000 of the 2,000 questions .* with another seed"):
        for k in (2000, 1000): in_memory([QA(f"q{i}", "Why?", "x") for i in range(k)], 128, "too many")


def test_other_questions_in_memory_cost_nothing():
    "Other draws, that nobody has seen: another part of the questions, other ids, another seed."
    a, b = QAS[:2], QAS[2:]
    assert in_memory(a, 8, "parts") == in_memory(b, 8, "parts") == in_memory(a, 8, "other") == (1, False)
    assert in_memory(QAS, 8, "parts") == (12, True)  # all of them together have grown, as in a folder
    assert in_memory([replace(qa, id=f"new {qa.id}") for qa in a], 8, "parts") == (1, False)


def test_memory_and_folder_price_growth_alike(tmp_path):
    for planned in (None, 2, [8, 16]):
        for step, (qas, n) in enumerate([(QAS[:2], 8), (QAS[:2], 16), (QAS, 16), (QAS, 20)]):
            there = look(open_run(tmp_path/str(planned), SETTINGS, qas, planned=planned), n)
            assert in_memory(qas, n, f"grown {planned}", planned=planned) == there and there[1] == (
                step > 1 or step == 1 and planned is None
            )


def test_a_plan_made_after_a_look_is_none():
    assert in_memory(QAS, 8, "late") == (1, False) and in_memory(QAS, 16, "late", planned=[8, 16]) == (1, True)


def test_a_plan_is_kept_and_old_folders_are_read(tmp_path):
    filled(tmp_path, planned=(16, 32))
    assert (
        read_run(tmp_path).planned == [16, 32]
        and not report_run(tmp_path, n=32).anytime
        and report_run(tmp_path, n=16).looks == 2
    )
    with pytest.raises(ValueError, match="another plan of looks"): open_run(tmp_path, SETTINGS, QAS, planned=[16, 40])
    old = json.loads((tmp_path/"run.json").read_text())
    del old["checksum"]                             # as folders were before plans named their n's
    (tmp_path/"run.json").write_text(json.dumps(old | dict(planned=2, looks=old["looks"][1:])))
    assert not report_run(tmp_path, n=32).anytime and report_run(tmp_path, n=20).anytime


@pytest.mark.parametrize("planned", [0, 1001, 2.5, "2", [], [8, 8], [16, 8], [0, 8], [8, "16"]], ids=str)
def test_what_is_no_plan_of_looks(planned):
    with pytest.raises(
        ValueError, match="looks must be the n's that will be reported on, growing, such as .512, 2048."
    ):
        open_run(None, SETTINGS, QAS, planned=planned)


def test_looks_are_written_once_and_with_what_was_looked_at(tmp_path):
    filled(tmp_path)
    for n, score in ((8, "keywords"), (8, "keywords"), (8, "exact_match"), (16, "keywords")):
        r = report_run(tmp_path, n=n, score=score)
    assert [(e["n"], e["questions"], e["score"]) for e in json.loads((tmp_path / "run.json").read_text())["looks"]] == [
        (8, 4, "key words (fraction)"),
        (8, 4, "exact match"),
        (16, 4, "key words (fraction)"),
    ]
    assert r.anytime and r.how["looks"] == [(8, 4), (16, 4)]


def test_a_report_that_fails_is_no_look(tmp_path):
    filled(tmp_path)
    for how in (dict(score="bleu"), dict(n=41), dict(leak_at=2)):
        with pytest.raises(ValueError): report_run(tmp_path, **how)
    assert read_run(tmp_path).looks == []


def test_looking_and_extending_keeps_the_promise():
    """A leak probability of 3 %; 8 looks from 50 to 400 draws; the run ends at the first look that proves less than 3 %.
    With α = 0.1 at most 10 % of 400 runs may do so; this test fails by chance less than once in 10,000."""
    rng, ends = np.random.default_rng(5), range(50, 401, 50)
    def ever_below(x): return any(stratified_betting(x[:, :n], .1, anytime=True) < .03 for n in ends)
    wrong = sum(ever_below((rng.random((2, 400)) < .03) * 1.) for _ in range(400))
    assert wrong <= binom.ppf(1 - 1e-4, 400, .1)


def test_differences_of_reports_that_grew_hold_at_all_times(tmp_path):
    a, b = (
        filled(tmp_path / "a", leaks=(30, 20, 0, 0)),
        filled(tmp_path / "b", leaks=(0, 0, 0, 0), settings=SETTINGS | dict(model="b")),
    )
    board = versus([report_run(a, name="a"), report_run(b, name="b")], alpha=.05)
    assert "of b minus that of a is between -" in board.notes[0] and "α = 0.05" in board.notes[0]
    assert ", fixed-n, " in board.notes[0]
    report_run(a, n=20)
    later = versus([report_run(a, name="a"), report_run(b, name="b")], alpha=.05)
    assert ", anytime, " in later.notes[0]
