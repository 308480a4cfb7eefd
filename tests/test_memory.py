"""Memorisation and membership attacks against enumeration, other people's statistics and simulation."""
import itertools
import math

import numpy as np
import pytest
import torch
from conftest import random_lm
from scipy import stats
from test_metrics import allowed

from probunlearn.losses import answer_stats
from probunlearn.memory import auc, auc_bound, exact_memorisation, extraction_strength, min_k, min_k_plus
from probunlearn.memory import priv_leak, without_end, zlib_score
from probunlearn.tofu import mean_loss


def test_extraction_strength_is_its_definition_for_every_pattern():
    def fewest(correct): # the empty suffix is always right
        return next(k for k in range(len(correct) + 1) if all(correct[k:]))
    for length in range(1, 9):
        patterns = np.array(list(itertools.product([0, 1], repeat=length)))
        whole = np.ones_like(patterns)
        strength = extraction_strength(patterns, whole)
        exact = exact_memorisation(patterns, whole)
        assert strength == pytest.approx([1 - fewest(row) / length for row in patterns], abs=1e-12)
        assert exact == pytest.approx(patterns.mean(1))
        assert (strength[patterns[:, -1] == 0] == 0).all() and (strength <= exact).all()


def test_padding_and_prompts_change_nothing():
    rng = np.random.default_rng(0)
    for _ in range(50):
        length, before, after = rng.integers(1, 9), rng.integers(0, 4), rng.integers(0, 4)
        correct, logp = rng.random((1, length)) < .6, -rng.random((1, length))
        def pad(row, value): return np.pad(row, ((0, 0), (before, after)), constant_values=value)
        bare = np.ones((1, length))
        mask = pad(bare, 0)
        assert extraction_strength(pad(correct, rng.random() < .5), mask) == extraction_strength(correct, bare)
        lowest = np.sort(logp[0])[:max(1, int(.3 * length))]
        for found in min_k(pad(logp, -99), mask, k=.3), min_k(logp, bare, k=.3):
            assert found[0] == pytest.approx(lowest.mean())
        assert without_end(mask).sum() == length - 1 and not without_end(mask)[0, before + length - 1]


def test_the_arrays_come_from_a_model_in_one_line():
    lm = random_lm("llama", vocab=11)
    ids = torch.randint(0, 11, (3, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :4], labels[2, 4:] = -100, -100
    stats_ = answer_stats(lm, dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels))
    loss = mean_loss(stats_.nll.detach(), stats_.answer)
    logp = lm(ids).logits.log_softmax(-1).detach()
    by_hand = [-logp[b, torch.arange(3, 8), ids[b, 4:]].mean().item() for b in (0, 1)]
    assert loss[:2] == pytest.approx(by_hand) and np.isnan(loss[2])
    spread = ((logp.exp() * logp**2).sum(-1) - stats_.entropy.detach()**2).sqrt()
    z = min_k_plus(-stats_.nll.detach(), -stats_.entropy.detach(), spread, stats_.answer, k=1)
    def standardised(row, token): # of one token, from its distribution
        p, mean = row.exp(), row @ row.exp()
        return ((row[token] - mean) / math.sqrt(p @ (row - mean)**2)).item()
    expected = [[standardised(logp[b, t], ids[b, t + 1]) for t in range(3, 8)] for b in (0, 1)]
    assert z[:2] == pytest.approx(np.mean(expected, axis=1)) and np.isnan(z[2])


def test_zlib_divides_by_what_is_hard_to_compress():
    texts = ["ab" * 20, "q8$jW0zp!Lr5^yB2&nVx7@kT4*hG9(mD1)sC6+eF"]
    scores = zlib_score(np.ones((2, 40)), np.ones((2, 40)), texts)
    assert scores[0] < scores[1] < 0


def test_auc_is_mann_whitney():
    rng = np.random.default_rng(1)
    for _ in range(50):
        x, y = rng.integers(0, 6, rng.integers(1, 30)), rng.integers(0, 6, rng.integers(1, 30))
        assert auc(x, y) == pytest.approx(stats.mannwhitneyu(x, y).statistic / (len(x) * len(y)))
        assert auc(x, y) == pytest.approx(1 - auc(y, x))
    assert auc([1, np.nan], [np.nan, 0]) == 1


def test_delong_is_its_formula():
    rng = np.random.default_rng(2)
    x, y, z = rng.normal(.7, 1, 23).round(1), rng.normal(0, 1, 31).round(1), stats.norm.ppf(.975)
    wins = (x[:, None] > y) + .5 * (x[:, None] == y)            # (m, n)
    a = wins.mean()
    error = math.sqrt(wins.mean(1).var(ddof=1) / 23 + wins.mean(0).var(ddof=1) / 31)
    logit = math.log(a / (1 - a))
    ends = [1 / (1 + math.exp(-(logit + sign * z * error / (a * (1 - a))))) for sign in (-1, 1)]
    assert auc_bound(x, y, .05, method="delong").value == pytest.approx(ends)


@pytest.mark.parametrize("shift, m, n", [(0, 15, 40), (1, 30, 30), (2.5, 40, 12)])
def test_auc_intervals_cover(shift, m, n):
    rng, runs, alpha, truth = np.random.default_rng(3), 1000, .1, stats.norm.cdf(shift / math.sqrt(2))
    x, y = rng.normal(shift, 1, (runs, m)), rng.normal(0, 1, (runs, n))
    def missed(method, rows):
        ends = np.array([auc_bound(x[i], y[i], alpha, method=method).value for i in rows])
        return ((ends[:, 0] > truth) | (ends[:, 1] < truth)).mean(), (ends[:, 1] - ends[:, 0]).mean()
    usable = [i for i in range(runs) if auc(x[i], y[i]) < 1]
    kl, delong = missed("kl", range(runs)), missed("delong", usable)
    assert kl[0] <= allowed(alpha, runs)        # guaranteed: 3 standard errors of the simulation
    assert delong[0] <= allowed(alpha, runs) and delong[1] < kl[1]      # an approximation that holds up at these sizes


def test_the_guarantee_holds_where_every_pair_moves_together():
    runs, alpha, n = 2000, .1, 12       # one common sample value on each side: as few free terms as can be
    rng = np.random.default_rng(4)
    x, y = (rng.random((runs, n)) < .3) * 2., np.ones((runs, 200))      # AUC .3: a plain proportion of the n members
    ends = np.array([auc_bound(x[i], y[i], alpha).value for i in range(runs)])
    assert ((ends[:, 0] > .3) | (ends[:, 1] < .3)).mean() <= allowed(alpha, runs)


def test_priv_leak_of_a_claim_is_a_claim():
    members, others = np.arange(50) + 10., np.arange(60.)
    bound = auc_bound(members, others, .05)
    leak = priv_leak(bound, reference=.6)
    assert leak.alpha == .05 and leak.value == pytest.approx(100 * (.6 - bound.value[::-1]) / .4)
    assert leak.value[0] < priv_leak(auc(members, others), .6) < leak.value[1]
    assert "PrivLeak in percent at a reference AUC of 0.6 is between" in str(leak) and "n = 50 to 60" in str(leak)
    for bad in (-.1, .5), (.5, 1), (np.nan, .5):
        with pytest.raises(ValueError, match="must lie in"): priv_leak(*bad)
