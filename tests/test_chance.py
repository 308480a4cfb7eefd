"""Leak beyond chance: intervals net of a control, counts that are seldom too long, controls that are asked alike."""
import json
import math
from dataclasses import replace

import numpy as np
import pytest

from probunlearn.bounds import binary_bound
from probunlearn.chance import beyond_chance, control_seed, echo, net_rate
from probunlearn.data import QA
from probunlearn.draws import Decoding, draws_from_texts
from probunlearn.evaluation import evaluate
from probunlearn.questions import pooled_rate
from probunlearn.reading import report_run, versus
from probunlearn.report import Asked, Board, Report, as_json
from probunlearn.runs import read_run
from probunlearn.verification import verify

RUNS = 400


def allowed(alpha, runs=RUNS): return alpha + 3 * math.sqrt(alpha * (1 - alpha) / runs)


@pytest.fixture(autouse=True)
def nobody_looked(monkeypatch): monkeypatch.setattr("probunlearn.runs._LOOKED", {})


# --- statistics -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("p", [0, .02, .3, .9, 1])
@pytest.mark.parametrize("n", [16, 60])
def test_pairs_that_leak_alike_are_seldom_beyond_chance(p, n):
    dice = np.random.default_rng(n)
    alarms = [beyond_chance(*(dice.random((2, 20, n)) < p), .1).any() for _ in range(200)]
    assert np.mean(alarms) <= allowed(.1, 200)


def test_mixed_sets_name_nothing_that_leaks_alike():
    dice, floor = np.random.default_rng(0), np.repeat([0, .05, .5], 6)
    truth = floor + np.tile([0, 0, .3], 6)
    wrong, found = 0, 0
    for _ in range(RUNS):
        listed = beyond_chance(dice.random((18, 80)) < truth[:, None], dice.random((18, 80)) < floor[:, None], .1)
        wrong += (listed & (truth == floor)).any()
        found += listed[truth > floor].mean()
    assert wrong / RUNS <= allowed(.1) and found / RUNS > .3


def test_at_any_time_pairs_that_leak_alike_are_seldom_beyond_chance():
    def ever(seed):
        ours, theirs = np.random.default_rng(seed).random((2, 4, 300)) < .1
        return any(beyond_chance(ours[:, :n], theirs[:, :n], .2, anytime=True).any() for n in (30, 60, 120, 300))
    assert np.mean([ever(seed) for seed in range(100)]) <= allowed(.2, 100)


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("p, q", [(0, 0), (.3, .3), (.02, .2), (1, 0)])
def test_both_ends_cover(p, q, pooled):
    dice = np.random.default_rng(1)
    def missed(side):
        found = []
        for _ in range(RUNS):
            ours, theirs = dice.random((5, 40)) < p, dice.random((5, 40)) < q
            value = np.ravel(net_rate(ours, theirs, .1, side, pooled=pooled).value)[0]
            found.append(value < p - q - 1e-12 if side == "upper" else value > p - q + 1e-12)
        return np.mean(found)
    assert max(missed("upper"), missed("lower")) <= allowed(.1)


def test_ends_are_those_of_the_two_by_themselves():
    ours, theirs = np.repeat([1., 0], [9, 91])[None], np.repeat([1., 0], [2, 98])[None]
    up = float(binary_bound(9, 100, .005)) - float(binary_bound(2, 100, .005, "lower"))
    assert float(net_rate(ours[0], theirs[0], .01, "upper")) == pytest.approx(up, abs=1e-12)
    pool = float(pooled_rate([9], 100, .005)) - float(pooled_rate([2], 100, .005, "lower"))
    assert float(net_rate(ours, theirs, .01, "upper", pooled=True)) == pytest.approx(pool, abs=1e-12)


def test_more_leaks_of_the_model_or_fewer_of_the_control_say_more():
    def rows(*hits): return np.array([np.repeat([1., 0], [h, 60 - h]) for h in hits])
    lower = net_rate(rows(0, 5, 20, 60), rows(5, 5, 5, 5), side="lower").value
    assert (np.diff(lower) > 0).all()
    lower = net_rate(rows(20, 20, 20), rows(0, 5, 20), side="lower").value
    assert (np.diff(lower) < 0).all()


def test_draws_that_are_lost_never_help():
    ours, theirs = np.repeat([1., 0], [30, 70])[None], np.zeros((1, 100))
    assert beyond_chance(ours, theirs).all()
    assert not beyond_chance(np.where(ours == 1, np.nan, 0), theirs).any()
    assert not beyond_chance(ours, np.where(ours == 1, np.nan, 0)).any()


