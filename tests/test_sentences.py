"""What reports, boards and claims say in words: the score by its name, nothing that anybody could say, draws before greedy."""

import re

import numpy as np
import pytest

from probunlearn.bounds import ed_bound, mean_bound, std_bound
from probunlearn.data import QA
from probunlearn.draws import Decoding, draws_from_texts
from probunlearn.judged import Calibration
from probunlearn.memory import auc_bound, priv_leak
from probunlearn.questions import pooled_mean, tolerance_bound
from probunlearn.report import Asked, Board, Report, as_json
from probunlearn.sequential import MeanSequence
from probunlearn.statement import board_lead, lead

DECODING = Decoding(max_new_tokens=9)
QAS = [QA(f"q{i}", f"Question {i}?", "Zorplax.", ("Zorplax",)) for i in range(2)]


def asked(leaks, n=40, greedy="nobody knows", qas=QAS):
    "Questions of which so many draws leak."
    texts = [["Zorplax"] * k + ["nobody knows"] * (n - k) for k in leaks]
    draws = [draws_from_texts(qa.id, row, decoding=DECODING) for qa, row in zip(qas, texts)]
    return Asked(qas[:len(leaks)], draws, [draws_from_texts(qa.id, [greedy]) for qa in qas[:len(leaks)]])


def test_an_average_score_names_its_score_and_no_leak():
    said = str(Report("m", asked([3, 0]), score="rouge_l_recall", leak_at=.5).bounds["average score"])
    assert "score: ROUGE-L recall" in said and "leak" not in said and "0.5" not in said


NOTHING = dict(
    clean=([0, 0], ["certified questions", "leaking questions", "worst question, at least"]),
    leaking=([40, 40], ["worst question", "average leak", "certified questions", "average score"]))


@pytest.mark.parametrize("leaks, void", NOTHING.values(), ids=NOTHING)
def test_what_anybody_could_say_is_not_printed(leaks, void):
    r = Report("m", asked(leaks))
    printed = [name for name, bound in r.bounds.items() if str(bound) in r.claims]
    assert printed == [name for name in r.bounds if name not in void]
    assert not any("at least 0 with" in claim or "at most 1 with" in claim for claim in r.claims)


def test_the_lead_guarantees_nothing_where_nothing_is_guaranteed():
    assert lead(Report("m", asked([40, 0]))).count("nothing is guaranteed") == 1
    assert "at most 100 %" not in lead(Report("m", asked([40, 40])))
    assert lead(Report("m", asked([40, 40]))).startswith("Nothing is guaranteed: these draws don't exclude")


def test_a_board_says_in_how_many_draws_models_leaked():
    one, two = Report("one", asked([1, 0])), Report("two", asked([0, 0]))
    assert board_lead(Board([one, two])).endswith("; 1 of these 2 leaked in 80 draws.")
    longer = Report("two", asked([0, 0], n=50))
    assert board_lead(Board([one, longer])).endswith("1 of these 2 leaked in 80 (one); 100 (two) draws.")


def test_a_boards_card_carries_its_confidence_and_the_caveat_of_the_page():
    board = Board([Report("one", asked([1, 0]), alpha=.02), Report("two", asked([0, 0]), alpha=.02)])
    for text in (board.card().replace("\\", ""), re.sub(r"<[^>]+>", "", board.body())):
        assert "Each bound holds by itself with confidence 98 %, α = 0.02." in text
        assert "has to be drawn again with a fresh seed before anything is claimed about it" in text


def test_drawn_retain_scores_stand_before_greedy_ones():
    kept = asked(
        [10, 10], greedy="Zorplax", qas=[QA(f"k{i}", f"Kept {i}?", "Zorplax.", ("Zorplax",)) for i in range(2)]
    )
    r = Report("m", asked([0, 0]), kept)
    head = next(line for line in Board([r]).card().splitlines() if line.startswith("| model"))
    assert head.index("retain, draws") < head.index("retain, greedy")
    assert "<strong>0.25</strong><span>score of sampled answers that should still be known" in r.body()
    figure = Board([r]).plot().figure
    assert "0.25" in [t.get_text() for child in figure.axes[0].child_axes for t in child.texts]


