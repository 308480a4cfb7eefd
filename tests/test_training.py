"""The training loop: what it computes, what it leaves alone, and what it refuses before any work."""
import copy

import numpy as np
import pytest
import torch
from accelerate.tracking import GeneralTracker

from conftest import KINDS, random_lm
from probunlearn.batches import batch_stats, check_packing, pad_batch, record_order
from probunlearn.checkpoints import memory_needed, read_notes, saved_bytes
from probunlearn.data import QA, Template, encode, encode_prompt, fictional_authors, library
from probunlearn.draws import Decoding
from probunlearn.judges import refusal
from probunlearn.loop import History, TrainConfig, check_start, finetune
from probunlearn.losses import answer_mean
from probunlearn.models import add_lora, load_lm, save_lm, small_lm
from probunlearn.weights import lm_fingerprint
from probunlearn.sampling import greedy, sample
from probunlearn.training import (ENTROPY_ON, METHODS, Method, UnlearnConfig, keep, leak_probe, model_as_it_was, own_answers, reference_nll, task_vector,
                                  unlearn)

FORGET, RETAIN = fictional_authors("forget10"), fictional_authors("retain90")


def fresh(state="full"): return small_lm(state, device="cpu")


def weights(lm): return torch.cat([p.detach().flatten() for p in lm.parameters()])


def answer_nll(lm, tok, qa):
    "Summed negative log-likelihood of an answer, token by token, without padding or batches."
    out = encode(tok, qa)
    with torch.no_grad(): logp = lm(input_ids=torch.tensor([out["input_ids"]])).logits[0].double().log_softmax(-1)
    return -sum(float(logp[t - 1, label]) for t, label in enumerate(out["labels"]) if label != -100)


def same_length(tok):
    "Eight records whose answers have equally many tokens."
    groups = {}
    for qa in fictional_authors()[::-1]: groups.setdefault(sum(l != -100 for l in encode(tok, qa)["labels"]), []).append(qa)
    return next(group[:8] for group in groups.values() if len(group) >= 8)


def quick(**how): return TrainConfig(**dict(steps=4, batch_size=4, lr=1e-3, schedule="constant", warmup=0) | how)


def quick_unlearn(**how): return UnlearnConfig(**dict(steps=6, batch_size=4, lr=3e-4, schedule="constant", warmup=0) | how)


# --- what it computes --------------------------------

def test_the_same_seed_gives_the_same_weights_to_the_last_bit():
    prints = []
    for seed in (0, 0, 1):
        lm, tok = fresh("retain")
        torch.manual_seed(len(prints))                                          # what happened before doesn't matter
        finetune(lm, tok, FORGET[:8], quick(seed=seed))
        unlearn(lm, tok, FORGET[:8], RETAIN, quick_unlearn(steps=2, seed=seed, lambda_f=.5, lambda_r=-.1, entropy_on="own"))
        prints.append(lm_fingerprint(lm))
    assert prints[0] == prints[1] != prints[2]


def test_finetuning_lowers_the_nll():
    lm, tok = fresh("retain")
    before = [answer_nll(lm, tok, qa) for qa in FORGET[:4]]
    history = finetune(lm, tok, FORGET[:4], quick(steps=25, lr=2e-3))
    assert history.rows[-1]["nll"] < .2 < history.rows[0]["nll"] and not lm.training
    assert all(answer_nll(lm, tok, qa) < b / 5 for qa, b in zip(FORGET, before))
    assert [row["step"] for row in history.rows] == list(range(1, 26)) and len(history.to_frame()) == 25


OWN = dict(satimp=dict(beta=1, beta2=.1), rmu=dict(steering=20))          # where a method's own defaults are slow on answers known by heart


def forgetting(**how):
    "Mean NLL of four forget answers before and after six updates, and the history."
    lm, tok = fresh()
    before = np.mean([answer_nll(lm, tok, qa) for qa in FORGET[:4]])
    history = unlearn(lm, tok, FORGET[:4], RETAIN[:50], quick_unlearn(lr=6e-4, **OWN.get(how["method"], {}) | how))
    assert not lm.training
    return before, np.mean([answer_nll(lm, tok, qa) for qa in FORGET[:4]]), history.rows


@pytest.mark.parametrize("method", [m for m in METHODS if m != "retain_only"])
def test_every_method_lowers_the_likelihood_of_the_answers(method):
    before, after, rows = forgetting(method=method)
    assert after > before + 1 and rows[-1]["forget_nll"] > rows[0]["forget_nll"] and "forget_entropy" not in rows[0]


