"""Each family of causal LMs as a tiny random model: its draws carry its own law, or it is refused by name."""
import copy
import re

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import KINDS, SIZES, LetterTok, letter_model, letters, random_lm
from probunlearn.data import encode_prompt, fictional_authors
from probunlearn.draws import Decoding
from probunlearn.evaluation import evaluate
from probunlearn.exact import answer_logprob
from probunlearn.prefix import CopiedRows, SharedRows, WholeRows, batch_shift, grow_rows, read_prompts, read_texts
from probunlearn.tree import PrefixTree

WAYS = {"shared": SharedRows, "copied": CopiedRows, "recomputed": WholeRows}
SHARED = ["llama", "gpt2", "gpt_neox", "phi", "phi3", "qwen2", "qwen3", "gemma", "olmo2", "smollm3", "granite"]
MAMBA = dict(mamba_n_heads=4, mamba_d_state=4, mamba_n_groups=1, mamba_chunk_size=8)
GPT = dict(n_embd=32, n_layer=2, n_head=4, n_positions=128, rotary_dim=4)
EXPERTS = dict(num_experts=2, num_experts_per_tok=1)
COPIED = {
    "mistral": KINDS["mistral"],                    # its answers leave the window
    "gemma2": KINDS["gemma2"],
    "gemma3_text": KINDS["gemma2"],
    "falcon": {},
    "opt": dict(ffn_dim=48, word_embed_proj_dim=32),
    "bloom": dict(n_head=4, n_layer=2),
    "mpt": dict(d_model=32, n_heads=4, n_layers=2, max_seq_len=128),
    "stablelm": dict(num_key_value_heads=2),
    "gptj": GPT,
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]], num_layers=2, num_heads=4, window_size=5),
    "codegen": GPT,
    "biogpt": {},
    "mixtral": dict(num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1),
}
RECOMPUTED = {
    "openai-gpt": dict(n_embd=32, n_layer=2, n_head=4, n_positions=128),    # it keeps nothing
    "mamba": dict(state_size=4),
    "mamba2": dict(state_size=4, num_heads=4, head_dim=16, n_groups=2, chunk_size=8),
    "falcon_mamba": dict(state_size=4),
    "rwkv": dict(attention_hidden_size=32, context_length=128),
    "recurrent_gemma": dict(num_key_value_heads=1, lru_width=32, attention_window_size=8, head_dim=8,
                            block_types=["recurrent", "attention"]),
    "jamba": dict(num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
                  expert_layer_offset=1, mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False) | EXPERTS,
    "lfm2": dict(num_key_value_heads=2, layer_types=["conv", "full_attention"]),
    "falcon_h1": dict(num_key_value_heads=2, mamba_d_ssm=32, mamba_d_head=8) | MAMBA,
    "granitemoehybrid": dict(num_key_value_heads=2, layer_types=["mamba", "attention"], mamba_d_head=16,
                             num_local_experts=2, num_experts_per_tok=1, shared_intermediate_size=32) | MAMBA,
    "bamba": dict(num_key_value_heads=2, attn_layer_indices=[1], mamba_d_head=16) | MAMBA,
    "qwen3_next": dict(num_key_value_heads=2, head_dim=8, layer_types=["linear_attention", "full_attention"],
                       linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8,
                       linear_value_head_dim=8, moe_intermediate_size=16, shared_expert_intermediate_size=16) | EXPERTS,
}
BART = dict(d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=48, decoder_ffn_dim=48)
REFUSED = {
    "cpmant": (dict(dim_head=8, dim_ff=48, prompt_length=4), "which puts tokens of its own before each prompt"),
    "xlm": (dict(emb_dim=32, n_layers=2, n_heads=4), "which doesn't write from left to right"),
    "bert": ({}, "which doesn't write from left to right"),
    "roberta": ({}, "which doesn't write from left to right"),
    "trocr": (BART, "a decoder that lacks its encoder"),
    "whisper": (BART, "a decoder that lacks its encoder"),
    "bart": (BART, "a decoder that lacks its encoder"),
    "blenderbot-small": (BART, "a decoder that lacks its encoder"),
    "marian": (BART, "a decoder that lacks its encoder"),
}
FAMILIES = {kind: ("shared", None) for kind in SHARED}
FAMILIES |= {kind: ("copied", options) for kind, options in COPIED.items()}
FAMILIES |= {kind: ("recomputed", options) for kind, options in RECOMPUTED.items()}
HOT = 3                                             # so that the draws of every family differ
SLOW = "ignore:.*each token reads its whole text again"


