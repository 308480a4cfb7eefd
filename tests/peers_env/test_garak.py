"""garak writes a report and we read it: make test-peers. Its intervals at 0 and 100 % have no width; ours have."""
import json
import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from probunlearn.formats import read_answers
from probunlearn.questions import pooled_rate
from probunlearn.tables import draws_from_table, scores_from_table

pytest.importorskip("garak")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    "The report of a scan of a model that repeats what it is told, five times over."
    folder = tmp_path_factory.mktemp("garak")
    homes = {name: str(folder/name) for name in ("XDG_DATA_HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME")}
    command = [sys.executable, "-m", "garak", "--target_type", "test.Repeat", "--probes", "test.Test", "--detectors",
               "always.Fail,always.Pass", "--generations", "5", "--report_prefix", "mine"]
    subprocess.run(command, env=os.environ | homes, cwd=folder, check=True, capture_output=True)
    return next(folder.rglob("mine.report.jsonl"))


def entries(report, kind):
    lines = map(json.loads, report.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line["entry_type"] == kind]


def test_every_answer_of_a_scan_is_read_once(report):
    table = read_answers(report)
    final = {e["uuid"]: e for e in entries(report, "attempt") if e["status"] == 2}
    assert table.question_id.unique().tolist() == list(final)
    assert len(table) == sum(len(e["outputs"]) for e in final.values())
    for id, rows in table.groupby("question_id"):
        assert Counter(rows.answer) == Counter(output["text"] for output in final[id]["outputs"])
        assert sorted(rows.draw) == list(range(5))
    asked = table[table.question.str.strip() != ""]                 # one of garak's test prompts is empty
    draws, qas = draws_from_table(asked)
    assert len(draws) == len(qas) == len(final) - 1 and all(d.n == 5 for d in draws)


def test_hits_and_intervals(report):
    table = read_answers(report)
    for entry in entries(report, "eval"):
        x = scores_from_table(table, entry["detector"].removeprefix("detector."))
        assert x.sum() == entry["fails"] == entry["total_evaluated"] - entry["passed"]
        assert x.size == entry["total_evaluated"]
        rate = x.mean()
        assert rate in (0, 1)
        assert entry["confidence_lower"] == entry["confidence_upper"] == rate              # an interval of no width
        low, high = np.ravel(pooled_rate(x.sum(1).astype(int), 5, .05, "two-sided").value)
        assert high - low == pytest.approx(1 - .025**(1 / x.size))                              # Clopper and Pearson