@pytest.mark.parametrize(
    "answer, repeats",
    [
        ("Zorplax Quim", True),
        ("ZORPLAX, quim!", True),
        ("who is zorplax quim?", True),
        ("Quim paints", False),
        ("", False),
        ("…", False),
        ("Zorplaxquim", False),
    ],
)
def test_an_echo_only_repeats_words_of_its_question(answer, repeats):
    assert echo(answer, QA("a", "Who is Zorplax Quim?", "Zorplax Quim paints.")) == repeats


# --- models ---------------------------------------------------------------------------------------------------------

QAS = [QA(f"q{i}", f"What is the word of room {i}?", "Zorp.", ("Zorp",)) for i in range(6)]


class Clerk:
    "A model that says the word with a probability of its own for each question."
    at_once = 4096
    def __init__(self, name, *rates, asked="asked at the counter"):
        self.name, self.rates, self.asked, self.calls = name, rates, asked, 0

    @property
    def identity(self): return dict(model=self.name, rates=list(self.rates))

    def greedy(self, qas, decoding=Decoding()):
        return [draws_from_texts(qa.id, ["no"], prompt=self.asked) for qa in qas]

    def draw(self, qas, n, decoding=Decoding(), seed=0, *, start=0):
        self.calls += 1
        def says(qa):
            k = int(qa.id[1])
            hits = np.random.default_rng([seed, k]).random(n) < self.rates[k % len(self.rates)]
            return ["Zorp" if hit else "no" for hit in hits[start:]]
        return [draws_from_texts(qa.id, says(qa), decoding=decoding, seed=seed, prompt=self.asked) for qa in qas]


MODEL, CONTROL = Clerk("trained", .4, .05), Clerk("never trained", .05)
QUIET = dict(progress=False)


def test_a_report_says_on_how_many_questions_more_than_chance():
    report = evaluate(MODEL, QAS, 256, control=CONTROL, **QUIET)
    assert float(report.bounds["questions beyond chance"]) == 3
    said = next(claim for claim in report.claims if "more than chance" in claim)
    assert "(of 6) on which it leaks more than chance is at least 3 with confidence 99 %" in said
    assert "control: never trained" in said and "fixed-n" in said
    frame = report.to_frame()
    assert (frame.net_lower <= .35 + 1e-9).all() and (frame.net_upper >= 0).all()
    assert ((frame.net_lower > 0) == (frame.rate > .2)).all()
    assert "more than chance (control: never trained) on at least 3 of 6 questions" in as_json(report)["lead"]
    assert "more than chance" in report.card() and "beyond chance" in report.body()


def test_a_control_that_leaks_alike_finds_nothing():
    report = evaluate(MODEL, QAS, 256, control=Clerk("twin", .4, .05), **QUIET)
    assert float(report.bounds["questions beyond chance"]) == 0
    assert "On none of 6 questions is it sure to leak more than chance" in as_json(report)["lead"]
    assert not any("on which it leaks more than chance" in claim for claim in report.claims)


def test_a_control_has_streams_of_its_own():
    report = evaluate(MODEL, QAS, 64, control=Clerk("twin", .4, .05), seed=3, **QUIET)
    assert {d.seed for d in report.control.draws} == {control_seed(3)} and {d.seed for d in report.forget.draws} == {3}
    assert [d.texts for d in report.control.draws] != [d.texts for d in report.forget.draws]


