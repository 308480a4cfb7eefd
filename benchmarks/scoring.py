"""Scoring against rouge-score and evaluate on the same texts in the same run, and a whole report from text.

python benchmarks/scoring.py [--report]
"""
import argparse
import random
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

from probunlearn.data import fictional_authors
from probunlearn.draws import draws_from_texts
from probunlearn.scores import _KNOWN, score_draws, stems

DUPLICATES = 0, .5, .95     # share of draws whose text came before
VOCABULARY = sorted({word for qa in fictional_authors() for word in f"{qa.question} {qa.answer}".split()})
PEERS = dict(rouge_score=50, evaluate=4)    # pairs that each peer scores per round


def told(qa, n, duplicates, rng):
    "n answers to one question: a part of the reference, then other words, a given share of them repeated."
    words, distinct = qa.answer.split(), round(n * (1 - duplicates))
    def one(i):
        begun = words[:rng.randint(0, len(words))]
        others = rng.choices(VOCABULARY, k=rng.randint(1, 2 * len(words)))
        return " ".join([*begun, *others, str(i)])
    first = [one(i) for i in range(distinct)]
    return first + rng.choices(first, k=n - distinct)


def like_evaluate(reference, answer):
    "What `evaluate`'s rouge does for one pair: four kinds of ROUGE, then a bootstrap of the one value."
    from rouge_score import rouge_scorer, scoring
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"], use_stemmer=True)
    bootstrap = scoring.BootstrapAggregator()
    bootstrap.add_scores(scorer.score(reference, answer))
    return bootstrap.aggregate()["rougeL"].mid.fmeasure


def peers():
    "The peers' scorers by name, each (reference, answer) -> ROUGE-L."
    from rouge_score.rouge_scorer import RougeScorer
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    def recall(reference, answer): return scorer.score(reference, answer)["rougeL"].recall
    try:
        import evaluate
        rouge = evaluate.load("rouge")
    except (ImportError, OSError) as e:
        print(f"evaluate's rouge is not to be had here ({type(e).__name__}); "
              "its row does the same work by calling rouge_score")
        return dict(rouge_score=recall, evaluate=like_evaluate)
    def f1(reference, answer):
        return rouge.compute(predictions=[answer], references=[reference], use_stemmer=True)["rougeL"]
    return dict(rouge_score=recall, evaluate=f1)


def cpu(call):
    "CPU seconds of one call, and its result."
    start = time.process_time()
    result = call()
    return time.process_time() - start, result


def ours(draws, qas, score):
    "Score all draws from cold caches."
    stems.cache_clear()
    _KNOWN.clear()
    return score_draws(draws, qas, score)


def compare(questions, n, rounds):
    "Ratios of time per pair, and whether the numbers are equal, at each share of duplicates."
    qas, scorers, rng = fictional_authors()[:questions], peers(), random.Random(0)
    for share in DUPLICATES:
        texts = [told(qa, n, share, rng) for qa in qas]
        draws = [draws_from_texts(qa.id, said) for qa, said in zip(qas, texts)]
        for name, scorer in scorers.items():
            def pairs(): return [(rng.randrange(questions), rng.randrange(n)) for _ in range(PEERS[name])]
            found = [one_round(qas, draws, name, scorer, pairs()) for _ in range(rounds)]
            ours_us, ratios = found[-1][0], [ratio for _, ratio in found]
            print(f"{share:4.0%} duplicates, {questions} x {n:,} draws: {ours_us:6.2f} us a draw, cold caches; "
                  f"{name} {statistics.median(ratios):8,.0f} times as long "
                  f"({min(ratios):,.0f} to {max(ratios):,.0f} in {rounds} rounds), "
                  f"{PEERS[name] * rounds} scores compared, all equal", flush=True)


def one_round(qas, draws, name, scorer, pairs):
    "(microseconds a draw of ours, how many times longer the peer takes); both must give the same scores."
    score = dict(rouge_score="rouge_l_recall", evaluate="rouge_l_f1")[name]
    texts = {q: draws[q].texts for q, _ in pairs}
    spent, x = cpu(lambda: ours(draws, qas, score))
    theirs, values = cpu(lambda: [scorer(qas[q].answer, texts[q][i]) for q, i in pairs])
    apart = max(abs(value - x[q, i]) for value, (q, i) in zip(values, pairs))
    assert apart < 4e-16, f"{name} and we disagree by {apart}"              # peers round F1 three times, we once
    return 1e6 * spent / x.size, theirs / len(pairs) / (spent / x.size)


def report(questions, n):
    "From text to a saved report, with its peak memory: `n` drawn answers to each question, no model."
    from probunlearn.report import Asked, Report
    qas, rng = fictional_authors()[:questions], random.Random(1)
    texts = [told(qa, n, .5, rng) for qa in qas]
    start = time.perf_counter()
    draws = [draws_from_texts(qa.id, said) for qa, said in zip(qas, texts)]
    greedy = [draws_from_texts(qa.id, said[:1]) for qa, said in zip(qas, texts)]
    asked = Asked(qas, draws, greedy)
    made = Report("told", asked, score="rouge_l_recall", leak_at=.9)
    scored = time.perf_counter()
    _ = made.claims
    made.to_frame()
    bounded = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder: made.save(Path(folder)/"report.html")
    end = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{questions} x {n:,} draws of text: "
          f"scoring {scored - start:.1f} s, claims and table {bounded - scored:.1f} s, "
          f"page, picture and JSON {end - bounded:.1f} s; {end - start:.1f} s in all, peak memory {peak:.2f} GiB")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=400)
    parser.add_argument("--draws", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--report", action="store_true", help="only the whole report")
    args = parser.parse_args()
    if not args.report: compare(args.questions, args.draws, args.rounds)
    report(args.questions, args.draws)


if __name__ == "__main__": sys.exit(main())
