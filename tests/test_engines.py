"""`Vllm` by a stand-in for the package vllm; tests/engines asks the real one, in an environment of its own."""
import json
import os
import signal
import sys
import time

import numpy as np
import pytest
from scipy import stats

import stand_in
from probunlearn.data import QA, Template, encode_prompt, fictional_authors
from probunlearn.draws import Decoding
from probunlearn.engines import Vllm, _batches, draw_seeds
from probunlearn.evaluation import evaluate
from probunlearn.exact import answer_logprob, sequence_logprobs
from probunlearn.judges import LEAK, GenerativeJudge
from probunlearn.models import TEMPLATE, load_model, small_model
from probunlearn.runs import read_run

QAS, SHORT = fictional_authors("forget10")[:2], Decoding(max_new_tokens=4)


@pytest.fixture(autouse=True)
def vllm(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr(stand_in.LLM, "started", [])
    stand_in.install()


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return small_model("retain", device="cpu").save(tmp_path_factory.mktemp("vllm")/"small")


@pytest.fixture
def model(folder): return Vllm(folder)


def texts(draws): return [d.texts for d in draws]


# --- seeds ----------------------------------------------------------------------------------------------------------

def test_seeds_of_a_question_differ_in_their_lower_half():
    "PyTorch's generator on a CPU hears 32 bits: by chance some of 200,000 would meet (4.7 pairs expected)."
    low = [s % 2**32 for s in draw_seeds(3, "q", 0, 200_000)]
    assert len(set(low)) == len(low)


def test_seeds_look_like_chance():
    "Bits, neighbours and differences: each test fails with probability below 1e-4."
    low = np.array([s % 2**32 for s in draw_seeds(0, "q", 0, 50_000)], dtype=np.int64)
    ones = [(low >> bit & 1).mean() for bit in range(32)]
    assert max(abs(np.array(ones) - .5)) < 5.5 * .5 / len(low)**.5
    assert stats.kstest(low / 2**32, "uniform").pvalue > 1e-4
    assert stats.kstest(np.diff(low) % 2**32 / 2**32, "uniform").pvalue > 1e-4
    assert abs(np.corrcoef(low[:-1], low[1:])[0, 1]) < 5 / len(low)**.5


def test_other_questions_and_seeds_walk_other_ways():
    ways = [draw_seeds(seed, id, 0, 5_000) for seed in (0, 1) for id in ("a", "b", "\ud800")]
    assert len({s for way in ways for s in way}) == 30_000
    for i in range(6):
        for j in range(i): assert not np.array_equal(np.diff(ways[i]), np.diff(ways[j]))


# --- what it says to vLLM -------------------------------------------------------------------------------------------

def test_one_request_per_draw_with_neutral_settings(model):
    decoding = Decoding(temperature=.5, top_p=.9, top_k=7, max_new_tokens=2)
    model.draw(QAS, 3, decoding, 5)
    heard = [how for _, how in model.engine.batches[0]]
    assert [how.seed for how in heard] == [s for qa in QAS for s in draw_seeds(5, qa.id, 0, 3)]
    wanted = dict(n=1, temperature=.5, top_p=.9, top_k=7, min_p=0, presence_penalty=0, frequency_penalty=0,
                  repetition_penalty=1, max_tokens=2, min_tokens=0, stop_token_ids=model.ends, ignore_eos=False)
    for how in heard: assert wanted.items() <= vars(how).items()
    assert [prompt for prompt, _ in model.engine.batches[0][::3]] == [
        tuple(encode_prompt(model.tok, qa.question, model.template)) for qa in QAS]


def test_options_go_to_vllm_and_their_effect_into_the_identity(folder):
    few = Vllm(folder, dtype="bfloat16", tensor_parallel_size=2, max_model_len=99)
    assert {"dtype": "bfloat16", "tensor_parallel_size": 2, "max_model_len": 99}.items() <= few.engine.options.items()
    assert few.identity["options"] == dict(dtype="bfloat16", max_model_len="99")
    assert json.loads(json.dumps(few.identity)) == few.identity
    assert Vllm(folder, dtype="float32").identity != few.identity
    assert few.made["vllm"] == "0.0" and "seed" not in few.identity


def test_other_weights_are_another_model(model, tmp_path):
    full = Vllm(small_model("full", device="cpu").save(tmp_path/"full"))
    assert full.identity["model"] != model.identity["model"] and full.files == Vllm(tmp_path/"full").files


def test_the_folders_own_settings_are_ignored_and_said_to_be(tmp_path):
    lm = small_model("retain", device="cpu")
    lm.lm.generation_config.update(do_sample=True, top_k=20, repetition_penalty=1.1, eos_token_id=[0, 7])
    lm.save(tmp_path/"own")
    with pytest.warns(UserWarning, match="asks for top_k 20, repetition_penalty 1.1. That is ignored: `decoding` says"):
        model = Vllm(tmp_path/"own")
    assert model.ends == [0, 7]
    model.draw(QAS[:1], 1, SHORT)
    assert model.engine.batches[0][0][1].top_k == 0 and model.engine.batches[0][0][1].stop_token_ids == [0, 7]


def test_the_template_that_was_saved_is_used(tmp_path):
    asked = small_model("retain", device="cpu").replace(template=Template("{question} ->")).save(tmp_path/"own")
    assert (asked/TEMPLATE).exists() and Vllm(asked).asked == "asked as '{question} ->'"
    other = Vllm(asked).replace(template=Template(), name="other")
    assert other.name == "other" and other.template == Template() and other.identity != Vllm(asked).identity


# --- what comes back ------------------------------------------------------------------------------------------------

def test_log_probabilities_are_those_of_a_forward_pass(model):
    local = load_model(model.engine.local.lm.config._name_or_path, device="cpu")
    draws = model.draw(QAS, 12, SHORT)
    for qa, d in zip(QAS, draws):
        exact = sequence_logprobs(local, encode_prompt(local.tok, qa.question, local.template), d.tokens, SHORT)
        np.testing.assert_allclose(d.logprobs, exact, atol=1e-4)
        assert list(d.finished) == [t[-1] in model.ends for t in d.tokens]


def test_without_log_probabilities_nothing_is_certain(model, monkeypatch):
    monkeypatch.setattr(stand_in.LLM, "logprobs", False)
    assert model.draw(QAS[:1], 3, SHORT)[0].logprobs is None
    report = evaluate(model, QAS, 8, decoding=SHORT, progress=False)
    assert report.to_frame().certain_upper.tolist() == [1, 1]
    assert model.greedy(QAS[:1], SHORT)[0].logprobs.tolist() == [0]     # a greedy answer is certain


def test_greedy_answers_are_those_of_the_model(model):
    assert texts(model.greedy(QAS, SHORT)) == texts(small_model("retain", device="cpu").greedy(QAS, SHORT))


def test_claims_say_what_the_engine_cannot_promise(model):
    report = evaluate(model, QAS, 8, decoding=SHORT, progress=False)
    said = "temperature 1, drawn by vLLM: a seed repeats a draw up to rounding, at most 4 tokens"
    assert said in str(report.bounds["average leak"]) and report.how["engine"] == "vllm"


def test_draws_begin_anywhere_and_in_batches_of_any_size(folder):
    whole, small = Vllm(folder).draw(QAS, 10, SHORT), Vllm(folder, at_once=3)
    assert texts(small.draw(QAS, 10, SHORT)) == texts(whole)
    assert {len(batch) for batch in small.engine.batches} == {3, 2}
    assert texts(small.draw(QAS[1:], 10, SHORT, start=7)) == [whole[1].texts[7:]]
    parts = {qa.id: [None] * 10 for qa in QAS}
    for qa, part, first in small.arriving(QAS, 10, SHORT): parts[qa.id][first:first + part.n] = part.texts
    assert list(parts.values()) == texts(whole)


def test_batches_hold_each_draw_once():
    for size in range(1, 12):
        batches = list(_batches("abc", range(2, 7), size))
        assert sorted((qa, i) for batch in batches for qa, some in batch for i in some) == [
            (qa, i) for qa in "abc" for i in range(2, 7)]
        assert all(sum(len(some) for _, some in batch) == size for batch in batches[:-1])


def test_it_judges(model):
    judge = GenerativeJudge(model, LEAK)
    assert judge.labels([(QAS[0], "no idea")]) == [None]
    assert judge.labels([(QAS[0], "word " * 600)]) == [None]            # longer than it can read


# --- what it refuses ------------------------------------------------------------------------------------------------

def test_rules_are_refused(folder, model):
    for ask in (lambda: Vllm(folder, rule="greedy above .9"), lambda: model.replace(rule="greedy above .9"),
                lambda: model.draw(QAS, 1, Decoding(rule="greedy above .9")),
                lambda: evaluate(model, QAS, 4, decoding=Decoding(rule="greedy above .9"), progress=False)):
        with pytest.raises(ValueError, match="vLLM draws at one temperature, and 'greedy above .9' moves it"): ask()


def test_what_is_no_folder_of_whole_weights(folder, tmp_path):
    from peft import LoraConfig, get_peft_model
    (tmp_path/"a.gguf").write_bytes(b"GGUF")
    plan = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    get_peft_model(load_model(folder, device="cpu").lm, plan).save_pretrained(tmp_path/"adapter")
    for source, why in {"./gone": "no such folder", tmp_path/"a.gguf": "is a file, and vLLM reads folders: load_model",
                        tmp_path: "holds a GGUF file", tmp_path/"adapter": "is an adapter: load_model"}.items():
        with pytest.raises((ValueError, FileNotFoundError), match=why): Vllm(source)
    (tmp_path/"bert").mkdir()
    config = dict(model_type="bert", architectures=["BertForSequenceClassification"])
    (tmp_path/"bert"/"config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="BertForSequenceClassification, which has no head"): Vllm(tmp_path/"bert")
    assert not stand_in.LLM.started


def test_a_prompt_without_room_and_questions_twice(folder):
    model = Vllm(folder, max_model_len=24)
    with pytest.raises(
        ValueError, match=r"exceed the 24 tokens that vLLM was started with: Vllm\(…, max_model_len=…\)"
    ):
        evaluate(model, QAS, 4, progress=False)
    with pytest.raises(ValueError, match="n must be a whole number >= 1, got 0"): model.draw(QAS, 0)
    with pytest.raises(ValueError, match="id"): model.draw([QAS[0]] * 2, 2, SHORT)
    assert not model.engine.batches


def test_exact_probabilities_need_weights_in_this_process(model):
    with pytest.raises(TypeError, match="Vllm gives answers only: load its weights"): answer_logprob(model, QAS)


def test_a_rank_is_no_share(model, monkeypatch, tmp_path):
    "Under torchrun each process would start an engine on the same devices."
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match=r"torchrun has started 2 processes: .* shard=\(i, N\)"):
        evaluate(model, QAS, 4, decoding=SHORT, out=tmp_path, progress=False)
    assert evaluate(model, QAS, 4, decoding=SHORT, out=tmp_path, shard=(0, 1), progress=False).x.shape == (2, 4)


def test_without_vllm(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r"can't be imported here .*: pip install 'probunlearn\[vllm\]', or"):
        Vllm(folder)


# --- a run survives kills -------------------------------------------------------------------------------------------

def ask(folder, out):
    "What the killed processes do."
    stand_in.install()
    stand_in.LLM.pause = .02
    evaluate(Vllm(folder, at_once=16), QAS, 128, decoding=SHORT, out=out, progress=False)


def there(out):
    "(question, number) → text of the draws on disk."
    if not (out/"run.json").exists(): return {}
    run = read_run(out)
    found = {qa.id: run.draws(qa) for qa in QAS}
    return {(id, i): t for id, d in found.items() if d for i, t in enumerate(d.texts) if t is not None}


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_run_that_is_killed_five_times_goes_on(nursery, folder, tmp_path):
    before, kills = {}, 0
    while kills < 5:
        child = nursery.Process(target=ask, args=(folder, tmp_path))
        child.start()
        while child.is_alive() and len(there(tmp_path)) < len(before) + 16: time.sleep(.01)
        kills += child.is_alive()
        if child.is_alive(): os.kill(child.pid, signal.SIGKILL)
        child.join()
        now = there(tmp_path)
        assert before.items() <= now.items()
        if len(now) == 256: break
        before = now
    assert kills >= 3
    ask(folder, tmp_path)
    stand_in.install()
    found = there(tmp_path)
    assert before.items() <= found.items() and len(found) == 256
    model = Vllm(folder)
    undisturbed = [text for d in model.draw(QAS, 128, SHORT) for text in d.texts]
    assert [found[qa.id, i] for qa in QAS for i in range(128)] == undisturbed
