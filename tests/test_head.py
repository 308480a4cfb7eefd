"""The fused head against the plain formulas in float64, and through real architectures against their own logits."""
import importlib.util
import os
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import multiprocessing
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

import probunlearn.head as head
from conftest import KINDS, SIZES, LetterTok, random_lm
from probunlearn.head import answer_stats, entropy, linear_stats, token_stats
from probunlearn.models import LocalModel, add_lora

FORMS = [dict(), dict(scale=.25), dict(softcap=3.), dict(scale=2., softcap=6.)]


def rows(n=50, size=16, vocab=300, dtype=torch.float64, scale=1., seed=0, masked=0):
    "Hidden states, weight, bias and targets with `masked` rows of -100; logits have a spread of about `scale`."
    rng = torch.Generator().manual_seed(seed)
    shapes = (n, size), (vocab, size), (vocab,)
    hidden, weight, bias = (torch.randn(*shape, dtype=torch.float64, generator=rng) for shape in shapes)
    target = torch.randint(vocab, (n,), generator=rng)
    target[torch.randperm(n, generator=rng)[:masked]] = -100
    return (scale * hidden / size**.5).to(dtype), weight.to(dtype), bias.to(dtype), target


def with_gradients(tensors):
    "The same, with gradients for those that are no whole numbers."
    return [v.requires_grad_() if v.is_floating_point() else v for v in tensors]


def plain(hidden, weight, target, bias=None, scale=1., softcap=None):
    "The open formulas."
    z = scale * F.linear(hidden, weight, bias)
    if softcap: z = softcap * torch.tanh(z / softcap)
    return F.cross_entropy(z, target, reduction="none", ignore_index=-100), -(z.softmax(-1) * z.log_softmax(-1)).sum(-1)


