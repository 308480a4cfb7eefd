"""Draws where they decide: verdicts that hold however draws are shared out, what they cost, and runs that go on."""
import math

import numpy as np
import pytest
from scipy import special

from probunlearn.allocation import AllocationPlan, Tally, allocate, clean_evidence, passing, plan_allocation, spend
from probunlearn.bounds import draws_needed
from probunlearn.data import QA, fictional_authors
from probunlearn.draws import Decoding, draws_from_texts
from probunlearn.models import small_model
from probunlearn.reading import report_run
from probunlearn.runs import read_run

ALPHA = .05
BELOW = 1 - 1e-9        # a hair below the border


@pytest.fixture(params=[100, pytest.param(400, marks=pytest.mark.slow)])
def runs(request): return request.param


def allowed(alpha, runs): return alpha + 3 * math.sqrt(alpha * (1 - alpha) / runs)


def run(rates, goal, seed, *, tau=.1, alpha=ALPHA, budget=1500, batch=16):
    tally, rng = Tally(len(rates), goal, tau, alpha), np.random.default_rng(seed)
    def pull(asks): return [rng.random(stop - start) < rates[q] for q, start, stop in asks]
    return spend(pull, tally, budget=budget, batch=batch), tally


# sets that are made to mislead: rates in units of tau, on both sides of the border
SETS = {
    "all equal": np.ones(8),
    "one bad": np.r_[1, np.zeros(7)],
    "half bad": np.r_[np.ones(4), np.zeros(4)],
    "one bad among nearly bad": np.r_[1, np.full(7, .9)],
    "one on the border, the others far above": np.r_[1, np.full(7, 4)],
    "two on the border, the others hardly far": np.r_[1, 1, np.full(6, 2.8)],
}


@pytest.mark.parametrize("rates", SETS.values(), ids=SETS)
def test_a_wrong_yes_is_rare(rates, runs):
    said = [run(rates * .1, "certify", seed)[0] for seed in range(runs)]
    assert said.count("holds") / runs <= allowed(ALPHA, runs)


@pytest.mark.parametrize("rates", [SETS[name] for name in ("all equal", "one bad", "half bad")])
def test_a_wrong_no_is_rare(rates, runs):
    said = [run(rates * .1 * BELOW, "certify", seed)[0] for seed in range(runs)]
    assert said.count("refuted") / runs <= allowed(ALPHA, runs)


@pytest.mark.parametrize("side", [1, BELOW], ids=["on the border", "a hair below"])
@pytest.mark.parametrize("rates", SETS.values(), ids=SETS)
def test_a_wrong_name_is_rare(rates, side, runs):
    bad = rates * side >= 1
    found = [run(rates * .1 * side, "name", seed)[1] for seed in range(runs)]
    wrong = [(tally.more & ~bad).any() or (tally.less & bad).any() for tally in found]
    assert np.mean(wrong) <= allowed(ALPHA, runs)


