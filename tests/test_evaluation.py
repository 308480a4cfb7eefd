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


# --- the same from memory and from disk -----------------------------------------------------------------------------------------------------

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
    assert same(again.forget.draws, first.forget.draws) and files(tmp_path/"run") == before
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


# --- resumed and mixed up ---------------------------------------------------------------------------------------------------------------------

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
                                          ("n", dict(n=13)), ("questions", dict(qas=FOUR[1:3])), ("questions", dict(qas=[replace(FOUR[0], answer="Another."), FOUR[1]])),
                                          ("rule", dict(rule=AdaptiveTemperature(.5)))], ids=lambda v: v if isinstance(v, str) else " ".join(v))
def test_a_run_with_another_setting_is_refused(full, retain, a_run, no_work, setting, how):
    before = files(a_run)
    with pytest.raises(ValueError, match=rf"another {setting}\b"): ask(*(retain if setting == "model" else full), out=a_run, **how)
    assert files(a_run) == before


# --- refused before any work ----------------------------------------------------------------------------------------------------------------

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


# --- killed and resumed ---------------------------------------------------------------------------------------------------------------------

def long_run(folder):
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())                                            # its own lock outlives a killed process
    return evaluate(*small_lm("full", device="cpu"), FOUR, n=256, decoding=Decoding(temperature=1.5, max_new_tokens=10), out=folder, progress=False)


def test_a_killed_run_goes_on_where_it_stopped(tmp_path, nursery):
    start = time.time()
    whole = long_run(tmp_path/"whole")
    took = time.time() - start
    for seed in range(3):
        folder = tmp_path/f"killed-{seed}"
        child = nursery.Process(target=long_run, args=(folder,))
        child.start()
        while child.is_alive() and not (folder/"run.json").exists(): time.sleep(.005)
        time.sleep(random.Random(seed).uniform(0, .8 * took))
        child.kill()
        child.join()
        there = {p.name: p.read_bytes() for p in folder.glob("*.parquet")}
        resumed = long_run(folder)
        assert same(resumed.forget.draws, whole.forget.draws) and same(resumed.forget.greedy, whole.forget.greedy) and resumed.claims == whole.claims
        assert there.items() <= files(folder).items()                           # what was whole was kept