def slopes(stats, variables, weights):
    "Gradients of a weighted sum of NLL and entropy, with both signs among the weights."
    nll, h = stats
    return torch.autograd.grad((weights[0].to(nll.dtype) * nll).sum() + (weights[1].to(h.dtype) * h).sum(), variables)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_gradcheck(form, chunk):
    hidden, weight, bias, target = rows(n=7, size=4, vocab=9, masked=2)
    for v in (hidden, weight, bias): v.requires_grad_()
    assert gradcheck(lambda *v: linear_stats(v[0], v[1], target, v[2], chunk=chunk, **form), (hidden, weight, bias))
    assert gradcheck(lambda h: linear_stats(h, weight.detach(), target, chunk=chunk, **form), hidden)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("spread", [1., 8.])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_values_and_gradients_against_the_plain_formulas_in_float64(form, spread, dtype, tolerance):
    """Flat and peaked (8: less than 1 nat on average without soft-cap), with masked rows.

    Inputs are rounded first, so that only our own arithmetic counts; an error is relative to the whole vector.
    """
    hidden, weight, bias, target = rows(dtype=dtype, scale=spread, masked=9)
    ours = [v.clone().requires_grad_() for v in (hidden, weight, bias)]
    exact = [v.double().requires_grad_() for v in (hidden, weight, bias)]
    weights = torch.randn(2, 50, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    mine = linear_stats(ours[0], ours[1], target, ours[2], chunk=16, **form)
    theirs = plain(exact[0], exact[1], target, exact[2], **form)
    assert mine[0].dtype == torch.promote_types(dtype, torch.float32) and (mine[0][target < 0] == 0).all()
    for a, b in zip((*mine, *slopes(mine, ours, weights)), (*theirs, *slopes(theirs, exact, weights))):
        assert float((a.double() - b).detach().norm()) <= tolerance * float(b.detach().norm())


def test_shifted_logits_keep_their_digits():
    "A bias of 1,000 on every word changes nothing but the rounding of the logits, which is 6e-5 there."
    hidden, weight, bias, target = rows(dtype=torch.float32, scale=4.)
    exact = plain(hidden.double(), weight.double(), target, bias.double())
    for a, b in zip(linear_stats(hidden, weight, target, bias + 1000), exact):
        assert float((a.double() - b).abs().max()) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_impossible_words(dtype):
    "A bias of -∞: no entropy, no gradient, and the other words as if there were only these."
    hidden, weight, bias, target = rows(vocab=20, dtype=dtype)
    target, bias[15:] = target % 15, -torch.inf
    variables = [v.requires_grad_() for v in (hidden, weight, bias)]
    stats = linear_stats(hidden, weight, target, bias)
    found = slopes(stats, variables, 300 * torch.ones(2, 50))
    for a, b in zip(stats, plain(hidden, weight[:15], target, bias[:15])): assert torch.allclose(a, b, atol=1e-5)
    assert all(v.isfinite().all() for v in (*stats, *found))
    assert (found[1][15:] == 0).all() and (found[2][15:] == 0).all()
    nll, _ = linear_stats(hidden, weight, target * 0 + 17, bias)        # what can't be said has no likelihood
    assert nll.isinf().all()


def test_either_output_alone_and_frozen_heads():
    hidden, weight, bias, target = with_gradients(rows())
    def slope(stats, i): return torch.autograd.grad(stats(hidden, weight, target, bias)[i].sum(), hidden)[0]
    for i in (0, 1): assert torch.allclose(slope(linear_stats, i), slope(plain, i))
    nll, h = linear_stats(hidden, weight.detach(), target, bias.detach())
    (nll.sum() + h.sum()).backward()
    assert hidden.grad is not None and weight.grad is None


def test_no_rows():
    hidden, weight, bias, target = rows(n=0)
    nll, h = linear_stats(hidden.requires_grad_(), weight.requires_grad_(), target, bias)
    assert nll.shape == h.shape == (0,) and (torch.autograd.grad(nll.sum() + h.sum(), weight)[0] == 0).all()


class Largest(TorchDispatchMode):
    "Remembers the largest tensor that any operation gave back."
    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        values = out if isinstance(out, (tuple, list)) else [out]
        self.numel = max([self.numel] + [v.numel() for v in values if isinstance(v, torch.Tensor)])
        return out


def test_never_more_than_a_chunk_of_logits():
    "500 rows × 2,000 words by 20 rows at a time; the plain formulas make all million at once."
    hidden, weight, bias, target = with_gradients(rows(n=500, size=8, vocab=2000))
    def largest(stats):
        with Largest() as seen:
            nll, h = stats()
            torch.autograd.grad(nll.sum() - h.sum(), (hidden, weight, bias))
        return seen.numel
    assert largest(lambda: linear_stats(hidden, weight, target, bias, chunk=20)) == 20 * 2000
    assert largest(lambda: plain(hidden, weight, target, bias)) == 500 * 2000


@pytest.fixture
def liger(monkeypatch):
    "Liger's function from its own file, whose CPU fallback needs no triton, under the name that it has in the package."
    found = importlib.util.find_spec("liger_kernel")
    if found is None: pytest.skip("liger-kernel is not installed: pip install --no-deps liger-kernel")
    name = "liger_kernel.ops.fused_linear_scaled_cross_entropy"
    file = Path(found.origin).parent/"ops"/"fused_linear_scaled_cross_entropy.py"
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", types.ModuleType("liger_kernel.ops"))
    monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("scale", [1., .25])
def test_ligers_fallback_agrees(liger, scale):
    "A peer as oracle, masked rows and their entropy included."
    hidden, weight, _, target = rows(masked=9, dtype=torch.float32)
    variables = hidden.requires_grad_(), weight.requires_grad_()
    weights = torch.randn(2, 50, generator=torch.Generator().manual_seed(3))
    def found(backend):
        stats = linear_stats(hidden, weight, target, scale=scale, backend=backend)
        return *stats, *slopes(stats, variables, weights)
    for a, b in zip(found("own"), found("liger")): assert torch.allclose(a, b, atol=1e-5)


def test_liger_through_a_model(liger):
    lm, batch = lm_of("llama", torch.float32), batch_of()
    for positions in ("answer", "all"):
        ours, theirs = (answer_stats(lm, batch, positions, backend=backend) for backend in ("own", "liger"))
        for name in ("nll", "entropy"): assert torch.allclose(getattr(ours, name), getattr(theirs, name), atol=1e-5)
    for kind in ("phi", "gemma2"):
        with pytest.raises(ValueError, match="neither bias nor soft-cap"):
            answer_stats(lm_of(kind), batch, backend="liger")


def test_backends_by_name():
    with pytest.raises(ValueError, match="backend must be one of 'own', 'liger', got 'triton'"):
        answer_stats(lm_of("llama"), batch_of(), backend="triton")


# --- through models ---------------------------------------------------------------------------------------------------

def batch_of(vocab=40, seed=0):
    "Four sequences of different lengths, prompt of three tokens, padded on the right."
    rng = torch.Generator().manual_seed(seed)
    ids, used = torch.randint(1, vocab, (4, 11), generator=rng), torch.arange(11) < torch.tensor([[7], [11], [5], [9]])
    answer = used & (torch.arange(11) >= 3)
    return dict(input_ids=ids * used, attention_mask=used.long(), labels=ids.where(answer, -100))


OTHERS = {"granite": dict(num_key_value_heads=2, logits_scaling=8.),
          "cohere": dict(num_key_value_heads=2, logit_scale=.0625),
          "cohere2": dict(num_key_value_heads=2, logit_scale=.25),
          "qwen3": dict(num_key_value_heads=2, head_dim=8),
          "gemma3_text": dict(num_key_value_heads=2, head_dim=8, sliding_window=64, query_pre_attn_scalar=8,
                              final_logit_softcapping=4.),
          "olmo2": dict(num_key_value_heads=2),
          "phi3": dict(num_key_value_heads=2),
          "opt": dict(ffn_dim=48, word_embed_proj_dim=32)}


def lm_of(kind, dtype=torch.float64, **options):
    "A small model with 40 words; windows are wide, since padding outside every window is NaN in some families."
    if kind in ("mistral", "gemma2"): options |= dict(sliding_window=64)
    if kind in KINDS: return random_lm(kind, 40, dtype=dtype, **options)
    torch.manual_seed(0)
    tokens = dict(vocab_size=40, eos_token_id=39, bos_token_id=None, pad_token_id=0)
    config = AutoConfig.for_model(kind, **SIZES | OTHERS[kind] | tokens | options)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def whole(lm, batch):
    "What the table of all logits says."
    return token_stats(lm(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits, batch["labels"])


def grads(lm, stats):
    "Gradients of NLL along the answers and of half the entropy where it was taken."
    lm.zero_grad()
    where = stats.answer if stats.positions == "answer" else torch.ones_like(stats.answer)
    (stats.nll.sum() - .5 * (stats.entropy * where).sum()).backward()
    return {name: p.grad.clone() for name, p in lm.named_parameters() if p.grad is not None}


def same(lm, batch, positions="answer", tolerance=1e-9):
    "NLL, entropy and every parameter's gradient are those of the whole table."
    table, ours = whole(lm, batch), answer_stats(lm, batch, positions)
    table = table._replace(positions=positions)
    where = torch.ones_like(ours.answer) if positions == "all" else ours.answer
    assert torch.equal(table.answer, ours.answer) and torch.equal(table.target, ours.target)
    assert torch.allclose(ours.nll, table.nll, atol=tolerance)
    assert torch.allclose(ours.entropy, table.entropy * where, atol=tolerance)
    expected, found = grads(lm, table), grads(lm, ours)
    assert expected.keys() == found.keys() and expected
    for name, value in expected.items():
        assert torch.allclose(found[name], value, atol=tolerance * max(1, float(value.abs().max()))), name


@pytest.fixture
def fused(monkeypatch):
    "A list that grows whenever the fused head is used."
    calls, original = [], head.linear_stats
    monkeypatch.setattr(head, "linear_stats", lambda *args, **options: calls.append(args) or original(*args, **options))
    return calls


@pytest.mark.parametrize("kind", [*KINDS, *OTHERS])
def test_families_give_what_their_own_logits_say(kind, fused):
    lm = lm_of(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same(lm, batch_of())
    assert len(fused) == 1
    assert len(fused[0][0]) == int((batch_of()["labels"] != -100).sum())            # only the answers' rows


@pytest.mark.parametrize("kind", ["phi", "gemma2", "cohere"])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_every_position(kind, dtype, tolerance): same(lm_of(kind, dtype), batch_of(), "all", tolerance)


@pytest.mark.parametrize("kind", ["llama", "phi", "gemma2", "granite"])
def test_bfloat16_models(kind, fused):
    "The check on the head must not mistake bfloat16's rounding for an unknown habit."
    lm = lm_of(kind, torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours, table = answer_stats(lm, batch_of()), whole(lm, batch_of())
    assert fused and torch.allclose(ours.nll, table.nll, rtol=2e-2, atol=2e-2)
    assert torch.allclose(ours.entropy[ours.answer], table.entropy[ours.answer], rtol=2e-2, atol=2e-2)


def test_autocast(fused):
    "Under mixed precision the head computes in bfloat16, as the model's own does; gradients arrive in float32."
    lm = lm_of("phi", torch.float32)
    with torch.autocast("cpu", torch.bfloat16): ours, table = answer_stats(lm, batch_of()), whole(lm, batch_of())
    assert fused and torch.allclose(ours.nll, table.nll, rtol=2e-2, atol=2e-2)
    expected, found = grads(lm, table._replace(positions="answer")), grads(lm, ours)
    for name, value in expected.items():
        assert found[name].dtype == torch.float32
        assert float((found[name] - value).norm()) < .05 * float(value.norm()) + 1e-3


def test_tied_weights_get_both_gradients(fused):
    lm = lm_of("llama", tie_word_embeddings=True)
    assert lm.get_output_embeddings().weight is lm.get_input_embeddings().weight
    same(lm, batch_of())
    assert fused


@pytest.mark.parametrize("targets,uses_fused", [("all-linear", True), (["q_proj", "lm_head"], False)])
def test_adapters_and_adapters_on_the_head(targets, uses_fused, fused):
    lm = add_lora(LocalModel(lm_of("llama"), LetterTok(40)), rank=2, targets=targets).lm
    for name, p in lm.named_parameters():       # zero at first, which would hide a lost adapter
        if "lora_B" in name: p.data = torch.randn_like(p) * .3
    same(lm.eval(), batch_of())
    assert bool(fused) == uses_fused


class Strange(LlamaForCausalLM):
    "A family that does to its logits what no config says."
    def forward(self, *args, **options):
        out = super().forward(*args, **options)
        out.logits = self.habit(out.logits)
        return out


HABITS = dict(scaled=lambda z: 1.05 * z, clamped=lambda z: z.clamp(max=2), biased=lambda z: z + torch.arange(40) % 3,
              cut=lambda z: z[..., :39])


@pytest.mark.parametrize("habit", HABITS.values(), ids=HABITS)
def test_an_unknown_habit_is_noticed_and_the_models_own_head_used(habit):
    torch.manual_seed(0)
    lm, batch = Strange(lm_of("llama").config).to(torch.float64).eval(), batch_of(39)
    lm.habit = habit
    with pytest.warns(UserWarning, match="does more to its logits than we know of"): same(lm, batch)


def test_logits_and_hidden_states_on_request():
    lm, batch = lm_of("gemma2"), batch_of()
    table, ours = whole(lm, batch), answer_stats(lm, batch, logits=True, layer=1)
    inputs = dict(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    states = lm(**inputs, output_hidden_states=True).hidden_states[1]
    everywhere = answer_stats(lm, batch, "all", logits=True)
    for a, b in [(ours.logits, table.logits), (ours.nll, table.nll), (ours.hidden, states[ours.answer]),
                 (everywhere.logits, ours.logits), (everywhere.entropy, table.entropy)]:
        assert torch.allclose(a, b, atol=1e-12)
    lean = answer_stats(lm, batch, layer=2)
    assert lean.logits is None and lean.hidden.shape == ours.hidden.shape


def test_the_model_is_left_as_it_was():
    lm, batch = lm_of("llama"), batch_of()
    before = whole(lm, batch).nll
    answer_stats(lm, batch)
    with pytest.raises(ValueError, match="one of 'answer', 'all', got 'prompt'"): answer_stats(lm, batch, "prompt")
    with pytest.raises(IndexError): answer_stats(lm, batch | dict(input_ids=batch["input_ids"] + 1000))
    assert torch.equal(whole(lm, batch).nll, before) and not lm.get_output_embeddings()._forward_pre_hooks


def _half(rank, port, path):
    "One of two processes: half of the batch through a wrapped model."
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    lm, batch = lm_of("phi"), {k: v[2 * rank:2 * rank + 2] for k, v in batch_of().items()}
    model = torch.nn.parallel.DistributedDataParallel(lm)
    grads_of = grads(lm, answer_stats(model, batch))
    twice = answer_stats(model, batch), answer_stats(model, batch)      # as with a forget and a retain batch
    lm.zero_grad()
    sum(s.nll.sum() for s in twice).backward()
    torch.save((grads_of, {name: p.grad for name, p in lm.named_parameters()}), f"{path}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_gradients_are_shared_between_processes(tmp_path):
    "Two processes with half a batch each have the same gradients: the mean of what one process finds on both halves."
    multiprocessing.spawn(_half, args=(29500 + os.getpid() % 2000, str(tmp_path)), nprocs=2)
    lm = lm_of("phi")
    expected = grads(lm, whole(lm, batch_of())._replace(positions="answer"))
    found = [torch.load(tmp_path/f"{rank}.pt") for rank in (0, 1)]
    lm.zero_grad()
    whole(lm, batch_of()).nll.sum().backward()
    for name, value in expected.items():
        for once, twice in found:
            assert torch.allclose(once[name], value / 2, atol=1e-9), name
            assert torch.allclose(twice[name], lm.get_parameter(name).grad, atol=1e-9), name
