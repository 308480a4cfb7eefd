"""Head and tail, and importance sampling, against plain draws in equal time: python benchmarks/exact.py [--questions 40] [--model FOLDER] [--sharpen 30]"""
import argparse, sys, time
from pathlib import Path
import numpy as np
import torch
from probunlearn.bounds import binary_bound
from probunlearn.cli import DEMO
from probunlearn.data import fictional_authors
from probunlearn.draws import Decoding
from probunlearn.exact import enumerate_answers
from probunlearn.models import load_lm, small_lm
from probunlearn.rare import draw_rest, head_and_tail, rare_leak
from probunlearn.sampling import sample
from probunlearn.scores import score_answers
from probunlearn.training import UnlearnConfig, unlearn
from sampling import sharpen


def timed(call): # (result, seconds of this one thread: other work on the machine doesn't count)
    start = time.process_time()
    return call(), time.process_time() - start


def sharp(folder, more): # the entropy-minimised model of the demo, or another one, minimised further
    lm, tok = load_lm(folder) if folder else small_lm("full")
    if not folder: unlearn(lm, tok, fictional_authors("forget10"), fictional_authors("retain90"), UnlearnConfig(**DEMO["NPO + entropy"]))
    return (sharpen(lm, tok, fictional_authors("forget10"), more, lr=2e-4) if more else lm), tok


def reach(name, lm, tok, qas, decoding): # how far enumeration comes
    found = [timed(lambda: enumerate_answers(lm, tok, qa, decoding=decoding, budget=32768, progress=False)) for qa in qas]
    mass, seconds, reads = (np.array(v) for v in ([1 - e.open for e, _ in found], [s for _, s in found], [e.reads for e, _ in found]))
    print(f"{name}: mass >= 0.99 within 10 s on {((mass >= .99) & (seconds <= 10)).mean():.0%} of {len(qas)} questions (median {np.median(seconds):.1f} s, "
          f"{reads.sum() / seconds.sum():,.0f} prefixes/s); mass reached: median {np.median(mass):.3f}, lowest {mass.min():.3f}", flush=True)


def rest(lm, tok, qas, decoding, reads, n): # upper bounds in equal time
    ratios = []
    for qa in qas:
        head, first = timed(lambda: enumerate_answers(lm, tok, qa, mass=1, budget=reads, decoding=decoding, progress=False))
        drawn, second = timed(lambda: draw_rest(head, n))
        bound, low = float(head_and_tail(head, drawn, qa)), float(head_and_tail(head, drawn, qa, side="lower"))
        plain, third = timed(lambda: sample(lm, tok, [qa], 4096, decoding, progress=False)[0])
        same = int(4096 * (first + second) / third)
        more = sample(lm, tok, [qa], same, decoding, seed=1, progress=False)[0]
        leaks = int((score_answers(more.answers, qa, "keywords")[more.index] == 1).sum())
        if bound < 1e-4: ratios.append(float(binary_bound(leaks, same)) / bound)
        print(f"  {qa.id}: open {head.open:.1e}, {first:.1f} + {second:.1f} s; leak in [{low:.1e}, {bound:.1e}]; {same:,} plain draws, {leaks} leaks: at most {float(binary_bound(leaks, same)):.1e}", flush=True)
    print(f"head and tail, leak certified below 1e-4 on {len(ratios)} of {len(qas)}: plain bound / ours, median {np.median(ratios):.0f}, "
          f"range {min(ratios):.0f} to {max(ratios):.0f}, at least 30 on {np.mean(np.array(ratios) >= 30):.0%}", flush=True)


def constructed(n): # importance sampling where the leak probability is known, in equal time
    sys.path.insert(0, str(Path(__file__).parent.parent/"tests"))
    from conftest import BARE, LetterTok
    from test_exact import ASK, SHARP, leak_probability, names_leak, proposal_lm, sharp_lm
    decoding, tok = Decoding(max_new_tokens=4), LetterTok(SHARP)
    for leak in 1e-5, 1e-6, 1e-8:
        lm = sharp_lm(leak)
        head, first = timed(lambda: enumerate_answers(lm, tok, ASK, mass=.995, budget=8, decoding=decoding, template=BARE, progress=False))
        found, second = timed(lambda: rare_leak(head, ASK, proposal_lm(), n=n, score=names_leak))
        same = int(n * (first + second) / timed(lambda: sample(lm, tok, [ASK], n, decoding, template=BARE, progress=False))[1])
        (low, high), plain = found.bound.value, binary_bound(0, same, .01, "two-sided").value
        print(f"constructed, leak {leak_probability(leak, 4):.2e}: [{low:.2e}, {high:.2e}] from {n:,} weighted draws; {same:,} plain draws at most {plain[1]:.1e}: "
              f"{(plain[1] - plain[0]) / (high - low):.0f} times wider", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=40)
    parser.add_argument("--model", help="folder of an entropy-minimised model; made anew if left out")
    parser.add_argument("--sharpen", type=int, default=0, help="more updates that minimise the entropy of its own answers")
    parser.add_argument("--reads", type=int, default=4000)
    parser.add_argument("--draws", type=int, default=2048)
    args = parser.parse_args()
    torch.set_num_threads(1)
    qas, decoding = fictional_authors("forget10")[::-(-40 // args.questions)], Decoding(max_new_tokens=48)
    lm, tok = sharp(args.model, args.sharpen)
    for name, model in ("full", small_lm("full")[0]), ("NPO + entropy", lm), ("retain", small_lm("retain")[0]): reach(name, model, tok, qas, decoding)
    rest(lm, tok, qas, decoding, args.reads, args.draws)
    constructed(4096)


if __name__ == "__main__": main()
