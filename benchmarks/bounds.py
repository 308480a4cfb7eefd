"""Bounds against conbo 0.1.1 on the same scores in the same run: python benchmarks/bounds.py [--big]"""
import argparse
import resource
import time

import numpy as np
from conbo import expectation_bounds, std_bounds

from probunlearn.bands import local_level
from probunlearn.bounds import ed_bound, mean_bound, std_bound, survival_bound


def best(call, repeats=5): # seconds of the fastest of several calls
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def report_needs(x): # four bounds by default
    mean_bound(x)
    std_bound(x)
    ed_bound(x)
    survival_bound(x, .5, method="bj")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--big", action="store_true", help="also one row of 1e7 scores")
    big = parser.parse_args().big
    rng = np.random.default_rng(0)
    x = np.where(rng.random((400, 1024)) < .3, 0, rng.beta(2, 8, (400, 1024)))
    def defaults(cold):
        if cold: local_level.cache_clear()
        report_needs(x)
    cold, warm = best(lambda: defaults(True)), best(lambda: defaults(False))
    print(f"400 x 1,024 scores: mean + std + ED + survival by default {cold:.3f} s, calibrated before {warm:.3f} s")
    reference = best(lambda: (expectation_bounds(x, alpha=.02), std_bounds(x, alpha=.01)))
    ours = best(lambda: (mean_bound(x, method="dkw"), std_bound(x, method="dkw")))
    print(f"mean + std by DKW: {1e3 * ours:.0f} ms, conbo {1e3 * reference:.0f} ms, ratio {reference / ours:.1f}")
    if big:
        row = rng.beta(2, 8, 10**7)
        seconds = best(lambda: report_needs(row), repeats=1)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"1e7 scores, the same four: {seconds:.1f} s, peak memory {peak:.2f} GiB")


if __name__ == "__main__": main()
