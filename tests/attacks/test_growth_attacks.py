"""What grows: time and memory stay in proportion to what was asked."""
import json
import time
import tracemalloc

import numpy as np
import pytest

from disks import Faulty, with_disk
from parrot import QAS, SHORT, Parrot
from probunlearn import scores
from probunlearn.draws import draws_from_texts, load_draws, save_draws
from probunlearn.evaluation import evaluate
from probunlearn.files import json_lines
from probunlearn.judges import FunctionJudge, judge_answers
from probunlearn.planning import RunPlan, most_leaks
from probunlearn.runs import price
from probunlearn.scores import rouge_l, score_answers, stems, stems_any_script


def cpu(work):
    "Seconds of this process for some work, the best of three."
    found = []
    for _ in range(3):
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
    return min(found)


def reads(n, folder):
    path = folder/f"{n}.parquet"
    with with_disk(Faulty()): save_draws(draws_from_texts("q", [f"answer {i}" for i in range(n)], decoding=SHORT), path)
    return lambda: load_draws(path)


def parses(n, folder):
    text = "\n".join(json.dumps(dict(a=i)) for i in range(n))
    return lambda: list(json_lines(text, "x"))


def judges(n, folder):
    pairs = [(QAS[0], f"answer {i}") for i in range(n)]
    judge = FunctionJudge(lambda answer, qa: 1, "one", batch_size=64)
    return lambda: judge_answers(pairs, judge, progress=False)


def scored(n, folder): return lambda: score_answers([f"answer {i}" for i in range(n)], QAS[0], "rouge_l_recall")
def priced(n, folder): return lambda: price([(i % 50 + 1, 2) for i in range(n)], "anytime")


LINEAR = {"load_draws": (reads, 5_000), "json_lines": (parses, 10_000), "judge_answers": (judges, 2_000),
    "scores": (scored, 4_000), "looks": (priced, 50_000)}


@pytest.mark.parametrize("name", LINEAR)
def test_four_times_the_work_takes_four_times_as_long(name, tmp_path):
    "A quadratic one takes sixteen times; twelve leaves room for a busy machine."
    make, n = LINEAR[name]
    small, large = cpu(make(n, tmp_path)), cpu(make(4 * n, tmp_path))
    assert large < 12 * small + .02, (small, large)


@pytest.mark.parametrize("split", [stems, stems_any_script])
def test_long_answers_are_not_kept(split):
    "300 answers of 20,000 words kept 79 MB."
    cache = {stems: scores._STEMS, stems_any_script: scores._STEMS_ANY_SCRIPT}[split]
    tracemalloc.start()
    for i in range(6): split(f"{i} " + "word and other words " * 5000)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 1e6 and cache.size <= cache.most


def test_short_answers_are_kept_within_bounds_and_score_the_same():
    small = scores._Words(str.split, most=1000)
    for i in range(500): assert small[f"word {i}"] == ["word", str(i)]
    assert small.size <= 1000 and len(small) < 150
    assert rouge_l("the vault lies here " * 3000, "the vault lies there").recall == .75


def test_endless_words_are_not_kept():
    before = len(scores._KNOWN)
    for i in range(20): stems("x" * 10_000 + str(i))
    assert len(scores._KNOWN) == before


@pytest.mark.parametrize("n", [10**6, 10**8])
def test_plans_of_many_draws_take_no_memory(n):
    tracemalloc.start()
    assert most_leaks(n) > 0 and "draws on each" in str(RunPlan(n, 3))
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()


@pytest.mark.parametrize("n, tau, alpha",
    [(1, .5, .3), (459, .01, .01), (100, .2, .05), (1000, .01, .01), (5000, .5, .001)])
def test_the_most_leaks_are_those_of_the_whole_table(n, tau, alpha):
    from scipy import special
    assert most_leaks(n, tau, alpha) == int((special.bdtr(np.arange(n + 1), n, tau) <= alpha).sum()) - 1


def test_a_report_in_json_is_strict(tmp_path):
    "An answer whose probability nobody knows, greedy answers that are missing: null, never NaN."
    model = Parrot(lambda qa, i: None if i % 2 else "Karmo0")
    model.greedy = lambda qas, decoding=SHORT: [draws_from_texts(qa.id, [None], lost={0: "gone"}, prompt=model.asked)
        for qa in qas]
    report = evaluate(model, QAS, 8, decoding=SHORT, progress=False)
    report.how["odd"] = [float("nan"), {"a": float("-inf"), 7: (1, np.float64("nan"))}, {1, 2}]
    with with_disk(Faulty()): report.save(tmp_path/"r")
    def refuse(word): raise AssertionError(word)
    found = json.loads((tmp_path/"r.json").read_text(), parse_constant=refuse)
    assert found["how"]["odd"][:2] == [None, {"a": None, "7": [1, None]}]
