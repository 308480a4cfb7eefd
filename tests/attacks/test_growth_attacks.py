"""What grows: time and memory stay in proportion to what was asked."""
import json
import time
import tracemalloc
import zipfile

import numpy as np
import pytest

from disks import Faulty, with_disk
from parrot import QAS, SHORT, Parrot
from probunlearn import peers, scores
from probunlearn.draws import draws_from_texts, load_draws, save_draws
from probunlearn.evaluation import evaluate
from probunlearn.files import json_lines
from probunlearn.formats import read_answers
from probunlearn.judges import FunctionJudge, judge_answers
from probunlearn.planning import RunPlan, most_leaks
from probunlearn.runs import price
from probunlearn.scores import rouge_l, score_answers, stems, stems_any_script
from test_tables import zstd_zip


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


def deflated(path, members):
    "A zip as most programs write it."
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in members.items(): archive.writestr(name, text)
    return path


def understated(path, members):
    "The same, and its index says that each member has one byte."
    data = deflated(path, members).read_bytes()
    with zipfile.ZipFile(path) as archive: sizes = {info.file_size for info in archive.infolist()}
    for size in sizes: data = data.replace(size.to_bytes(4, "little"), (1).to_bytes(4, "little"))
    path.write_bytes(data)
    return path


def spaces(count, size): return {f"samples/{i}_epoch_1.json": " " * size + "{}" for i in range(count)}


BOMBS = {
    "one large sample": (deflated, spaces(1, 30 * 2**20), "unpacks to more than 0.0 GB"),
    "many small ones": (deflated, spaces(200, 2**14), "unpacks to more than 0.0 GB"),
    "one by Zstandard": (zstd_zip, spaces(1, 30 * 2**20), "unpacks to more than 0.0 GB"),
    "many by Zstandard": (zstd_zip, spaces(200, 2**14), "unpacks to more than 0.0 GB"),
    "one that lies": (understated, spaces(1, 30 * 2**20), "looks like a log of inspect, but could not be read"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_zipped_log_unpacks_as_far_as_a_limit(name, monkeypatch, tmp_path):
    "A limit of 2 MB, and samples that unpack to more than 3: what is read stays in memory near the limit."
    make, members, says = BOMBS[name]
    path = make(tmp_path/"x.eval", members)
    monkeypatch.setattr(peers, "_MOST", 2 * 2**20)
    assert path.stat().st_size < 2**18
    tracemalloc.start()
    with pytest.raises(ValueError, match=says) as error: read_answers(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(path) in str(error.value) and peak < 12 * 2**20


def test_a_zipped_log_within_the_limit_is_read(monkeypatch, tmp_path):
    "Just as large as the limit, and one byte more."
    sample = json.dumps(dict(id=1, epoch=1, input="Why?", target="So.", scores={}, output=dict(choices=[])))
    for make in deflated, zstd_zip:
        path = make(tmp_path/f"{make.__name__}.eval", {"samples/1_epoch_1.json": sample})
        monkeypatch.setattr(peers, "_MOST", len(sample))
        assert len(read_answers(path)) == 1
        monkeypatch.setattr(peers, "_MOST", len(sample) - 1)
        with pytest.raises(ValueError, match="unpacks to more than"): read_answers(path)
