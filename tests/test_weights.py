"""What people have as a model, and what is refused: each source is made here with random weights."""
import json
import os
import re
import shutil
import types
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, BertLMHeadModel
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel, T5Config
from transformers import T5ForConditionalGeneration

from probunlearn import weights
from probunlearn.data import QA, Template, encode_prompt
from probunlearn.draws import Decoding
from probunlearn.models import LocalModel, add_lora, load_model
from probunlearn.weights import packaged

QAS = [QA("a", "Who taught anybody to write?", "Nobody."), QA("b", "Where?", "There.")]
SHORT = Decoding(max_new_tokens=6)
SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
LLAMA = SIZES | dict(num_key_value_heads=2, max_position_embeddings=128, initializer_range=.4)
TOK = AutoTokenizer.from_pretrained(packaged("full"))
VOCAB = dict(vocab_size=len(TOK), eos_token_id=TOK.eos_token_id)


def llama(kind=LlamaForCausalLM, **options):
    "A small Llama with random weights."
    torch.manual_seed(0)
    return kind(LlamaConfig(**LLAMA | VOCAB | options)).eval()


def saved(lm, folder, tok=TOK, **options):
    "A folder as transformers writes it."
    lm.save_pretrained(folder, **options)
    if tok: tok.save_pretrained(folder)
    return folder


def edited(file, **changed):
    "A JSON file with other values; None takes a key out."
    stored = json.loads(file.read_text()) | changed
    file.write_text(json.dumps({key: value for key, value in stored.items() if value is not None}))


def read(source, **options): return load_model(source, device="cpu", **options)


def words(model): return [d.texts[0] for d in model.greedy(QAS, SHORT)]


def same(model, lm, tolerance=0.):
    "Whether a model computes what another one does, with a tokenizer that works, as fast."
    ids = torch.tensor([encode_prompt(model.tok, "Who taught anybody to write?")])
    with torch.no_grad(): gap = (model.lm(input_ids=ids).logits - lm(input_ids=ids).logits).abs().max()
    return not model.lm.training and len(words(model)) == 2 and float(gap) <= tolerance


def refused(source, *said, error=ValueError, **options):
    "The one sentence by which a source is refused."
    with pytest.raises(error) as e: read(source, **options)
    text = str(e.value)
    assert type(e.value) is error and all(part in text for part in said), text
    assert text.count("\n") == 0 and len(text.replace(str(source), "")) < 420, text


@pytest.fixture
def plain(tmp_path): return saved(llama(), tmp_path/"plain")


@pytest.fixture(autouse=True)
def nothing_printed(capfd):
    "No table of weights on the screen, whatever is read."
    yield
    out, err = capfd.readouterr()
    err = re.sub(r"\r[^\r\n]*", "", err)                   # progress bars
    assert "LOAD REPORT" not in out + err and "PWNED" not in out + err and len(err) < 500, err


# --- folders ---

@pytest.mark.parametrize("options", [{}, dict(tie_word_embeddings=True)])
def test_a_folder(options, tmp_path):
    lm = llama(**options)
    model = read(saved(lm, tmp_path/"mine"))
    assert same(model, lm) and model.name == "mine" and words(model) == words(LocalModel(lm, TOK))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002])
def test_saved_files_are_as_readable_as_any_other(mask, tmp_path):
    "safetensors writes for the owner only; a folder is shared by those whom the umask lets in."
    before = os.umask(mask)
    try: LocalModel(llama(), TOK).save(tmp_path/"m")
    finally: os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path/"m").iterdir()} == {0o666 & ~mask}


