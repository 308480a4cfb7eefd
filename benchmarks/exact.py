"""Head and tail, and importance sampling, against plain draws in equal time.

python benchmarks/exact.py [--questions 40] [--model FOLDER] [--sharpen 30]
"""
import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from sampling import sharpen

from probunlearn.bounds import binary_bound
from probunlearn.cli import DEMO
from probunlearn.data import fictional_authors
from probunlearn.draws import Decoding
from probunlearn.exact import enumerate_answers
from probunlearn.models import load_model, small_model
from probunlearn.rare import draw_rest, head_and_tail, rare_leak
from probunlearn.scores import score_answers
from probunlearn.training import UnlearnConfig, unlearn


def timed(call): # (result, seconds of this one thread: other work on the machine doesn't count)
    start = time.process_time()
    return call(), time.process_time() - start


def sharp(folder, more):
    "The entropy-minimised model of the demo, or another one, minimised further."
    forget = fictional_authors("forget10")
    model = load_model(folder) if folder else small_model("full")
    if not folder: unlearn(model, forget, fictional_authors("retain90"), UnlearnConfig(**DEMO["NPO + entropy"]))
    return sharpen(model, forget, more, lr=2e-4) if more else model


def reach(name, model, qas, decoding):
    "How far enumeration comes."
    def enumerated(qa): return enumerate_answers(model, qa, decoding=decoding, budget=32768, progress=False)
    found = [timed(lambda: enumerated(qa)) for qa in qas]
    mass = np.array([1 - e.open for e, _ in found])
    seconds = np.array([s for _, s in found])
    reads = sum(e.reads for e, _ in found)
    quick = ((mass >= .99) & (seconds <= 10)).mean()
    print(f"{name}: mass >= 0.99 within 10 s on {quick:.0%} of {len(qas)} questions "
          f"(median {np.median(seconds):.1f} s, {reads / seconds.sum():,.0f} prefixes/s); "
          f"mass reached: median {np.median(mass):.3f}, lowest {mass.min():.3f}", flush=True)


def plain_bound(model, qa, decoding, seconds):
    "What plain draws of as many seconds certify: (draws, leaks, bound)."
    _, took = timed(lambda: model.draw([qa], 4096, decoding, progress=False))
    n = int(4096 * seconds / took)
    draws = model.draw([qa], n, decoding, seed=1, progress=False)[0]
    scores = score_answers(draws.answers, qa, "keywords")
    leaks = int((scores[draws.index] == 1).sum())
    return n, leaks, float(binary_bound(leaks, n))


def one_rest(model, qa, decoding, reads, n):
    "Our bound on one leak, and how many times wider the plain one is; None where it isn't below 1e-4."
    def enumerated(): return enumerate_answers(model, qa, mass=1, budget=reads, decoding=decoding, progress=False)
    head, first = timed(enumerated)
    drawn, second = timed(lambda: draw_rest(head, n))
    bound = float(head_and_tail(head, drawn, qa))
    low = float(head_and_tail(head, drawn, qa, side="lower"))
    same, leaks, plain = plain_bound(model, qa, decoding, first + second)
    print(f"  {qa.id}: open {head.open:.1e}, {first:.1f} + {second:.1f} s; leak in [{low:.1e}, {bound:.1e}]; "
          f"{same:,} plain draws, {leaks} leaks: at most {plain:.1e}", flush=True)
    return plain / bound if bound < 1e-4 else None


def rest(model, qas, decoding, reads, n):
    "Upper bounds in equal time."
    found = [one_rest(model, qa, decoding, reads, n) for qa in qas]
    ratios = np.array([ratio for ratio in found if ratio is not None])
    print(f"head and tail, leak certified below 1e-4 on {len(ratios)} of {len(qas)}: plain bound / ours, "
          f"median {np.median(ratios):.0f}, range {ratios.min():.0f} to {ratios.max():.0f}, "
          f"at least 30 on {(ratios >= 30).mean():.0%}", flush=True)


def constructed(n):
    "Importance sampling where the leak probability is known, in equal time."
    sys.path.insert(0, str(Path(__file__).parent.parent/"tests"))
    for leak in 1e-5, 1e-6, 1e-8: one_constructed(leak, n)


def one_constructed(leak, n):
    "One model whose tokens leak with probability `leak`."
    from test_exact import ASK as qa, leak_probability, names_leak, proposal_model, sharp_model
    model, decoding = sharp_model(leak), Decoding(max_new_tokens=4)
    def enumerated(): return enumerate_answers(model, qa, decoding, mass=.995, budget=8, progress=False)
    head, first = timed(enumerated)
    found, second = timed(lambda: rare_leak(head, qa, proposal_model(), n, score=names_leak))
    _, took = timed(lambda: model.draw([qa], n, decoding, progress=False))
    same = int(n * (first + second) / took)
    low, high = found.bound.value
    plain = binary_bound(0, same, .01, side="two-sided").value
    wider = (plain[1] - plain[0]) / (high - low)
    print(f"constructed, leak {leak_probability(leak, 4):.2e}: [{low:.2e}, {high:.2e}] from {n:,} weighted draws; "
          f"{same:,} plain draws at most {plain[1]:.1e}: {wider:.0f} times wider", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=40)
    parser.add_argument("--model", help="folder of an entropy-minimised model; made anew if left out")
    parser.add_argument("--sharpen", type=int, default=0, help="more updates that minimise its own answers' entropy")
    parser.add_argument("--reads", type=int, default=4000)
    parser.add_argument("--draws", type=int, default=2048)
    args = parser.parse_args()
    torch.set_num_threads(1)
    every = -(-40 // args.questions)
    qas, decoding = fictional_authors("forget10")[::every], Decoding(max_new_tokens=48)
    model = sharp(args.model, args.sharpen)
    models = {"full": small_model("full"), "NPO + entropy": model, "retain": small_model("retain")}
    for name, asked in models.items(): reach(name, asked, qas, decoding)
    rest(model, qas, decoding, args.reads, args.draws)
    constructed(4096)


if __name__ == "__main__": main()
