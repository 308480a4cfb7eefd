"""Evaluation runs: the same from memory and from disk, killed and resumed, mixed up on purpose, and refused before any work."""
import multiprocessing
import random
import shutil
import threading
import time
from dataclasses import replace
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

import probunlearn.evaluation
from conftest import LetterTok, random_lm
from probunlearn.data import Template, fictional_authors
from probunlearn.draws import Decoding
from probunlearn.evaluation import evaluate
from probunlearn.models import small_lm
from probunlearn.report import as_json
from probunlearn.temperature import AdaptiveTemperature

FOUR, KEPT = fictional_authors("forget01"), fictional_authors("retain90")[:2]
LIVELY = Decoding(temperature=1.5, max_new_tokens=20)     # so that draws differ


def ask(lm, tok, qas=FOUR[:2], **how): return evaluate(lm, tok, qas, **dict(n=12, decoding=LIVELY, progress=False, name="m") | how)


def same(a, b):
    "Whether two lists of draws agree draw for draw, probabilities included."
    def facts(d): return d.id, d.texts, d.index.tolist(), [tuple(t) for t in d.tokens], d.logprobs.tolist(), d.finished.tolist(), d.decoding, d.seed
    return [facts(d) for d in a] == [facts(d) for d in b]


def files(folder): return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.fixture(scope="module", autouse=True)
def nursery():
    "Makes processes that can be killed; it imports torch once for all of them, while other tests run."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with pytest.MonkeyPatch.context() as m:
        m.setenv("PYTHONPATH", str(Path(__file__).parent))
        forkserver.ensure_running()
    return context


@pytest.fixture
def no_work(monkeypatch):
    "No model is asked anything."
    for name in ("sample", "greedy"): monkeypatch.setattr(probunlearn.evaluation, name, lambda *a, **k: pytest.fail("the model was asked"))


# --- the same from memory and from disk --------------------------------

def test_seed_decides_and_the_folder_changes_nothing(full, tmp_path, monkeypatch):
    reports = [ask(*full, retain=KEPT, n_retain=5, out=out) for out in (None, None, tmp_path/"run")]
    first = reports[0]
    for r in reports[1:]:
        assert as_json(r) == as_json(first) and same(r.forget.draws, first.forget.draws) and same(r.retain.draws, first.retain.draws) and same(r.forget.greedy, first.forget.greedy)
    assert first.x.shape == (2, 12) and first.retain.draws[0].n == 5
    assert not same(ask(*full, seed=1).forget.draws, first.forget.draws)
    before = files(tmp_path/"run")
    monkeypatch.setattr(probunlearn.evaluation, "sample", lambda *a, **k: pytest.fail("drawn again"))
    again = ask(*full, retain=KEPT, n_retain=5, out=tmp_path/"run", score="rouge_l_recall", leak_at=.5, alpha=.05)     # another score of the same draws
    assert same(again.forget.draws, first.forget.draws) and {k: v for k, v in files(tmp_path/"run").items() if k != "run.json"} == {k: v for k, v in before.items() if k != "run.json"}
    assert "ROUGE-L recall ≥ 0.5" in again.claims[1] and "α = 0.05" in again.claims[1]


def test_adaptive_temperature_is_in_the_claims(full, tmp_path):
    rule = AdaptiveTemperature(.9)
    for out in (None, tmp_path, tmp_path):
        r = ask(*full, rule=rule, out=out)
        assert all(str(rule) in claim for claim in r.claims) and r.how["rule"] == str(rule)
    with pytest.raises(ValueError, match="rule"): ask(*full, out=tmp_path)


def test_any_question_id_is_a_file(full, tmp_path):
    ids = ["a/b", "../up", "文/é", "%2F", "A b\n?*"]
    qas = [replace(FOUR[0], id=i) for i in ids]
    drawn = ask(*full, qas, out=tmp_path/"run").forget.draws
    assert [d.id for d in drawn] == ids and same(drawn, ask(*full, qas, out=tmp_path/"run").forget.draws)
    assert len(list((tmp_path/"run").glob("*.parquet"))) == 10 and [p.name for p in tmp_path.iterdir()] == ["run"]


