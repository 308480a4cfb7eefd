"""Self-BLEU and self-ROUGE against nltk and against all pairs."""
import itertools
import warnings

import numpy as np
import pytest
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

from probunlearn.metrics import diversity
from probunlearn.scores import rouge_l
from probunlearn.similarity import self_bleu, self_rouge

WORDS = "the a town sea born Lisbon Rome writes writing wrote".split()


def answers(rng, n, repeats=True):
    "n answers of up to nine words, some of them repeated."
    first = [" ".join(rng.choice(WORDS, rng.integers(1, 10))) for _ in range(n)]
    return list(rng.choice(first, n)) if repeats else first


def test_self_bleu_is_nltks_bleu_against_all_others():
    rng, smooth = np.random.default_rng(0), SmoothingFunction().method1
    for case in range(60):
        texts = answers(rng, rng.integers(2, 12), repeats=case % 2)
        words = [t.lower().split() for t in texts]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = [sentence_bleu(words[:i] + words[i + 1:], words[i], smoothing_function=smooth) for i in range(len(words))]
        assert self_bleu(texts) == pytest.approx(np.mean(theirs), abs=1e-12)


def test_self_rouge_is_the_mean_over_all_pairs_of_draws():
    rng = np.random.default_rng(1)
    for case in range(60):
        texts = answers(rng, rng.integers(2, 12), repeats=case % 2)
        assert self_rouge(texts) == pytest.approx(np.mean([rouge_l(a, b).f1 for a, b in itertools.permutations(texts, 2)]), abs=1e-12)


def test_silence_and_repetition_are_not_variety():
    for measure in self_bleu, self_rouge:
        assert measure([""] * 5) == measure(["one two three four"] * 5) == 1
        assert measure(["alpha", "beta", "gamma"]) == 0
        with pytest.raises(ValueError, match="at least two, got 1"): measure(["alone"])


def test_diversity_reports_them_when_asked():
    texts = ["a b c", "a b d", "a b c"]
    plain, full = diversity(texts), diversity(texts, pairs=True)
    assert {k: full[k] for k in plain} == plain and set(full) - set(plain) == {"self_bleu", "self_rouge"}
    assert full["self_bleu"] == self_bleu(texts) and full["self_rouge"] == self_rouge(texts)
    alone = diversity(["a b"], pairs=True)
    assert np.isnan([alone["self_bleu"], alone["self_rouge"]]).all()
