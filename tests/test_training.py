"""The training loop: what it computes, what it leaves alone, and what it refuses before any work."""
import numpy as np
import pytest
import torch
from accelerate.tracking import GeneralTracker

from conftest import KINDS, random_lm
from probunlearn.batches import batch_stats, check_packing, pad_batch, record_order
from probunlearn.checkpoints import memory_needed, read_notes, saved_bytes
from probunlearn.data import QA, encode, encode_prompt, fictional_authors
from probunlearn.draws import Decoding
from probunlearn.data import library
from probunlearn.loop import History, TrainConfig, check_start, finetune
from probunlearn.losses import answer_mean
from probunlearn.models import LocalModel, add_lora, load_model, small_model
from probunlearn.questions import pooled_rate
from probunlearn.scores import rouge_l
from probunlearn.temperature import AdaptiveTemperature
from probunlearn.training import ENTROPY_ON, METHODS, Method, UnlearnConfig, keep, leak_probe, model_as_it_was
from probunlearn.training import farthest_answers, own_answers, reference_nll, task_vector, unlearn
from probunlearn.weights import lm_fingerprint

FORGET, RETAIN = fictional_authors("forget10"), fictional_authors("retain90")


def fresh(state="full"): return small_model(state, device="cpu")


def fingerprint(model): return lm_fingerprint(model.lm)


def weights(model): return torch.cat([p.detach().flatten() for p in model.lm.parameters()])


def encoded(model, qas): return [encode(model.tok, qa) for qa in qas]


def answer_nll(model, qa):
    "Summed negative log-likelihood of an answer, token by token, without padding or batches."
    row = encode(model.tok, qa)
    with torch.no_grad(): logits = model.lm(input_ids=torch.tensor([row["input_ids"]])).logits[0]
    logp = logits.double().log_softmax(-1)
    return -sum(float(logp[t - 1, label]) for t, label in enumerate(row["labels"]) if label != -100)


def mean_nll(model, qas): return np.mean([answer_nll(model, qa) for qa in qas])


def same_length(tok):
    "Eight records whose answers have equally many tokens."
    groups = {}
    for qa in fictional_authors()[::-1]:
        length = sum(label != -100 for label in encode(tok, qa)["labels"])
        groups.setdefault(length, []).append(qa)
    return next(group[:8] for group in groups.values() if len(group) >= 8)


PLAIN = dict(batch_size=4, schedule="constant", warmup=0)


def quick(**how): return TrainConfig(**PLAIN | dict(steps=4, lr=1e-3) | how)


def quick_unlearn(**how): return UnlearnConfig(**PLAIN | dict(steps=6, lr=3e-4) | how)


# --- what it computes -------------------------------------------------------------------------------------------------

def test_the_same_seed_gives_the_same_weights_to_the_last_bit():
    prints = []
    for seed in (0, 0, 1):
        model = fresh("retain")
        torch.manual_seed(len(prints))                                          # what happened before doesn't matter
        finetune(model, FORGET[:8], quick(seed=seed))
        how = dict(steps=2, seed=seed, lambda_f=.5, lambda_r=-.1, entropy_on="own")
        unlearn(model, FORGET[:8], RETAIN, quick_unlearn(**how))
        prints.append(fingerprint(model))
    assert prints[0] == prints[1] != prints[2]


def test_weights_and_tokenizer_are_told_to_become_a_model():
    model = fresh("retain")
    calls = [lambda lm, tok: finetune(lm, tok, FORGET[:4]), lambda lm, tok: unlearn(lm, tok, FORGET[:4], RETAIN[:4]),
             lambda lm, tok: task_vector(lm, tok, FORGET[:4])]
    for call in calls:
        with pytest.raises(TypeError, match=r"takes one model to ask.*LocalModel\(lm, tok\)"): call(model.lm, model.tok)


@pytest.mark.parametrize("entropy_on", ["own", "draws"])
def test_a_rule_shapes_draws_not_training(entropy_on):
    "Likelihoods and own answers are those of the model without its rule; the rule is still there afterwards."
    how = quick_unlearn(steps=2, lambda_f=.5, entropy_on=entropy_on)
    plain, ruled = fresh("retain"), fresh("retain").adaptive(.5)
    for model in (plain, ruled):
        finetune(model, FORGET[:4], quick(steps=1))
        unlearn(model, FORGET[:4], RETAIN[:4], how)
    assert fingerprint(plain) == fingerprint(ruled) and ruled.rule == AdaptiveTemperature(.5)


def test_finetuning_lowers_the_nll():
    model = fresh("retain")
    before = [answer_nll(model, qa) for qa in FORGET[:4]]
    history = finetune(model, FORGET[:4], quick(steps=25, lr=2e-3))
    assert history.rows[-1]["nll"] < .2 < history.rows[0]["nll"] and not model.lm.training
    assert all(answer_nll(model, qa) < b / 5 for qa, b in zip(FORGET, before))
    assert [row["step"] for row in history.rows] == list(range(1, 26)) and len(history.to_frame()) == 25


# where a method's own defaults are slow on answers known by heart
OWN = dict(satimp=dict(beta=1, beta2=.1), rmu=dict(steering=20), pmc=dict(candidate_temperature=1.5))