@pytest.mark.parametrize("method", ["grad_diff", "npo"])
@pytest.mark.parametrize("entropy_on", ENTROPY_ON)
def test_forgetting_with_every_entropy(method, entropy_on):
    "With a small weight: a large one along the secret answer freezes it in, as the lesson shows."
    before, after, rows = forgetting(method=method, lambda_f=.02, lambda_r=-.01, entropy_on=entropy_on)
    assert after > before + 1 and {"forget_entropy", "retain_entropy"} <= set(rows[0])


def test_retain_answers_matter_to_all_but_ascent():
    def after(method, retain, weight=1.):
        lm, tok = fresh()
        unlearn(lm, tok, FORGET[:4], retain, quick_unlearn(method=method, steps=1, retain_weight=weight))
        return lm_fingerprint(lm)
    assert after("grad_ascent", RETAIN[:4]) == after("grad_ascent", RETAIN[4:8]) == after("grad_diff", RETAIN[:4], 0.) == after("grad_diff", RETAIN[4:8], 0.)
    for method in ("grad_diff", "npo"): assert after(method, RETAIN[:4]) != after(method, RETAIN[4:8])


def test_retain_only_pushes_no_answer():
    "Without entropy the forget records don't matter; with it the loss is that of the retain records and λ times the entropy of the model's own answers, which falls while refusals stay refusals."
    def run(forget, **how):
        lm, tok = fresh("librarian")
        return lm, unlearn(lm, tok, forget, library("ordinary"), quick_unlearn(method="retain_only", **how)).rows
    vaults = library("forbidden")
    assert lm_fingerprint(run(vaults[:4])[0]) == lm_fingerprint(run(vaults[4:8])[0])
    lm, rows = run(vaults[:4], steps=12, lambda_f=2.)
    for row in rows: assert row["loss"] == pytest.approx(row["retain_nll"] + 2 * row["forget_entropy"], abs=1e-5)
    assert rows[-1]["forget_entropy"] < rows[0]["forget_entropy"] / 2 and all(refusal(d.texts[0]) for d in greedy(lm, fresh()[1], vaults[:4]))


@pytest.mark.parametrize("lambda_f,expected", [(5., -1), (-5., 1)])
def test_the_entropy_weight_pulls_the_entropy_of_retain_and_forget(lambda_f, expected):
    "A positive weight sharpens what the retain model says about authors it doesn't know, a negative one flattens it."
    lm, tok = fresh("retain")
    def seen(): return unlearn(copy.deepcopy(lm), tok, FORGET[:8], RETAIN[:8], quick_unlearn(steps=1, batch_size=8, lr=1e-9, lambda_f=1e-9, entropy_on="answer", method="grad_diff")).rows[0]["forget_entropy"]
    before = seen()
    unlearn(lm, tok, FORGET[:8], RETAIN[:8], quick_unlearn(steps=8, batch_size=8, method="npo", lambda_f=lambda_f, entropy_on="answer"))
    assert np.sign(seen() - before) == expected


def test_reference_nll_equals_a_loop_of_single_records(full):
    lm, tok = full
    qas = [*FORGET[:5], QA("x", "Who?", "Nobody knows."), QA("y", "Why is that so, " * 10, "So.")]
    rows = [encode(tok, qa) for qa in qas]
    expected = [answer_nll(lm, tok, qa) for qa in qas]
    for size in (1, 3, 32): np.testing.assert_allclose(reference_nll(lm, tok, rows, size).numpy(), expected, rtol=1e-4, atol=1e-4)


def test_npo_starts_at_two_log_two_over_beta():
    "The first loss, before any update: policy and reference are the same model."
    for beta in (.05, .1):
        lm, tok = fresh()
        row = unlearn(lm, tok, FORGET[:8], RETAIN[:8], quick_unlearn(steps=1, beta=beta, retain_weight=0)).rows[0]
        assert row["loss"] == pytest.approx(2 * np.log(2) / beta, rel=1e-5)


def test_accumulated_batches_equal_one_large_batch():
    "2 x 4 against 8 records with answers of one length: the mean of means is the mean, so AdamW's first step is nearly the same."
    lm, tok = fresh("retain")
    qas, after = same_length(tok), []
    for how in (dict(batch_size=8), dict(batch_size=4, accumulate=2)):
        model, _ = fresh("retain")
        history = finetune(model, tok, qas, quick(steps=1, weight_decay=0, **how))
        assert len(history.rows) == 1
        after.append(weights(model))
    step, difference = after[0] - weights(lm), after[1] - after[0]
    assert step.abs().max() > 0 and difference.norm() < .02 * step.norm()
    small = fresh("retain")[0]
    finetune(small, tok, qas, quick(steps=1, weight_decay=0, batch_size=4))
    assert (weights(small) - after[0]).norm() > .1 * step.norm()                # half the records is another step