def test_gpt2_with_and_without_its_head(tmp_path):
    "GPT-2's head is its embedding: a checkpoint without it is whole; so are masks that old checkpoints hold."
    torch.manual_seed(0)
    sizes = dict(n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=.4)
    lm = GPT2LMHeadModel(GPT2Config(**sizes, **VOCAB)).eval()
    assert same(read(saved(lm, tmp_path/"head")), lm)
    bare = saved(lm.transformer, tmp_path/"bare")
    stored = load_file(bare/"model.safetensors")
    stored["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(stored, bare/"model.safetensors", dict(format="pt"))
    assert isinstance(lm.transformer, GPT2Model) and same(read(bare), lm)


def test_many_files_in_bfloat16(tmp_path):
    folder = saved(llama().bfloat16(), tmp_path/"sharded", max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    model, lm = read(folder), llama()
    for p in lm.parameters(): p.data = p.data.bfloat16().float()
    assert model.lm.dtype == torch.float32 and same(model, lm)
    assert read(folder, dtype="auto").lm.dtype == torch.bfloat16


def as_bin(folder, state):
    "A folder with a pickled checkpoint in place of safetensors."
    (folder/"model.safetensors").unlink()
    torch.save(state, folder/"pytorch_model.bin")
    return folder


def test_a_bin_file_of_weights(plain):
    assert same(read(as_bin(plain, llama().state_dict())), llama())


class Evil:
    def __reduce__(self): return print, ("PWNED",)


@pytest.mark.parametrize("options", [{}, dict(weights_only=False)])
def test_no_pickle_runs(plain, options):
    folder = as_bin(plain, llama().state_dict() | dict(evil=Evil()))
    refused(folder, "a pickle can run code", "as safetensors", **options)


def test_leftover_weights_are_no_error(plain):
    stored = load_file(plain/"model.safetensors")
    save_file(stored | {"other.weight": torch.zeros(3)}, plain/"model.safetensors", dict(format="pt"))
    assert same(read(plain), llama())


def test_a_bert_that_is_a_decoder(tmp_path):
    torch.manual_seed(0)
    lm = BertLMHeadModel(BertConfig(**SIZES, **VOCAB, is_decoder=True, initializer_range=.4)).eval()
    assert read(saved(lm, tmp_path)).lm.config.is_decoder


# --- options ---

def test_where_it_lies_is_told_to_both_and_the_rest_to_the_model(plain, tmp_path, monkeypatch):
    "A subfolder holds both; attention is the model's business only."
    shutil.move(plain, tmp_path/"repo"/"sub")
    told = {}
    for kind in (weights.AutoModelForCausalLM, weights.AutoTokenizer):
        def spy(*args, _read=kind.from_pretrained, _kind=kind.__name__, **options):
            told[_kind] = set(options)
            return _read(*args, **options)
        monkeypatch.setattr(kind, "from_pretrained", spy)
    model = read(tmp_path/"repo", subfolder="sub", revision="main", attn_implementation="eager")
    assert same(model, llama(attn_implementation="eager"), 1e-5)
    assert model.lm.config._attn_implementation == "eager" and model.name == "repo"
    assert told["AutoTokenizer"] == {"subfolder", "revision", "trust_remote_code"}
    assert told["AutoModelForCausalLM"] >= told["AutoTokenizer"] | {"attn_implementation", "dtype"}
    refused(tmp_path/"repo", "no such folder", error=FileNotFoundError, subfolder="gone")


def test_the_template_is_found_in_a_subfolder(plain, tmp_path):
    LocalModel(llama(), TOK, template=Template("{question} ->")).save(tmp_path/"repo"/"sub")
    assert read(tmp_path/"repo", subfolder="sub").template.prompt == "{question} ->"


def test_a_hub_id_in_the_cache(plain, tmp_path, monkeypatch):
    "Laid out as the hub's client keeps it."
    cache, commit = tmp_path/"cache"/"models--nobody--some", "0123456789abcdef0123456789abcdef01234567"
    shutil.move(plain, cache/"snapshots"/commit)
    (cache/"refs").mkdir()
    for ref in ("main", "v2"): (cache/"refs"/ref).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for options in ({}, dict(revision="v2")):
        model = read("nobody/some", cache_dir=tmp_path/"cache", **options)
        assert same(model, llama()) and (model.name, model.source) == ("some", "nobody/some")
    refused("nobody/some", "pass the folder", error=FileNotFoundError, cache_dir=tmp_path/"cache", revision="v3")


# --- adapters ---

def adapter(base, folder, tok=None, lm=None, zero=False, **options):
    "A LoRA adapter's folder, and the model that it makes of its base."
    from peft import LoraConfig, get_peft_model
    torch.manual_seed(1)
    config = LoraConfig(**dict(task_type="CAUSAL_LM", r=2, target_modules="all-linear") | options)
    lm = get_peft_model(lm or llama(), config)
    for name, p in lm.named_parameters():
        if "lora_B" in name and not zero: torch.nn.init.normal_(p, std=.2)
    lm.peft_config["default"].base_model_name_or_path = str(base)
    lm.save_pretrained(folder)
    if tok: tok.save_pretrained(folder)
    return folder, lm.eval()


@pytest.mark.parametrize("tok", [None, TOK])
def test_an_adapter_with_and_without_its_tokenizer(plain, tmp_path, tok):
    folder, lm = adapter(plain, tmp_path/"mine", tok)
    model = read(folder)
    assert same(model, lm, 1e-4) and not same(model, llama(), 1e-2) and (model.name, model.source) == ("mine", "mine")
    again = read(model.save(tmp_path/"merged"))         # plain weights: saved, adapted and trained like any other
    assert again.identity == model.identity and words(add_lora(again, rank=2)) == words(model)


def test_the_zero_adapter_answers_as_its_base(plain, tmp_path):
    assert same(read(adapter(plain, tmp_path/"zero", zero=True)[0]), llama(), 1e-6)


def test_an_adapter_of_a_grown_vocabulary(plain, tmp_path):
    "The adapter's file holds the grown embedding, its folder the grown tokenizer."
    tok, lm = AutoTokenizer.from_pretrained(plain), llama()
    tok.add_tokens(["<one>", "<two>"])
    lm.resize_token_embeddings(len(tok), mean_resizing=False)
    folder, lm = adapter(plain, tmp_path/"grown", tok, lm)
    model = read(folder)
    assert len(model.tok) == len(TOK) + 2 == model.lm.get_input_embeddings().weight.shape[0] and same(model, lm, 1e-4)
    (folder/"adapter_model.safetensors").unlink()
    small = adapter(plain, tmp_path/"small", tok)[0]
    refused(small, f"counts {len(tok)} tokens, and the model has embeddings for {len(TOK)}")


def test_the_template_of_an_adapter_is_its_own_or_its_base_s(tmp_path):
    base = LocalModel(llama(), TOK, template=Template("{question} ->")).save(tmp_path/"base")
    folder, _ = adapter(base, tmp_path/"adapter")
    assert read(folder).template.prompt == "{question} ->"
    (folder/"probunlearn_template.json").write_text('{"prompt": "{question} =>"}')
    assert read(folder).template.prompt == "{question} =>"


def test_adapters_that_do_not_fit(plain, tmp_path):
    other = saved(llama(num_hidden_layers=1), tmp_path/"other")
    refused(adapter(other, tmp_path/"deep")[0], "don't fit the layers of its base", "adapter_config.json")
    wide = saved(llama(intermediate_size=64), tmp_path/"wide")
    refused(adapter(wide, tmp_path/"narrow")[0], "doesn't fit its base", "adapter_config.json")
    torn, _ = adapter(plain, tmp_path/"torn")
    stored = load_file(torn/"adapter_model.safetensors")
    save_file({key: v for key, v in stored.items() if "layers.1" not in key}, torn/"adapter_model.safetensors")
    refused(torn, "weights of the adapter don't fit", "copy the adapter again")
    refused(adapter("/gone/base", tmp_path/"lost")[0], "no such folder: /gone/base", "adapter_config.json",
            error=FileNotFoundError)


def test_adapters_of_other_kinds(plain, tmp_path):
    from peft import PromptTuningConfig, get_peft_model
    folder, _ = adapter(plain, tmp_path/"classifier")
    edited(folder/"adapter_config.json", task_type="SEQ_CLS")
    refused(folder, "SEQ_CLS", "pass an adapter of a causal language model")
    soft = get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    soft.save_pretrained(tmp_path/"soft")
    edited(tmp_path/"soft"/"adapter_config.json", base_model_name_or_path=str(plain))
    refused(tmp_path/"soft", "PROMPT_TUNING", "adapts weights, such as LoRA")


def test_broken_adapters(plain, tmp_path):
    folder, lm = adapter(plain, tmp_path/"mine")
    whole = (folder/"adapter_model.safetensors").read_bytes()
    (folder/"adapter_model.safetensors").write_bytes(whole[:len(whole) // 2])
    refused(folder, "cut off", "Copy the folder again")
    (folder/"adapter_model.safetensors").unlink()
    torch.save(dict(evil=Evil()), folder/"adapter_model.bin")
    refused(folder, "a pickle can run code")
    edited(folder/"adapter_config.json", base_model_name_or_path=None)
    refused(folder, "names no base_model_name_or_path")
    (folder/"adapter_config.json").write_text("{")
    refused(folder, "broken", "Copy the folder again")
    shutil.copy(plain/"model.safetensors", folder)
    edited_text = json.dumps(dict(base_model_name_or_path=str(folder)))
    (folder/"adapter_config.json").write_text(edited_text)
    refused(folder, "a whole model and an adapter", "in their own folder")


# --- what is no causal language model, or not whole ---

def test_a_classifier_is_refused(tmp_path):
    "With tied embeddings, transformers would make a head for words of it without a word."
    for tied in (False, True):
        lm = llama(LlamaForSequenceClassification, pad_token_id=0, tie_word_embeddings=tied)
        said = "LlamaForSequenceClassification, which has no head for words: pass a causal language model"
        refused(saved(lm, tmp_path/f"{tied}"), said)


def test_encoders_are_refused(tmp_path):
    torch.manual_seed(0)
    refused(saved(BertForMaskedLM(BertConfig(**SIZES, **VOCAB)), tmp_path/"bert"), "BertForMaskedLM", "…ForCausalLM")
    edited(tmp_path/"bert"/"config.json", architectures=None)
    refused(tmp_path/"bert", "'bert', which doesn't write from left to right")
    config = T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=len(TOK))
    t5 = T5ForConditionalGeneration(config)
    refused(saved(t5, tmp_path/"t5"), "an encoder with a decoder (t5)", "…ForCausalLM")
    vit = transformers.ViTModel(transformers.ViTConfig(**SIZES, image_size=32, patch_size=16))
    refused(saved(vit, tmp_path/"vit"), "'vit', which doesn't write from left to right")


def test_missing_weights(plain, tmp_path):
    stored = load_file(plain/"model.safetensors")
    kept = {key: v for key, v in stored.items() if "layers.1" not in key}
    save_file(kept, plain/"model.safetensors", dict(format="pt"))
    refused(plain, "9 weights are missing from the checkpoint (model.layers.1", "Copy the folder again, whole")
    refused(saved(llama(LlamaModel), tmp_path/"headless"), "1 weights are missing from the checkpoint (lm_head.weight")


def test_weights_of_another_shape(plain):
    edited(plain/"config.json", intermediate_size=64)
    said = "has the shape (32, 48), and config.json asks for (32, 64)"
    refused(plain, said, "belong to different models")
    refused(plain, said, ignore_mismatched_sizes=True)


def test_a_tokenizer_with_too_many_tokens(tmp_path):
    folder = saved(llama(vocab_size=len(TOK) - 1), tmp_path)
    refused(folder, f"counts {len(TOK)} tokens, and the model has embeddings for {len(TOK) - 1}", "trained with")


@pytest.mark.parametrize("trusted", [{}, dict(trust_remote_code=None)])
def test_code_that_comes_with_a_model(plain, trusted, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("a question on the terminal"))
    (plain/"mine.py").write_text('print("PWNED")')
    mine = dict(AutoConfig="mine.Config", AutoModelForCausalLM="mine.Model")
    edited(plain/"config.json", auto_map=mine)
    assert same(read(plain), llama())                           # transformers' own Llama is there, and is taken
    edited(plain/"config.json", model_type="mine")
    refused(plain, "brings code of its own", "trust_remote_code=True", **trusted)
    edited(plain/"config.json", model_type="vit")
    refused(plain, "brings code of its own", "trust_remote_code=True", **trusted)


def test_a_tokenizer_with_code_of_its_own(plain, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("a question on the terminal"))
    (plain/"mine.py").write_text('print("PWNED")')
    edited(plain/"tokenizer_config.json", auto_map=dict(AutoTokenizer=["mine.Tok", None]), tokenizer_class="MineTok")
    try: assert same(read(plain), llama())                      # or transformers reads tokenizer.json with its own code
    except ValueError as e: assert "trust_remote_code=True" in str(e)


def test_code_runs_when_it_is_trusted(plain):
    (plain/"mine.py").write_text("""
from transformers import LlamaConfig, LlamaForCausalLM
class Config(LlamaConfig): model_type = "mine"
class Model(LlamaForCausalLM): config_class = Config
""")
    edited(plain/"config.json", model_type="mine",
           auto_map=dict(AutoConfig="mine.Config", AutoModelForCausalLM="mine.Model"))
    assert same(read(plain, trust_remote_code=True), llama())


def test_kinds_that_nobody_knows(plain):
    edited(plain/"config.json", model_type="strange")
    refused(plain, "knows no 'strange' models", "pip install -U transformers")
    edited(plain/"config.json", model_type=None)
    refused(plain, "holds no model", "model_type")


# --- files that are broken, cut off or not there ---

def cut(path): path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
def empty(path): path.write_bytes(b"")
def pointer(path): path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 12\n")
def brace(path): path.write_text("{")
def listed(path): path.write_text("[]")
def gone(path): path.unlink()


@pytest.mark.parametrize("harm", [cut, empty, pointer])
def test_safetensors_that_were_cut_off(plain, harm):
    harm(plain/"model.safetensors")
    refused(plain, "missing, broken or cut off", "Copy the folder again, whole")


@pytest.mark.parametrize("harm", [cut, empty, pointer])
def test_a_bin_file_that_was_cut_off(plain, harm):
    harm(as_bin(plain, llama().state_dict())/"pytorch_model.bin")
    refused(plain)


@pytest.mark.parametrize("harm", [brace, listed, empty, gone])
def test_a_broken_config(plain, harm):
    harm(plain/"config.json")
    refused(plain)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("harm", [brace, empty, cut])
def test_a_broken_tokenizer(plain, file, harm):
    harm(plain/file)
    refused(plain, "the tokenizer can't be read", "tokenizer.json")


def test_no_tokenizer(tmp_path):
    refused(saved(llama(), tmp_path, tok=None), "the tokenizer can't be read", "tokenizer.json")


def test_a_shard_that_was_not_copied(tmp_path):
    folder = saved(llama(), tmp_path, max_shard_size="60KB")
    max(folder.glob("*.safetensors")).unlink()
    refused(folder, "Copy the folder again, whole", error=FileNotFoundError)


def test_no_weights(plain):
    (plain/"model.safetensors").unlink()
    refused(plain, "Copy the folder again, whole", error=FileNotFoundError)


def test_a_path_is_never_sent_to_a_hub(plain, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", lambda *a, **k: pytest.fail("a hub was asked"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    for source in ("plain/typo", "./gone", "~/gone", "a/b/c", Path("gone"), "/gone", "gone.gguf", "plain/gone.gguf"):
        refused(source, f"no such folder: {source}", error=FileNotFoundError)
    assert same(read("plain"), llama()) and read(Path("plain")).name == "plain"
    refused("plain/model.safetensors", "is a file", "pass the folder that holds it")


# --- GGUF (a real one is read in test_real.py) ---

def test_gguf_files_that_cannot_be_read(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    (tmp_path/"one.gguf").write_bytes(b"GGUF" + bytes(40))
    refused(tmp_path/"one.gguf", "can't be read as a GGUF file", "copy it again")
    refused(tmp_path, "can't be read as a GGUF file", "copy it again")
    (tmp_path/"two.gguf").write_text("no model")
    refused(tmp_path/"two.gguf", "can't be read as a GGUF file")
    refused(tmp_path, "several GGUF files (one.gguf, two.gguf)", "pass one of them")


def test_gguf_without_its_package(tmp_path, monkeypatch):
    (tmp_path/"one.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(weights, "find_spec", types.MethodType(lambda self, name: None, weights))
    refused(tmp_path/"one.gguf", "pip install gguf")


def test_a_folder_with_both_is_read_as_safetensors(plain):
    (plain/"one.gguf").write_bytes(b"GGUF")
    assert same(read(plain), llama())