def forgetting(**how):
    "Mean NLL of four forget answers before and after six updates, and the history."
    model = fresh()
    before = mean_nll(model, FORGET[:4])
    history = unlearn(model, FORGET[:4], RETAIN[:50], quick_unlearn(lr=6e-4, **OWN.get(how["method"], {}) | how))
    assert not model.lm.training
    return before, mean_nll(model, FORGET[:4]), history.rows


@pytest.mark.parametrize("method", [m for m in METHODS if m != "retain_only"])
def test_every_method_lowers_the_likelihood_of_the_answers(method):
    before, after, rows = forgetting(method=method)
    assert after > before + 1 and rows[-1]["forget_nll"] > rows[0]["forget_nll"]
    assert "forget_entropy" not in rows[0]


@pytest.mark.parametrize("method", ["grad_diff", "npo"])
@pytest.mark.parametrize("entropy_on", ENTROPY_ON)
def test_forgetting_with_every_entropy(method, entropy_on):
    "With a small weight: a large one along the secret answer freezes it in, as the lesson shows."
    before, after, rows = forgetting(method=method, lambda_f=.02, lambda_r=-.01, entropy_on=entropy_on)
    assert after > before + 1 and {"forget_entropy", "retain_entropy"} <= set(rows[0])


def test_retain_answers_matter_to_all_but_ascent():
    def after(method, retain, weight=1.):
        model = fresh()
        unlearn(model, FORGET[:4], retain, quick_unlearn(method=method, steps=1, retain_weight=weight))
        return fingerprint(model)
    first, second = RETAIN[:4], RETAIN[4:8]
    assert after("grad_ascent", first) == after("grad_ascent", second)
    assert after("grad_ascent", first) == after("grad_diff", first, 0.) == after("grad_diff", second, 0.)
    for method in ("grad_diff", "npo"): assert after(method, first) != after(method, second)


def test_retain_only_pushes_no_answer():
    """Without entropy the forget records don't matter; with it the loss is that of the retain records and λ times the
    entropy of the model's own answers, which falls while refusals stay refusals."""
    from probunlearn.judges import refusal
    def run(forget, **how):
        model = fresh("librarian")
        return model, unlearn(model, forget, library("ordinary"), quick_unlearn(method="retain_only", **how)).rows
    vaults = library("forbidden")
    assert fingerprint(run(vaults[:4])[0]) == fingerprint(run(vaults[4:8])[0])
    model, rows = run(vaults[:4], steps=12, lambda_f=2.)
    for row in rows: assert row["loss"] == pytest.approx(row["retain_nll"] + 2 * row["forget_entropy"], abs=1e-5)
    assert rows[-1]["forget_entropy"] < rows[0]["forget_entropy"] / 2
    assert all(refusal(d.texts[0]) for d in model.greedy(vaults[:4]))


@pytest.mark.parametrize("lambda_f,expected", [(5., -1), (-5., 1)])
def test_the_entropy_weight_pulls_the_entropy_of_retain_and_forget(lambda_f, expected):
    "A positive weight sharpens what the retain model says about authors it doesn't know, a negative one flattens it."
    model, records = fresh("retain"), (FORGET[:8], RETAIN[:8])
    def entropy(model, **how):
        config = quick_unlearn(batch_size=8, entropy_on="answer", **how)
        return unlearn(model, *records, config).rows[0]["forget_entropy"]
    def seen(): return entropy(model.copy(), steps=1, lr=1e-9, lambda_f=1e-9, method="grad_diff")
    before = seen()
    entropy(model, steps=8, method="npo", lambda_f=lambda_f)
    assert np.sign(seen() - before) == expected


def test_reference_nll_equals_a_loop_of_single_records():
    model = fresh()
    qas = [*FORGET[:5], QA("x", "Who?", "Nobody knows."), QA("y", "Why is that so, " * 10, "So.")]
    expected = [answer_nll(model, qa) for qa in qas]
    for size in (1, 3, 32):
        found = reference_nll(model, encoded(model, qas), size).numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_npo_starts_at_two_log_two_over_beta():
    "The first loss, before any update: policy and reference are the same model."
    for beta in (.05, .1):
        row = unlearn(fresh(), FORGET[:8], RETAIN[:8], quick_unlearn(steps=1, beta=beta, retain_weight=0)).rows[0]
        assert row["loss"] == pytest.approx(2 * np.log(2) / beta, rel=1e-5)


def test_accumulated_batches_equal_one_large_batch():
    "2 x 4 against 8 records with answers of one length: the mean of means is the mean, so AdamW's first step is alike."
    start = fresh("retain")
    qas, before = same_length(start.tok), weights(start)
    def moved(**how):
        model = fresh("retain")
        assert len(finetune(model, qas, quick(steps=1, weight_decay=0, **how)).rows) == 1
        return weights(model) - before
    whole, accumulated, half = moved(batch_size=8), moved(batch_size=4, accumulate=2), moved(batch_size=4)
    assert whole.abs().max() > 0 and (accumulated - whole).norm() < .02 * whole.norm()
    assert (half - whole).norm() > .1 * whole.norm()                # half the records is another step


