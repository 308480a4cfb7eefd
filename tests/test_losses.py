"""Losses against plain Python arithmetic on one small batch, closed forms, and numerical gradients."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from conftest import random_lm
from probunlearn.losses import TokenStats, answer_mean, answer_stats, answer_sum, entropy, grad_ascent, grad_diff, mean_entropy, npo, token_stats

# two sequences of three tokens over a vocabulary of four; position t is about token t + 1, so position 2 is about nothing
LOGITS = [[[.5, -1., 2., 0.], [1., 1., -3., .25], [0., 0., 0., 7.]], [[-2., .3, .3, 1.5], [4., -4., .1, 0.], [1., 2., 3., 4.]]]
LABELS = [[-100, 2, 1], [-100, -100, 3]]


def by_hand(line):
    "(log-probabilities, entropy) of four logits."
    total = math.log(sum(math.exp(z) for z in line))
    logp = [z - total for z in line]
    return logp, -sum(math.exp(l) * l for l in logp)


NLL = [-by_hand(LOGITS[0][0])[0][2], -by_hand(LOGITS[0][1])[0][1], -by_hand(LOGITS[1][1])[0][3]]     # of answer tokens 2 and 1, and of 3
H = [[by_hand(line)[1] for line in sequence] for sequence in LOGITS]
LONG, SHORT = NLL[0] + NLL[1], NLL[2]                                                               # NLL of the two answers


def batch(padding=0, dtype=torch.float64):
    logits = F.pad(torch.tensor(LOGITS, dtype=dtype), (0, 0, 0, padding), value=.7)
    return token_stats(logits, F.pad(torch.tensor(LABELS), (0, padding), value=-100))


def other():
    "A second batch, for retain: the same with the sequences' logits swapped."
    return token_stats(torch.tensor(LOGITS[::-1], dtype=torch.float64), torch.tensor(LABELS))


OTHER = [-by_hand(LOGITS[1][0])[0][2], -by_hand(LOGITS[1][1])[0][1], -by_hand(LOGITS[0][1])[0][3]]


def near(value, expected): assert float(torch.as_tensor(value).detach()) == pytest.approx(expected, rel=2e-6, abs=1e-6)


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


@pytest.mark.parametrize("beta", [.05, .1, 2.])
def test_npo_by_hand(beta):
    reference = (1.5, 3.)
    expected = sum(2 / beta * math.log(1 + math.exp(-beta * (nll - ref))) for nll, ref in zip((LONG, SHORT), reference)) / 2
    near(npo(batch(), torch.tensor(reference), beta), expected)


@pytest.mark.parametrize("beta,value", [(.05, 27.7259), (.1, 13.8629), (1., 1.38629)])
def test_npo_at_its_reference_is_two_log_two_over_beta(beta, value):
    stats = batch()
    assert float(npo(stats, answer_sum(stats.nll, stats.answer), beta)) == pytest.approx(value, abs=1e-4) == 2 * math.log(2) / beta


def test_npo_does_not_overflow():
    "Long answers differ from their reference by hundreds of nats."
    stats = TokenStats(torch.tensor([[900.], [0.]], requires_grad=True), torch.zeros(2, 1), torch.ones(2, 1, dtype=torch.bool))
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
    near(mean_entropy(batch(), "all"), (sum(H[0]) + sum(H[1])) / 6)             # every position of the batch, as a plain mean
    with pytest.raises(ValueError, match="'answer' or 'all', got 'own'"): mean_entropy(batch(), "own")


@pytest.mark.parametrize("loss", [lambda s: answer_mean(s.nll, s.answer), grad_ascent, lambda s: grad_diff(s, s, 3.), lambda s: npo(s, torch.tensor([1., 2.])), mean_entropy])
@pytest.mark.parametrize("padding", [1, 50])
def test_padding_changes_no_masked_loss(loss, padding):
    near(loss(batch(padding)), float(loss(batch())))


def test_padding_of_a_real_batch_changes_no_masked_loss():
    "Right padding with its mask, through a model."
    lm, ids = random_lm("llama", 16), torch.randint(16, (3, 9), generator=torch.manual_seed(0))
    labels = ids.where(torch.arange(9) > 4, -100)
    def stats(padding): return answer_stats(lm, dict(input_ids=F.pad(ids, (0, padding)), attention_mask=F.pad(torch.ones_like(ids), (0, padding)), labels=F.pad(labels, (0, padding), value=-100)))
    with torch.no_grad(): short, long = stats(0), stats(7)
    for loss in (lambda s: answer_mean(s.nll, s.answer), lambda s: npo(s, torch.ones(3)), mean_entropy): near(loss(long), float(loss(short)))
    with torch.no_grad(): peer = lm(input_ids=ids, labels=labels).loss           # transformers' own cross-entropy over answer tokens
    near(answer_mean(short.nll, short.answer), float(peer))


def test_first_token_of_a_sequence_is_never_scored():
    "Nothing predicts it: a label there counts for nothing."
    stats = token_stats(torch.zeros(1, 3, 4), torch.tensor([[1, 2, 3]]))
    assert stats.answer.tolist() == [[True, True, False]] and float(answer_sum(stats.nll, stats.answer)) == pytest.approx(2 * math.log(4))


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
    "The uncentred form lse - sum p z is wrong by .06 with logits around 1,000; the logits themselves are rounded to 6e-5 there."
    logits = torch.randn(200, 3000, generator=torch.manual_seed(0)) * 4 + shift
    assert float((entropy(logits).double() - entropy(logits.double())).abs().max()) < 5e-4


def test_numerical_gradients():
    logits = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.manual_seed(0)).requires_grad_()
    answer = torch.tensor(LABELS)[:, 1:] != -100
    assert gradcheck(entropy, logits)
    def stats(z):
        "`token_stats` in the logits' own precision: it rounds to float32, too coarse for differences."
        nll = F.cross_entropy(z[:, :2].flatten(0, 1), torch.tensor(LABELS)[:, 1:].flatten(), reduction="none", ignore_index=-100).view(2, 2)
        return TokenStats(nll, entropy(z[:, :2]), answer)
    for loss in (grad_ascent, lambda s: grad_diff(s, s, .5), lambda s: npo(s, torch.tensor([1., 2.], dtype=torch.float64)), mean_entropy, lambda s: mean_entropy(s, "all")):
        assert gradcheck(lambda z: loss(stats(z)), logits)


def test_gradients_of_token_stats_equal_the_formulas():
    "d nll/dz = p - e_y and dH/dz = -p (log p + H), at answer positions for the first."
    logits, labels = torch.tensor(LOGITS, requires_grad=True), torch.tensor(LABELS)
    p = logits.detach().softmax(-1)
    stats = token_stats(logits, labels)
    target = F.one_hot(labels[:, 1:].clamp(min=0), 4).float()
    expected = F.pad((p[:, :2] - target) * (labels[:, 1:] != -100)[..., None], (0, 0, 0, 1))
    assert torch.allclose(torch.autograd.grad(stats.nll.sum(), logits, retain_graph=True)[0], expected, atol=1e-6)
    assert torch.allclose(torch.autograd.grad(stats.entropy.sum(), logits)[0], -p * (p.log() + entropy(p.log())[..., None]), atol=1e-6)


def test_float64_models_are_scored_in_float64():
    "Double precision in, double precision out."
    assert batch().nll.dtype == batch().entropy.dtype == torch.float64
    near_exact = answer_sum(batch().nll, batch().answer)
    assert [float(v) for v in near_exact] == pytest.approx([LONG, SHORT], rel=1e-13)