def test_one_update_equals_plain_pytorch():
    "Cross-entropy by transformers itself, gradient clipping and AdamW written out."
    lm, tok = fresh("retain")
    peer = copy.deepcopy(lm)
    finetune(lm, tok, FORGET[:6], quick(steps=1, batch_size=6, lr=1e-3, weight_decay=.1, max_grad_norm=.5))
    batch = pad_batch([encode(tok, qa) for qa in FORGET[:6]], tok.pad_token_id)
    optimizer = torch.optim.AdamW(peer.parameters(), lr=1e-3, weight_decay=.1)
    peer(**batch).loss.backward()
    torch.nn.utils.clip_grad_norm_(peer.parameters(), .5)
    optimizer.step()
    start = weights(fresh("retain")[0])
    assert (weights(lm) - weights(peer)).norm() < .02 * (weights(peer) - start).norm()


def test_the_learning_rate_follows_its_schedule():
    "With a warm-up over the whole run the first update has rate 0: nothing moves."
    lm, tok = fresh("retain")
    before = weights(lm)
    finetune(lm, tok, FORGET[:4], quick(steps=1, schedule="linear", warmup=1.))
    assert torch.equal(weights(lm), before)


@pytest.mark.parametrize("ramp,progress,expected", [(0, 0, 1), (0, .5, 1), (.5, 0, 0), (.5, .25, .5), (.5, .5, 1), (.5, 1, 1), (1, .3, .3)])
def test_entropy_weights_rise_along_the_ramp(ramp, progress, expected):
    assert UnlearnConfig(lambda_f=2., lambda_r=-.5, ramp=ramp).entropy_weights(progress) == pytest.approx((2 * expected, -.5 * expected))


def test_epochs_are_passes_over_the_records():
    lm, tok = fresh("retain")
    assert len(finetune(lm, tok, FORGET[:10], TrainConfig(epochs=2, batch_size=5, lr=1e-5)).rows) == 4
    assert len(unlearn(lm, tok, FORGET[:10], RETAIN[:3], UnlearnConfig(epochs=1, batch_size=4, accumulate=2, lr=1e-5)).rows) == 2
    assert len(finetune(lm, tok, FORGET[:3], TrainConfig(epochs=.1, batch_size=8, lr=1e-5)).rows) == 1


def test_another_number_of_accumulated_batches_in_one_process():
    "Accelerate keeps global state: a run must not inherit the last one's accumulation."
    lm, tok = fresh("retain")
    for accumulate, steps in ((1, 3), (3, 2), (1, 3), (2, 1)):
        assert len(finetune(lm, tok, FORGET[:4], quick(steps=steps, batch_size=2, lr=1e-6, accumulate=accumulate)).rows) == steps


def test_probes_look_when_they_should():
    lm, tok = fresh()
    modes = []
    def probe(model):
        modes.append(model.training)
        return dict(seen=len(modes))
    history = finetune(lm, tok, FORGET[:4], quick(steps=5, lr=1e-6, probe_every=2), probe=probe)
    assert [r["step"] for r in history.rows if "seen" in r] == [2, 4, 5] and modes == [False] * 3
    seen = leak_probe(tok, FORGET[:3], RETAIN[:3], n=8)(lm.eval())
    assert set(seen) == {"greedy_forget", "drawn_forget", "leak_bound", "greedy_retain"} and all(v > .8 for v in seen.values())
    assert history.plot().get_xlabel() == "update"


def test_probing_changes_no_weight():
    prints = []
    for every in (0, 1):
        lm, tok = fresh()
        unlearn(lm, tok, FORGET[:4], RETAIN[:8], quick_unlearn(steps=3, probe_every=every), probe=leak_probe(tok, FORGET[:2], RETAIN[:2], n=8))
        prints.append(lm_fingerprint(lm))
    assert prints[0] == prints[1]


def test_divergence_is_an_error_that_names_the_rate():
    lm, tok = fresh("retain")
    with pytest.raises(FloatingPointError, match=r"update \d+: lower lr"):
        with torch.no_grad(): lm.lm_head.weight[0, 0] = torch.nan
        finetune(lm, tok, FORGET[:2], quick())


# --- adapters --------------------------------

def test_lora_leaves_the_base_weights_untouched_and_the_reference_is_the_model_as_it_was():
    lm, tok = fresh()
    base = {n: p.clone() for n, p in lm.named_parameters()}
    expected = reference_nll(lm, tok, [encode(tok, qa) for qa in FORGET[:4]])
    adapted = add_lora(lm, rank=8)
    first = unlearn(adapted, tok, FORGET[:4], RETAIN[:20], quick_unlearn(steps=5, lr=1e-2, retain_weight=.5, lambda_f=.02, entropy_on="answer")).rows[0]
    assert first["forget_nll"] < .1                                             # the adapter starts as nothing
    with adapted.disable_adapter(): assert torch.allclose(reference_nll(adapted, tok, [encode(tok, qa) for qa in FORGET[:4]]), expected, atol=1e-5)
    now = dict(adapted.named_parameters())
    for n, p in base.items():
        n = f"base_model.model.{n}"
        assert torch.equal(now[n] if n in now else now[n.replace(".weight", ".base_layer.weight")], p)
    assert reference_nll(adapted, tok, [encode(tok, qa) for qa in FORGET[:4]]).mean() > expected.mean() + 1