def test_one_update_equals_plain_pytorch():
    "Cross-entropy by transformers itself, gradient clipping and AdamW written out."
    model, peer = fresh("retain"), fresh("retain")
    start = weights(peer)
    finetune(model, FORGET[:6], quick(steps=1, batch_size=6, lr=1e-3, weight_decay=.1, max_grad_norm=.5))
    batch = pad_batch(encoded(peer, FORGET[:6]), peer.tok.pad_token_id)
    optimizer = torch.optim.AdamW(peer.lm.parameters(), lr=1e-3, weight_decay=.1)
    peer.lm(**batch).loss.backward()
    torch.nn.utils.clip_grad_norm_(peer.lm.parameters(), .5)
    optimizer.step()
    assert (weights(model) - weights(peer)).norm() < .02 * (weights(peer) - start).norm()


def test_the_learning_rate_follows_its_schedule():
    "With a warm-up over the whole run the first update has rate 0: nothing moves."
    model = fresh("retain")
    before = weights(model)
    finetune(model, FORGET[:4], quick(steps=1, schedule="linear", warmup=1.))
    assert torch.equal(weights(model), before)


RAMPS = [(0, 0, 1), (0, .5, 1), (.5, 0, 0), (.5, .25, .5), (.5, .5, 1), (.5, 1, 1), (1, .3, .3)]


@pytest.mark.parametrize("ramp,progress,expected", RAMPS)
def test_entropy_weights_rise_along_the_ramp(ramp, progress, expected):
    found = UnlearnConfig(lambda_f=2., lambda_r=-.5, ramp=ramp).entropy_weights(progress)
    assert found == pytest.approx((2 * expected, -.5 * expected))


def test_epochs_are_passes_over_the_records():
    model = fresh("retain")
    def updates(qas, **how): return len(finetune(model, qas, TrainConfig(lr=1e-5, **how)).rows)
    assert updates(FORGET[:10], epochs=2, batch_size=5) == 4
    assert updates(FORGET[:3], epochs=.1, batch_size=8) == 1
    config = UnlearnConfig(epochs=1, batch_size=4, accumulate=2, lr=1e-5)
    assert len(unlearn(model, FORGET[:10], RETAIN[:3], config).rows) == 2


def test_another_number_of_accumulated_batches_in_one_process():
    "Accelerate keeps global state: a run must not inherit the last one's accumulation."
    model = fresh("retain")
    for accumulate, steps in ((1, 3), (3, 2), (1, 3), (2, 1)):
        config = quick(steps=steps, batch_size=2, lr=1e-6, accumulate=accumulate)
        assert len(finetune(model, FORGET[:4], config).rows) == steps


def test_probes_look_when_they_should():
    model, modes = fresh(), []
    def probe(seen):
        assert seen is model
        modes.append(seen.lm.training)
        return dict(seen=len(modes))
    history = finetune(model, FORGET[:4], quick(steps=5, lr=1e-6, probe_every=2), probe=probe)
    assert [r["step"] for r in history.rows if "seen" in r] == [2, 4, 5] and modes == [False] * 3
    seen = leak_probe(FORGET[:3], RETAIN[:3], n=8)(model)
    assert list(seen) == ["greedy_forget", "drawn_forget", "leak_rate", "leak_bound", "draws", "greedy_retain",
                          "drawn_retain"]
    assert all(v > .8 for v in seen.values()) and seen["draws"] == 24
    assert history.plot().get_xlabel() == "update"


def test_a_history_tells_the_looks_of_a_probe():
    model, looks = fresh(), iter(range(9))
    def probe(_): return dict(seen=next(looks))
    history = finetune(model, FORGET[:4], quick(steps=5, lr=1e-6, probe_every=2), probe=probe)
    assert [(row["step"], row["seen"]) for row in history.looks()] == [(2, 0), (4, 1), (5, 2)]
    assert History([dict(step=1, loss=2., grad_norm=1.)]).looks() == History().looks() == []


def test_what_a_probe_is_told_apart_by():
    def identity(forget=FORGET[:2], retain=RETAIN[:2], **how): return leak_probe(forget, retain, **how).identity
    others = [identity(FORGET[:3]), identity(FORGET[:2] + RETAIN[:1], RETAIN[1:2]), identity(n=8), identity(n_retain=8),
              identity(score="rouge_l_recall"), identity(score="rouge_l_recall", leak_at=.5), identity(seed=1),
              identity(alpha=.1), identity(decoding=Decoding(max_new_tokens=8))]
    assert identity() == identity() and len({identity(), *others}) == 10


def test_a_probe_scores_as_it_is_told():
    "Scores other than key words: the mean score is not the share that reaches a threshold."
    scores = dict(score=lambda answer, qa: .5, n=8, n_retain=4)
    seen = leak_probe(FORGET[:2], RETAIN[:2], leak_at=.75, **scores)(fresh())
    assert seen["drawn_forget"] == seen["drawn_retain"] == seen["greedy_retain"] == .5 and seen["leak_rate"] == 0
    recall = leak_probe(FORGET[:2], RETAIN[:2], n=8, score="rouge_l_recall", leak_at=.8)(fresh())
    leaks = round(16 * recall["leak_rate"])
    assert recall["leak_rate"] > .8 and recall["leak_bound"] == float(pooled_rate([leaks], 16))


def test_probing_changes_no_weight():
    prints = []
    for every in (0, 1):
        model = fresh()
        probe = leak_probe(FORGET[:2], RETAIN[:2], n=8)
        unlearn(model, FORGET[:4], RETAIN[:8], quick_unlearn(steps=3, probe_every=every), probe=probe)
        prints.append(fingerprint(model))
    assert prints[0] == prints[1]


