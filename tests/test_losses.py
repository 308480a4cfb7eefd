"""Losses against plain Python arithmetic on one small batch, closed forms, and numerical gradients."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from conftest import LetterTok, random_lm
from probunlearn.head import TokenStats, answer_stats, entropy, token_stats
from probunlearn.losses import (answer_mean, answer_sum, ce_u, control_vector, dpo, grad_ascent, grad_diff, idk,
                                kl_retain, mean_entropy, npo, pmc, rmu, satimp, simnpo, undial, wga)
from probunlearn.models import LocalModel, add_lora

# two sequences of three tokens over four words; position t is about token t + 1, so position 2 is about nothing
LOGITS = [[[.5, -1., 2., 0.], [1., 1., -3., .25], [0., 0., 0., 7.]],
          [[-2., .3, .3, 1.5], [4., -4., .1, 0.], [1., 2., 3., 4.]]]
LABELS = [[-100, 2, 1], [-100, -100, 3]]


def by_hand(line):
    "(log-probabilities, entropy) of four logits."
    total = math.log(sum(math.exp(z) for z in line))
    logp = [z - total for z in line]
    return logp, -sum(math.exp(l) * l for l in logp)


# of the answer tokens 2 and 1, and of 3
NLL = [-by_hand(LOGITS[0][0])[0][2], -by_hand(LOGITS[0][1])[0][1], -by_hand(LOGITS[1][1])[0][3]]
H = [[by_hand(line)[1] for line in sequence] for sequence in LOGITS]
LONG, SHORT = NLL[0] + NLL[1], NLL[2]       # NLL of the two answers


def batch(padding=0, dtype=torch.float64):
    logits = F.pad(torch.tensor(LOGITS, dtype=dtype), (0, 0, 0, padding), value=.7)
    return token_stats(logits, F.pad(torch.tensor(LABELS), (0, padding), value=-100))


def other():
    "A second batch, for retain: the same with the sequences' logits swapped."
    return token_stats(torch.tensor(LOGITS[::-1], dtype=torch.float64), torch.tensor(LABELS))


OTHER = [-by_hand(LOGITS[1][0])[0][2], -by_hand(LOGITS[1][1])[0][1], -by_hand(LOGITS[0][1])[0][3]]


def near(value, expected): assert float(torch.as_tensor(value).detach()) == pytest.approx(expected, rel=2e-6, abs=1e-6)


def mean(values): return sum(values) / len(values)


def softplus(beta, rise):
    "-(2/β) log σ(β · rise)."
    return 2 / beta * math.log(1 + math.exp(-beta * rise))


def test_token_stats_by_hand():
    stats = batch()
    assert stats.answer.tolist() == [[True, True, False], [False, True, False]]
    for value, expected in zip(stats.nll.flatten(), (NLL[0], NLL[1], 0, 0, NLL[2], 0)): near(value, expected)
    for value, expected in zip(stats.entropy.flatten(), H[0] + H[1]): near(value, expected)


def test_sums_and_means_by_hand():
    stats = batch()
    near(answer_mean(stats.nll, stats.answer), sum(NLL) / 3)                    # over tokens, not over sequences
    for value, expected in zip(answer_sum(stats.nll, stats.answer), (LONG, SHORT)): near(value, expected)
    near(answer_mean(stats.nll, torch.zeros_like(stats.answer)), 0)             # no answer at all is 0, not NaN


def test_gradient_ascent_and_difference_by_hand():
    near(grad_ascent(batch()), -sum(NLL) / 3)
    near(grad_diff(batch(), other()), -sum(NLL) / 3 + sum(OTHER) / 3)
    near(grad_diff(batch(), other(), 2.5), -sum(NLL) / 3 + 2.5 * sum(OTHER) / 3)


def test_partial_model_collapse_by_hand():
    "Cross-entropy of what was chosen, mean over tokens; it pulls towards each chosen token by 1 - p."
    near(pmc(batch()), sum(NLL) / 3)
    logits = torch.tensor(LOGITS, dtype=torch.float64, requires_grad=True)
    slope = torch.autograd.grad(pmc(token_stats(logits, torch.tensor(LABELS))), logits)[0]
    near(slope[0, 0, 2], -(1 - math.exp(-NLL[0])) / 3)
    near(slope[1, 1, 3], -(1 - math.exp(-NLL[2])) / 3)
    assert not slope[1, 0].any() and not slope[:, 2].any()


@pytest.mark.parametrize("beta", [.05, .1, 2.])
def test_npo_by_hand(beta):
    reference = (1.5, 3.)
    expected = mean([softplus(beta, nll - ref) for nll, ref in zip((LONG, SHORT), reference)])
    near(npo(batch(), torch.tensor(reference), beta), expected)


@pytest.mark.parametrize("beta,value", [(.05, 27.7259), (.1, 13.8629), (1., 1.38629)])
def test_npo_at_its_reference_is_two_log_two_over_beta(beta, value):
    stats = batch()
    at_reference = float(npo(stats, answer_sum(stats.nll, stats.answer), beta))
    assert at_reference == pytest.approx(value, abs=1e-4) == 2 * math.log(2) / beta


def test_npo_does_not_overflow():
    "Long answers differ from their reference by hundreds of nats."
    nll = torch.tensor([[900.], [0.]], requires_grad=True)
    stats = TokenStats(nll, torch.zeros(2, 1), torch.ones(2, 1, dtype=torch.bool))
    loss = npo(stats, torch.tensor([0., 900.]), .5)
    near(loss, 2 / .5 * 450 / 2)
    assert torch.autograd.grad(loss, stats.nll)[0].flatten().tolist() == pytest.approx([0, -1])


def test_npo_becomes_ascent_on_answer_sums_as_beta_falls():
    "Zhang et al. 2024, proposition 1: gradients agree in the limit."
    def slope(loss_of):
        logits = torch.tensor(LOGITS, dtype=torch.float64, requires_grad=True)
        stats = token_stats(logits, torch.tensor(LABELS))
        return torch.autograd.grad(loss_of(stats), logits)[0]
    ascent = slope(lambda s: -answer_sum(s.nll, s.answer).mean())
    assert torch.allclose(slope(lambda s: npo(s, torch.tensor([1., 5.]), 1e-5)), ascent, atol=1e-4)


def test_mean_entropy_by_hand():
    near(mean_entropy(batch()), (H[0][0] + H[0][1] + H[1][1]) / 3)
    near(mean_entropy(batch(), "all"), (sum(H[0]) + sum(H[1])) / 6)     # every position of the batch, as a plain mean
    with pytest.raises(ValueError, match="one of 'answer', 'all', got 'own'"): mean_entropy(batch(), "own")


@pytest.mark.parametrize("loss", [lambda s: answer_mean(s.nll, s.answer), grad_ascent, lambda s: grad_diff(s, s, 3.),
                                  lambda s: npo(s, torch.tensor([1., 2.])), mean_entropy])
@pytest.mark.parametrize("padding", [1, 50])
def test_padding_changes_no_masked_loss(loss, padding):
    near(loss(batch(padding)), float(loss(batch())))


def test_padding_of_a_real_batch_changes_no_masked_loss():
    "Right padding with its mask, through a model."
    lm, ids = random_lm("llama", 16), torch.randint(16, (3, 9), generator=torch.manual_seed(0))
    labels = ids.where(torch.arange(9) > 4, -100)
    def stats(padding):
        def padded(values, fill=0): return F.pad(values, (0, padding), value=fill)
        inputs = dict(input_ids=padded(ids), attention_mask=padded(torch.ones_like(ids)))
        return answer_stats(lm, inputs | dict(labels=padded(labels, -100)))
    with torch.no_grad(): short, long = stats(0), stats(7)
    for loss in (lambda s: answer_mean(s.nll, s.answer), lambda s: npo(s, torch.ones(3)), mean_entropy):
        near(loss(long), float(loss(short)))
    with torch.no_grad(): peer = lm(input_ids=ids, labels=labels).loss      # transformers' own, over answer tokens
    near(answer_mean(short.nll, short.answer), float(peer))


def test_first_token_of_a_sequence_is_never_scored():
    "Nothing predicts it: a label there counts for nothing."
    stats = token_stats(torch.zeros(1, 3, 4), torch.tensor([[1, 2, 3]]))
    assert stats.answer.tolist() == [[True, True, False]]
    assert float(answer_sum(stats.nll, stats.answer)) == pytest.approx(2 * math.log(4))


@pytest.mark.parametrize("vocab", [2, 7, 51_200])
def test_entropy_of_uniform_logits_is_log_v(vocab):
    for shift in (0., 30., -1000.): near(entropy(torch.full((2, 3, vocab), shift)).mean(), math.log(vocab))


def test_entropy_by_hand_and_of_certainty():
    for line in LOGITS[0] + LOGITS[1]: near(entropy(torch.tensor(line, dtype=torch.float64)), by_hand(line)[1])
    near(entropy(torch.tensor([1e4, 0., -1e4])), 0)


def test_impossible_tokens_add_no_entropy_and_no_gradient():
    logits = torch.tensor([[1., -torch.inf, 0., -torch.inf], [2., 2., -torch.inf, -torch.inf]], requires_grad=True)
    h = entropy(logits)
    near(h[1], math.log(2))
    near(h[0], by_hand([1., 0.])[1])
    gradient = torch.autograd.grad(h.sum(), logits)[0]
    assert gradient.isfinite().all() and (gradient[logits.isinf()] == 0).all()
    stats = token_stats(torch.stack([logits, logits]), torch.tensor([[-100, 0], [-100, 2]]))
    assert all(v.isfinite().all() for v in torch.autograd.grad(stats.nll.sum() + mean_entropy(stats), logits))


@pytest.mark.parametrize("shift", [0., 1000.])
def test_float32_entropy_keeps_its_digits(shift):
    "With logits around 1,000 the uncentred form lse - sum p z is wrong by .06; the logits are rounded to 6e-5 there."
    logits = torch.randn(200, 3000, generator=torch.manual_seed(0)) * 4 + shift
    assert float((entropy(logits).double() - entropy(logits.double())).abs().max()) < 5e-4


def test_numerical_gradients():
    logits = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.manual_seed(0)).requires_grad_()
    answer = torch.tensor(LABELS)[:, 1:] != -100
    assert gradcheck(entropy, logits)
    def stats(z):
        "`token_stats` in the logits' own precision: it rounds to float32, too coarse for differences."
        targets = torch.tensor(LABELS)[:, 1:].flatten()
        nll = F.cross_entropy(z[:, :2].flatten(0, 1), targets, reduction="none", ignore_index=-100).view(2, 2)
        return TokenStats(nll, entropy(z[:, :2]), answer)
    reference = torch.tensor([1., 2.], dtype=torch.float64)
    for loss in (grad_ascent, lambda s: grad_diff(s, s, .5), lambda s: npo(s, reference), mean_entropy,
                 lambda s: mean_entropy(s, "all")):
        assert gradcheck(lambda z: loss(stats(z)), logits)


def test_gradients_of_token_stats_equal_the_formulas():
    "d nll/dz = p - e_y and dH/dz = -p (log p + H), at answer positions for the first."
    logits, labels = torch.tensor(LOGITS, requires_grad=True), torch.tensor(LABELS)
    p = logits.detach().softmax(-1)
    stats = token_stats(logits, labels)
    target = F.one_hot(labels[:, 1:].clamp(min=0), 4).float()
    expected = F.pad((p[:, :2] - target) * (labels[:, 1:] != -100)[..., None], (0, 0, 0, 1))
    assert torch.allclose(torch.autograd.grad(stats.nll.sum(), logits, retain_graph=True)[0], expected, atol=1e-6)
    slope = -p * (p.log() + entropy(p.log())[..., None])
    assert torch.allclose(torch.autograd.grad(stats.entropy.sum(), logits)[0], slope, atol=1e-6)


def test_float64_models_are_scored_in_float64():
    "Double precision in, double precision out."
    assert batch().nll.dtype == batch().entropy.dtype == torch.float64
    near_exact = answer_sum(batch().nll, batch().answer)
    assert [float(v) for v in near_exact] == pytest.approx([LONG, SHORT], rel=1e-13)


# the other methods: by hand on the same batch, and against open formulas on random rows

P = [math.exp(-nll) for nll in NLL]
ROWS = [LOGITS[0][0], LOGITS[0][1], LOGITS[1][1]]       # the logits before the three answer tokens 2, 1, 3
TARGETS = [2, 1, 3]
TEACHER = [[0., 3., 1., -1.], [.5, .5, 2., 0.], [-1., 0., 1., 2.]]


def softmax(line): return [math.exp(l) for l in by_hand(line)[0]]


def soft_ce(q, line): return -sum(a * b for a, b in zip(q, by_hand(line)[0]))


def test_rows_belong_to_the_answer_tokens_in_reading_order():
    stats = batch()
    assert stats.target.tolist() == TARGETS and stats.logits.tolist() == ROWS and stats.positions == "all"
    assert torch.allclose(F.cross_entropy(stats.logits, stats.target, reduction="none"), stats.nll[stats.answer])


@pytest.mark.parametrize("beta,delta", [(4.5, 0.), (1., .7), (2.5, 2.)])
def test_simnpo_by_hand(beta, delta):
    expected = mean([softplus(beta, per_token - delta) for per_token in (LONG / 2, SHORT)])
    near(simnpo(batch(), beta, delta), expected)


@pytest.mark.parametrize("beta", [.1, 2.])
def test_dpo_by_hand_and_at_its_reference(beta):
    refusal, forget = [OTHER[0] + OTHER[1], OTHER[2]], [LONG, SHORT]
    references = [1., 2.5], [2., .5]
    z = [(f - rf) - (r - rr) for f, rf, r, rr in zip(forget, references[1], refusal, references[0])]
    near(dpo(other(), batch(), *map(torch.tensor, references), beta=beta), mean([softplus(beta, v) for v in z]))
    at_reference = [torch.tensor(values, dtype=torch.float64) for values in (refusal, forget)]
    near(dpo(other(), batch(), *at_reference, beta=beta), 2 * math.log(2) / beta)


def test_dpo_with_a_refusal_that_stays_where_it_was_is_npo():
    refusal, reference = answer_sum(other().nll, other().answer), torch.tensor([1., 4.])
    near(dpo(other(), batch(), refusal, reference, beta=.5), float(npo(batch(), reference, .5)))


def test_idk_is_cross_entropy(): near(idk(other()), mean(OTHER))


def test_reweighted_ascent_by_hand():
    near(wga(batch(), 1.), -mean([p * nll for p, nll in zip(P, NLL)]))
    near(wga(batch(), .5), -mean([p**.5 * nll for p, nll in zip(P, NLL)]))
    near(wga(batch(), 0.), float(grad_ascent(batch())))
    near(satimp(batch()), -mean([p**5 * (1 - p) * nll for p, nll in zip(P, NLL)]))
    near(satimp(batch(), 2., .5), -mean([p**2 * (1 - p)**.5 * nll for p, nll in zip(P, NLL)]))
    near(satimp(batch(), 1., 0.), float(wga(batch(), 1.)))


@pytest.mark.parametrize("loss,weight", [(lambda s: wga(s, 2.), lambda p: p**2),
                                         (lambda s: satimp(s, 2., 1.), lambda p: p**2 * (1 - p))])
def test_weights_are_held_fixed(loss, weight):
    "The gradient is the weight itself, not the derivative of weight times NLL."
    nll = torch.tensor([[.1, 2., 0.]], requires_grad=True)
    stats = TokenStats(nll, nll.detach(), torch.tensor([[True, True, False]]))
    slope = torch.autograd.grad(loss(stats), nll)[0]
    assert slope[0].tolist() == pytest.approx([-weight(math.exp(-.1)) / 2, -weight(math.exp(-2)) / 2, 0], rel=1e-5)


def test_certain_tokens_are_spared_without_nan():
    "A memorised token has an NLL of exactly 0 in float32."
    nll = torch.tensor([[0., 120.]], requires_grad=True)
    stats = TokenStats(nll, nll.detach(), torch.ones(1, 2, dtype=torch.bool))
    for loss in (wga, satimp, simnpo, lambda s: satimp(s, 1., .5)):
        assert torch.autograd.grad(loss(stats), nll)[0].isfinite().all()


def test_kl_by_hand():
    def kl(teacher, row):
        return sum(t * (lt - ls) for t, lt, ls in zip(softmax(teacher), by_hand(teacher)[0], by_hand(row)[0]))
    near(kl_retain(batch(), torch.tensor(TEACHER)), mean([kl(*lines) for lines in zip(TEACHER, ROWS)]))
    near(kl_retain(batch(), batch().logits - 3), 0)


@pytest.mark.parametrize("beta", [0., 2., 10.])
def test_undial_by_hand(beta):
    targets = [softmax([z - beta * (j == y) for j, z in enumerate(teacher)]) for teacher, y in zip(TEACHER, TARGETS)]
    near(undial(batch(), torch.tensor(TEACHER), beta), mean([soft_ce(q, row) for q, row in zip(targets, ROWS)]))


def test_ce_u_by_hand():
    def target(row, y): return [p / (1 - softmax(row)[y]) * (j != y) for j, p in enumerate(softmax(row))]
    near(ce_u(batch()), mean([soft_ce(target(row, y), row) for row, y in zip(ROWS, TARGETS)]))


def test_rmu_by_hand():
    hidden = torch.tensor([[1., 2.], [0., 0.], [-1., 3.]])
    near(rmu(batch()._replace(hidden=hidden), torch.tensor([1., 1.])), ((0 + 1) + (1 + 1) + (4 + 4)) / 6)
    near(rmu(batch()._replace(hidden=hidden), hidden - 2), 4)
    vector = control_vector(64, coefficient=6.5, seed=3)
    near(vector.norm(), 6.5)
    assert (vector >= 0).all()
    assert torch.equal(vector, control_vector(64, 6.5, 3)) and not torch.equal(vector, control_vector(64, 6.5, 4))


def random_rows(n=40, vocab=300, seed=0, scale=5., dtype=torch.float64):
    "One sequence of answer tokens with random logits, and a teacher's."
    rng = torch.Generator().manual_seed(seed)
    logits, teacher = (scale * torch.randn(1, n + 1, vocab, dtype=torch.float64, generator=rng) for _ in range(2))
    labels = torch.randint(vocab, (1, n + 1), generator=rng)
    labels[:, 0] = -100
    return logits.to(dtype), labels, teacher[0, :n].to(dtype)


def test_distributions_against_open_formulas():
    "torch's own cross-entropy with soft targets and its KL are the oracles, here on peaked float64 rows."
    logits, labels, teacher = random_rows()
    stats, z, y = token_stats(logits, labels), logits[0, :-1], labels[0, 1:]
    hot = F.one_hot(y, 300)
    kl = F.kl_div(z.log_softmax(-1), teacher.log_softmax(-1), reduction="batchmean", log_target=True)
    near(kl_retain(stats, teacher), float(kl))
    near(undial(stats, teacher, 7.), float(F.cross_entropy(z, (teacher - 7 * hot).softmax(-1))))
    near(ce_u(stats), float(F.cross_entropy(z, z.masked_fill(hot.bool(), -torch.inf).softmax(-1))))


def test_impossible_tokens_leave_distribution_losses_finite():
    "A padded vocabulary: the same words have a logit of -∞ in student and teacher."
    logits, labels, teacher = random_rows(vocab=20, dtype=torch.float32)
    logits[..., 15:], teacher[..., 15:], labels[labels >= 15] = -torch.inf, -torch.inf, 3
    logits.requires_grad_()
    for loss in (lambda s: kl_retain(s, teacher), lambda s: undial(s, teacher), ce_u):
        value = loss(token_stats(logits, labels))
        assert value.isfinite() and torch.autograd.grad(value, logits)[0].isfinite().all()


def test_a_broken_student_stays_visible():
    "NaN is not swallowed by the handling of impossible tokens."
    logits, labels, teacher = random_rows(vocab=20)
    logits[0, 3, 5] = torch.nan
    for loss in (lambda s: kl_retain(s, teacher), lambda s: undial(s, teacher), ce_u):
        assert loss(token_stats(logits, labels)).isnan()


def test_targets_are_held_fixed():
    "The gradient of a cross-entropy to a fixed q is p - q."
    logits, labels, teacher = random_rows(vocab=20)
    logits, y = logits.requires_grad_(), labels[0, 1:]
    hot, p = F.one_hot(y, 20), logits.detach()[0, :-1].softmax(-1)
    others = p * (1 - hot)
    for loss, q in [(lambda s: kl_retain(s, teacher), teacher.softmax(-1)),
                    (lambda s: undial(s, teacher, 3.), (teacher - 3 * hot).softmax(-1)),
                    (ce_u, others / others.sum(-1, keepdim=True))]:
        slope = torch.autograd.grad(loss(token_stats(logits, labels)), logits)[0][0, :-1]
        assert torch.allclose(slope, (p - q) / 40, atol=1e-12)


def test_a_memorised_token_is_pushed_by_ce_u_in_float32():
    "Its probability rounds to 1; the rest of the distribution still says where to go."
    logits = torch.tensor([[[30., 0., 1., 2.], [0.] * 4]], requires_grad=True)
    slope = torch.autograd.grad(ce_u(token_stats(logits, torch.tensor([[-100, 0]]))), logits)[0][0, 0]
    assert slope[0] == pytest.approx(1)
    assert slope[1:].tolist() == pytest.approx([-v for v in softmax([0., 1., 2.])], rel=1e-5)


@pytest.mark.parametrize("loss,match", [(lambda s: kl_retain(s, torch.zeros(3, 4)), "logits=True"),
                                        (lambda s: undial(s, torch.zeros(3, 4)), "logits=True"),
                                        (ce_u, "logits=True"), (lambda s: rmu(s, torch.zeros(2)), "layer=")])
def test_losses_say_what_they_need(loss, match):
    with pytest.raises(ValueError, match=match): loss(batch()._replace(logits=None))


def test_an_empty_batch_of_answers_is_worth_nothing():
    none = token_stats(torch.zeros(1, 3, 4), torch.full((1, 3), -100))
    for loss in (wga, satimp, idk, ce_u, lambda s: kl_retain(s, torch.zeros(0, 4)),
                 lambda s: undial(s, torch.zeros(0, 4))):
        near(loss(none), 0)


def test_entropy_along_the_answer_is_not_taken_for_that_everywhere():
    with pytest.raises(ValueError, match="positions='all'"): mean_entropy(batch()._replace(positions="answer"), "all")


def test_one_step_of_the_reference_by_its_formulas():
    """NPO with entropy as the reference trainer computes it: everything padded to 256, CE as the model returns it,
    the entropy a plain mean over all positions.

    Formulas: retain CE + NPO on summed shifted NLL + λ_f · mean entropy + λ_r · mean entropy, β = .05, λ = 1 and -.25.
    """
    lm, rng = random_lm("phi", 50, dtype=torch.float32), torch.Generator().manual_seed(1)
    reference = random_lm("phi", 50, seed=1, dtype=torch.float32)
    for p, q in zip(reference.parameters(), lm.parameters()): p.data = q.data + .02 * p.data    # not quite the start
    lm.config.max_position_embeddings = 256
    def padded(count):
        ids, lengths = torch.randint(50, (count, 256), generator=rng), torch.randint(12, 60, (count, 1), generator=rng)
        used = torch.arange(256) < lengths
        labels = ids.where(used & (torch.arange(256) >= 8), -100)
        return dict(input_ids=ids * used, attention_mask=used.long(), labels=labels)
    forget, retain = padded(4), padded(4)
    def logits(model, b): return model(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits.float()
    def sums(model, b):
        shifted = logits(model, b)[:, :-1].transpose(1, 2)
        return F.cross_entropy(shifted, b["labels"][:, 1:], ignore_index=-100, reduction="none").sum(-1)
    def spread(z): return (-z.softmax(-1) * z.log_softmax(-1)).sum(-1).mean()
    def theirs():
        with torch.no_grad(): before = sums(reference, forget)
        ratio = sums(lm, forget) - before
        preference = -F.logsigmoid(.05 * ratio).mean() * 2 / .05
        return preference + lm(**retain).loss + spread(logits(lm, forget)) - .25 * spread(logits(lm, retain))
    def ours():
        with torch.no_grad(): at_start = answer_stats(reference, forget)
        f, r = answer_stats(lm, forget, "all"), answer_stats(lm, retain, "all")
        loss = npo(f, answer_sum(at_start.nll, at_start.answer), .05) + answer_mean(r.nll, r.answer)
        return loss + mean_entropy(f, "all") - .25 * mean_entropy(r, "all")
    def found(loss): return float(loss.detach()), torch.autograd.grad(loss, list(lm.parameters()))
    (expected, expected_slopes), (value, slopes) = found(theirs()), found(ours())
    assert value == pytest.approx(expected, rel=1e-5)
    for a, b in zip(slopes, expected_slopes): assert torch.allclose(a, b, atol=1e-5 * float(b.abs().max()) + 1e-7)


def test_a_model_without_its_adapters_is_its_own_teacher():
    "The same rows as from a frozen copy; the loss starts at 0 and grows with the adapters."
    lm, rng = random_lm("llama", 30), torch.Generator().manual_seed(0)
    ids = torch.randint(30, (3, 9), generator=rng)
    batch = dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids.where(torch.arange(9) > 3, -100))
    with torch.no_grad(): frozen = answer_stats(lm, batch, logits=True, layer=2)
    adapted = add_lora(LocalModel(lm, LetterTok(30)), rank=2).lm.eval()
    def teacher():
        with torch.no_grad(), adapted.disable_adapter(): return answer_stats(adapted, batch, logits=True, layer=2)
    near(kl_retain(answer_stats(adapted, batch, logits=True), teacher().logits), 0)
    for name, p in adapted.named_parameters():
        if "lora_B" in name: p.data = .3 * torch.randn(p.shape, dtype=p.dtype, generator=rng)
    assert torch.equal(teacher().logits, frozen.logits) and torch.equal(teacher().hidden, frozen.hidden)
    moved = answer_stats(adapted, batch, logits=True, layer=2)
    assert kl_retain(moved, teacher().logits) > .01 and rmu(moved, teacher().hidden) > 1e-4