def tiny(kind, dtype=torch.float32):
    "A model of the family with random weights, at most two layers wide of 32."
    if FAMILIES.get(kind, ("", 0))[1] is None: return random_lm(kind, dtype=dtype)
    torch.manual_seed(0)
    tokens = dict(vocab_size=16, eos_token_id=15, bos_token_id=None, pad_token_id=0)
    options = REFUSED[kind][0] if kind in REFUSED else FAMILIES[kind][1]
    config = AutoConfig.for_model(kind, **SIZES | options | tokens)
    lm = AutoModelForCausalLM.from_config(config).to(dtype).eval()      # PyTorch 2.6 starts no RWKV in bfloat16
    lm.generation_config.eos_token_id, lm.generation_config.pad_token_id = 15, 0
    return lm


def teacher_forced(lm, prompt, answer, temperature=HOT):
    "Log-probability of an answer, from one plain forward pass over prompt and answer."
    logits = lm(input_ids=torch.tensor([[*prompt, *answer]]), use_cache=False).logits[0].double()
    law = (logits / temperature).log_softmax(-1)[len(prompt) - 1:-1]
    return float(law[range(len(answer)), list(answer)].sum())


def generated(lm, prompt, most):
    "transformers' greedy answer."
    ids = torch.tensor([prompt])
    out = lm.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=most)
    return tuple(out[0, len(prompt):].tolist())


def lists(model, qas): return [encode_prompt(model.tok, qa.question, model.template) for qa in qas]


@pytest.mark.filterwarnings(SLOW)
@pytest.mark.parametrize("kind,way", [(kind, way) for kind, (way, _) in FAMILIES.items()])
@torch.no_grad()
def test_draws_carry_the_models_own_law(kind, way):
    "Questions of different lengths in one batch, draws that split and end; one plain forward pass is the reference."
    lm, decoding = tiny(kind), Decoding(temperature=HOT, max_new_tokens=6)
    model, qas = letter_model(lm), letters(4, longest=12)
    prompts = lists(model, qas)
    rows = grow_rows(lm, read_prompts(lm, model.tok, prompts), torch.arange(4), length=6, slots=4)
    assert type(rows) is WAYS[way]
    for qa, prompt, draws in zip(qas, prompts, model.draw(qas, 24, decoding, merge=4)):
        assert len(set(draws.tokens)) > 6
        for tokens, logprob in zip(draws.tokens, draws.logprobs):
            assert abs(logprob - teacher_forced(lm, prompt, tokens)) < 1e-4
    greedy = model.greedy(qas, decoding)
    assert [tuple(draws.tokens[0]) for draws in greedy] == [generated(lm, prompt, 6) for prompt in prompts]
    assert batch_shift(lm, model.tok, prompts) < 1e-4


@pytest.mark.parametrize("kind", REFUSED)
def test_others_are_refused_by_name(kind):
    "`transformers` counts them among causal models, but a token's law isn't that of the tokens before it."
    model, qas = letter_model(tiny(kind)), letters(2)
    words = re.escape(f"a model of kind {kind!r}, {REFUSED[kind][1]}: pass a causal language model")
    for ask in (lambda: model.draw(qas, 2), lambda: model.greedy(qas), lambda: model.check(qas, Decoding()),
                lambda: answer_logprob(model, qas), lambda: PrefixTree(model, qas[0], Decoding())):
        with pytest.raises(ValueError, match=words): ask()


@pytest.mark.filterwarnings(SLOW)
@pytest.mark.parametrize("kind", ["rwkv", "mamba", "jamba"])
@torch.no_grad()
def test_rows_without_a_cache_keep_the_promises_of_all_draws(kind):
    "More draws continue the first; other questions and less memory change nothing."
    model, qas, decoding = letter_model(tiny(kind)), letters(3, longest=12), Decoding(max_new_tokens=4)
    draws = model.draw(qas, 300, decoding)
    assert model.draw(qas[1:2], 260, decoding)[0].texts == draws[1].texts[:260]
    few = model.draw(qas[:1], 64, decoding, memory=.02)[0]          # the tree is cut into pieces
    assert few.texts == draws[0].texts[:64]


@pytest.mark.filterwarnings("error")
def test_a_slow_way_is_said_with_the_architectures_name():
    with pytest.raises(UserWarning, match="^mamba: each token reads its whole text again, since"):
        letter_model(tiny("mamba")).draw(letters(1), 2)
    letter_model(tiny("llama")).draw(letters(1), 2)


@pytest.mark.parametrize("kind", ["rwkv", "falcon_h1"])
@torch.no_grad()
def test_texts_of_different_lengths_are_read_without_padding(kind):
    lm = tiny(kind)
    texts = [[3, 5, 7, 2], [1, 2], [6, 6, 1, 3, 9, 4, 2], [4, 4]]
    logits, mask = read_texts(lm, LetterTok(16), texts, last=3)
    assert logits.shape == (4, 3, 16) and mask.sum(-1).tolist() == [4, 2, 7, 2]
    for text, row in zip(texts, logits):
        alone = lm(input_ids=torch.tensor([text]), use_cache=False).logits[0, -3:]
        torch.testing.assert_close(row[-len(alone):], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["mamba", "lfm2"])
