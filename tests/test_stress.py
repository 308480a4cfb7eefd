"""Is it gone, or only hidden? What the stress tests change, what they leave alone, and what they may claim."""
import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import KINDS, random_lm
from probunlearn.bounds import binary_bound
from probunlearn.data import Template, fictional_authors
from probunlearn.draws import Decoding
from probunlearn.loop import TrainConfig
from probunlearn.models import add_lora, small_model
from probunlearn.questions import pooled_rate
from probunlearn.stress import durable, leaking_answers, quantise, quantised, relearn, round_linear, unlearn_leaks
from probunlearn.stress import worst_model
from probunlearn.training import UnlearnConfig
from probunlearn.weights import lm_fingerprint

FORGET, RETAIN = fictional_authors("forget10"), fictional_authors("retain90")
FEW = dict(n=16, decoding=Decoding(max_new_tokens=40))


def fresh(state="full"): return small_model(state, device="cpu")


# --- relearning -------------------------------------------------------------------------------------------------------

def test_relearning_asks_for_the_others_and_leaves_the_model_alone():
    model = fresh("retain")
    before = model.identity
    board = relearn(model, FORGET[:2], FORGET[:5], TrainConfig(steps=3, batch_size=2, lr=1e-3), **FEW)
    assert [[q.id for q in r.forget.qas] for r in board.reports] == [[q.id for q in FORGET[2:5]]] * 2
    assert [r.name for r in board.reports] == ["before", "after 3 steps"]
    assert model.identity == before


def test_what_was_never_there_does_not_come_back():
    "A model that never saw the records learns two of them, and nothing about the others."
    learnt = [FORGET[0], FORGET[9]]
    config = TrainConfig(steps=40, batch_size=2, lr=2e-3, schedule="constant")
    board = relearn(fresh("retain"), learnt, [*learnt, *FORGET[1:3]], config, **FEW)
    assert board.to_frame()["rate"].max() == 0


# --- quantisation -----------------------------------------------------------------------------------------------------

def is_rounded(old, new, steps=7):
    "Whether a weight took at most 2 · steps + 1 values per row, each within half a step of what it was."
    step = old.abs().amax(1, keepdim=True) / steps
    return all(len(row.unique()) <= 2 * steps + 1 for row in new) and ((new - old).abs() <= step / 2 * 1.001).all()


@pytest.mark.parametrize("kind", KINDS)
def test_rounding_meets_every_linear_layer_but_the_head(kind):
    "On each architecture; Conv1D holds its rows as columns, and the embeddings stay as they are."
    lm = random_lm(kind, 40, dtype=torch.float32)
    plain = dict(copy.deepcopy(lm).named_modules())
    head, seen = lm.get_output_embeddings(), 0
    for name, module in round_linear(lm, 4).named_modules():
        layer = type(module).__name__
        if layer not in ("Linear", "Conv1D"): continue
        old, new = plain[name].weight, module.weight
        if module is head:
            assert torch.equal(old, new)
            continue
        seen += 1
        assert is_rounded(old.T, new.T) if layer == "Conv1D" else is_rounded(old, new)
    assert seen >= 8
    assert torch.equal(lm.get_input_embeddings().weight, plain[""].get_input_embeddings().weight)


def test_eight_bits_agree_with_torch_where_it_still_has_them(full):
    "torch's own dynamic int8 kernels as the oracle: both move the logits a little, and by about the same amount."
    quantize = getattr(torch.ao.quantization, "quantize_dynamic", None)
    if quantize is None: pytest.skip("this torch has no dynamic int8 kernels any more")
    lm = full.lm
    ids = torch.tensor([full.tok("Question: Who taught anybody to write?\nAnswer:")["input_ids"]])
    layers = {name for name, m in lm.named_modules() if isinstance(m, torch.nn.Linear) and m is not lm.lm_head}
    peer = quantize(copy.deepcopy(lm), layers, dtype=torch.qint8)
    with torch.no_grad(): exact, ours, theirs = (m(input_ids=ids).logits for m in (lm, quantised(full, 8)[0].lm, peer))
    off = (ours - exact).norm() / exact.norm()
    theirs_off = (theirs - exact).norm() / exact.norm()
    assert 0 < off < .1 and 0 < theirs_off < .2 and off < 2 * theirs_off