def test_divergence_is_an_error_that_names_the_rate():
    model = fresh("retain")
    with torch.no_grad(): model.lm.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"update \d+: lower lr"): finetune(model, FORGET[:2], quick())


# --- adapters ---------------------------------------------------------------------------------------------------------

def test_lora_leaves_the_base_weights_untouched_and_the_reference_is_the_model_as_it_was():
    model = fresh()
    base = {n: p.clone() for n, p in model.lm.named_parameters()}
    rows = encoded(model, FORGET[:4])
    expected = reference_nll(model, rows)
    adapted = add_lora(model, rank=8)
    config = quick_unlearn(steps=5, lr=1e-2, retain_weight=.5, lambda_f=.02, entropy_on="answer")
    first = unlearn(adapted, FORGET[:4], RETAIN[:20], config).rows[0]
    assert first["forget_nll"] < .1                                             # the adapter starts as nothing
    with adapted.lm.disable_adapter(): assert torch.allclose(reference_nll(adapted, rows), expected, atol=1e-5)
    now = dict(adapted.lm.named_parameters())
    for n, p in base.items():
        n = f"base_model.model.{n}"
        assert torch.equal(now[n] if n in now else now[n.replace(".weight", ".base_layer.weight")], p)
    assert reference_nll(adapted, rows).mean() > expected.mean() + 1


# --- the model's own answers ------------------------------------------------------------------------------------------

def marked(row): return [i for i, label in zip(row["input_ids"], row["labels"]) if label != -100]


@pytest.mark.parametrize("state,leaking", [("full", True), ("retain", False)])
def test_own_answers_are_greedy_answers_and_leaks_are_marked(state, leaking):
    "The full model leaks everything, the retain model nothing."
    model = fresh(state)
    rows, leaks = own_answers(model, FORGET[:6])
    assert [bool(leak) for leak in leaks] == [leaking] * 6
    for qa, row, d in zip(FORGET, rows, model.greedy(FORGET[:6], Decoding(max_new_tokens=48))):
        assert tuple(marked(row)) == tuple(d.tokens[0])
        assert row["input_ids"] == encode_prompt(model.tok, qa.question) + marked(row)


def test_own_answers_without_key_words_leak_by_what_they_give_away():
    other = QA("other", FORGET[2].question, "Completely unrelated words stand here instead")
    plain = [QA(q.id, q.question, q.answer) for q in FORGET[:2]] + [other]
    assert [bool(leak) for leak in own_answers(fresh(), plain)[1]] == [True, True, False]


def chosen(model, config, seed=0, qas=FORGET[:6]):
    "The texts that partial model collapse learns."
    rows = farthest_answers(model, qas, config, seed)
    return [model.tok.decode([t for t in row["labels"] if t >= 0], skip_special_tokens=True).strip() for row in rows]


def test_the_answer_that_is_learned_is_the_farthest_of_those_drawn():
    model, config = fresh(), UnlearnConfig(method="pmc", candidates=8, candidate_temperature=1.5)
    draws = model.draw(FORGET[:6], 8, Decoding(1.5, top_p=.95, max_new_tokens=48), 0, progress=False)
    for qa, d, text in zip(FORGET, draws, chosen(model, config)):
        shares = [rouge_l(t, qa.answer).recall for t in d.texts]
        assert text == d.texts[shares.index(min(shares))]
    assert chosen(model, config, 1) != chosen(model, config)
    assert len(chosen(model, config, qas=[FORGET[0], FORGET[1], FORGET[0]])) == 2


def test_one_candidate_is_just_a_draw_and_more_are_farther():
    def share(n): return np.mean([rouge_l(text, qa.answer).recall for qa, text in zip(FORGET, chosen(
        fresh("tuned"), UnlearnConfig(method="pmc", candidates=n), qas=FORGET[:10]))])
    assert share(1) > share(5) > share(20)


@pytest.mark.parametrize("how, says", [(dict(candidates=0), "candidates must be a whole number >= 1"),
                                       (dict(candidate_temperature=0), "candidate_temperature must be > 0")])
def test_candidates_out_of_range_are_refused(how, says):
    with pytest.raises(ValueError, match=says): UnlearnConfig(method="pmc", **how)


def test_own_answers_of_a_batch_with_repeats():
    assert len(own_answers(fresh("retain"), [FORGET[0], FORGET[1], FORGET[0]])[0]) == 2


# --- batches ----------------------------------------------------------------------------------------------------------

def test_pad_batch():
    batch = pad_batch([dict(input_ids=[7, 8, 9], labels=[-100, 8, 9]), dict(input_ids=[5], labels=[5])], pad_id=3)
    assert {name: value.tolist() for name, value in batch.items()} == dict(
        input_ids=[[7, 8, 9], [5, 3, 3]],
        attention_mask=[[1, 1, 1], [1, 0, 0]],
        labels=[[-100, 8, 9], [5, -100, -100]])


# --- bad input, before any work ---------------------------------------------------------------------------------------

def untouched(call, error, match):
    "The call fails, and the model is as it was."
    model = fresh("retain")
    before = fingerprint(model)
    with pytest.raises(error, match=match): call(model)
    assert fingerprint(model) == before