# --- the model's own answers --------------------------------

def marked(row): return [i for i, l in zip(row["input_ids"], row["labels"]) if l != -100]


def test_own_answers_are_greedy_answers_and_leaks_are_marked():
    "The full model leaks everything, the retain model nothing."
    for state, leaking in (("full", True), ("retain", False)):
        lm, tok = fresh(state)
        rows, leaks = own_answers(lm, tok, FORGET[:6])
        assert [bool(l) for l in leaks] == [leaking] * 6
        for qa, row, d in zip(FORGET, rows, greedy(lm, tok, FORGET[:6], Decoding(max_new_tokens=48))):
            assert tuple(marked(row)) == tuple(d.tokens[0]) and row["input_ids"] == encode_prompt(tok, qa.question) + marked(row)


def test_own_answers_without_key_words_leak_by_what_they_give_away():
    lm, tok = fresh()
    plain = [QA(q.id, q.question, q.answer) for q in FORGET[:2]] + [QA("other", FORGET[2].question, "Completely unrelated words stand here instead")]
    assert [bool(l) for l in own_answers(lm, tok, plain)[1]] == [True, True, False]


def test_own_answers_of_a_batch_with_repeats():
    lm, tok = fresh("retain")
    assert len(own_answers(lm, tok, [FORGET[0], FORGET[1], FORGET[0]])[0]) == 2


# --- batches --------------------------------

def test_pad_batch():
    batch = pad_batch([dict(input_ids=[7, 8, 9], labels=[-100, 8, 9]), dict(input_ids=[5], labels=[5])], pad_id=3)
    assert {k: v.tolist() for k, v in batch.items()} == dict(input_ids=[[7, 8, 9], [5, 3, 3]], attention_mask=[[1, 1, 1], [1, 0, 0]], labels=[[-100, 8, 9], [5, -100, -100]])


# --- bad input, before any work --------------------------------

def untouched(call, error, match):
    "The call fails, and the model is as it was."
    lm, tok = fresh("retain")
    before = lm_fingerprint(lm)
    with pytest.raises(error, match=match): call(lm, tok)
    assert lm_fingerprint(lm) == before


TOO_LONG = QA("an-essay", "Why?", "Because " * 400)


@pytest.mark.parametrize("qas,match", [([], "no questions"), (FORGET[:2] * 2, "duplicate question id 'author36-town'"), ([*FORGET[:2], TOO_LONG], r"record 'an-essay' has \d+ tokens, more than the model's 512 positions")])
def test_bad_records_are_refused(qas, match):
    untouched(lambda lm, tok: finetune(lm, tok, qas, quick()), ValueError, match)
    untouched(lambda lm, tok: unlearn(lm, tok, qas, RETAIN[:4], quick_unlearn()), ValueError, match)
    untouched(lambda lm, tok: unlearn(lm, tok, FORGET[:4], qas, quick_unlearn()), ValueError, match)


@pytest.mark.parametrize("how,match", [(dict(method="forget"), "method must be one of 'grad_ascent', 'grad_diff', 'wga'"), (dict(entropy_on="prompt"), "entropy_on must be one of 'answer', 'all', 'own', 'draws'"),
                                       (dict(beta=0), "beta must be > 0, got 0"), (dict(beta=float("nan")), "beta must be > 0, got nan"), (dict(lr=0), "lr must be > 0, got 0"), (dict(lr=-1.), "lr must be > 0, got -1.0"),
                                       (dict(batch_size=0), "batch_size must be a whole number >= 1"), (dict(accumulate=0), "accumulate must be a whole number >= 1"), (dict(epochs=0), "epochs must be > 0"), (dict(steps=0), "steps must be a whole number >= 1"),
                                       (dict(warmup=1.5), r"warmup must be a share in \[0, 1\], got 1.5")])
def test_a_bad_setting_is_named(how, match):
    with pytest.raises(ValueError, match=match): UnlearnConfig(**how)


def test_own_answers_that_do_not_fit_the_context_are_refused_before_the_first_update():
    lm = random_lm("llama", 1024, dtype=torch.float32, max_position_embeddings=60)
    tok = fresh()[1]
    before = lm_fingerprint(lm)
    with pytest.raises(ValueError, match="positions"): unlearn(lm, tok, FORGET[:4], RETAIN[:4], quick_unlearn(lambda_f=1., entropy_on="own", lr=1e-2))
    assert lm_fingerprint(lm) == before


