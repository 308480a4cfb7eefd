"""How tight is each bound? Ten laws of scores, 128 and 1,024 draws: python benchmarks/tightness.py [--rows 200]"""
import argparse

import numpy as np

from probunlearn.bands import FLOORS
from probunlearn.bounds import MEANS, ed_bound, mean_bound, std_bound
from probunlearn.means import cautious_stake, first_refuted, log_wealth

try: from conbo import expectation_bounds, std_bounds
except ImportError: expectation_bounds = None


def coin(p): return lambda rng, size: (rng.random(size) < p) * 1.
def mostly_zero(share): return lambda rng, size: np.where(rng.random(size) < share, 0, rng.beta(2, 5, size))
def rouge_a(rng, size):                 # many zeros, a few whole answers, the rest on a grid of twentieths
    some = np.where(rng.random(size) < .05, 1, np.ceil(20 * rng.beta(1, 8, size)) / 20)
    return np.where(rng.random(size) < .6, 0, some)
def rouge_b(rng, size): return (np.round(rng.normal(.45, .04, size) * 37) / 37).clip(0, 1)

# name -> (draw, whether the score is 0 or 1 by definition)
LAWS = {"zeros": (lambda rng, size: np.zeros(size), True), "coin .003": (coin(.003), True),
        "coin .02": (coin(.02), True), "coin .3": (coin(.3), True),
        "99 % zeros": (mostly_zero(.99), False), "90 % zeros": (mostly_zero(.9), False),
        "ROUGE-A": (rouge_a, False), "ROUGE-B": (rouge_b, False),
        "Beta(2, 8)": (lambda rng, size: rng.beta(2, 8, size), False),
        "uniform": (lambda rng, size: rng.random(size), False)}
ALPHA = .01


def cautious(x, alpha):                 # what "betting" was: one cautious player, in the order of the draws
    stake, goal = cautious_stake(x, alpha), -np.log(alpha)
    return first_refuted(lambda m: log_wealth(x, m[:, None], stake).max(1) >= goal, np.zeros(len(x)), steps=30)

def means(x, binary):                   # method -> average upper bound on the mean
    found = {"cautious, as drawn": cautious(x, ALPHA).mean()}
    found |= {name: mean_bound(x, ALPHA, method=name).value.mean() for name in [*MEANS, *FLOORS]}
    if binary: found["clopper-pearson"] = mean_bound(x, ALPHA, binary=True).value.mean()
    if expectation_bounds: found["conbo"] = expectation_bounds(x, alpha=2 * ALPHA)[2].mean()
    return found

def spreads(x):                         # method -> average upper bounds on the standard deviation and on mean + 2 std
    found = {name: (std_bound(x, ALPHA, method=name).value.mean(), ed_bound(x, ALPHA, method=name).value.mean())
             for name in ("betting", "bj", "dkw")}
    if expectation_bounds:
        std = std_bounds(x, alpha=ALPHA)[2]
        valid = not (x == 0).any()      # it drops the probability of a score of exactly 0
        both = expectation_bounds(x, alpha=ALPHA)[2] + 2 * std
        found["conbo" if valid else "conbo (invalid here)"] = std.mean(), both.mean()
    return found

def percent(value, base): return f"{100 * (value / base - 1):+.1f} %"

def judge(name, n, found):              # what must hold, and whether it does
    before, ours = found["cautious, as drawn"], found["betting"]
    valid = {k: v for k, v in found.items() if k not in ("betting", "cautious, as drawn", "conbo")}
    best = min(valid, key=valid.get)
    ratio, loss = max(1, ours / valid[best]), ours / before
    wrong = [words for words, bad in {"over 15 % above the best": ratio > 1.15, "over 3 % above before": loss > 1.03,
                                      "looser than conbo": ours > found.get("conbo", 1)}.items() if bad]
    print(f"  {name}, {n:,}: against before {percent(ours, before)}, against {best} {percent(ours, valid[best])}"
          f"{'; NOT HELD: ' + ', '.join(wrong) if wrong else ''}")
    return wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200, help="samples of 128 draws; half as many of 1,024")
    rows, wrong = parser.parse_args().rows, []
    for n in 128, 1024:
        for name, (draw, binary) in LAWS.items():
            x = draw(np.random.default_rng([n, len(name)]), (max(rows if n < 1000 else rows // 2, 4), n))
            found = means(x, binary)
            print(f"{name}, n = {n:,}: mean " + ", ".join(f"{k} {v:.5f}" for k, v in found.items()))
            wrong += judge(name, n, found)
            print("  std, ED: " + ", ".join(f"{k} {a:.4f} {b:.4f}" for k, (a, b) in spreads(x[:40]).items()))
    print(f"{len(wrong)} exceptions in 20 cells: {wrong}")


if __name__ == "__main__": main()