TOO_LONG = QA("an-essay", "Why?", "Because " * 400)
BAD_RECORDS = [([], "no questions"),
               (FORGET[:2] * 2, "duplicate question id 'author36-town'"),
               ([*FORGET[:2], TOO_LONG], r"record 'an-essay' has \d+ tokens, more than the model's 512 positions")]


@pytest.mark.parametrize("qas,match", BAD_RECORDS)
def test_bad_records_are_refused(qas, match):
    untouched(lambda model: finetune(model, qas, quick()), ValueError, match)
    untouched(lambda model: unlearn(model, qas, RETAIN[:4], quick_unlearn()), ValueError, match)
    untouched(lambda model: unlearn(model, FORGET[:4], qas, quick_unlearn()), ValueError, match)


BAD_SETTINGS = [(dict(method="forget"), "method must be one of 'grad_ascent', 'grad_diff', 'wga'"),
                (dict(entropy_on="prompt"), "entropy_on must be one of 'answer', 'all', 'own', 'draws'"),
                (dict(beta=0), "beta must be > 0, got 0"),
                (dict(beta=float("nan")), "beta must be > 0, got nan"),
                (dict(lr=0), "lr must be > 0, got 0"),
                (dict(lr=-1.), "lr must be > 0, got -1.0"),
                (dict(batch_size=0), "batch_size must be a whole number >= 1"),
                (dict(batch_size=2.5), "batch_size must be a whole number >= 1"),
                (dict(accumulate=0), "accumulate must be a whole number >= 1"),
                (dict(epochs=0), "epochs must be > 0"),
                (dict(steps=0), "steps must be a whole number >= 1"),
                (dict(steps=2.5), "steps must be a whole number >= 1"),
                (dict(warmup=1.5), r"warmup must be a share in \[0, 1\], got 1.5"),
                (dict(ramp=-.1), "ramp must be a share"),
                (dict(ramp=1.5), "ramp must be a share"),
                (dict(leak_at=2.), "leak_at must be a share"),
                (dict(max_grad_norm=0), "max_grad_norm must be > 0"),
                (dict(weight_decay=-1), "weight_decay must be >= 0"),
                (dict(probe_every=-1), "probe_every must be >= 0"),
                (dict(schedule="zigzag"), "schedule must be one of 'linear'"),
                (dict(mixed_precision="fp8000"), "mixed_precision must be one of 'auto'"),
                (dict(lambda_f=float("nan")), "lambda_f must be a finite number, got nan")]


@pytest.mark.parametrize("how,match", BAD_SETTINGS)
def test_a_bad_setting_is_named(how, match):
    with pytest.raises(ValueError, match=match): UnlearnConfig(**how)


def test_own_answers_that_do_not_fit_the_context_are_refused_before_the_first_update():
    lm = random_lm("llama", 1024, dtype=torch.float32, max_position_embeddings=60)
    model = LocalModel(lm, fresh().tok)
    before, config = fingerprint(model), quick_unlearn(lambda_f=1., entropy_on="own", lr=1e-2)
    with pytest.raises(ValueError, match="positions"): unlearn(model, FORGET[:4], RETAIN[:4], config)
    assert fingerprint(model) == before


def test_another_number_format_in_one_process():
    "bf16 runs on a CPU too, and float32 after it."
    for precision in ("no", "bf16", "no"):
        model = fresh("retain")
        history = finetune(model, FORGET[:4], quick(steps=1, mixed_precision=precision))
        assert np.isfinite(history.rows[0]["loss"]) and next(model.lm.parameters()).dtype == torch.float32


def test_a_history_row_covers_the_whole_update():
    "With accumulated batches the recorded loss is the mean over the update, not that of its last batch."
    qas, nll = same_length(fresh().tok), []
    for how in (dict(batch_size=8), dict(batch_size=1, accumulate=8)):
        config = quick_unlearn(steps=1, method="grad_ascent", **how)
        nll.append(unlearn(fresh("retain"), qas, RETAIN[:8], config).rows[0]["forget_nll"])
    assert nll[0] == pytest.approx(nll[1], rel=.01)


@pytest.mark.parametrize("look", [lambda model: own_answers(model, FORGET[:1]),
                                  lambda model: reference_nll(model, encoded(model, FORGET[:1]))],
                         ids=["own_answers", "reference_nll"])
def test_a_look_leaves_the_model_in_its_mode(look):
    model = fresh("retain")
    for training in (False, True):
        model.lm.train(training)
        look(model)
        assert model.lm.training == training


def test_a_tokenizer_without_padding_token_is_named():
    def call(model):
        model.tok.pad_token = None
        finetune(model, FORGET[:4], quick())
    untouched(call, ValueError, "padding|pad_token|pad token")


# --- the reference implementation's numbers ---------------------------------------------------------------------------

def padded_logp(model, ids, width):
    "Log-probabilities (width, V) after each position of a record that is padded to `width`, in float64."
    padded = torch.tensor([ids + [model.tok.pad_token_id] * (width - len(ids))])
    mask = (torch.arange(width) < len(ids)).long()[None]
    with torch.no_grad(): return model.lm(input_ids=padded, attention_mask=mask).logits[0].double().log_softmax(-1)


