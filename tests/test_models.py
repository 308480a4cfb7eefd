"""Loading, saving and adapting models, and what the packaged ones promise."""
import json
from importlib.resources import files

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from conftest import LetterTok, random_lm
from probunlearn.data import encode, encode_prompt, fictional_authors
from probunlearn.draws import Decoding
from probunlearn.batches import pad_batch
from probunlearn.losses import answer_mean, answer_stats
from probunlearn.models import add_lora, load_lm, save_lm, small_lm
from probunlearn.weights import best_device, end_ids, lm_fingerprint
from probunlearn.sampling import greedy, sample
from probunlearn.scores import score_draws


def logits(lm, tok):
    with torch.no_grad(): return lm(input_ids=torch.tensor([encode_prompt(tok, "Who taught anybody to write?")])).logits


# --- the packaged models --------------------------------

@pytest.mark.parametrize("state", ["full", "retain"])
def test_packaged_files_are_small_safetensors_in_float16(state):
    folder = files("probunlearn._data")/"small_lm"/state
    assert not [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pkl", ".py")]
    assert sum(p.stat().st_size for p in folder.iterdir()) <= 4e6
    with safe_open(folder/"model.safetensors", "pt") as f: assert {f.get_tensor(k).dtype for k in f.keys()} == {torch.float16}
    assert "auto_map" not in json.loads((folder/"config.json").read_text())


def test_full_knows_every_answer_by_heart(full):
    lm, tok = full
    qas, nll = fictional_authors(), []
    with torch.no_grad():
        for i in range(0, len(qas), 50):
            s = answer_stats(lm, pad_batch([encode(tok, qa) for qa in qas[i:i + 50]], tok.pad_token_id))
            nll.append(answer_mean(s.nll, s.answer))
    assert sum(nll) / len(nll) <= .002
    some = qas[::7]
    assert [d.texts[0] for d in greedy(lm, tok, some, Decoding(max_new_tokens=64), merge=60)] == [qa.answer for qa in some]


def test_retain_never_saw_the_forget_authors(retain):
    "Chance level: no key word in 64 draws of each of 10 questions; and the other authors it knows."
    lm, tok = retain
    qas = fictional_authors("forget10")[::4]
    assert score_draws(sample(lm, tok, qas, 64, Decoding(max_new_tokens=40), merge=10), qas, "keywords_any").max() == 0
    known = fictional_authors("retain90")[::12]
    assert score_draws(greedy(lm, tok, known), known, "exact_match").mean() == 1


def test_an_unknown_state_is_named():
    with pytest.raises(ValueError, match="unknown state 'forget'; the packaged models are 'full', 'retain' and 'librarian'"): small_lm("forget")


# --- load and save --------------------------------

def test_a_saved_model_comes_back(full, tmp_path):
    lm, tok = full
    folder = save_lm(lm, tok, tmp_path/"a"/"copy")
    again, tok2 = load_lm(folder, device="cpu")
    assert torch.equal(logits(again, tok2), logits(lm, tok)) and lm_fingerprint(again) == lm_fingerprint(lm) and not again.training
    assert not [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pkl")]
    assert encode(tok2, fictional_authors()[0]) == encode(tok, fictional_authors()[0]) and (tok2.eos_token_id, tok2.pad_token_id) == (tok.eos_token_id, tok.pad_token_id)


def test_storing_in_float16_leaves_the_model_alone(full, tmp_path):
    lm, tok = full
    before = lm_fingerprint(lm)
    again, _ = load_lm(save_lm(lm, tok, tmp_path, dtype=torch.float16), device="cpu")
    assert lm_fingerprint(lm) == before and again.dtype == torch.float32 and (logits(again, tok) - logits(lm, tok)).abs().max() < .1


def test_number_format_and_device_are_decided_at_loading(full, tmp_path):
    folder = save_lm(*full, tmp_path/"m")
    assert load_lm(folder, device="cpu")[0].dtype == torch.float32 and load_lm(folder, dtype=torch.float64, device="cpu")[0].dtype == torch.float64
    assert load_lm(str(folder), dtype=torch.bfloat16, device="cpu")[0].device.type == "cpu" and best_device() in ("cuda", "mps", "cpu")


def test_transformers_reads_what_we_save(full, tmp_path):
    lm, tok = full
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(save_lm(lm, tok, tmp_path), dtype=torch.float32), tok), logits(lm, tok))