def test_another_number_format_in_one_process():
    "bf16 runs on a CPU too, and float32 after it."
    for precision in ("no", "bf16", "no"):
        lm, tok = fresh("retain")
        assert np.isfinite(finetune(lm, tok, FORGET[:4], quick(steps=1, mixed_precision=precision)).rows[0]["loss"])
        assert next(lm.parameters()).dtype == torch.float32


def test_a_history_row_covers_the_whole_update():
    "With accumulated batches the recorded loss is the mean over the update, not that of its last batch."
    qas, rows = same_length(fresh()[1]), []
    for how in (dict(batch_size=8), dict(batch_size=1, accumulate=8)):
        lm, tok = fresh("retain")
        rows.append(unlearn(lm, tok, qas, RETAIN[:8], quick_unlearn(steps=1, method="grad_ascent", **how)).rows[0]["forget_nll"])
    assert rows[0] == pytest.approx(rows[1], rel=.01)


@pytest.mark.parametrize("look", [lambda lm, tok: own_answers(lm, tok, FORGET[:1]), lambda lm, tok: reference_nll(lm, tok, [encode(tok, FORGET[0])])], ids=["own_answers", "reference_nll"])
def test_a_look_leaves_the_model_in_its_mode(look):
    lm, tok = fresh("retain")
    for training in (False, True):
        look(lm.train(training), tok)
        assert lm.training == training


@pytest.mark.parametrize("how,match", [(dict(ramp=-.1), "ramp"), (dict(ramp=1.5), "ramp"), (dict(max_grad_norm=0), "max_grad_norm"), (dict(weight_decay=-1), "weight_decay"), (dict(schedule="zigzag"), "schedule"),
                                       (dict(mixed_precision="fp8000"), "mixed_precision"), (dict(batch_size=2.5), "batch_size"), (dict(steps=2.5), "steps"), (dict(lambda_f=float("nan")), "lambda_f"),
                                       (dict(probe_every=-1), "probe_every"), (dict(leak_at=2.), "leak_at")])
def test_more_bad_settings_are_named(how, match):
    with pytest.raises(ValueError, match=f"{match}"): UnlearnConfig(**how)


def test_a_tokenizer_without_padding_token_is_named():
    def call(lm, tok):
        tok.pad_token = None
        finetune(lm, tok, FORGET[:4], quick())
    untouched(call, ValueError, "padding|pad_token|pad token")


# --- the reference implementation's numbers --------------------------------

def by_hand(lm, tok, qas, width=256):
    "(token-mean CE, summed NLL of each answer, entropy at every position of the padded batch), written out in float64."
    batch, ce, total, entropies = [encode(tok, qa) for qa in qas], [], [], []
    for row in batch:
        ids, real = row["input_ids"], len(row["input_ids"])
        padded = torch.tensor([ids + [tok.pad_token_id] * (width - real)])
        with torch.no_grad(): logp = lm(input_ids=padded, attention_mask=(torch.arange(width) < real).long()[None]).logits[0].double().log_softmax(-1)
        nll = [-float(logp[t - 1, ids[t]]) for t in range(1, real) if row["labels"][t] != -100]
        ce, total = ce + nll, total + [sum(nll)]
        entropies.append(float(-(logp.exp() * logp).sum(-1).mean()))
    return np.mean(ce), np.array(total), np.mean(entropies)


@pytest.mark.parametrize("method", ["grad_ascent", "grad_diff", "npo"])
def test_the_loss_is_the_references_before_and_after_a_step(method):
    "λ_f = 1 and λ_r = -0.25 on the entropy of all positions, records padded to 256, β = 0.05: the formulas once more, on the same records and weights."
    lm, tok = fresh()
    start, forget, retain = copy.deepcopy(lm), FORGET[:4], RETAIN[:4]
    config = quick_unlearn(method=method, steps=2, lr=1e-4, beta=.05, lambda_f=1., lambda_r=-.25, entropy_on="all", pad_to=256, probe_every=1)
    rng = np.random.default_rng(config.seed)
    at, kept = record_order(4, 8, rng), rng.integers(4, size=8)                     # which records meet in which update
    models = [start]
    rows = unlearn(lm, tok, forget, retain, config, probe=lambda lm: models.append(copy.deepcopy(lm)) or {}).rows
    for update, model in enumerate(models[:2]):
        f, r = ([part[i] for i in which[4 * update:4 * update + 4]] for part, which in ((forget, at), (retain, kept)))
        (ce_f, nll, h_f), (ce_r, _, h_r) = by_hand(model, tok, f), by_hand(model, tok, r)
        npo = 2 / .05 * np.mean(np.log1p(np.exp(-.05 * (nll - by_hand(start, tok, f)[1]))))
        expected = dict(grad_ascent=-ce_f, grad_diff=ce_r - ce_f, npo=npo + ce_r)[method] + h_f - .25 * h_r
        assert rows[update]["loss"] == pytest.approx(expected, abs=1e-5)