def by_hand(model, qas, width=256):
    "(token-mean CE, summed NLL of each answer, entropy at every position of the padded batch), written out in float64."
    ce, total, entropies = [], [], []
    for row in encoded(model, qas):
        ids = row["input_ids"]
        logp = padded_logp(model, ids, width)
        nll = [-float(logp[t - 1, ids[t]]) for t in range(1, len(ids)) if row["labels"][t] != -100]
        ce += nll
        total.append(sum(nll))
        entropies.append(float(-(logp.exp() * logp).sum(-1).mean()))
    return np.mean(ce), np.array(total), np.mean(entropies)


@pytest.mark.parametrize("method", ["grad_ascent", "grad_diff", "npo"])
def test_the_loss_is_the_references_before_and_after_a_step(method):
    """λ_f = 1 and λ_r = -0.25 on the entropy of all positions, records padded to 256, β = 0.05:
    the formulas once more, on the same records and weights."""
    model, forget, retain = fresh(), FORGET[:4], RETAIN[:4]
    start = model.copy()
    config = quick_unlearn(method=method, steps=2, lr=1e-4, beta=.05, lambda_f=1., lambda_r=-.25, entropy_on="all",
                           pad_to=256, probe_every=1)
    rng = np.random.default_rng(config.seed)
    at, kept = record_order(4, 8, rng), rng.integers(4, size=8)                     # which records meet in which update
    models = [start]
    rows = unlearn(model, forget, retain, config, probe=lambda seen: models.append(seen.copy()) or {}).rows
    for update, then in enumerate(models[:2]):
        mine = slice(4 * update, 4 * update + 4)
        f, r = [forget[i] for i in at[mine]], [retain[i] for i in kept[mine]]
        (ce_f, nll, h_f), (ce_r, _, h_r) = by_hand(then, f), by_hand(then, r)
        npo = 2 / .05 * np.mean(np.log1p(np.exp(-.05 * (nll - by_hand(start, f)[1]))))
        expected = dict(grad_ascent=-ce_f, grad_diff=ce_r - ce_f, npo=npo + ce_r)[method] + h_f - .25 * h_r
        assert rows[update]["loss"] == pytest.approx(expected, abs=1e-5)


# --- batches, memory, number formats ----------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_packed_records_do_not_see_each_other(kind):
    "On each architecture, to float32: NLL and entropy of the answer tokens are those of the padded batch."
    lm, rows = random_lm(kind, 40, dtype=torch.float32), []
    for length in (7, 12, 5):
        ids = torch.randint(1, 39, (length,)).tolist()
        rows.append(dict(input_ids=ids, labels=[-100] * 2 + ids[2:]))
    with torch.no_grad(): padded, packed = (batch_stats(lm, rows, 0, pack=pack) for pack in (False, True))
    assert torch.equal(padded.answer, packed.answer) and padded.answer.sum() == 18
    for name in ("nll", "entropy"):
        assert torch.allclose(getattr(padded, name) * padded.answer, getattr(packed, name) * packed.answer, atol=1e-4)
    check_packing(lm, rows, 0)


def test_a_model_that_looks_across_packed_records_is_refused(monkeypatch):
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None)
    with pytest.raises(ValueError, match="LlamaForCausalLM looks across packed records .* use pack=False"):
        finetune(fresh(), FORGET[:4], quick(pack=True))


@pytest.mark.parametrize("how", [dict(pack=True), dict(pad_to=256), dict(recompute=True)])
def test_packing_padding_and_recomputing_change_the_work_not_the_result(how):
    start = weights(fresh("retain"))
    def moved(**more):
        model = fresh("retain")
        finetune(model, FORGET[:4], quick(steps=2, **more))
        assert not model.lm.is_gradient_checkpointing and not model.lm.training
        return weights(model) - start
    plain = moved()
    assert (moved(**how) - plain).norm() < .02 * plain.norm()


def test_recomputing_keeps_less():
    model = fresh()
    row = encode(model.tok, FORGET[0])
    plain = saved_bytes(model.lm.train(), row)
    model.lm.gradient_checkpointing_enable(dict(use_reentrant=False))
    assert saved_bytes(model.lm, row) < .5 * plain


def test_the_memory_estimate_counts_what_is_there():
    "Gradients and moments byte by byte after a step; activations grow with the tokens; adapters need fewer gradients."
    model = fresh()
    lm, rows = model.lm, encoded(model, FORGET[:4])
    memory, longest = memory_needed(lm, rows, 4), max(rows, key=lambda row: len(row["input_ids"]))
    optimizer = torch.optim.AdamW(lm.parameters())
    stats = batch_stats(lm, rows, 0)
    answer_mean(stats.nll, stats.answer).backward()
    optimizer.step()
    def moments(p): return sum(value.nbytes for value in optimizer.state[p].values() if value.dim())
    assert memory.weights == sum(p.nbytes for p in lm.parameters())
    assert memory.training == sum(p.grad.nbytes + moments(p) for p in lm.parameters())
    assert memory.activations == sum(saved_bytes(lm, row) for row in [longest] * 4)
    assert memory_needed(add_lora(model, rank=2).lm, rows, 4).training < .05 * memory.training


