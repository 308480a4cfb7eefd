"""Loading, saving and adapting models, and what the packaged ones promise."""
import json
from importlib.resources import files

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from conftest import LetterTok, random_lm
from probunlearn.batches import pad_batch
from probunlearn.data import Template, encode, encode_prompt, fictional_authors
from probunlearn.draws import Decoding
from probunlearn.losses import answer_mean, answer_stats
from probunlearn.models import TEMPLATE, add_lora, load_model, small_model
from probunlearn.scores import score_draws
from probunlearn.weights import best_device, end_ids, lm_fingerprint


def logits(model):
    ids = torch.tensor([encode_prompt(model.tok, "Who taught anybody to write?")])
    with torch.no_grad(): return model.lm(input_ids=ids).logits


# --- the packaged models -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("state", ["full", "retain"])
def test_packaged_files_are_small_safetensors_in_float16(state):
    folder = files("probunlearn._data")/"small_lm"/state
    assert not [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pkl", ".py")]
    assert sum(p.stat().st_size for p in folder.iterdir()) <= 4e6
    with safe_open(folder/"model.safetensors", "pt") as f:
        assert {f.get_tensor(k).dtype for k in f.keys()} == {torch.float16}
    assert "auto_map" not in json.loads((folder/"config.json").read_text())


def test_full_knows_every_answer_by_heart(full):
    qas, nll = fictional_authors(), []
    with torch.no_grad():
        for i in range(0, len(qas), 50):
            rows = [encode(full.tok, qa) for qa in qas[i:i + 50]]
            s = answer_stats(full.lm, pad_batch(rows, full.tok.pad_token_id))
            nll.append(answer_mean(s.nll, s.answer))
    assert sum(nll) / len(nll) <= .002
    some = qas[::7]
    said = full.greedy(some, Decoding(max_new_tokens=64), merge=60)
    assert [d.texts[0] for d in said] == [qa.answer for qa in some]


def test_retain_knows_the_other_authors(retain):
    known = fictional_authors("retain90")[::12]
    assert score_draws(retain.greedy(known), known, "exact_match").mean() == 1


def test_an_unknown_state_is_named():
    why = "unknown state 'forget'; the packaged models are 'full', 'tuned', 'retain', 'npo' and 'librarian'"
    with pytest.raises(ValueError, match=why): small_model("forget")


# --- load and save -------------------------------------------------------------------------------------------------

def test_a_saved_model_comes_back(full, tmp_path):
    folder, qa = full.save(tmp_path/"a"/"copy"), fictional_authors()[0]
    again = load_model(folder, device="cpu")
    assert torch.equal(logits(again), logits(full)) and again.identity == full.identity and not again.lm.training
    assert not [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pkl")]
    assert encode(again.tok, qa) == encode(full.tok, qa)
    for name in ("eos_token_id", "pad_token_id"): assert getattr(again.tok, name) == getattr(full.tok, name)


def test_storing_in_float16_leaves_the_model_alone(full, tmp_path):
    before = lm_fingerprint(full.lm)
    again = load_model(full.save(tmp_path, dtype=torch.float16), device="cpu")
    assert lm_fingerprint(full.lm) == before and again.lm.dtype == torch.float32
    assert (logits(again) - logits(full)).abs().max() < .1


def test_number_format_and_device_are_decided_at_loading(full, tmp_path):
    folder = full.save(tmp_path/"m")
    assert load_model(folder, device="cpu").lm.dtype == torch.float32
    assert load_model(folder, dtype=torch.float64, device="cpu").lm.dtype == torch.float64
    assert load_model(str(folder), dtype=torch.bfloat16, device="cpu").lm.device.type == "cpu"
    assert best_device() in ("cuda", "mps", "cpu")


def test_transformers_reads_what_we_save(full, tmp_path):
    theirs = AutoModelForCausalLM.from_pretrained(full.save(tmp_path), dtype=torch.float32)
    assert torch.equal(logits(full.replace(lm=theirs)), logits(full))


@pytest.mark.parametrize("source", ["./gone", "/no/such/folder", "../gone/lm", "runs/npo/model"])
def test_a_folder_that_is_not_there(source):
    with pytest.raises(FileNotFoundError, match=f"no such folder: {source}"): load_model(source)


@pytest.mark.parametrize("source", ["nobody/nothing", "a model"])
def test_a_hub_id_offline_says_what_to_do(source, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    why = f"'{source}' is neither a model folder nor on the hub(.|\n)*pass the folder"
    with pytest.raises(FileNotFoundError, match=why): load_model(source)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises((FileNotFoundError, ValueError)): load_model(tmp_path)


def test_a_model_without_end_token_is_refused_when_loaded(tmp_path, full):
    folder = full.save(tmp_path)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        stored = json.loads((folder/name).read_text())
        for key in ("eos_token_id", "eos_token"): stored.pop(key, None)
        (folder/name).write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="no end-of-text token"): load_model(folder)


def test_a_missing_padding_token_is_the_end_token(tmp_path, full):
    folder = full.save(tmp_path)
    stored = json.loads((folder/"tokenizer_config.json").read_text())
    stored.pop("pad_token")
    (folder/"tokenizer_config.json").write_text(json.dumps(stored))
    tok = load_model(folder, device="cpu").tok
    assert tok.pad_token_id == tok.eos_token_id


def test_end_tokens_of_generation_config_and_tokenizer():
    lm, tok = random_lm("llama", 9), LetterTok(9)
    for configured, expected in ((None, [8]), (3, [3, 8]), ([5, 2, 5], [2, 5, 8])):
        lm.generation_config.eos_token_id = configured
        assert end_ids(lm, tok) == expected


# --- fingerprints and adapters -------------------------------------------------------------------------------------

def test_a_fingerprint_sees_one_changed_bit():
    a, b = random_lm("llama", 9), random_lm("llama", 9)
    assert lm_fingerprint(a) == lm_fingerprint(b) != lm_fingerprint(random_lm("llama", 9, seed=1))
    with torch.no_grad(): b.model.layers[0].mlp.up_proj.weight.view(torch.int64)[0, 0] ^= 1
    assert lm_fingerprint(a) != lm_fingerprint(b) and len(lm_fingerprint(a)) == 16
    assert lm_fingerprint(a.float()) != lm_fingerprint(random_lm("llama", 9).bfloat16())


def test_lora_trains_little_and_starts_as_the_model():
    model = small_model("full", device="cpu")
    before = logits(model)
    adapted = add_lora(model, rank=4)
    trained = {n for n, p in adapted.lm.named_parameters() if p.requires_grad}
    assert trained and all("lora" in n for n in trained) and torch.equal(logits(adapted), before)
    assert end_ids(adapted.lm, adapted.tok) == end_ids(model.lm, model.tok)
    with pytest.raises(ValueError, match="no linear layers called nowhere; it has down_proj"):
        add_lora(small_model("full", device="cpu"), targets=["nowhere"])


def shaken_lora():
    "An adapted model whose adapter does something."
    model, rng = add_lora(small_model("full", device="cpu"), rank=4), torch.Generator().manual_seed(0)
    for n, p in model.lm.named_parameters():
        if "lora_B" in n: p.data = torch.randn(p.shape, generator=rng) * .02
    model.lm.eval()
    return model


def test_a_saved_adapter_is_merged_into_a_plain_model(tmp_path):
    model = shaken_lora()
    before = logits(model)
    again = load_model(model.save(tmp_path), device="cpu")
    assert not hasattr(again.lm, "merge_and_unload") and torch.allclose(logits(again), before, atol=1e-3)


def test_float16_halves_the_file(full, tmp_path):
    "Tied weights are stored once in every format."
    folders = [full.save(tmp_path/str(dtype), dtype=dtype) for dtype in (torch.float16, torch.float32)]
    sizes = [(folder/"model.safetensors").stat().st_size for folder in folders]
    assert .49 < sizes[0] / sizes[1] < .51


def test_saving_leaves_the_adapter_in_place(tmp_path):
    "Training may go on after a checkpoint."
    model = shaken_lora()
    names, before = set(model.lm.state_dict()), logits(model)
    model.save(tmp_path)
    assert set(model.lm.state_dict()) == names and torch.allclose(logits(model), before, atol=1e-4)
    with model.lm.disable_adapter(): assert (logits(model) - before).abs().max() > 1e-2


# --- one object to ask ---------------------------------------------------------------------------------------------

def test_a_template_is_saved_with_the_model_and_wins_over_a_chat_template(full, tmp_path):
    own = full.replace(template=Template("{question} ->"))
    assert load_model(own.save(tmp_path), device="cpu").template == own.template
    assert load_model(tmp_path, template=Template("{question}?"), device="cpu").template.prompt == "{question}?"
    (tmp_path/TEMPLATE).write_text("[]")
    with pytest.raises(ValueError, match="is no template of a model"): load_model(tmp_path)


def test_who_is_asked_another_way_is_another_model_with_the_same_weights(full):
    others = [full.replace(template=Template("{question} ->")), full.adaptive(.9)]
    assert all(other.lm is full.lm and other.identity != full.identity for other in others)
    copy = full.copy()
    assert copy.identity == full.identity and copy.lm is not full.lm
    with torch.no_grad(): copy.lm.get_input_embeddings().weight += 1e-3
    assert copy.identity != full.identity


def test_draws_arrive_in_parts_that_are_those_of_the_whole(retain):
    qas, decoding = fictional_authors("forget01")[:2], Decoding(max_new_tokens=8)
    whole, parts = retain.draw(qas, 1100, decoding, progress=False), {}
    for qa, d, start in retain.arriving(qas, 1100, decoding):
        assert start == len(parts.setdefault(qa.id, []))
        parts[qa.id].extend(d.texts)
    assert [parts[d.id] for d in whole] == [d.texts for d in whole]


@pytest.mark.parametrize("name", ["load_lm", "small_lm", "save_lm"])
def test_earlier_names_say_the_new_ones(name):
    with pytest.raises(ImportError, match=f"{name} is now .*one object holds weights, tokenizer and prompt"):
        exec(f"from probunlearn.models import {name}")
