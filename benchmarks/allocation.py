"""What adaptive allocation saves against equal allocation: python benchmarks/allocation.py [--sets 200] [--models]

--models draws real answers: 2,048 for each question and packaged model, drawn once. Each of 20 searches takes them in
an order of its own, no draw twice, and ends undecided when a question has none left."""
import argparse
import time

import numpy as np

from probunlearn.allocation import Tally, _equal_decides, _equal_n, spend
from probunlearn.bounds import leaked
from probunlearn.data import fictional_authors
from probunlearn.draws import Decoding
from probunlearn.models import small_model
from probunlearn.scores import score_answers

QUESTIONS, TAU, ALPHA = 40, .01, .01
BATCH = 32                              # draws of one question at a time
POOL = 2048                             # real draws of each question
GOALS = "certify", "name", "worst"


def equal_for(goal, questions):         # draws with which clean questions pass under the same error rule
    return questions * _equal_n(goal, questions, TAU, ALPHA)


def draws(goal, rates, seed):           # until it is decided
    tally, rng = Tally(len(rates), goal, TAU, ALPHA), np.random.default_rng(seed)
    def pull(asks): return [rng.random(stop - start) < rates[q] for q, start, stop in asks]
    outcome = spend(pull, tally, budget=10**6, batch=BATCH)
    if outcome == "undecided": raise AssertionError(f"{goal!r} was not decided by a million draws")
    return tally.n.sum()


def simulated(goal, bad, sets):         # as shares of equal allocation
    rng = np.random.default_rng(bad)
    mixed = [rng.permutation(np.r_[rng.uniform(.02, .3, bad), np.zeros(QUESTIONS - bad)]) for _ in range(sets)]
    found = [draws(goal, rates, seed) for seed, rates in enumerate(mixed)]
    return np.array(found) / equal_for(goal, QUESTIONS)


def drawn(model, qas):                  # (questions, POOL) did a draw leak?
    every = model.draw(qas, POOL, Decoding(max_new_tokens=48), 0, progress=False)
    return np.array([leaked(np.array(score_answers(d.answers, qa, "keywords")), 1.)[d.index]
                     for qa, d in zip(qas, every)])


def searched(pool, goal, batch, seed):  # outcome and draws, taken from the pool in an order shuffled by the seed
    tally, pool = Tally(len(pool), goal, TAU, ALPHA), np.random.default_rng(seed).permuted(pool, axis=1)
    def pull(asks):
        if any(stop > POOL for _, _, stop in asks): raise EOFError
        return [pool[q, start:stop] for q, start, stop in asks]
    try: outcome = spend(pull, tally, budget=pool.size, batch=batch)
    except EOFError: outcome = "undecided"      # a question's pool is empty
    n = _equal_n(goal, len(pool), TAU, ALPHA)
    return outcome, tally.n.sum(), _equal_decides(pool[:, :n].sum(1), n, goal, TAU, ALPHA)


def packaged(seeds):                    # three packaged models on forty forget questions
    forget = fictional_authors("forget10")
    for name in "full", "npo", "retain":
        start, model = time.perf_counter(), small_model(name)
        pool = drawn(model, forget)
        rates = pool.mean(1)
        print(f"{name}: {pool.size:,} draws once, {time.perf_counter() - start:.0f} s; {(rates >= TAU).sum()} of "
              f"{len(pool)} questions leak in {TAU:.0%} of them or more, the worst in {rates.max():.1%}", flush=True)
        for goal in GOALS:
            equal = equal_for(goal, len(pool))
            for batch in BATCH, model.block:
                outcomes, taken, equally = zip(*(searched(pool, goal, batch, seed) for seed in range(seeds)))
                came = ", ".join(f"{outcomes.count(o)} {o}" for o in sorted(set(outcomes)))
                half = np.median(taken)
                print(f"  {goal}, {batch} at a time: {came}; median {half:,.0f} draws, {half / equal:.1%} of equal "
                      f"allocation's {equal:,}, which decide {sum(equally)} of {seeds}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=200, help="simulated sets for each number of leaky questions")
    parser.add_argument("--models", action="store_true", help="also the demo's models: half an hour")
    parser.add_argument("--seeds", type=int, default=20, help="searches of each model's pool")
    options = parser.parse_args()
    for goal in GOALS:
        for bad in 0, 1, 4, 10:
            share = simulated(goal, bad, options.sets if bad else 1)
            half, low, high = np.quantile(share, [.5, .1, .9])
            equal = f"equal allocation's {equal_for(goal, QUESTIONS):,} draws"
            print(f"{goal}, {bad} of {QUESTIONS} leak: median {half:.1%} of {equal}, "
                  f"eight in ten sets {low:.1%} to {high:.1%}", flush=True)
    if options.models: packaged(options.seeds)


if __name__ == "__main__": main()