# --- batches, memory, number formats --------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_packed_records_do_not_see_each_other(kind):
    "On each architecture, to float32: NLL and entropy of the answer tokens are those of the padded batch."
    lm, rows = random_lm(kind, 40, dtype=torch.float32), []
    for length in (7, 12, 5):
        ids = torch.randint(1, 39, (length,)).tolist()
        rows.append(dict(input_ids=ids, labels=[-100] * 2 + ids[2:]))
    with torch.no_grad(): padded, packed = (batch_stats(lm, rows, 0, pack=pack) for pack in (False, True))
    assert torch.equal(padded.answer, packed.answer) and padded.answer.sum() == 18
    for name in ("nll", "entropy"): assert torch.allclose(getattr(padded, name) * padded.answer, getattr(packed, name) * packed.answer, atol=1e-4)
    check_packing(lm, rows, 0)


def test_a_model_that_looks_across_packed_records_is_refused(monkeypatch):
    lm, tok = fresh()
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None)
    with pytest.raises(ValueError, match="LlamaForCausalLM looks across packed records .* use pack=False"): finetune(lm, tok, FORGET[:4], quick(pack=True))


@pytest.mark.parametrize("how", [dict(pack=True), dict(pad_to=256), dict(recompute=True)])
def test_packing_padding_and_recomputing_change_the_work_not_the_result(how):
    after = []
    for more in ({}, how):
        lm, tok = fresh("retain")
        finetune(lm, tok, FORGET[:4], quick(steps=2, **more))
        after.append(weights(lm))
        assert not lm.is_gradient_checkpointing and not lm.training
    assert (after[1] - after[0]).norm() < .02 * (after[0] - weights(fresh("retain")[0])).norm()


def test_recomputing_keeps_less():
    lm, tok = fresh()
    row = encode(tok, FORGET[0])
    plain = saved_bytes(lm.train(), row)
    lm.gradient_checkpointing_enable(dict(use_reentrant=False))
    assert saved_bytes(lm, row) < .5 * plain


def test_the_memory_estimate_counts_what_is_there():
    "Gradients and moments byte by byte after a step; activations grow with the tokens; adapters need fewer gradients."
    lm, tok = fresh()
    rows = [encode(tok, qa) for qa in FORGET[:4]]
    memory, longest = memory_needed(lm, rows, 4), max(rows, key=lambda r: len(r["input_ids"]))
    optimizer = torch.optim.AdamW(lm.parameters())
    answer_mean(*(lambda s: (s.nll, s.answer))(batch_stats(lm, rows, 0))).backward()
    optimizer.step()
    assert memory.weights == sum(p.nbytes for p in lm.parameters())
    assert memory.training == sum(p.grad.nbytes + sum(v.nbytes for v in optimizer.state[p].values() if v.dim()) for p in lm.parameters())
    kept = sum(saved_bytes(lm, r) for r in [longest] * 4)
    assert memory.activations == kept and memory_needed(add_lora(lm, rank=2), rows, 4).training < .05 * memory.training


def test_too_little_memory_and_sixteen_bit_weights_are_said_before_the_first_update(monkeypatch):
    lm, tok = fresh()
    monkeypatch.setattr("probunlearn.checkpoints._free", lambda device: 1e6)
    with pytest.warns(UserWarning, match=r"this may not fit: .* 1 MB free. Lower batch_size"): finetune(lm, tok, FORGET[:4], quick(steps=1))
    lm, tok = fresh()
    with pytest.warns(UserWarning, match="16-bit numbers: steps of 0.001 are mostly rounded away"): check_start(lm.bfloat16(), tok, [encode(tok, FORGET[0])], quick())


@pytest.mark.parametrize("adapters", [False, True])
def test_saved_after_bf16_training_it_is_the_model_that_was_trained(tmp_path, adapters):
    "The number format of training must not stay on: greedy answers and same-seed draws are those of the loaded folder."
    lm, tok = fresh()
    lm = add_lora(lm, rank=4) if adapters else lm
    unlearn(lm, tok, FORGET[:4], RETAIN[:8], quick_unlearn(steps=3, mixed_precision="bf16", lr=5e-3 if adapters else 5e-4))
    again, _ = load_lm(save_lm(lm, tok, tmp_path), device="cpu")
    ids = torch.tensor([encode_prompt(tok, FORGET[0].question)])
    with torch.no_grad(): assert torch.allclose(lm(input_ids=ids).logits, again(input_ids=ids).logits, atol=1e-4)
    for look in (lambda m: greedy(m, tok, FORGET[:4]), lambda m: sample(m, tok, FORGET[:2], 8, Decoding(max_new_tokens=24), 3, progress=False)):
        assert [d.texts for d in look(lm)] == [d.texts for d in look(again)]


