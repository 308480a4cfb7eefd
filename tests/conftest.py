"""Small models and tokenizers that the tests share: real architectures with random weights; nothing is downloaded."""
import importlib.util
import math
import multiprocessing
import os
import subprocess
import sys
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from transformers import AutoConfig, AutoModelForCausalLM, PhiConfig, PhiForCausalLM

from probunlearn.data import QA, Template
from probunlearn.models import LocalModel, small_model

# files that take longest come first, so that the workers of `make test` end at about the same time
LONGEST = "browser real sampling endpoint allocation fault_attacks training verification docs exact order protocol".split()


def pytest_collection_modifyitems(items):
    def place(item):
        name = item.path.stem.removeprefix("test_")
        return LONGEST.index(name) if name in LONGEST else len(LONGEST)
    items.sort(key=place)


SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             max_position_embeddings=128, initializer_range=.4)
KINDS = {
    "llama": dict(num_key_value_heads=2),
    "gpt_neox": {},
    "phi": {},
    "qwen2": dict(num_key_value_heads=2),
    "gpt2": dict(n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=.4),
    "mistral": dict(num_key_value_heads=2, sliding_window=5),
    "gemma": dict(num_key_value_heads=1, head_dim=8),
    "phi3": dict(num_key_value_heads=2),
    "qwen3": dict(num_key_value_heads=2, head_dim=16),
    "olmo2": dict(num_key_value_heads=2),
    "smollm3": dict(num_key_value_heads=2),
    "granite": dict(attention_multiplier=.3, logits_scaling=2.),
    "gemma2": dict(num_key_value_heads=2, head_dim=8, sliding_window=5, query_pre_attn_scalar=8),
}
BARE = Template(prompt="{question}", answer="{answer}")     # for tokenizers that know no words


class LetterTok:
    "One token per character: its code modulo the vocabulary without the end token, which is the last one."
    pad_token_id, chat_template = 0, None

    def __init__(self, vocab):
        self.vocab = vocab
        self.eos_token_id = vocab - 1

    def __len__(self): return self.vocab

    def get_vocab(self): return {str(i): i for i in range(self.vocab)}

    def decode(self, ids, skip_special_tokens=False):
        return " ".join(str(int(i)) for i in ids if not skip_special_tokens or i != self.eos_token_id)

    def __call__(self, text, add_special_tokens=True, return_offsets_mapping=False):
        ids = [ord(c) % (self.vocab - 1) for c in text]
        return dict(input_ids=ids, offset_mapping=[(i, i + 1) for i in range(len(text))])


def random_lm(kind="llama", vocab=16, seed=0, dtype=torch.float64, ends=None, **options):
    "A small causal LM of the given architecture with random, not too flat weights."
    torch.manual_seed(seed)
    sizes = KINDS[kind] if kind == "gpt2" else SIZES | KINDS[kind]
    tokens = dict(vocab_size=vocab, eos_token_id=vocab - 1, bos_token_id=None, pad_token_id=0)
    config = AutoConfig.for_model(kind, **sizes | tokens | options)
    lm = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    lm.generation_config.eos_token_id = ends if ends is not None else vocab - 1
    lm.generation_config.pad_token_id = 0
    return lm


def constant_lm(probabilities, dtype=torch.float64):
    "A model whose next-token distribution is the same after every prefix; the last token ends an answer."
    torch.manual_seed(0)
    vocab = len(probabilities)
    tokens = dict(vocab_size=vocab, bos_token_id=None, eos_token_id=vocab - 1, pad_token_id=0)
    lm = PhiForCausalLM(PhiConfig(**SIZES | tokens)).to(dtype).eval()
    lm.lm_head.weight.data.zero_()
    lm.lm_head.bias.data = torch.tensor([math.log(p) if p else -math.inf for p in probabilities], dtype=dtype)
    lm.generation_config.eos_token_id = vocab - 1
    return lm


def letter_model(lm, rule=None):
    "A small LM together with the letters that it reads, asked without a word around the question."
    return LocalModel(lm, LetterTok(lm.config.vocab_size), template=BARE, rule=rule)


def random_model(kind="llama", vocab=16, seed=0, *, rule=None, **options):
    "As `random_lm`, ready to be asked."
    return letter_model(random_lm(kind, vocab, seed, **options), rule)


def constant_model(probabilities, *, rule=None, **options):
    "As `constant_lm`, ready to be asked."
    return letter_model(constant_lm(probabilities, **options), rule)


def letters(count, longest=9, seed=0):
    "Questions of random letters, of different lengths."
    rng = torch.Generator().manual_seed(seed)
    def word():
        length = int(torch.randint(2, longest, (1,), generator=rng))
        return "".join(chr(97 + int(c)) for c in torch.randint(26, (length,), generator=rng))
    return [QA(f"q{i}", word(), "x") for i in range(count)]


@pytest.fixture(autouse=True)
def no_figures_left():
    "Each test starts without open figures."
    yield
    if "matplotlib.pyplot" in sys.modules: sys.modules["matplotlib.pyplot"].close("all")


@pytest.fixture(scope="session")
def full():
    "The packaged `LocalModel` that knows every author; don't train it, train `full.copy()`."
    return small_model("full", device="cpu")


@pytest.fixture(scope="session")
def retain():
    "The packaged `LocalModel` that never saw the forget authors; don't train it."
    return small_model("retain", device="cpu")


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    "The folder of the website as `make docs` builds it; one of the workers builds it for all of them."
    if not importlib.util.find_spec("myst_nb"): pytest.skip("needs pip install -e '.[docs]'")
    own = tmp_path_factory.getbasetemp()
    out = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own)/"website"
    script = Path(__file__).parent.parent/"tools"/"build_docs.py"
    with FileLock(f"{out}.lock"):
        if not out.exists():
            done = subprocess.run([sys.executable, script, out], capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def nursery(request):
    "Makes processes that can be killed; it imports the module and torch once for all of them, while other tests run."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([request.module.__name__])
    with pytest.MonkeyPatch.context() as m:
        m.setenv("PYTHONPATH", str(Path(__file__).parent))
        forkserver.ensure_running()
    return context