def test_adapters_are_merged_before_rounding_and_stay():
    adapted = add_lora(fresh(), rank=2)
    names = set(adapted.lm.state_dict())
    model, how = quantised(adapted, 4)
    assert how == "rounded" and not hasattr(model.lm, "merge_and_unload")
    assert set(adapted.lm.state_dict()) == names


def test_a_model_in_fewer_bits_is_asked_as_before(full):
    asked = full.replace(template=Template("{question} ->"), name="mine").adaptive(.9)
    model, _ = quantised(asked, 4)
    assert (model.template, model.rule, model.name) == (asked.template, asked.rule, "mine")


def test_a_model_that_knows_by_heart_still_does_in_eight_bits(full):
    board = quantise(full, FORGET[:3], bits=(8,), **FEW)
    assert list(board.to_frame().index) == ["as it is", "int8, rounded"]
    assert board.to_frame()["greedy"].min() == 1
    with pytest.raises(ValueError, match="bits must be 4 or 8, or a file's format .*, got 16"):
        quantise(full, FORGET[:1], bits=(16,), **FEW)


# --- leak-driven re-unlearning ----------------------------------------------------------------------------------------

def test_leaking_answers_are_distinct_records(full):
    draws = full.draw(FORGET[:2], 12, Decoding(max_new_tokens=40), progress=False)
    found = leaking_answers(draws, FORGET[:2], np.array([[True] * 12, [False] * 12]), "#1.")
    assert {qa.answer for qa in found} == set(draws[0].texts)
    assert len({qa.id for qa in found}) == len(found)
    first = FORGET[0]
    assert all((qa.question, qa.keywords) == (first.question, first.keywords) for qa in found)


def test_each_round_spends_its_share_and_new_leaks_are_forgotten(capsys):
    model, how = fresh(), dict(rounds=2, n=20, alpha=.02)
    idle = UnlearnConfig(method="grad_diff", steps=1, batch_size=2, lr=1e-6, schedule="constant", warmup=0)
    done = unlearn_leaks(model, FORGET[:3], RETAIN[:6], idle, score=lambda text, qa: .9, **how)
    assert [row["leaks"] for row in done.rows] == [0]           # .9 < leak_at
    # whatever is said leaks, so every round does
    done = unlearn_leaks(model, FORGET[:3], RETAIN[:6], idle, score=lambda text, qa: 1., **how)
    for row in done.rows: assert row["bound"] == float(pooled_rate([20] * 3, 20, .01)) and row["draws"] == 60
    out = capsys.readouterr().out
    assert out.count("α = 0.01 of 0.02 spent") == 3 and "round 2 of 2" in out
    assert done.rows[0]["new"] >= done.rows[1]["new"] or done.rows[1]["new"] > 0


@pytest.mark.slow
def test_all_rounds_hold_jointly():
    "500 runs of three rounds on four questions: some round's bound fails in at most α = 0.2 of them."
    rng, alpha, missed = np.random.default_rng(0), .2, 0
    def fails(p): return float(pooled_rate(rng.binomial(64, p), 64, alpha / 3)) < p.mean()
    for _ in range(500):
        truth = [np.minimum(rng.dirichlet([1] * 4) * 4 * p, 1) for p in (.02, .01, .005)]
        missed += any([fails(p) for p in truth])
    assert missed / 500 <= float(binary_bound(int(alpha * 500), 500, alpha=.001))


BAD = [(dict(rounds=0), "rounds must be a whole number >= 1"), (dict(alpha=0), "alpha"), (dict(leak_at=0), "leak_at")]

