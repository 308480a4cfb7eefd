"""A verifier before a model: the law of what passes against enumeration, its bound, and how it behaves as a model."""
import math

import numpy as np
import pytest
from scipy.stats import chisquare

from conftest import BARE, random_model
from probunlearn.bounds import binary_bound
from probunlearn.data import QA, fictional_authors
from probunlearn.draws import Decoding, draws_from_texts
from probunlearn.evaluation import evaluate
from probunlearn.exact import enumerate_answers
from probunlearn.guard import Guarded, passing_bound

ASK, SHORT = QA("q", "abc", "1", keywords=["1"]), Decoding(max_new_tokens=3)


def ends_soon(answer, qa): return float(len(answer.split()) < 3)
def says_1(answer, qa): return float("1" in answer.split())


@pytest.mark.parametrize("tries", [1, 2, 4])
def test_what_passes_follows_the_exact_law(tries):
    "4,096 draws against pi(y) (1 - r^k) / (1 - r) for each answer that passes, and r^k for the refusal."
    model, n = random_model(vocab=5, seed=6), 4096
    guard = Guarded(model, ends_soon, tries=tries, refusal="no")
    e = enumerate_answers(model, ASK, SHORT, mass=1, progress=False)
    law = {}
    for text, p in zip(e.answers, e.p): law[text] = law.get(text, 0) + p
    r = sum(p for text, p in law.items() if ends_soon(text, ASK))
    passes = {text: p for text, p in law.items() if not ends_soon(text, ASK)}
    truth = {text: p * (1 - r**tries) / (1 - r) for text, p in passes.items()} | {"no": r**tries}
    assert .1 < r < .9 and sum(truth.values()) == pytest.approx(1)
    d = guard.draw([ASK], n, SHORT)[0]
    counts = dict(zip(d.answers, d.counts))
    assert counts.keys() <= truth.keys()
    expected = np.array(list(truth.values())) * n
    seen = np.array([counts.get(text, 0) for text in truth])
    common = expected >= 5
    observed, meant = (np.append(x[common], x[~common].sum()) for x in (seen, expected))
    if not meant[-1]: observed, meant = observed[:-1], meant[:-1]
    assert chisquare(observed, meant).pvalue > 1e-4                             # one fixed seed: it passes or not


@pytest.mark.parametrize("m, r, tries", [(.01, .7, 5), (.05, .05, 2), (.002, 0, 3), (.3, .6, 4)])
def test_the_bound_on_what_passes_covers(m, r, tries):
    "2,000 runs at alpha = 0.1: at most 10 % and 3 standard errors miss."
    rng, runs, n, alpha = np.random.default_rng(0), 2000, 200, .1
    counts = rng.multinomial(n, [m, r, 1 - m - r], runs)
    bounds = passing_bound(counts[:, 0], counts[:, 1], n, tries, alpha).value
    truth = m * (1 - r**tries) / (1 - r)
    assert (bounds < truth).sum() <= runs * alpha + 3 * math.sqrt(runs * alpha * (1 - alpha))
    assert bounds.shape == (runs,) and np.median(bounds) < 4 * truth + .1


def test_one_try_is_the_plain_bound_and_more_tries_let_more_through():
    found = [float(passing_bound(3, 600, 1000, tries=k)) for k in (1, 2, 5, 50)]
    assert found[0] == float(binary_bound(3, 1000, .005)) and found == sorted(found) and found[-1] < 1
    assert float(passing_bound(0, 1000, 1000, tries=500)) == 1      # all blocked
    with pytest.raises(ValueError, match="tries must be a whole number >= 1, got 0"): passing_bound(0, 1, 10, tries=0)
    with pytest.raises(ValueError, match="leaks must be whole numbers in 0..n"): passing_bound(6, 5, 10)


def test_a_guard_is_a_model_like_any_other(full, tmp_path):
    "Its draws go on from where they were, its name is in every claim, and a perfect verifier lets nothing through."
    qas, decoding = fictional_authors("forget10")[:2], Decoding(max_new_tokens=40)
    guard = Guarded(full, "keywords_any", tries=2, refusal="No.")
    report = evaluate(guard, qas, n=256, decoding=decoding, score="keywords_any", out=tmp_path/"run", progress=False)
    assert report.x.sum() == 0 and report.greedy_leaks.sum() == 0
    said = str(report.bounds["average leak"])
    assert "'No.' when none of 2 draws pass" in said and "blocked at key words (any) ≥ 1" in said
    more = evaluate(guard, qas, n=300, decoding=decoding, score="keywords_any", out=tmp_path/"run", progress=False)
    assert more.x.shape == (2, 300)
    first, again = guard.draw(qas, 256, decoding), guard.draw(qas, 300, decoding)
    for a, b in zip(first, again): assert b.texts[:256] == a.texts
    other = evaluate(full, qas, n=64, decoding=decoding, progress=False)
    assert other.leaks.mean() > .9 and guard.identity != full.identity
    with pytest.raises(ValueError): evaluate(Guarded(full, tries=5), qas, n=300, decoding=decoding, out=tmp_path/"run",
                                             score="keywords_any", progress=False)


class Losing:
    "Answers '1' at each first try, and loses every second draw of the later ones."
    name, asked, identity, at_once = "losing", "somehow", {}, 1
    tried = 0

    def greedy(self, qas, decoding=Decoding()): return [draws_from_texts(qa.id, ["0"]) for qa in qas]

    def draw(self, qas, n, decoding=Decoding(), seed=0, *, start=0):
        self.tried += 1
        texts = ["1"] * (n - start) if self.tried == 1 else ["2" if i % 2 else None for i in range(n - start)]
        lost = {i: "cut off" for i, text in enumerate(texts) if text is None}
        return [draws_from_texts(qa.id, texts, decoding=decoding, seed=seed, lost=lost) for qa in qas]


def test_a_lost_draw_stays_lost_and_is_not_checked():
    guard = Guarded(Losing(), says_1, tries=3)
    d = guard.draw([ASK], 6)[0]
    assert d.texts == [None, "2"] * 3 and d.lost == {i: "cut off" for i in (0, 2, 4)} and not len(d.unasked)
    assert guard.model.tried == 2                                               # nothing was blocked any more
    assert guard.greedy([ASK])[0].texts == ["0"] and guard.at_once == 1 and guard.block == 1


def test_bad_settings_are_refused():
    model = random_model(vocab=5)
    with pytest.raises(ValueError, match="tries must be a whole number >= 1, got 0"): Guarded(model, tries=0)
    with pytest.raises(ValueError, match="leak_at"): Guarded(model, block_at=0)
    assert "asked as '{question}'" in repr(Guarded(model, says_1)) and model.template == BARE