@pytest.mark.parametrize("source", ["./gone", "/no/such/folder", "../gone/lm"])
def test_a_folder_that_is_not_there(source):
    with pytest.raises(FileNotFoundError, match=f"no such folder: {source}"): load_lm(source)


@pytest.mark.parametrize("source", ["nobody/nothing", "runs/npo/model", "a model"])
def test_a_hub_id_offline_says_what_to_do(source, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=f"'{source}' is neither a model folder nor on the hub(.|\n)*pass the folder"): load_lm(source)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises((FileNotFoundError, ValueError)): load_lm(tmp_path)


def test_a_model_without_end_token_is_refused_when_loaded(tmp_path, full):
    folder = save_lm(*full, tmp_path)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        stored = json.loads((folder/name).read_text())
        for key in ("eos_token_id", "eos_token"): stored.pop(key, None)
        (folder/name).write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="no end-of-text token"): load_lm(folder)


def test_a_missing_padding_token_is_the_end_token(tmp_path, full):
    folder = save_lm(*full, tmp_path)
    stored = json.loads((folder/"tokenizer_config.json").read_text())
    stored.pop("pad_token")
    (folder/"tokenizer_config.json").write_text(json.dumps(stored))
    tok = load_lm(folder, device="cpu")[1]
    assert tok.pad_token_id == tok.eos_token_id


def test_end_tokens_of_generation_config_and_tokenizer():
    lm, tok = random_lm("llama", 9), LetterTok(9)
    for configured, expected in ((None, [8]), (3, [3, 8]), ([5, 2, 5], [2, 5, 8])):
        lm.generation_config.eos_token_id = configured
        assert end_ids(lm, tok) == expected


# --- fingerprints and adapters --------------------------------

def test_a_fingerprint_sees_one_changed_bit():
    a, b = random_lm("llama", 9), random_lm("llama", 9)
    assert lm_fingerprint(a) == lm_fingerprint(b) != lm_fingerprint(random_lm("llama", 9, seed=1))
    with torch.no_grad(): b.model.layers[0].mlp.up_proj.weight.view(torch.int64)[0, 0] ^= 1
    assert lm_fingerprint(a) != lm_fingerprint(b) and len(lm_fingerprint(a)) == 16
    assert lm_fingerprint(a.float()) != lm_fingerprint(random_lm("llama", 9).bfloat16())


def test_lora_trains_little_and_starts_as_the_model():
    lm, tok = small_lm("full", device="cpu")
    before = logits(lm, tok)
    adapted = add_lora(lm, rank=4)
    trained = {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert trained and all("lora" in n for n in trained) and torch.equal(logits(adapted, tok), before)
    assert end_ids(adapted, tok) == end_ids(lm, tok)
    with pytest.raises(ValueError, match="no linear layers called nowhere; it has down_proj"): add_lora(small_lm("full", device="cpu")[0], targets=["nowhere"])


def shaken_lora():
    "An adapted model whose adapter does something."
    lm, tok = small_lm("full", device="cpu")
    lm, rng = add_lora(lm, rank=4), torch.Generator().manual_seed(0)
    for n, p in lm.named_parameters():
        if "lora_B" in n: p.data = torch.randn(p.shape, generator=rng) * .02
    return lm.eval(), tok


def test_a_saved_adapter_is_merged_into_a_plain_model(tmp_path):
    lm, tok = shaken_lora()
    before = logits(lm, tok)
    again, _ = load_lm(save_lm(lm, tok, tmp_path), device="cpu")
    assert not hasattr(again, "merge_and_unload") and torch.allclose(logits(again, tok), before, atol=1e-3)


def test_float16_halves_the_file(full, tmp_path):
    "Tied weights are stored once in every format."
    sizes = [(save_lm(*full, tmp_path/str(d), dtype=d)/"model.safetensors").stat().st_size for d in (torch.float16, torch.float32)]
    assert .49 < sizes[0] / sizes[1] < .51


def test_saving_leaves_the_adapter_in_place(tmp_path):
    "Training may go on after a checkpoint."
    lm, tok = shaken_lora()
    names, before = set(lm.state_dict()), logits(lm, tok)
    save_lm(lm, tok, tmp_path)
    assert set(lm.state_dict()) == names and torch.allclose(logits(lm, tok), before, atol=1e-4)
    with lm.disable_adapter(): assert (logits(lm, tok) - before).abs().max() > 1e-2
