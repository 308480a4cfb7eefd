"""What adaptive allocation saves against equal allocation: python benchmarks/allocation.py [--sets 200] [--models]"""
import argparse
import time

import numpy as np

from probunlearn.allocation import Tally, allocate, spend
from probunlearn.bounds import draws_needed
from probunlearn.data import fictional_authors

QUESTIONS, TAU, ALPHA = 40, .01, .01
BATCH = 32                              # draws of one question at a time
GOALS = "certify", "name", "worst"


def equal_for(goal, questions):         # draws with which clean questions pass under the same error rule
    return questions * draws_needed(TAU, dict(certify=ALPHA, name=ALPHA / questions, worst=ALPHA / 2)[goal])


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


def demo():                             # the demo's models and questions
    from probunlearn.cli import demo_models
    forget = fictional_authors("forget10")
    ten = [forget[kind + 10 * (kind % 4)] for kind in range(10)]
    for name, model in demo_models().items():
        for goal in GOALS:
            start = time.perf_counter()
            found = allocate(model, ten, goal, TAU, alpha=ALPHA, budget=10 * 2048, progress=False)
            fixed = equal_for(goal, len(ten))
            print(f"{name}, {goal}: {found.outcome} after {found.draws:,} draws, {found.draws / fixed:.0%} of equal "
                  f"allocation's {fixed:,}, {time.perf_counter() - start:.0f} s", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", type=int, default=200, help="simulated sets for each number of leaky questions")
    parser.add_argument("--models", action="store_true", help="also the packaged models: minutes")
    options = parser.parse_args()
    for goal in GOALS:
        for bad in 0, 1, 4, 10:
            share = simulated(goal, bad, options.sets if bad else 1)
            half, low, high = np.quantile(share, [.5, .1, .9])
            equal = f"equal allocation's {equal_for(goal, QUESTIONS):,} draws"
            print(f"{goal}, {bad} of {QUESTIONS} leak: median {half:.1%} of {equal}, "
                  f"eight in ten sets {low:.1%} to {high:.1%}", flush=True)
    if options.models: demo()


if __name__ == "__main__": main()
