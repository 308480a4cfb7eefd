"""Runs: the same from memory and from disk, killed and resumed, mixed up on purpose, refused before any work."""
import json
import random
import shutil
import threading
import time
from dataclasses import replace

import pytest
import torch
from tqdm import tqdm

from conftest import LetterTok, random_lm
from probunlearn.data import Template, fictional_authors
from probunlearn.draws import Decoding, draws_from_texts
from probunlearn.evaluation import evaluate
from probunlearn.models import LocalModel, small_model
from probunlearn.report import as_json
from probunlearn.runs import read_run
from probunlearn.training import UnlearnConfig, unlearn

FOUR, KEPT = fictional_authors("forget01"), fictional_authors("retain90")[:2]
LIVELY = Decoding(temperature=1.5, max_new_tokens=20)       # so that draws differ
pytestmark = pytest.mark.usefixtures("nursery")             # it imports torch while other tests run


def ask(model, qas=FOUR[:2], **how):
    return evaluate(model, qas, **dict(n=12, decoding=LIVELY, progress=False, name="m") | how)


def facts(d):
    "All that draws are, as plain values."
    arrays = [values.tolist() for values in (d.index, d.logprobs, d.finished)]
    return d.id, d.texts, [tuple(t) for t in d.tokens], arrays, d.decoding, d.seed


def same(a, b): return [facts(d) for d in a] == [facts(d) for d in b]       # draw for draw, probabilities included


def files(folder, suffix=""):
    "Name → content of a folder's files."
    return {path.name: path.read_bytes() for path in sorted(folder.glob(f"*{suffix}"))}


@pytest.fixture
def no_work(monkeypatch):
    "No model is asked anything."
    def asked(*args, **how): pytest.fail("the model was asked")
    for name in ("draw", "greedy", "arriving"): monkeypatch.setattr(LocalModel, name, asked)


# --- the same from memory and from disk -------------------------------------------------------------------------------

def test_seed_decides_and_the_folder_changes_nothing(full, tmp_path, request):
    reports = [ask(full, retain=KEPT, n_retain=5, out=out) for out in (None, None, tmp_path/"run")]
    first = reports[0]
    for r in reports[1:]:
        assert as_json(r) == as_json(first) and same(r.forget.draws, first.forget.draws)
        assert same(r.retain.draws, first.retain.draws) and same(r.forget.greedy, first.forget.greedy)
    assert first.x.shape == (2, 12) and first.retain.draws[0].n == 5
    assert not same(ask(full, seed=1).forget.draws, first.forget.draws)
    before = files(tmp_path/"run", ".parquet")
    request.getfixturevalue("no_work")                      # another score of the same draws
    again = ask(full, retain=KEPT, n_retain=5, out=tmp_path/"run", score="rouge_l_recall", leak_at=.5, alpha=.05)
    assert same(again.forget.draws, first.forget.draws) and files(tmp_path/"run", ".parquet") == before
    assert "ROUGE-L recall ≥ 0.5" in again.claims[1] and "α = 0.05" in again.claims[1]


def test_adaptive_temperature_is_in_the_claims(full, tmp_path):
    model = full.adaptive(.9)
    for out in (None, tmp_path, tmp_path):
        r = ask(model, out=out)
        assert all(str(model.rule) in claim for claim in r.claims) and r.how["rule"] == str(model.rule)
    with pytest.raises(ValueError, match="rule"): ask(full, out=tmp_path)


def test_how_the_model_is_asked_is_in_the_claims_and_said_before(full, tmp_path, capsys):
    model = full.replace(template=Template("{question} ->"))
    r = ask(model, out=tmp_path, progress=True, name=None)
    assert all("asked as '{question} ->'" in claim for claim in r.claims)
    assert "full is asked as '{question} ->'" in capsys.readouterr().out


def test_any_question_id_is_a_file(full, tmp_path):
    ids = ["a/b", "../up", "文/é", "%2F", "A b\n?*"]
    qas = [replace(FOUR[0], id=i) for i in ids]
    drawn = ask(full, qas, out=tmp_path/"run").forget.draws
    assert [d.id for d in drawn] == ids and same(drawn, ask(full, qas, out=tmp_path/"run").forget.draws)
    assert len(files(tmp_path/"run", ".parquet")) == 10
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