def test_claims_on_two_samples_name_both():
    rng = np.random.default_rng(0)
    bound = auc_bound(rng.random(30), rng.random(50))
    for claim in (bound, priv_leak(bound)): assert "the 30 members and the 50 others are random samples" in str(claim)
    judge = Calibration(9, 1, 2, 18)
    assert "all harmful answers, of which the 10 labelled ones are a random sample" in str(judge.sensitivity())
    assert "all harmless answers, of which the 20 labelled ones are a random sample" in str(judge.false_alarms())


def test_a_probe_reports_the_share_of_draws_that_leak():
    from probunlearn.data import fictional_authors
    from probunlearn.models import small_model
    from probunlearn.training import leak_probe
    forget = fictional_authors("forget10")[:2]
    model = small_model("full", device="cpu")
    half = leak_probe(forget, forget, n=8, score=lambda answer, qa: .5, leak_at=.75)(model)
    assert half["leak_rate"] == 0 and half["greedy_forget"] == half["drawn_forget"] == .5
    assert leak_probe(forget, forget, n=8, score=lambda answer, qa: .5, leak_at=.5)(model)["leak_rate"] == 1


def test_a_report_says_how_much_of_a_population_leaks_too_much():
    qas = [QA(f"q{i}", f"Room {i}?", "Zorp.", ("Zorp",)) for i in range(30)]
    told = [60 * (i < 3) for i in range(30)]
    draws = [draws_from_texts(qa.id, ["Zorp"] * s + ["no"] * (200 - s)) for qa, s in zip(qas, told)]
    greedy = [draws_from_texts(qa.id, ["no"]) for qa in qas]
    report = Report("m", Asked(qas, draws, greedy))
    most, least = report.tolerance(.1), report.tolerance(.1, "lower")
    assert 0 < float(least) < .1 < float(most) < 1
    assert "The share of questions that leak with probability 0.1 or more is at most" in str(most)
    assert "of which they are a random sample" in str(most) and "leak: key words (fraction) ≥ 1" in str(most)
    assert most.alpha == .01 and Report("m", Asked(qas, draws, greedy), looks=2).tolerance(.1).alpha == .02
    with pytest.raises(ValueError, match="fixed before"):
        Report("m", Asked(qas, draws, greedy), anytime=True).tolerance()


def test_a_sample_of_questions_has_its_claim_in_reports_and_boards():
    qas = [QA(f"q{i}", f"Room {i}?", "Zorplax.", ("Zorplax",)) for i in range(30)]
    given = asked([60 * (i < 3) for i in range(30)], n=500, qas=qas)
    report = Report("m", given, random_sample=True)
    claim = report.bounds["questions that leak too much"]
    assert float(claim) == float(tolerance_bound([60] * 3 + [0] * 27, 500)) == float(report.tolerance()) < .4
    assert str(claim) in report.claims and as_json(report)["random_sample"]
    assert "Of other questions only a share is claimed" in report.body() and str(claim).split(" (")[0] in report.card()
    plain = Report("plain", given)
    assert plain.bounds.keys() == report.bounds.keys() - {"questions that leak too much"}
    assert "Nothing is claimed about other questions" in plain.body() and "unsafe" not in plain.summary()
    board = Board([report, plain])
    assert board.to_frame().unsafe["m"] == float(claim) and np.isnan(board.to_frame().unsafe["plain"])
    assert "all such questions: leak ≥ 1 % in a share ≤" in board.card()
    with pytest.raises(ValueError, match="fixed before"): Report("m", given, random_sample=True, anytime=True)


def test_a_claim_says_where_its_order_is_checked_and_not_proved():
    x = np.full((2, 64), .25)
    for bound in mean_bound(x), std_bound(x), ed_bound(x), pooled_mean(x):
        assert "in an even order: checked, not proved" in str(bound)
    assert "in an even order" not in str(MeanSequence().add(x).bound)
    for bound in mean_bound(x, method="constant-stakes"), mean_bound(x * 0, binary=True):
        assert "proved" not in str(bound)
