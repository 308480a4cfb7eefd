"""Is it gone, or only hidden? What the stress tests change, what they leave alone, and what they may claim."""
import copy

import numpy as np
import pytest
import torch

from conftest import KINDS, random_lm
from probunlearn.bounds import binary_bound
from probunlearn.data import fictional_authors
from probunlearn.draws import Decoding
from probunlearn.loop import TrainConfig
from probunlearn.models import add_lora, small_lm
from probunlearn.weights import lm_fingerprint
from probunlearn.questions import pooled_rate
from probunlearn.sampling import sample
from probunlearn.stress import leaking_answers, quantise, quantised, relearn, round_linear, unlearn_leaks
from probunlearn.training import UnlearnConfig

FORGET, RETAIN = fictional_authors("forget10"), fictional_authors("retain90")
FEW = dict(n=16, decoding=Decoding(max_new_tokens=40))


def fresh(state="full"): return small_lm(state, device="cpu")


def test_relearning_asks_for_the_others_and_leaves_the_model_alone():
    lm, tok = fresh("retain")
    before = lm_fingerprint(lm)
    board = relearn(lm, tok, FORGET[:2], FORGET[:5], TrainConfig(steps=3, batch_size=2, lr=1e-3), **FEW)
    assert [[q.id for q in r.forget.qas] for r in board.reports] == [[q.id for q in FORGET[2:5]]] * 2
    assert [r.name for r in board.reports] == ["before", "after 3 steps"] and lm_fingerprint(lm) == before


def test_what_was_never_there_does_not_come_back():
    "A model that never saw the records learns two of them, and nothing about the others."
    lm, tok = fresh("retain")
    board = relearn(lm, tok, [FORGET[0], FORGET[9]], [FORGET[0], FORGET[9], *FORGET[1:3]], TrainConfig(steps=40, batch_size=2, lr=2e-3, schedule="constant"), **FEW)
    assert board.to_frame()["rate"].max() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_rounding_meets_every_linear_layer_but_the_head(kind):
    "On each architecture: at most 2^bits - 1 values per row (column for Conv1D), no entry moved by more than half a step, head and embeddings untouched."
    lm = random_lm(kind, 40, dtype=torch.float32)
    plain = dict(copy.deepcopy(lm).named_modules())
    head, seen = lm.get_output_embeddings(), 0
    for name, module in round_linear(lm, 4).named_modules():
        if type(module).__name__ not in ("Linear", "Conv1D"): continue
        old, new = plain[name].weight, module.weight
        if module is head:
            assert torch.equal(old, new)
            continue
        if type(module).__name__ == "Conv1D": old, new = old.T, new.T
        step, seen = old.abs().amax(1, keepdim=True) / 7, seen + 1
        assert all(len(row.unique()) <= 15 for row in new) and ((new - old).abs() <= step / 2 * 1.001).all()
    assert seen >= 8 and torch.equal(lm.get_input_embeddings().weight, plain[""].get_input_embeddings().weight)


def test_eight_bits_agree_with_torch_where_it_still_has_them(full):
    "torch's own dynamic int8 kernels as the oracle: both move the logits a little, and by about the same amount."
    quantize = getattr(torch.ao.quantization, "quantize_dynamic", None)
    if quantize is None: pytest.skip("this torch has no dynamic int8 kernels any more")
    lm, tok = full
    ids = torch.tensor([tok("Question: Who taught anybody to write?\nAnswer:")["input_ids"]])
    peer = quantize(copy.deepcopy(lm), {name for name, m in lm.named_modules() if isinstance(m, torch.nn.Linear) and m is not lm.lm_head}, dtype=torch.qint8)
    with torch.no_grad(): exact, ours, theirs = (m(input_ids=ids).logits for m in (lm, quantised(lm, tok, 8)[0], peer))
    off, theirs_off = (ours - exact).norm() / exact.norm(), (theirs - exact).norm() / exact.norm()
    assert 0 < off < .1 and 0 < theirs_off < .2 and off < 2 * theirs_off


def test_adapters_are_merged_before_rounding_and_stay():
    lm, tok = fresh()
    adapted = add_lora(lm, rank=2)
    names = set(adapted.state_dict())
    model, how = quantised(adapted, tok, 4)
    assert how == "rounded" and not hasattr(model, "merge_and_unload") and set(adapted.state_dict()) == names


def test_a_model_that_knows_by_heart_still_does_in_eight_bits():
    lm, tok = fresh()
    board = quantise(lm, tok, FORGET[:3], bits=(8,), **FEW)
    assert list(board.to_frame().index) == ["as it is", "int8, rounded"] and board.to_frame()["greedy"].min() == 1
    with pytest.raises(ValueError, match="bits must be 4 or 8, got 16"): quantise(lm, tok, FORGET[:1], bits=(16,), **FEW)


# --- leak-driven re-unlearning --------------------------------

def test_leaking_answers_are_distinct_records():
    lm, tok = fresh()
    draws = sample(lm, tok, FORGET[:2], 12, Decoding(max_new_tokens=40), progress=False)
    found = leaking_answers(draws, FORGET[:2], np.array([[True] * 12, [False] * 12]), "#1.")
    assert {qa.answer for qa in found} == set(draws[0].texts) and len({qa.id for qa in found}) == len(found)
    assert all(qa.question == FORGET[0].question and qa.keywords == FORGET[0].keywords for qa in found)


def test_each_round_spends_its_share_and_new_leaks_are_forgotten(capsys):
    lm, tok = fresh()
    config = UnlearnConfig(method="grad_diff", steps=1, batch_size=2, lr=1e-6, schedule="constant", warmup=0)          # forgets nothing, so every round leaks
    done = unlearn_leaks(lm, tok, FORGET[:3], RETAIN[:6], config, rounds=2, n=20, alpha=.02, score=lambda text, qa: .9)
    assert [row["leaks"] for row in done.rows] == [0]                                                                   # .9 < leak_at
    done = unlearn_leaks(lm, tok, FORGET[:3], RETAIN[:6], config, rounds=2, n=20, alpha=.02)
    for row in done.rows: assert row["bound"] == float(pooled_rate([20] * 3, 20, .01)) and row["draws"] == 60
    out = capsys.readouterr().out
    assert out.count("α = 0.01 of 0.02 spent") == 3 and "round 2 of 2" in out
    assert done.rows[0]["new"] >= done.rows[1]["new"] or done.rows[1]["new"] > 0


@pytest.mark.slow
def test_all_rounds_hold_jointly():
    "500 runs of three rounds with true leak probabilities 0.02, 0.01, 0.005 on four questions: some round's bound fails in at most α = 0.2 of them."
    rng, alpha, missed = np.random.default_rng(0), .2, 0
    for _ in range(500):
        truth = [rng.dirichlet([1] * 4) * 4 * p for p in (.02, .01, .005)]
        missed += any(float(pooled_rate(rng.binomial(64, np.minimum(p, 1)), 64, alpha / 3)) < np.minimum(p, 1).mean() for p in truth)
    assert missed / 500 <= float(binary_bound(int(alpha * 500), 500, alpha=.001))


@pytest.mark.parametrize("how,match", [(dict(rounds=0), "rounds must be a whole number >= 1"), (dict(alpha=0), "alpha"), (dict(leak_at=0), "leak_at")])
def test_bad_settings_are_refused_before_any_work(how, match):
    lm, tok = fresh()
    before = lm_fingerprint(lm)
    with pytest.raises(ValueError, match=match): unlearn_leaks(lm, tok, FORGET[:2], RETAIN[:2], **how)
    assert lm_fingerprint(lm) == before