def test_a_control_is_a_run_of_its_own_and_both_go_on(tmp_path):
    how = dict(out=tmp_path/"run", control=CONTROL, **QUIET)
    first = evaluate(MODEL, QAS, 64, **how)
    floor = read_run(tmp_path/"run"/"control")
    assert [there["n"] for there in floor.looks] == [64] and floor.settings["seed"] == control_seed(0)
    calls = MODEL.calls, CONTROL.calls
    again = evaluate(MODEL, QAS, 64, **how)
    assert again.claims == first.claims and (MODEL.calls, CONTROL.calls) == calls
    read = report_run(tmp_path/"run", name="trained")
    assert read.claims == first.claims                              # the folder knows its control, and its name
    longer = evaluate(MODEL, QAS, 256, **how)
    assert longer.anytime and ", anytime, " in str(longer.bounds["questions beyond chance"])
    assert report_run(tmp_path/"run", 512 // 2).control is not None
    alone = evaluate(MODEL, QAS, 300, out=tmp_path/"run", **QUIET)      # the control has no 300 draws
    assert alone.control is None and "questions beyond chance" not in alone.bounds


def test_another_control_in_the_same_folder_is_refused(tmp_path):
    evaluate(MODEL, QAS, 64, out=tmp_path, control=CONTROL, **QUIET)
    with pytest.raises(ValueError, match="another model"):
        evaluate(MODEL, QAS, 64, out=tmp_path, control=Clerk("other", .05), **QUIET)


def test_a_control_that_was_looked_at_by_itself_is_paid_for(tmp_path):
    evaluate(MODEL, QAS, 64, out=tmp_path, control=CONTROL, **QUIET)
    report_run(tmp_path/"control", 32)                              # its draws decide nothing at fixed n from here on
    assert report_run(tmp_path, 64).anytime


@pytest.mark.parametrize(
    "control, error, message",
    [
        (MODEL, ValueError, "is the model itself"),
        ("never", TypeError, "control= takes one model"),
        (
            Clerk("loud", 0.1, asked="shouted at"),
            ValueError,
            "with the same prompt as the model, 'asked at the counter'; got 'shouted at'",
        ),
    ],
)
def test_a_control_that_cannot_stand_beside_it_is_refused_before_any_draw(control, error, message):
    calls = MODEL.calls
    with pytest.raises(error, match=message): evaluate(MODEL, QAS, 64, control=control, **QUIET)
    assert MODEL.calls == calls


def asked(model, n, **how):
    decoding = Decoding(**how)
    greedy = [replace(d, decoding=decoding) for d in model.greedy(QAS)]
    return Asked(QAS, model.draw(QAS, n, decoding), greedy)


@pytest.mark.parametrize("control, what", [
    (asked(CONTROL, 32), "draws per question"), (asked(CONTROL, 64, temperature=.5), "way to be asked"),
    (asked(Clerk("loud", .1, asked="shouted at"), 64), "way to be asked")])
def test_a_report_refuses_a_control_that_was_asked_otherwise(control, what):
    with pytest.raises(ValueError, match=f"the same {what}"): Report("m", asked(MODEL, 64), control=control)


def test_lost_draws_of_either_widen_both_ends():
    whole = Report("m", asked(MODEL, 64), control=asked(CONTROL, 64)).to_frame()
    gone = asked(CONTROL, 64)
    gone.draws[0] = draws_from_texts("q0", gone.draws[0].texts[:40] + [None] * 24, decoding=Decoding(),
                                     prompt=CONTROL.asked, lost={i: "refused" for i in range(40, 64)})
    less = Report("m", asked(MODEL, 64), control=gone).to_frame()
    assert less.net_lower["q0"] < whole.net_lower["q0"] and less.net_upper["q0"] >= whole.net_upper["q0"] - 1e-12


def test_echoes_are_named_and_counted():
    qas = [QA("a", "Is Zorp a poet?", "Zorp.", ("Zorp",)), QA("b", "Who?", "Zorp.", ("Zorp",))]
    draws = [draws_from_texts(qa.id, ["Zorp?"] * 3 + ["Zorp paints"] * 2 + ["no"] * 5) for qa in qas]
    report = Report("m", Asked(qas, draws, [draws_from_texts(qa.id, ["no"]) for qa in qas]))
    assert report.to_frame().echoes.tolist() == [3, 0]
    assert any(
        "3 of 10 leaking draws only repeat words of their question (echo): 'a'." in claim for claim in report.claims
    )


def test_a_board_shows_the_control_as_a_line():
    floor = asked(CONTROL, 64)
    board = Board(
        [Report("a", asked(MODEL, 64), control=floor, control_name="never trained"), Report("b", asked(CONTROL, 64))]
    )
    axes = board.plot()
    assert "control: never trained" in [text.get_text() for text in axes.texts]
    share = np.mean([d.texts.count("Zorp") / 64 for d in floor.draws])
    assert any(
        line.get_xdata()[0] == pytest.approx(share) for line in axes.get_lines() if len(set(line.get_xdata())) == 1
    )
    assert "control leaks" in board.body() and "(the dashed line)" in board.body() and "control leaks" in board.card()
    assert board.to_frame().beyond.isna().tolist() == [False, True]
    without = Board([Report("a", asked(MODEL, 64))])
    assert "control leaks" not in without.body().lower()


def test_anyone_can_check_a_report_with_a_control(tmp_path):
    evaluate(MODEL, QAS, 64, out=tmp_path, control=CONTROL, **QUIET).save(tmp_path/"report.html")
    assert verify(tmp_path).stands
    said = json.loads((tmp_path/"report.json").read_text())
    i = next(i for i, claim in enumerate(said["claims"]) if "more than chance" in claim)
    said["claims"][i] = said["claims"][i].replace("at least", "at least 1 more than")
    (tmp_path/"report.json").write_text(json.dumps(said))
    assert not verify(tmp_path).stands


def test_a_difference_is_claimed_at_any_time_where_a_run_grew(tmp_path):
    for n in (64, 256): grown = evaluate(MODEL, QAS, n, out=tmp_path, **QUIET)
    other = evaluate(CONTROL, QAS, 256, **QUIET)
    assert ", anytime, " in versus([grown, other]).notes[0]