def test_a_tree_of_prefixes_is_refused_by_name(kind):
    with pytest.raises(NotImplementedError, match=f"^{kind}: the keys and values .* ask for draws instead"):
        PrefixTree(letter_model(tiny(kind)), letters(1)[0], Decoding(max_new_tokens=2))


# --- independence --------------------------------------------------------------------------------------------------

def int8(model):
    "The model with weights and activations in eight bits; each batch's largest number sets the step of all."
    lm = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model.lm), {torch.nn.Linear}, torch.qint8)
    return model.replace(lm=lm)


def watched(lm, seen):
    "Note the shape of the token ids of every forward pass."
    lm.register_forward_pre_hook(lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)),
                                 with_kwargs=True)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "bloom", "rwkv", "lfm2"])
def test_sound_models_are_asked_in_batches(kind, dtype):
    model, qas = letter_model(tiny(kind, dtype)), letters(4)
    model.check(qas, Decoding())
    model.check(qas[:1], Decoding())
    assert not hasattr(model.lm, "answers_alone")


def test_the_check_takes_two_forward_passes():
    model, seen = letter_model(tiny("llama")), []
    watched(model.lm, seen)
    model.check(letters(50), Decoding())
    assert [rows for rows, _ in seen] == [1, 8]


@pytest.mark.filterwarnings("ignore:torch:DeprecationWarning", "ignore:torch.quantize_per_tensor")
@torch.no_grad()
def test_a_model_that_rounds_by_the_batch_is_asked_row_by_row(retain):
    "Then draws are the same whatever else is asked, and each token has the law of its own text read alone."
    model, qas, decoding = int8(retain), fictional_authors("forget10")[:4], Decoding(max_new_tokens=5)
    assert batch_shift(model.lm, model.tok, lists(model, qas)) > 1e-3
    with pytest.warns(UserWarning, match="would not be independent: it is asked row by row"):
        model.check(qas, decoding)
    seen = []
    watched(model.lm, seen)
    draws = model.draw(qas[:2], 6, decoding, merge=2)
    assert {rows for rows, _ in seen} == {1}
    assert [d.texts for d in draws] == [model.draw([qa], 6, decoding)[0].texts for qa in qas[:2]]
    prompt, tokens = lists(model, qas)[1], draws[1].tokens[0]
    texts = [torch.tensor([[*prompt, *tokens[:t]]]) for t in range(len(tokens))]
    laws = [model.lm(input_ids=text, logits_to_keep=1).logits[0, -1].double().log_softmax(-1) for text in texts]
    logprob = sum(float(law[token]) for law, token in zip(laws, tokens))
    assert abs(logprob - draws[1].logprobs[0]) < 1e-5
    assert model.copy().lm.answers_alone and model.replace(rule=None).lm.answers_alone


@torch.no_grad()
def test_a_model_that_padding_breaks_is_asked_row_by_row():
    "Padded, bloom is NaN in float64 by transformers' own forward pass."
    model, qas = letter_model(tiny("bloom", torch.float64)), letters(3)
    with pytest.warns(UserWarning, match="^bloom: among other texts the law of its next token shifts by nan"):
        model.check(qas, Decoding())
    draws = model.draw(qas, 8, Decoding(temperature=HOT, max_new_tokens=4), merge=3)
    for prompt, drawn in zip(lists(model, qas), draws):
        for tokens, logprob in zip(drawn.tokens, drawn.logprobs):
            assert abs(logprob - teacher_forced(model.lm, prompt, tokens)) < 1e-9


def test_a_broken_model_is_not_called_dependent():
    lm = tiny("llama")
    lm.lm_head.weight.data.fill_(float("nan"))
    assert batch_shift(lm, LetterTok(16), [[1, 2, 3], [4, 5]]) == 0


@pytest.mark.filterwarnings(SLOW)
@pytest.mark.parametrize("kind", ["mamba", "rwkv", "recurrent_gemma"])
def test_an_evaluation_runs_from_check_to_exact_probabilities(kind):
    "The reference answers' probabilities are those of plain forward passes, too."
    lm, decoding = tiny(kind), Decoding(max_new_tokens=4)
    model, qas = letter_model(lm), letters(3, longest=12)
    report = evaluate(model, qas, n=16, score="exact_match", alpha=.2, decoding=decoding, progress=False)
    with torch.no_grad():
        for qa, prompt, found in zip(qas, lists(model, qas), answer_logprob(model, qas)):
            assert abs(found - teacher_forced(lm, prompt, [ord("x") % 15, 15], 1)) < 1e-4
    assert len(report.forget.draws) == 3
