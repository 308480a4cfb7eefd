"""Families of models: e-values are fair, lists of models have few wrong names, and joint claims hold jointly."""
import numpy as np
import pytest
from scipy.stats import binom

from probunlearn.data import QA
from probunlearn.draws import draws_from_texts
from probunlearn.reading import _STAKES, e_bh, less_evidence, versus
from probunlearn.report import Asked, Board, Report
from probunlearn.sequential import Claim, certify

QAS = [QA(f"q{i}", f"Question {i}?", "Zorplax.", ("Zorplax",)) for i in range(2)]


def report(name, hits, **how):
    "A report on draws (question, draw) of which some leak."
    draws = [draws_from_texts(qa.id, ["Zorplax" if hit else "nobody" for hit in row]) for qa, row in zip(QAS, hits)]
    return Report(name, Asked(QAS, draws, [draws_from_texts(qa.id, ["nobody"]) for qa in QAS]), **how)


def counted(name, k, n=200, **how): return report(name, np.arange(n) < np.array([[k], [0]]), **how)


def evidence(wins, losses):
    "E-values of wins and losses, as `less_evidence` counts them."
    money = np.multiply.outer(wins, np.log1p(_STAKES)) + np.multiply.outer(losses, np.log1p(-_STAKES))
    return np.exp(np.logaddexp.reduce(money, axis=-1)) / len(_STAKES)


def test_evidence_counts_pairs_in_any_order():
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 60)) < .1, rng.random((2, 60)) < .5
    less = less_evidence(report("a", a), report("b", b))
    assert less == pytest.approx(evidence((b & ~a).sum(), (a & ~b).sum())) and less > 100
    order = rng.permutation(60)
    assert less_evidence(report("a", a[:, order]), report("b", b[:, order])) == pytest.approx(less)
    assert less_evidence(report("b", b), report("a", a)) < 1
    assert less_evidence(report("a", a), report("c", a)) == pytest.approx(1)


@pytest.mark.parametrize(
    "p, q",
    [((0.1, 0.1), (0.1, 0.1)), ((0.3, 0.0), (0.0, 0.3)), ((0.02, 0.0), (0.01, 0.01)), ((0.9, 0.5), (0.7, 0.7))],
    ids=str,
)
def test_evidence_is_fair_where_both_leak_alike_on_average(p, q):
    "Exactly: the chances of wins and losses on each question, averaged over the stakes; at most 1 by Hölder's inequality."
    n, total = 50, 0
    for theta in _STAKES: total += np.prod([(1 + theta * (b * (1 - a) - a * (1 - b)))**n for a, b in zip(p, q)])
    assert total / len(_STAKES) <= 1 + 1e-9


def test_a_list_of_models_has_few_wrong_names():
    """Six models of which three leak as much as the first, which all share: 2,000 boards at a false discovery rate of 10 %."""
    rng, n, boards, rates = np.random.default_rng(1), 300, 2000, np.array([.1, .1, .1, .05, .02, .01])
    shares, found = [], 0
    for _ in range(boards):
        first = rng.random(n) < .1
        models = rng.random((6, n)) < rates[:, None]
        named = e_bh(evidence((first & ~models).sum(1), (models & ~first).sum(1)), .1)
        shares.append(named[:3].sum() / max(1, named.sum()))
        found += named[3:].sum()
    error = np.std(shares) / np.sqrt(boards)
    assert np.mean(shares) <= .1 + 3 * error and found > .3 * 3 * boards


def test_joint_differences_are_wrong_in_alpha_of_boards_at_most():
    "Four models that leak as much as the first: some joint claim is wrong in at most 10 % of 150 boards (1 in 10,000)."
    rng, wrong = np.random.default_rng(2), 0
    for _ in range(150):
        first, *others = (rng.random((1, 80)) < .2 for _ in range(5))
        board = versus([one(f"m{i}", hits) for i, hits in enumerate([first, *others])], alpha=.1, family="fwer")
        ends = [note.split("between ")[1].split(" with")[0].split(" and ") for note in board.notes]
        wrong += any(float(low) > 0 or float(high) < 0 for low, high in ends)
    assert wrong <= binom.ppf(1 - 1e-4, 150, .1)


def one(name, hits):
    draws = [draws_from_texts("q0", ["Zorplax" if hit else "nobody" for hit in hits[0]])]
    return Report(name, Asked(QAS[:1], draws, [draws_from_texts("q0", ["nobody"])]))


def test_a_board_says_what_its_claims_cost_together():
    first, *others = (counted(name, k) for name, k in (("full", 60), ("npo", 20), ("grad", 50), ("same", 60)))
    alone, joint, listed = (versus([first, *others], family=family) for family in ("each", "fwer", "fdr"))
    assert (
        "these 3 claims stands for itself: that some of them is wrong has probability at most 0.03." in alone.notes[-1]
    )
    assert len(joint.notes) == 3 and all("jointly for 3 models" in note and "α = 0.01" in note for note in joint.notes)
    assert "Of 3 models, npo (e = " in listed.notes[-1] and "same" not in listed.notes[-1]
    assert "at most 0.01 (e-BH)." in listed.notes[-1]
    width = [
        np.diff([float(v) for v in b.notes[0].split("between ")[1].split(" with")[0].split(" and ")])[0]
        for b in (alone, joint)
    ]
    assert width[0] < width[1]
    assert len(versus([first, others[0]]).notes) == 1                       # one claim needs no such word
    for text in (alone.body(), alone.card().replace("\\", "")):
        assert "some of the 4 bounds in a column is wrong has probability at most 0.04." in text
    assert "in a column" not in Board([first]).body()


def test_models_that_were_chosen_pay_for_it_in_a_list():
    first, rival = counted("full", 60), counted("best", 40)
    e = less_evidence(rival, first)
    chosen = versus([first, counted("best", 40, models=int(e * .05) + 1)], alpha=.05, family="fdr")
    assert (
        "best (e = " in versus([first, rival], alpha=0.05, family="fdr").notes[-1] and "none leaks" in chosen.notes[-1]
    )


def test_no_other_family():
    with pytest.raises(ValueError, match="family must be one of 'each', 'fwer', 'fdr'"):
        versus([counted("a", 1), counted("b", 2)], family="fdrr")


def test_verdicts_carry_their_evidence():
    held, refuted, open_ = (certify(Claim(.05), np.arange(n) < k) for n, k in ((400, 0), (400, 100), (20, 0)))
    assert [v.outcome for v in (held, refuted, open_)] == ["holds", "refuted", "undecided"]
    assert 100 <= held.evidence < 120 and refuted.evidence >= 100 and 1 < open_.evidence < 100
    assert "α = 0.01, e = 1" in str(held)


def test_the_evidence_of_a_verdict_is_at_most_1_on_average_where_it_is_wrong():
    "At the border, stopped when decided or after 200 draws, 4,000 times: a mean within three standard errors of 1 at most."
    rng = np.random.default_rng(3)
    verdicts = [certify(Claim(.05), rng.random(200) < .05) for _ in range(4000)]
    e = np.array([v.evidence for v in verdicts if v.outcome != "refuted"])
    mean = e.sum() / 4000
    assert mean <= 1 + 3 * e.std() / np.sqrt(4000)