# --- resumed and mixed up --------------------------------

def test_a_truncated_file_is_named_and_nothing_is_deleted(full, tmp_path):
    ask(*full, out=tmp_path)
    for file in sorted(tmp_path.glob("*.parquet"))[::3]:                        # one of draws, one of greedy answers
        whole = file.read_bytes()
        file.write_bytes(whole[:len(whole) // 2])
        before = files(tmp_path)
        with pytest.raises(ValueError) as e: ask(*full, out=tmp_path)
        assert str(file) in str(e.value) and files(tmp_path) == before
        file.write_bytes(whole)


def test_a_file_of_another_run_is_refused(full, retain, tmp_path):
    ask(*full, out=tmp_path/"full")
    ask(*retain, out=tmp_path/"retain")
    for file in sorted((tmp_path/"full").glob("*.parquet"))[::3]:
        own = file.read_bytes()
        shutil.copy(tmp_path/"retain"/file.name, file)
        with pytest.raises(ValueError) as e: ask(*full, out=tmp_path/"full")
        assert str(file) in str(e.value) and file.read_bytes() != own
        file.write_bytes(own)
    drawn = sorted((tmp_path/"full").glob("draws-*"))
    shutil.copy(drawn[0], drawn[1])                                             # the same run, another question
    with pytest.raises(ValueError): ask(*full, out=tmp_path/"full")


@pytest.fixture(scope="module")
def a_run(full, tmp_path_factory):
    "The folder of a finished run; don't write there."
    folder = tmp_path_factory.mktemp("run")
    ask(*full, out=folder)
    return folder


@pytest.mark.parametrize("setting, how", [("model", {}), ("template", dict(template=Template(prompt="{question}"))), ("decoding", dict(decoding=Decoding())), ("seed", dict(seed=1)),
                                          ("set of questions", dict(qas=FOUR[1:3])), ("question", dict(qas=[replace(FOUR[0], answer="Another."), FOUR[1]])), ("plan of looks", dict(looks=2)),
                                          ("rule", dict(rule=AdaptiveTemperature(.5)))], ids=lambda v: v if isinstance(v, str) else " ".join(v))
def test_a_run_with_another_setting_is_refused(full, retain, a_run, no_work, setting, how):
    before = files(a_run)
    with pytest.raises(ValueError, match=rf"another {setting}\b"): ask(*(retain if setting == "model" else full), out=a_run, **how)
    assert files(a_run) == before


# --- refused before any work --------------------------------

BARE = [replace(qa, keywords=()) for qa in FOUR]
BAD = [(dict(score="bleu"), "bleu"), (dict(qas=BARE), "key words"), (dict(retain=[replace(KEPT[0], keywords=())]), "key words"), (dict(alpha=0), "alpha"), (dict(alpha=1), "alpha"),
       (dict(n=0), "n and n_retain"), (dict(n=1.5), "1.5"), (dict(n_retain=-1, retain=KEPT), "-1"), (dict(qas=[]), "no questions"), (dict(qas=[FOUR[0]] * 2), "duplicate"),
       (dict(retain=FOUR[:1]), "duplicate"), (dict(leak_at=0), "leak_at"), (dict(leak_at=1.1), "leak_at"), (dict(leak_at=float("nan")), "leak_at")]

@pytest.mark.parametrize("how, match", BAD, ids=[f"{i} {match}" for i, (_, match) in enumerate(BAD)])
def test_bad_settings_cost_no_work(full, tmp_path, no_work, how, match):
    with pytest.raises(ValueError, match=match): ask(*full, out=tmp_path/"run", **how)
    assert not (tmp_path/"run").exists()


def test_a_model_without_an_end_costs_no_work(no_work):
    lm, tok = random_lm(), LetterTok(16)
    lm.generation_config.eos_token_id = tok.eos_token_id = None
    with pytest.raises(ValueError, match="end-of-text"): ask(lm, tok)


def test_a_broken_score_is_an_error_not_a_clean_answer(full):
    for value in (float("nan"), None, 1.5):
        with pytest.raises(ValueError, match=r"lie in \[0, 1\]"): ask(*full, FOUR[:1], n=2, score=lambda answer, qa: value)


# --- extended --------------------------------

def count_rows(lm, rows): return lm.register_forward_pre_hook(lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True)


def row_steps(lm, work):
    "Rows of all forward passes while `work()` runs, and what it returns."
    rows = []
    hook = count_rows(lm, rows)
    try: return work(), sum(rows)
    finally: hook.remove()


def test_an_extended_run_draws_only_what_is_new_and_equals_a_fresh_one(full, tmp_path):
    lm, how = full[0], dict(decoding=Decoding(temperature=1.5, max_new_tokens=6), progress=False)
    (small, first), (grown, more), (fresh, all_) = (row_steps(lm, lambda: evaluate(*full, FOUR[:2], n, out=tmp_path/out, **how)) for n, out in ((512, "run"), (2048, "run"), (2048, "fresh")))
    greedy_alone = row_steps(lm, lambda: probunlearn.evaluation.greedy(*full, FOUR[:1], how["decoding"]))[1]
    assert first + more == all_ and more < all_ and more > first and greedy_alone * 2 < first    # blocks of 256: nothing is drawn twice, nor greedy answers
    assert same(grown.forget.draws, fresh.forget.draws) and same(grown.forget.greedy, fresh.forget.greedy) and small.x.shape == (2, 512) and (grown.x == fresh.x).all()
    again, none = row_steps(lm, lambda: evaluate(*full, FOUR[:2], 2048, score="rouge_l_recall", leak_at=.5, out=tmp_path/"run", **how))
    assert none == 0 and same(again.forget.draws, fresh.forget.draws)
    assert ", fixed-n," in small.claims[1] and ", anytime," in grown.claims[1] and ", fixed-n," in fresh.claims[1]


def test_a_part_of_a_block_is_drawn_again(full, tmp_path):
    for n in (5, 300, 513): grown = ask(*full, FOUR[:1], n=n, out=tmp_path/"run")
    assert same(grown.forget.draws, ask(*full, FOUR[:1], n=513, out=tmp_path/"fresh").forget.draws)


def test_new_questions_are_added_and_old_draws_stay(full, tmp_path):
    ask(*full, FOUR[:2], out=tmp_path)
    before = files(tmp_path)
    r = ask(*full, FOUR, out=tmp_path, retain=KEPT, n_retain=4)
    assert len(r.x) == 4 and len(r.retain.qas) == 2 and {k: v for k, v in before.items() if k.endswith("parquet")}.items() <= files(tmp_path).items()
    assert "anytime" in r.claims[1] and r.alpha * r.looks == pytest.approx(.01) and r.looks == 6
    with pytest.raises(ValueError, match="set of questions"): ask(*full, FOUR[:2], out=tmp_path)


def test_planned_looks_stay_fixed_n_and_share_alpha(full, tmp_path):
    reports = [ask(*full, FOUR[:1], n=n, looks=2, out=tmp_path, alpha=.02) for n in (8, 16, 12)]
    assert [(r.alpha, r.looks, r.anytime) for r in reports] == [(.01, 2, False), (.01, 2, False), (.01, 2, True)]
    reports = [ask(*full, FOUR[:1], n=n, looks=[8, 12], out=tmp_path/"listed", alpha=.02) for n in (8, 12)]
    assert [(r.alpha, r.looks, r.anytime) for r in reports] == [(.01, 2, False)] * 2


def test_an_extension_in_memory_is_noticed(full):
    def twice(seed, *ns): return [ask(*full, FOUR[:1], n=n, seed=seed).anytime for n in ns]
    assert twice(901, 8, 8, 16) == [False, False, True] and twice(902, 16) == [False]


def test_other_versions_go_on_reporting_but_not_drawing(full, tmp_path, monkeypatch):
    ask(*full, out=tmp_path)
    monkeypatch.setattr(probunlearn.evaluation, "version", lambda name: "9.9")
    assert ask(*full, out=tmp_path).x.shape == (2, 12)
    before = files(tmp_path)
    with pytest.raises(ValueError, match="was drawn with torch .*, here it is 9.9"): ask(*full, n=300, out=tmp_path)
    assert files(tmp_path) == before


# --- shared --------------------------------

def test_parts_meet_in_the_folder(full, tmp_path, capsys):
    parts = [ask(*full, FOUR, out=tmp_path/"run", shard=(i, 3), retain=KEPT, n_retain=4) for i in (2, 0, 1)]
    assert parts[:2] == [None, None] and "still left to others" in capsys.readouterr().out
    whole = ask(*full, FOUR, out=tmp_path/"whole", retain=KEPT, n_retain=4)
    assert same(parts[2].forget.draws, whole.forget.draws) and parts[2].claims == whole.claims and same(ask(*full, FOUR, out=tmp_path/"run", shard=(0, 3)).forget.draws, whole.forget.draws)


def test_torchrun_shares_by_rank(full, tmp_path, monkeypatch):
    for rank in "10":
        monkeypatch.setenv("RANK", rank), monkeypatch.setenv("WORLD_SIZE", "2")
        r = ask(*full, FOUR, out=tmp_path)
    assert len(r.x) == 4
    assert ask(*full, FOUR[:1]).x.shape == (1, 12)                              # in memory every process draws everything


@pytest.mark.parametrize("shard", [(2, 2), (-1, 2), (0, 0), (.5, 2)], ids=str)
def test_a_part_that_is_none(full, shard, tmp_path, no_work):
    with pytest.raises(ValueError, match="0 <= i < N"): ask(*full, out=tmp_path/"run", shard=shard)


# --- killed and resumed --------------------------------

def long_run(folder, questions=4, n=256, shard=(0, 1)):
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())                                            # its own lock outlives a killed process
    qas = fictional_authors("forget10")[:questions]
    return evaluate(*small_lm("full", device="cpu"), qas, n=n, decoding=Decoding(temperature=1.5, max_new_tokens=6), out=folder, shard=shard, progress=False)


def killed_run(nursery, folder, whole, kills, took, processes=1, **how):
    "Kill one of the processes at random moments, start it again, and go on until all is drawn."
    rng = random.Random(kills)
    children, killed = {}, 0
    def start(i):
        children[i] = nursery.Process(target=long_run, args=(folder,), kwargs=dict(shard=(i, processes), **how))
        children[i].start()
    for i in range(processes): start(i)
    while killed < kills:
        time.sleep(rng.uniform(0, took / processes / max(2, kills / 2)))
        i = rng.randrange(processes)
        running = children[i].is_alive()
        children[i].kill()
        children[i].join()
        killed += running
        if not running and all(not c.is_alive() for c in children.values()) and len(list(folder.glob("draws-*"))) == len(whole.forget.qas): break
        start(i)
    there = {p.name: p.read_bytes() for p in folder.glob("*.parquet")}
    for c in children.values(): c.join()
    resumed = long_run(folder, **how)
    assert same(resumed.forget.draws, whole.forget.draws) and same(resumed.forget.greedy, whole.forget.greedy) and resumed.claims == whole.claims
    assert there.items() <= files(folder).items()                               # what was whole was kept
    return killed


def test_a_killed_run_goes_on_where_it_stopped(tmp_path, nursery):
    start = time.time()
    whole = long_run(tmp_path/"whole")
    took = time.time() - start
    assert killed_run(nursery, tmp_path/"one", whole, 2, took) >= 1
    assert killed_run(nursery, tmp_path/"two", whole, 3, took, processes=2) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_forty_questions_killed_twenty_times(tmp_path, nursery, processes):
    start = time.time()
    whole = long_run(tmp_path/"whole", 40, 512)
    assert killed_run(nursery, tmp_path/"run", whole, 20, time.time() - start, processes, questions=40, n=512) == 20