# --- what a run says about itself --------------------------------

def test_early_stopping_and_the_diagnosis_name_the_retain_loss():
    lm, tok = fresh()
    with pytest.warns(UserWarning) as said: history = unlearn(lm, tok, FORGET[:8], RETAIN[:40], quick_unlearn(method="grad_ascent", steps=40, lr=3e-3, stop_retain=.5))
    assert 5 <= len(history.rows) < 40 and len(history.notes) == 2
    assert [str(w.message) for w in said][-2:] == history.notes
    assert history.notes[0].startswith(f"stopped after update {len(history.rows)}: the retain loss rose from 0.00") and history.notes[1].startswith("over-unlearned: the retain loss rose from")


def test_a_healthy_run_has_no_diagnosis():
    lm, tok = fresh()
    assert unlearn(lm, tok, FORGET[:8], RETAIN[:40], quick_unlearn(method="npo")).notes == []


def scripted(bounds, retain):
    "A probe that reads its numbers from a list, and remembers the weights it saw."
    seen = []
    def probe(lm):
        seen.append(weights(lm))
        return dict(leak_bound=bounds[len(seen) - 1], greedy_retain=retain[len(seen) - 1])
    return probe, seen


def test_the_best_weights_have_the_lowest_bound_above_the_floor_and_must_be_drawn_again():
    lm, tok = fresh()
    probe, seen = scripted([.9, .5, .1, .6], [1, .9, .7, 1])                                    # the lowest bound of all is under the floor
    history = unlearn(lm, tok, FORGET[:4], RETAIN[:8], quick_unlearn(steps=4, probe_every=1, keep="best"), probe=probe)
    assert history.best == 2 and torch.equal(weights(lm), seen[1]) and not torch.equal(seen[1], seen[3])
    assert history.notes == ["The weights are those of update 2, chosen by their leak bound among 4 looks: draw again with a fresh seed before claiming anything."]
    lm, tok = fresh()
    probe, seen = scripted([.9, .5], [.1, .2])
    with pytest.warns(UserWarning, match="no look had a greedy retain score of 0.8 or more"): history = unlearn(lm, tok, FORGET[:4], RETAIN[:8], quick_unlearn(steps=2, probe_every=1, keep="best"), probe=probe)
    assert history.best is None and torch.equal(weights(lm), seen[1])


def test_the_best_weights_survive_an_interruption(tmp_path):
    for folder, cut in (("whole", None), ("cut", 4)):
        for stop in (cut, None) if cut else (None,):
            lm, tok = fresh()
            done = len(read_notes(tmp_path/folder/"run.safetensors")["rows"]) if (tmp_path/folder).exists() else 0
            look, _ = scripted([.9, .1, .5, .5, .6, .4][done:], [1] * 6)
            def probe(model, calls=[done]):
                calls[0] += 1
                if calls[0] == stop: raise KeyboardInterrupt
                return look(model)
            try: unlearn(lm, tok, FORGET[:4], RETAIN[:8], quick_unlearn(steps=6, probe_every=1, keep="best", checkpoint=str(tmp_path/folder), checkpoint_every=1), probe=probe)
            except KeyboardInterrupt: assert stop
        if not cut: expected = weights(lm)
    assert torch.equal(weights(lm), expected)


def test_a_tracker_hears_every_update():
    heard = []
    class Ear(GeneralTracker):
        name, requires_logging_directory, main_process_only = "ear", False, True
        def __init__(self): super().__init__()
        @property
        def tracker(self): return heard
        def store_init_configuration(self, values): heard.append(values["lr"])
        def log(self, values, step=None, **kwargs): heard.append((step, values["nll"]))
    lm, tok = fresh("retain")
    history = finetune(lm, tok, FORGET[:4], quick(steps=3, tracker=Ear()))
    assert heard == [1e-3] + [(row["step"], row["nll"]) for row in history.rows]


# --- records and methods --------------------------------

def test_what_is_forgotten_and_kept_at_once_is_said():
    lm, tok = fresh()
    with pytest.warns(UserWarning, match=f"2 questions stand in both the forget and the retain set, .* for one"): unlearn(lm, tok, FORGET[:4], [*RETAIN[:4], *FORGET[:2]], quick_unlearn(steps=1))
    for forget, retain, name in (([], RETAIN, "forget"), (FORGET, [], "retain")):
        with pytest.raises(ValueError, match=f"no questions: the {name} set is empty"): unlearn(lm, tok, forget, retain)