# --- resumed and mixed up ---------------------------------------------------------------------------------------------

def test_a_truncated_file_is_named_and_nothing_is_deleted(full, tmp_path):
    ask(full, out=tmp_path)
    for file in sorted(tmp_path.glob("*.parquet"))[::3]:                        # one of draws, one of greedy answers
        whole = file.read_bytes()
        file.write_bytes(whole[:len(whole) // 2])
        before = files(tmp_path)
        with pytest.raises(ValueError) as e: ask(full, out=tmp_path)
        assert str(file) in str(e.value) and files(tmp_path) == before
        file.write_bytes(whole)


def test_a_file_of_another_run_is_refused(full, retain, tmp_path):
    ask(full, out=tmp_path/"full")
    ask(retain, out=tmp_path/"retain")
    for file in sorted((tmp_path/"full").glob("*.parquet"))[::3]:
        own = file.read_bytes()
        shutil.copy(tmp_path/"retain"/file.name, file)
        with pytest.raises(ValueError) as e: ask(full, out=tmp_path/"full")
        assert str(file) in str(e.value) and file.read_bytes() != own
        file.write_bytes(own)
    drawn = sorted((tmp_path/"full").glob("draws-*"))
    shutil.copy(drawn[0], drawn[1])                                             # the same run, another question
    with pytest.raises(ValueError): ask(full, out=tmp_path/"full")


@pytest.fixture(scope="module")
def a_run(full, tmp_path_factory):
    "The folder of a finished run; don't write there."
    folder = tmp_path_factory.mktemp("run")
    ask(full, out=folder)
    return folder


OTHER = [
    ("template", {}, dict(template=Template(prompt="{question}"))), ("rule", dict(confidence=.5), {}),
    ("decoding", dict(decoding=Decoding()), {}), ("seed", dict(seed=1), {}),
    ("set of questions", dict(qas=FOUR[1:3]), {}), ("plan of looks", dict(looks=2), {}),
    ("question", dict(qas=[replace(FOUR[0], answer="Another."), FOUR[1]]), {})]

@pytest.mark.parametrize("setting, how, changed", OTHER, ids=[setting for setting, *_ in OTHER])
def test_a_run_with_another_setting_is_refused(full, a_run, no_work, setting, how, changed):
    before, how = files(a_run), dict(how)
    model = full.adaptive(how.pop("confidence")) if "confidence" in how else full.replace(**changed)
    with pytest.raises(ValueError, match=rf"another {setting}\b"): ask(model, out=a_run, **how)
    assert files(a_run) == before


def test_a_run_of_another_model_is_refused(retain, a_run, no_work):
    with pytest.raises(ValueError, match=r"another model\b"): ask(retain, out=a_run)


def test_a_model_that_was_trained_in_place_is_another_model(tmp_path):
    model, forget, retain = (
        small_model("full", device="cpu"),
        fictional_authors("forget01"),
        fictional_authors("retain99"),
    )
    how = dict(n=16, decoding=Decoding(max_new_tokens=8), out=tmp_path/"run", progress=False)
    evaluate(model, forget[:2], **how)
    unlearn(model, forget, retain[:8], UnlearnConfig(steps=1, batch_size=2))
    with pytest.raises(ValueError, match="another model"): evaluate(model, forget[:2], **how)



# --- refused before any work ------------------------------------------------------------------------------------------

BARE = [replace(qa, keywords=()) for qa in FOUR]
BAD = [(dict(score="bleu"), "bleu"), (dict(qas=BARE), "key words"),
       (dict(retain=[replace(KEPT[0], keywords=())]), "key words"), (dict(alpha=0), "alpha"), (dict(alpha=1), "alpha"),
       (dict(n=0), "n must be a whole number >= 1, got 0"), (dict(n=1.5), "1.5"),
       (dict(n_retain=-1, retain=KEPT), "-1"), (dict(seed=-1), "seed must be a whole number >= 0"),
       (dict(qas=[]), "no questions"),
       (dict(qas=[FOUR[0]] * 2), "duplicate"), (dict(retain=FOUR[:1]), "duplicate"), (dict(leak_at=0), "leak_at"),
       (dict(leak_at=1.1), "leak_at"), (dict(leak_at=float("nan")), "leak_at")]

@pytest.mark.parametrize("how, match", BAD, ids=[f"{i} {match}" for i, (_, match) in enumerate(BAD)])
def test_bad_settings_cost_no_work(full, tmp_path, no_work, how, match):
    with pytest.raises(ValueError, match=match): ask(full, out=tmp_path/"run", **how)
    assert not (tmp_path/"run").exists()


def test_a_model_without_an_end_costs_no_work(no_work):
    lm, tok = random_lm(), LetterTok(16)
    lm.generation_config.eos_token_id = tok.eos_token_id = None
    with pytest.raises(ValueError, match="end-of-text"): ask(LocalModel(lm, tok))


def test_weights_and_tokenizer_as_two_arguments_are_told_what_to_write(full):
    says = r"takes one model to ask.*LocalModel\(lm, tok\)"
    with pytest.raises(TypeError, match=says): evaluate(full.lm, full.tok, FOUR)


def test_a_broken_score_is_an_error_not_a_clean_answer(full):
    for value in (float("nan"), None, 1.5):
        def broken(answer, qa): return value
        with pytest.raises(ValueError, match=r"lie in \[0, 1\]"): ask(full, FOUR[:1], n=2, score=broken)


# --- extended ---------------------------------------------------------------------------------------------------------

def row_steps(lm, work):
    "What `work()` returns, and the rows of all forward passes while it runs."
    rows = []
    def count(module, args, kwargs): rows.append(len(kwargs["input_ids"]))
    hook = lm.register_forward_pre_hook(count, with_kwargs=True)
    try: return work(), sum(rows)
    finally: hook.remove()


def test_an_extended_run_draws_only_what_is_new_and_equals_a_fresh_one(full, tmp_path, monkeypatch):
    monkeypatch.setattr("probunlearn.models.check_independence", lambda *model: None)       # its rows aren't counted
    how = dict(decoding=Decoding(temperature=1.5, max_new_tokens=6), progress=False)
    def work(n, out, **more):
        return row_steps(full.lm, lambda: evaluate(full, FOUR[:2], n, out=tmp_path/out, **how, **more))
    (small, first), (grown, more), (fresh, all_) = work(512, "run"), work(2048, "run"), work(2048, "fresh")
    greedy_alone = row_steps(full.lm, lambda: full.greedy(FOUR[:1], how["decoding"]))[1]
    assert first + more == all_ and more > first                                # blocks of 256: nothing is drawn twice,
    assert greedy_alone * 2 < first                                             # nor greedy answers
    assert same(grown.forget.draws, fresh.forget.draws) and same(grown.forget.greedy, fresh.forget.greedy)
    assert small.x.shape == (2, 512) and (grown.x == fresh.x).all()
    again, none = work(2048, "run", score="rouge_l_recall", leak_at=.5)
    assert none == 0 and same(again.forget.draws, fresh.forget.draws)
    kinds = [", fixed-n,", ", anytime,", ", fixed-n,"]
    assert all(kind in report.claims[1] for kind, report in zip(kinds, (small, grown, fresh)))


def test_a_part_of_a_block_is_drawn_again(full, tmp_path):
    for n in (5, 300, 513): grown = ask(full, FOUR[:1], n=n, out=tmp_path/"run")
    assert same(grown.forget.draws, ask(full, FOUR[:1], n=513, out=tmp_path/"fresh").forget.draws)


def test_new_questions_are_added_and_old_draws_stay(full, tmp_path):
    ask(full, FOUR[:2], out=tmp_path)
    before = files(tmp_path, ".parquet")
    r = ask(full, FOUR, out=tmp_path, retain=KEPT, n_retain=4)
    assert len(r.x) == 4 and len(r.retain.qas) == 2 and before.items() <= files(tmp_path).items()
    assert "anytime" in r.claims[1] and r.alpha * r.looks == pytest.approx(.01) and r.looks == 6
    with pytest.raises(ValueError, match="set of questions"): ask(full, FOUR[:2], out=tmp_path)


def test_planned_looks_stay_fixed_n_and_share_alpha(full, tmp_path):
    def looks(*ns, **how):
        reports = [ask(full, FOUR[:1], n=n, alpha=.02, **how) for n in ns]
        return [(r.alpha, r.looks, r.anytime) for r in reports]
    assert looks(8, 16, 12, looks=2, out=tmp_path) == [(.01, 2, False), (.01, 2, False), (.01, 2, True)]
    assert looks(8, 12, looks=[8, 12], out=tmp_path/"listed") == [(.01, 2, False)] * 2


def test_an_extension_in_memory_is_noticed(full):
    def anytime(seed, *ns): return [ask(full, FOUR[:1], n=n, seed=seed).anytime for n in ns]
    assert anytime(901, 8, 8, 16) == [False, False, True] and anytime(902, 16) == [False]


def test_other_versions_go_on_reporting_but_not_drawing(full, tmp_path, monkeypatch):
    ask(full, out=tmp_path)
    monkeypatch.setattr(LocalModel, "made", full.made | dict(torch="9.9"))
    assert ask(full, out=tmp_path).x.shape == (2, 12)
    before = files(tmp_path)
    with pytest.raises(ValueError, match="was drawn with torch .*, here it is 9.9"): ask(full, n=300, out=tmp_path)
    assert files(tmp_path) == before


# --- a model of one's own ---------------------------------------------------------------------------------------------

class Parrot:
    "Says the answer in every eighth draw; hands its draws over in parts, and may be cut off."
    name, asked, identity, at_once = "parrot", "asked by name", dict(model="parrot"), 64

    def __init__(self, patience=10**9): self.patience, self.calls = patience, []

    def said(self, qa, start, n): return [qa.answer if i % 8 == 0 else "no idea" for i in range(start, n)]

    def greedy(self, qas, decoding=Decoding()):
        return [draws_from_texts(qa.id, ["no idea"], prompt=self.asked) for qa in qas]

    def draw(self, qas, n, decoding=Decoding(), seed=0, *, start=0):
        self.calls.append(([qa.id for qa in qas], start, n))
        if len(self.calls) > self.patience: raise ConnectionError("cut off")
        how = dict(decoding=decoding, seed=seed, prompt=self.asked)
        return [draws_from_texts(qa.id, self.said(qa, start, n), **how) for qa in qas]


def test_any_object_with_the_names_of_a_model_is_asked_as_many_at_a_time_as_keep_it_busy():
    parrot = Parrot()
    report = evaluate(parrot, FOUR, n=32, progress=False)
    assert parrot.calls == [([qa.id for qa in FOUR[i:i + 2]], 0, 32) for i in (0, 2)]
    assert report.leaks.mean(1).tolist() == [1 / 8] * 4 and "asked by name" in report.claims[1]
    assert report.name == "parrot"


def test_what_came_before_a_model_was_cut_off_is_kept(tmp_path):
    how = dict(n=64, out=tmp_path, progress=False)
    with pytest.raises(ConnectionError): evaluate(Parrot(patience=2), FOUR, **how)
    assert [read_run(tmp_path).count(qa) for qa in FOUR] == [64, 64, 0, 0]
    parrot = Parrot()
    report = evaluate(parrot, FOUR, **how)
    assert [ids for ids, *_ in parrot.calls] == [[qa.id] for qa in FOUR[2:]] and report.x.shape == (4, 64)


# --- shared -----------------------------------------------------------------------------------------------------------

def test_parts_meet_in_the_folder(full, tmp_path, capsys):
    how = dict(out=tmp_path/"run", retain=KEPT, n_retain=4)
    parts = [ask(full, FOUR, shard=(i, 3), **how) for i in (2, 0, 1)]
    assert parts[:2] == [None, None] and "still left to others" in capsys.readouterr().out
    whole = ask(full, FOUR, **how | dict(out=tmp_path/"whole"))
    assert same(parts[2].forget.draws, whole.forget.draws) and parts[2].claims == whole.claims
    assert same(ask(full, FOUR, out=tmp_path/"run", shard=(0, 3)).forget.draws, whole.forget.draws)


def test_torchrun_shares_by_rank(full, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "10":
        monkeypatch.setenv("RANK", rank)
        r = ask(full, FOUR, out=tmp_path)
    assert len(r.x) == 4
    assert ask(full, FOUR[:1]).x.shape == (1, 12)               # in memory every process draws everything


@pytest.mark.parametrize("shard", [(2, 2), (-1, 2), (0, 0), (.5, 0)], ids=str)
def test_a_part_that_is_none(full, shard, tmp_path, no_work):
    with pytest.raises(ValueError, match="0 <= i < N"): ask(full, out=tmp_path/"run", shard=shard)


# --- killed and resumed -----------------------------------------------------------------------------------------------

def long_run(folder, questions=4, n=256, shard=(0, 1)):
    "A run that takes long enough to be killed."
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())                                            # its own lock outlives a killed process
    model, qas = small_model("full", device="cpu"), fictional_authors("forget10")[:questions]
    decoding = Decoding(temperature=1.5, max_new_tokens=6)
    return evaluate(model, qas, n=n, decoding=decoding, out=folder, shard=shard, progress=False)


def kill_often(start, folder, whole, processes, kills, took):
    "Kill a process when it has begun, and others at random moments, and start them again; how often one was alive."
    rng, killed = random.Random(kills), 0
    children = [start(i) for i in range(processes)]
    while not folder.exists(): time.sleep(.002)
    def finished(): return len(list(folder.glob("draws-*"))) == len(whole.forget.qas)
    while killed < kills:
        if killed: time.sleep(rng.uniform(0, took / processes / max(2, kills / 2)))
        i = rng.randrange(processes)
        running = children[i].is_alive()
        children[i].kill()
        children[i].join()
        killed += running
        if not running and not any(c.is_alive() for c in children) and finished(): break
        children[i] = start(i)
    return killed, children


def killed_run(nursery, folder, whole, kills, took, processes=1, **how):
    "A run of killed processes equals a whole one, and keeps what was whole; how often one was killed."
    def start(i):
        child = nursery.Process(target=long_run, args=(folder,), kwargs=dict(shard=(i, processes), **how))
        child.start()
        return child
    killed, children = kill_often(start, folder, whole, processes, kills, took)
    there = files(folder, ".parquet")
    for child in children: child.join()
    resumed = long_run(folder, **how)
    assert same(resumed.forget.draws, whole.forget.draws) and same(resumed.forget.greedy, whole.forget.greedy)
    assert resumed.claims == whole.claims and there.items() <= files(folder).items()
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
    whole, size = long_run(tmp_path/"whole", 40, 512), dict(questions=40, n=512)
    assert killed_run(nursery, tmp_path/"run", whole, 20, time.time() - start, processes, **size) == 20


# --- rows in one pass -------------------------------------------------------------------------------------------------

def test_rows_in_one_pass_are_a_setting_and_runs_of_earlier_versions_keep_theirs(tmp_path):
    "An answer takes 786 kB of keys and values: 32 MB hold 42, so that 64 rows are read, and 1,024 MB hold all 130."
    lm = random_lm("llama", 300, num_key_value_heads=4, head_dim=64, num_hidden_layers=6, initializer_range=.02)
    model, qas, n = LocalModel(lm, LetterTok(300), template=Template("{question}")), FOUR[:1], 130
    decoding, rows = Decoding(max_new_tokens=64), []
    assert model.identity["memory"] == 1024 and model.replace(memory=7).identity["memory"] == 7
    count_rows(lm, rows)
    evaluate(model, qas, n, out=tmp_path, decoding=decoding, progress=False, score="exact_match")
    assert max(rows) > 120
    notes = json.loads((tmp_path/"run.json").read_text())
    assert notes["settings"].pop("memory") == 1024 and notes.pop("checksum")
    for file in tmp_path.glob("*.parquet"): file.unlink()
    (tmp_path/"run.json").write_text(json.dumps(notes))
    rows.clear()
    evaluate(model, qas, n, out=tmp_path, decoding=decoding, progress=False, score="exact_match")
    assert max(rows) <= 64 and "memory" not in read_run(tmp_path).settings
    how = dict(out=tmp_path/"new", decoding=Decoding(max_new_tokens=2), progress=False, score="exact_match")
    evaluate(model, qas, n, **how)
    with pytest.raises(ValueError, match="another memory: 1024 there, 7 now"):
        evaluate(model.replace(memory=7), qas, n, **how)


def count_rows(lm, rows):
    "Append the number of rows of every forward pass to a list."
    lm.register_forward_pre_hook(lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True)