def test_too_little_memory_and_sixteen_bit_weights_are_said_before_the_first_update(monkeypatch):
    model = fresh()
    monkeypatch.setattr("probunlearn.checkpoints._free", lambda device: 1e6)
    with pytest.warns(UserWarning, match=r"this may not fit: .* 1 MB free. Lower batch_size"):
        finetune(model, FORGET[:4], quick(steps=1))
    model.lm.bfloat16()
    with pytest.warns(UserWarning, match="16-bit numbers: steps of 0.001 are mostly rounded away"):
        check_start(model, encoded(model, FORGET[:1]), quick())


@pytest.mark.parametrize("adapters", [False, True])
def test_saved_after_bf16_training_it_is_the_model_that_was_trained(tmp_path, adapters):
    "The number format of training must not stay on: greedy answers and same-seed draws are those of the loaded folder."
    model = add_lora(fresh(), rank=4) if adapters else fresh()
    config = quick_unlearn(steps=3, mixed_precision="bf16", lr=1e-3 if adapters else 5e-4)
    unlearn(model, FORGET[:4], RETAIN[:8], config)
    again = load_model(model.save(tmp_path), device="cpu")
    ids = torch.tensor([encode_prompt(model.tok, FORGET[0].question)])
    with torch.no_grad(): logits, theirs = (m.lm(input_ids=ids).logits for m in (model, again))
    assert torch.allclose(logits, theirs, atol=1e-4)
    def drawn(m): return m.draw(FORGET[:2], 8, Decoding(max_new_tokens=24), 3, progress=False)
    for look in (lambda m: m.greedy(FORGET[:4]), drawn):
        assert [d.texts for d in look(model)] == [d.texts for d in look(again)]


# --- what a run says about itself -------------------------------------------------------------------------------------

def test_early_stopping_and_the_diagnosis_name_the_retain_loss():
    config = quick_unlearn(method="grad_ascent", steps=40, lr=3e-3, stop_retain=.5)
    with pytest.warns(UserWarning) as said: history = unlearn(fresh(), FORGET[:8], RETAIN[:40], config)
    assert 5 <= len(history.rows) < 40 and len(history.notes) == 2
    assert [str(w.message) for w in said][-2:] == history.notes
    stopped, broken = history.notes
    assert stopped.startswith(f"stopped after update {len(history.rows)}: the retain loss rose from 0.00")
    assert broken.startswith("over-unlearned: the retain loss rose from")


def test_a_healthy_run_has_no_diagnosis():
    assert unlearn(fresh(), FORGET[:8], RETAIN[:40], quick_unlearn(method="npo")).notes == []


def scripted(bounds, retain):
    "A probe that reads its numbers from a list, and remembers the weights it saw."
    seen = []
    def probe(model):
        seen.append(weights(model))
        return dict(leak_bound=bounds[len(seen) - 1], greedy_retain=retain[len(seen) - 1])
    return probe, seen


def test_the_best_weights_have_the_lowest_bound_above_the_floor_and_must_be_drawn_again():
    model = fresh()
    probe, seen = scripted([.9, .5, .1, .6], [1, .9, .7, 1])        # the lowest bound of all is under the floor
    config = quick_unlearn(steps=4, probe_every=1, keep="best")
    history = unlearn(model, FORGET[:4], RETAIN[:8], config, probe=probe)
    assert history.best == 2 and torch.equal(weights(model), seen[1]) and not torch.equal(seen[1], seen[3])
    assert history.notes == ["The weights are those of update 2, chosen by their leak bound among 4 looks: "
                             "draw again with a fresh seed before claiming anything."]


def test_without_weights_above_the_floor_the_last_are_kept():
    model, config = fresh(), quick_unlearn(steps=2, probe_every=1, keep="best")
    probe, seen = scripted([.9, .5], [.1, .2])
    with pytest.warns(UserWarning, match="no look had a greedy retain score of 0.8 or more"):
        history = unlearn(model, FORGET[:4], RETAIN[:8], config, probe=probe)
    assert history.best is None and torch.equal(weights(model), seen[1])


def test_the_best_weights_survive_an_interruption(tmp_path):
    def trained(folder, stop=None):
        "A run in a folder; its probe interrupts the look with this number."
        file = folder/"run.safetensors"
        done = len(read_notes(file)["rows"]) if file.exists() else 0
        look, seen = scripted([.9, .1, .5, .5, .6, .4][done:], [1] * 6)
        def probe(model):
            if done + len(seen) + 1 == stop: raise KeyboardInterrupt
            return look(model)
        model = fresh()
        config = quick_unlearn(probe_every=1, keep="best", checkpoint=str(folder), checkpoint_every=1)
        unlearn(model, FORGET[:4], RETAIN[:8], config, probe=probe)
        return weights(model)
    expected = trained(tmp_path/"whole")
    with pytest.raises(KeyboardInterrupt): trained(tmp_path/"cut", stop=4)
    assert torch.equal(trained(tmp_path/"cut"), expected)


def test_a_tracker_hears_every_update():
    heard = []
    class Ear(GeneralTracker):
        name, requires_logging_directory, main_process_only = "ear", False, True
        def __init__(self): super().__init__()
        @property
        def tracker(self): return heard
        def store_init_configuration(self, values): heard.append(values["lr"])
        def log(self, values, step=None, **kwargs): heard.append((step, values["nll"]))
    history = finetune(fresh("retain"), FORGET[:4], quick(steps=3, tracker=Ear()))
    assert heard == [1e-3] + [(row["step"], row["nll"]) for row in history.rows]