@pytest.mark.parametrize("rates", SETS.values(), ids=SETS)
def test_a_wrong_worst_is_rare(rates, runs):
    def wrong(seed):
        p, (_, tally) = rates * .1, run(rates * .1, "worst", seed, budget=400)
        first = tally.low.argmax()
        rival = np.delete(tally.high, first).max()
        return not tally.low.max() <= p.max() <= tally.high.max() or p.max() > p[first] + max(
            0, rival - tally.low[first]
        )

    assert np.mean([wrong(seed) for seed in range(runs // 4)]) <= allowed(ALPHA, runs // 4)


@pytest.mark.parametrize("bad", [1, 4, 10])
def test_bad_questions_are_found_with_few_draws(bad):
    rng, share = np.random.default_rng(bad), []
    for seed in range(200):
        rates = rng.permutation(np.r_[rng.uniform(.02, .3, bad), np.zeros(40 - bad)])
        outcome, tally = run(rates, "certify", seed, tau=.01, alpha=.01, budget=10**6, batch=32)
        assert outcome == "refuted"
        share.append(tally.n.sum() / (40 * draws_needed(.01)))
    assert np.median(share) <= .1 and max(share) <= .6


@pytest.mark.parametrize("sets", [12, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("bad", [1, 4, 10])
def test_questions_are_named_with_few_draws(bad, sets):
    rng, share = np.random.default_rng(bad), []
    for seed in range(sets):
        rates = rng.permutation(np.r_[rng.uniform(.02, .3, bad), np.zeros(40 - bad)])
        outcome, tally = run(rates, "name", seed, tau=.01, alpha=.01, budget=10**6, batch=32)
        assert outcome == "sorted" and (tally.more == (rates > 0)).all()
        share.append(tally.n.sum() / (40 * draws_needed(.01, .01 / 40)))
    assert np.median(share) <= .6


def test_a_question_that_may_be_near_costs_the_others_and_a_far_one_nothing():
    assert passing(np.array([1., 0, 1]), np.array([False, True, False])).tolist() == [True, False, True]
    assert not passing(np.array([1.9, 0, 1.9]), np.zeros(3, bool)).any()
    assert passing(np.array([2., 0, 2]), np.zeros(3, bool)).tolist() == [True, False, True]


def test_evidence_of_clean_draws_is_fair_and_worth_more_than_a_mixture():
    for tau in .3, .01:
        for n in 1, 5, 40:
            count = np.arange(n + 1)
            chance = np.exp(special.gammaln(n + 1) - special.gammaln(count + 1) - special.gammaln(n - count + 1)
                            + count * np.log(tau) + (n - count) * np.log1p(-tau))
            assert (chance * np.exp(clean_evidence(count, n, tau))).sum() == pytest.approx(1)
            assert (np.diff(clean_evidence(count, n, tau)) < 0).all()
    assert clean_evidence(0, 477, .01) >= math.log(100) > clean_evidence(0, 476, .01)


@pytest.mark.parametrize("bad", [1, 4, 10])
def test_the_worst_is_found_with_few_draws(bad):
    rng, share = np.random.default_rng(bad), []
    for seed in range(12):
        rates = rng.permutation(np.r_[rng.uniform(.02, .3, bad), np.zeros(40 - bad)])
        outcome, tally = run(rates, "worst", seed, tau=.01, alpha=.01, budget=10**6, batch=32)
        assert outcome == "found"
        share.append(tally.n.sum() / (40 * draws_needed(.01, .005)))
    assert np.median(share) <= .6


@pytest.mark.parametrize("goal, most", [("certify", 1.10), ("name", .6), ("worst", 1.15)])
def test_caution_costs_little_where_nothing_leaks(goal, most):
    plan = plan_allocation(np.zeros(40), goal, repeats=1)
    assert 1 - plan.saved <= most and plan.decides == 1 and set(plan.outcomes) <= {"holds", "sorted", "found"}


def test_a_smaller_tau_costs_more_and_a_larger_alpha_less():
    def cost(goal, **how): return plan_allocation(np.zeros(10), goal, repeats=1, **how).draws[0]
    for goal in ("certify", "name"):
        assert cost(goal, tau=.01) > cost(goal, tau=.02) > cost(goal, tau=.02, alpha=.05)


def test_one_question_costs_what_the_sequence_costs():
    assert plan_allocation([0.], repeats=1).draws.tolist() == [499]


def test_lost_draws_count_against_every_verdict():
    def pull(asks): return [np.full(stop - start, np.nan) for _, start, stop in asks]
    for goal in ("certify", "name", "worst"):
        tally = Tally(3, goal, .01, .01)
        assert spend(pull, tally, budget=3000, batch=50) == "undecided" and tally.n.sum() == 3000
        assert not tally.less.any() and not tally.more.any() and (tally.below == 0).all() and (tally.above == 0).all()


def test_the_budget_is_never_exceeded():
    for budget in (1, 7, 33, 100):
        for goal in ("certify", "name", "worst"):
            assert run(np.full(4, .1), goal, 0, budget=budget, batch=32)[1].n.sum() <= budget


def test_a_plan_reads_as_a_sentence():
    plan = plan_allocation([.1, 0, 0], repeats=3)
    assert isinstance(plan, AllocationPlan) and "3 questions, goal 'certify', τ = 0.01, α = 0.01" in str(plan)


# --- models ---------------------------------------------------------------------------------------------------------

QAS = [QA(f"q{i}", f"What is the word of room {i}?", "Zorp.", ("Zorp",)) for i in range(5)]


class Clerk:
    "A model of the test's own, which may break down."
    name, asked, identity, at_once = "clerk", "asked at the counter", dict(model="clerk"), 64
    def __init__(self, patience=10**9): self.patience, self.drawn = patience, []

    def greedy(self, qas, decoding=Decoding()):
        return [draws_from_texts(qa.id, ["no"], prompt=self.asked) for qa in qas]

    def draw(self, qas, n, decoding=Decoding(), seed=0, *, start=0):
        if self.patience == 0: raise KeyboardInterrupt
        self.patience -= 1
        def says(qa, i): return "Zorp" if np.random.default_rng([seed, int(qa.id[1]), i]).random() < .02 else "no"
        self.drawn += [(qa.id, i) for qa in qas for i in range(start, n)]
        how = dict(decoding=decoding, seed=seed, prompt=self.asked)
        return [draws_from_texts(qa.id, [says(qa, i) for i in range(start, n)], **how) for qa in qas]


@pytest.mark.parametrize("goal", ["certify", "name", "worst"])
def test_a_killed_allocation_goes_on_and_asks_nothing_twice(goal, tmp_path):
    how = dict(goal=goal, tau=.1, progress=False)
    whole = allocate(Clerk(), QAS, **how)
    clerk = Clerk(patience=3)
    with pytest.raises(KeyboardInterrupt): allocate(clerk, QAS, out=tmp_path, **how)
    clerk.patience = 10**9
    found = allocate(clerk, QAS, out=tmp_path, **how)
    assert str(found) == str(whole) and len(set(clerk.drawn)) == len(clerk.drawn) == found.draws
    assert str(allocate(Clerk(patience=0), QAS, out=tmp_path, **how)) == str(whole)


def test_claims_on_its_draws_hold_at_any_time(tmp_path):
    clerk = Clerk()
    allocate(clerk, QAS, tau=.1, out=tmp_path, progress=False)
    from probunlearn.evaluation import evaluate
    report = evaluate(clerk, QAS, 256, out=tmp_path, progress=False)
    assert report.anytime and report_run(tmp_path).anytime
    assert len(set(clerk.drawn)) == len(clerk.drawn) == 5 * 256          # filled up, nothing twice
    unkept = Clerk()
    for n in (allocate(unkept, QAS, tau=.1, seed=4, progress=False).tally.n.max(), 256):
        assert evaluate(unkept, QAS, int(n), seed=4, progress=False).anytime


def test_a_run_that_was_reported_on_is_refused(tmp_path):
    from probunlearn.evaluation import evaluate
    evaluate(Clerk(), QAS, 64, out=tmp_path, progress=False)
    with pytest.raises(ValueError, match="another plan of looks"): allocate(Clerk(), QAS, out=tmp_path, progress=False)


class Broken(Clerk):
    "A server out of reach: draws from 40 on aren't asked."
    def draw(self, qas, n, decoding=Decoding(), seed=0, *, start=0):
        whole = super().draw(qas, n, decoding, seed, start=start)
        def cut(d): return [text if start + i < 40 else None for i, text in enumerate(d.texts)]
        return [draws_from_texts(d.id, cut(d), decoding=decoding, seed=seed, prompt=self.asked) for d in whole]


def test_draws_that_were_never_asked_are_no_draws(tmp_path):
    with pytest.raises(ConnectionError, match="the same call goes on"):
        allocate(Broken(), QAS, tau=.1, out=tmp_path, progress=False)
    assert str(allocate(Clerk(), QAS, tau=.1, out=tmp_path, progress=False)) == str(
        allocate(Clerk(), QAS, tau=.1, seed=0, progress=False))


def test_a_local_model_is_asked_in_blocks(tmp_path):
    model, qas, short = (
        small_model("retain", device="cpu"),
        fictional_authors("forget10")[:2],
        Decoding(max_new_tokens=6),
    )
    found = allocate(model, qas, tau=.02, decoding=short, out=tmp_path, progress=False)
    kept = read_run(tmp_path)
    for qa, n in zip(qas, found.tally.n):
        draws = kept.draws(qa)
        assert draws.n >= n > 0
        whole = model.draw([qa], draws.n, short, progress=False)[0]
        assert draws.texts == whole.texts
    assert f"model {model.name}" in str(found) and "at most 6 tokens" in str(found)


@pytest.mark.parametrize("wrong, message", [
    (dict(goal="best"), "goal must be one of"), (dict(tau=0.), "tau must lie"), (dict(alpha=1.), "alpha must lie"),
    (dict(budget=0), "budget must be"), (dict(batch=-1), "batch must be"), (dict(leak_at=0.), "leak_at must lie"),
    (dict(score="luck"), "score must be"), (dict(seed=-1), "seed must be")])
def test_what_is_wrong_is_said_before_any_draw(wrong, message):
    clerk = Clerk()
    with pytest.raises(ValueError, match=message): allocate(clerk, QAS, progress=False, **wrong)
    assert clerk.drawn == []