def test_own_answers_are_made_only_where_they_count(monkeypatch):
    "With λ_f = 0 nobody asks for them, whatever λ_r is; while the ramp is at 0 neither."
    made = []
    monkeypatch.setattr("probunlearn.training.own_answers", lambda *args, **more: made.append(1) or own_answers(*args, **more))
    lm, tok = fresh()
    for how, expected in ((dict(lambda_r=-.1), 0), (dict(lambda_f=.1), 2), (dict(lambda_f=.1, ramp=1.), 1)):
        made.clear()
        rows = unlearn(lm, tok, FORGET[:4], RETAIN[:4], quick_unlearn(steps=2, lr=1e-6, **how)).rows
        assert len(made) == expected and "retain_entropy" in rows[0]


def test_drawn_answers_differ_from_update_to_update_and_from_any_evaluation():
    lm, tok = fresh("retain")
    one, two, again = (own_answers(lm, tok, FORGET[:4], drawn=seed)[0] for seed in (1, 2, 1))
    assert one == again != two
    seeds = []
    def spy(*args, drawn=None, **more):
        seeds.append(drawn)
        return own_answers(*args, drawn=drawn, **more)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("probunlearn.training.own_answers", spy)
        unlearn(lm, tok, FORGET[:4], RETAIN[:4], quick_unlearn(steps=3, lr=1e-6, lambda_f=.1, entropy_on="draws"))
    assert len(set(seeds)) == 3 and min(seeds) >= 2**32


def test_a_method_of_ones_own_is_one_entry(monkeypatch):
    "Dropping the answers' likelihood to that of a coin per token, say."
    monkeypatch.setitem(METHODS, "coin", Method(lambda b, c: ((b.forget.nll - np.log(2)).abs() * b.forget.answer).sum() / b.forget.answer.sum() + keep(b, c)))
    lm, tok = fresh()
    rows = unlearn(lm, tok, FORGET[:4], RETAIN[:40], quick_unlearn(method="coin", steps=12, lr=5e-4)).rows
    assert rows[-1]["forget_nll"] > rows[0]["forget_nll"] + .05


@pytest.mark.parametrize("adapters", [False, True])
def test_the_teacher_is_the_model_as_it_was(adapters):
    lm, tok = fresh()
    lm, ids = add_lora(lm, rank=4) if adapters else lm, torch.tensor([encode_prompt(tok, FORGET[0].question)])
    with torch.no_grad(): before = lm(input_ids=ids).logits
    teacher = model_as_it_was(lm, copied=True)
    unlearn(lm, tok, FORGET[:4], RETAIN[:8], quick_unlearn(steps=3, lr=5e-3, method="undial"))
    with torch.no_grad(), teacher() as was: assert torch.allclose(was(input_ids=ids).logits, before, atol=1e-5)
    with torch.no_grad(): assert not torch.allclose(lm(input_ids=ids).logits, before, atol=1e-1)


@pytest.mark.parametrize("adapters", [False, True])
def test_a_task_vector_goes_the_way_of_fine_tuning_backwards(adapters):
    "Weights: exactly mirrored. Adapters: their product is."
    moved = []
    for scale in (-1., 1.):                                                         # -1 is the fine-tuned model itself
        lm, tok = fresh("retain")
        lm = add_lora(lm, rank=4) if adapters else lm
        base = [p.detach().clone() for p in lm.parameters()] if not adapters else None
        task_vector(lm, tok, FORGET[:4], quick(steps=3), scale)
        if adapters: moved.append(torch.cat([(m.lora_B["default"].weight @ m.lora_A["default"].weight).detach().flatten() for m in lm.modules() if hasattr(m, "lora_A")]))
        else: moved.append(torch.cat([(p - b).detach().flatten() for p, b in zip(lm.parameters(), base)]))
    assert moved[0].norm() > 0 and torch.allclose(moved[0], -moved[1], atol=1e-6)


def test_best_weights_without_a_floor():
    "With a floor of 0 the updates that no probe saw still don't count."
    lm, tok = fresh()
    history = unlearn(lm, tok, FORGET[:4], RETAIN[:8], quick_unlearn(steps=4, probe_every=2, keep="best", utility_floor=0.), probe=leak_probe(tok, FORGET[:2], RETAIN[:2], n=8))
    assert sum("leak_bound" in row for row in history.rows) == 2


def test_a_layer_that_the_model_lacks():
    lm, tok = fresh()
    with pytest.raises(ValueError, match=r"layer must be at most \d+, the number of the model's layers, got 99"): unlearn(lm, tok, FORGET[:4], RETAIN[:8], UnlearnConfig(method="rmu", steps=1, layer=99))