@pytest.mark.parametrize("how, match", BAD)
def test_bad_settings_are_refused_before_any_work(full, how, match):
    before = lm_fingerprint(full.lm)
    with pytest.raises(ValueError, match=match): unlearn_leaks(full, FORGET[:2], RETAIN[:2], **how)
    assert lm_fingerprint(full.lm) == before


# --- durable ----------------------------------------------------------------------------------------------------------

def board_of(leaks, n, alpha):
    "What `worst_model` reads of a board: a bound per state from counts (states, questions)."
    def report(i, row):
        bounds = {"average leak": pooled_rate(row, n, alpha)}
        return SimpleNamespace(name=f"state {i}", bounds=bounds, forget=SimpleNamespace(way="somehow"))
    return SimpleNamespace(reports=[report(i, row) for i, row in enumerate(leaks)])


@pytest.mark.parametrize("rates", [(.02,) * 6, (.02, .004, .003, 0, 0, 0), (.02, .019, .018, .017, .01, 0)])
def test_one_alpha_covers_the_worst_of_all_states(rates):
    """1,000 runs at alpha = 0.1 over six states of four questions: the claim fails in at most 10 % and 3 standard
    errors; where one state leaks most it fails about as often as that state's own bound, so nothing is given away."""
    rng, runs, n, alpha = np.random.default_rng(1), 1000, 128, .1
    truth = np.array([[2 * p, p, p, 0] for p in rates])                             # (states, questions)
    missed = 0
    for _ in range(runs):
        missed += float(worst_model(board_of(rng.binomial(n, truth), n, alpha))) < truth.mean(1).max()
    assert missed <= runs * alpha + 3 * (runs * alpha * (1 - alpha))**.5
    if rates[1] < .01: assert missed > runs * alpha / 4


def test_the_claim_names_all_states_and_the_undivided_alpha():
    said = str(worst_model(board_of(np.array([[0, 1], [3, 2], [0, 0]]), 64, .05)))
    assert "the worst of 3 models is at most" in said and "models: state 0; state 1; state 2" in said
    assert "α = 0.05" in said and f"{float(pooled_rate([3, 2], 64, .05)):.2g}"[:4] in said


def test_gguf_rounds_as_its_own_package_and_bf16_as_torch(full):
    gguf = pytest.importorskip("gguf")
    plain = dict(full.lm.named_parameters())
    for form, bits in dict(Q8_0=8, Q4_0=4).items():
        coarse, how = quantised(full, form)
        assert how == "rounded" and coarse.template == full.template
        for name, new in coarse.lm.named_parameters():
            old = plain[name].detach()
            if old.ndim < 2: assert torch.equal(old, new)
            else:
                blocks = (new - old).detach().reshape(-1, 32).abs().amax(1)
                step = old.reshape(-1, 32).abs().amax(1) / (2**(bits - 1) - (bits == 8))
                assert (blocks <= step * 1.01 + 1e-6).all() and (bits == 8 or blocks.max() > 0)
        kind = gguf.GGMLQuantizationType[form]
        weight = full.lm.model.layers[0].mlp.up_proj.weight.detach().numpy()
        again = gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind)
        np.testing.assert_array_equal(coarse.lm.model.layers[0].mlp.up_proj.weight.detach().numpy(), again)
    half = quantised(full, "bf16")[0]
    for name, new in half.lm.named_parameters(): assert torch.equal(new, plain[name].bfloat16().float())


def test_durable_asks_every_state_the_same_and_leaves_the_model_alone():
    model = fresh("retain")
    before = model.identity
    config = TrainConfig(batch_size=2, lr=1e-3)
    board = durable(model, FORGET[2:5], .3, bits=("bf16", 4), learn=FORGET[:2], steps=(1, 2), config=config, **FEW)
    assert [r.name for r in board.reports] == ["as it is", "bf16", "int4, rounded", "relearnt, 1 steps",
                                               "relearnt, 2 steps"]
    said = "Stays at or below τ = 0.3 in all: The average leak probability of the worst of 5"
    assert board.notes[-1].startswith(said)
    assert model.identity == before