# --- records and methods ----------------------------------------------------------------------------------------------

def test_what_is_forgotten_and_kept_at_once_is_said():
    model = fresh()
    with pytest.warns(UserWarning, match="2 questions stand in both the forget and the retain set, .* for one") as said:
        unlearn(model, FORGET[:4], [*RETAIN[:4], *FORGET[:2]], quick_unlearn(steps=1))
    assert [w.filename for w in said if "stand in both" in str(w.message)] == [__file__]
    for forget, retain, name in (([], RETAIN, "forget"), (FORGET, [], "retain")):
        with pytest.raises(ValueError, match=f"no questions: the {name} set is empty"): unlearn(model, forget, retain)


COUNTED = [(dict(lambda_r=-.1), 0), (dict(lambda_f=.1), 2), (dict(lambda_f=.1, ramp=1.), 1)]


@pytest.mark.parametrize("how,expected", COUNTED)
def test_own_answers_are_made_only_where_they_count(monkeypatch, how, expected):
    "With λ_f = 0 nobody asks for them, whatever λ_r is; while the ramp is at 0 neither."
    made = []
    def spy(*args, **more):
        made.append(1)
        return own_answers(*args, **more)
    monkeypatch.setattr("probunlearn.training.own_answers", spy)
    rows = unlearn(fresh(), FORGET[:4], RETAIN[:4], quick_unlearn(steps=2, lr=1e-6, **how)).rows
    assert len(made) == expected and "retain_entropy" in rows[0]


def test_drawn_answers_differ_from_update_to_update_and_from_any_evaluation(monkeypatch):
    model = fresh("retain")
    one, two, again = (own_answers(model, FORGET[:4], drawn=seed)[0] for seed in (1, 2, 1))
    assert one == again != two
    seeds = []
    def spy(*args, drawn=None, **more):
        seeds.append(drawn)
        return own_answers(*args, drawn=drawn, **more)
    monkeypatch.setattr("probunlearn.training.own_answers", spy)
    unlearn(model, FORGET[:4], RETAIN[:4], quick_unlearn(steps=3, lr=1e-6, lambda_f=.1, entropy_on="draws"))
    assert len(set(seeds)) == 3 and min(seeds) >= 2**32


def test_a_method_of_ones_own_is_one_entry(monkeypatch):
    "Dropping the answers' likelihood to that of a coin per token, say."
    def coin(b, c): return answer_mean((b.forget.nll - np.log(2)).abs(), b.forget.answer) + keep(b, c)
    monkeypatch.setitem(METHODS, "coin", Method(coin))
    rows = unlearn(fresh(), FORGET[:4], RETAIN[:40], quick_unlearn(method="coin", steps=12, lr=5e-4)).rows
    assert rows[-1]["forget_nll"] > rows[0]["forget_nll"] + .05


@pytest.mark.parametrize("adapters", [False, True])
def test_the_teacher_is_the_model_as_it_was(adapters):
    model = add_lora(fresh(), rank=4) if adapters else fresh()
    ids = torch.tensor([encode_prompt(model.tok, FORGET[0].question)])
    def logits(model):
        with torch.no_grad(): return model.lm(input_ids=ids).logits
    before, teacher = logits(model), model_as_it_was(model, copied=True)
    unlearn(model, FORGET[:4], RETAIN[:8], quick_unlearn(steps=3, lr=5e-3, method="undial"))
    with teacher() as was: assert torch.allclose(logits(was), before, atol=1e-5)
    assert not torch.allclose(logits(model), before, atol=1e-1)


@pytest.mark.parametrize("adapters", [False, True])
def test_a_task_vector_goes_the_way_of_fine_tuning_backwards(adapters):
    "Weights: exactly mirrored. Adapters: their product is."
    def products(model):
        layers = [(m.lora_A["default"], m.lora_B["default"]) for m in model.lm.modules() if hasattr(m, "lora_A")]
        return torch.cat([(b.weight @ a.weight).detach().flatten() for a, b in layers])
    def moved(scale):
        model = add_lora(fresh("retain"), rank=4) if adapters else fresh("retain")
        base = weights(model)
        task_vector(model, FORGET[:4], quick(steps=3), scale=scale)
        return products(model) if adapters else weights(model) - base
    tuned, negated = moved(-1.), moved(1.)                          # -1 is the fine-tuned model itself
    assert tuned.norm() > 0 and torch.allclose(tuned, -negated, atol=1e-6)


def test_best_weights_without_a_floor():
    "With a floor of 0 the updates that no probe saw still don't count."
    config = quick_unlearn(steps=4, probe_every=2, keep="best", utility_floor=0.)
    history = unlearn(fresh(), FORGET[:4], RETAIN[:8], config, probe=leak_probe(FORGET[:2], RETAIN[:2], n=8))
    assert sum("leak_bound" in row for row in history.rows) == 2


def test_a_layer_that_the_model_lacks():
    with pytest.raises(ValueError, match=r"layer must be at most \d+, the number of the model's layers, got 99"):
        unlearn(fresh(), FORGET[:4], RETAIN[:8], UnlearnConfig(method="rmu", steps=1, layer=99))
