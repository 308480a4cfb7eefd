"""lm-evaluation-harness writes what we read, and what we write is what it would have written: make test-peers."""
import json
import math

import numpy as np
import pytest
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask
from lm_eval.loggers import EvaluationTracker
from rouge_score.rouge_scorer import RougeScorer

from datasets import Dataset
from probunlearn.data import QA
from probunlearn.draws import Decoding
from probunlearn.entries import lm_eval_task
from probunlearn.formats import read_answers
from probunlearn.peers import read_lm_eval
from probunlearn.scores import score_draws
from probunlearn.tables import draws_from_table
from probunlearn.writers import write_lm_eval

QAS = [QA("001", "Where was Quenby born?", "In Tessmark."), QA("b/2", "Who wrote it?", "Ines Sorrel wrote it."),
       QA("7", "What for?", "Nobody knows.")]
SAID = [["In Lisbon.", "In Tessmark.", "", "Tessmark, in the north"],
        ["Sorrel", "Me.", "Ines", "Ines Sorrel wrote it."],
        ["Nobody knows.", "Nobody.", "I know.", "Löwe – \"x\"\n"]]
LOGP = {" oak": -1., " owl": -2.5, " elm": -1.5}


class Told(LM):
    "A model whose answers stand in a table."
    def __init__(self):
        super().__init__()
        self.asked = []

    def generate_until(self, requests, **_):
        found = []
        for request in requests:
            self.asked.append(request.args)
            number = [qa.question for qa in QAS].index(request.args[0])
            found.append(SAID[number][sum(args[0] == request.args[0] for args in self.asked) - 1])
        return found

    def loglikelihood(self, requests, **_): return [(LOGP[r.args[1]], False) for r in requests]
    def loglikelihood_rolling(self, requests, **_): pytest.fail(f"neither task asks for whole texts, got {requests}")


def run(folder, task):
    "The harness's results and the file of samples that it writes."
    model = Told()
    found = simple_evaluate(model, tasks=[task], log_samples=True, bootstrap_iters=0)
    [(name, samples)] = found["samples"].items()
    tracker = EvaluationTracker(output_path=str(folder))
    tracker.date_id = "today"
    tracker.save_results_samples(name, samples)
    [file] = folder.rglob("samples_*.jsonl")
    return found["results"][name], file, model


@pytest.fixture
def ours(tmp_path): return run(tmp_path, lm_eval_task(QAS, 4, "rouge_l_recall", Decoding(.7, top_p=.9)))


def test_our_task_asks_as_it_is_told_and_its_numbers_are_right(ours):
    results, _, model = ours
    assert len(model.asked) == 12
    for _, how in model.asked:
        assert (how["do_sample"], how["temperature"], how["top_p"], how["max_gen_toks"]) == (True, .7, .9, 64)
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    expected = [np.mean([scorer.score(qa.answer, t)["rougeL"].recall for t in texts]) for qa, texts in zip(QAS, SAID)]
    assert results["rouge_l_recall,draws"] == pytest.approx(np.mean(expected))


def test_all_draws_come_back_from_the_harness(ours):
    _, file, _ = ours
    draws, qas = draws_from_table(read_answers(file))
    assert [d.id for d in draws] == [qa.id for qa in QAS] and [d.texts for d in draws] == SAID
    assert [(qa.question, qa.answer) for qa in qas] == [(qa.question, qa.answer) for qa in QAS]


def test_we_write_what_the_harness_would_have_written(ours, tmp_path):
    _, file, _ = ours
    draws, _ = draws_from_table(read_answers(file))
    x = score_draws(draws, QAS, "rouge_l_recall")
    written = write_lm_eval(tmp_path/"ours.jsonl", draws, QAS, dict(rouge_l_recall=x))
    theirs, mine = ([json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
                    for path in (file, written))
    for a, b in zip(theirs, mine, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"arguments", "filter", "rouge_l_recall"}: assert a[name] == b[name], name
        assert a["arguments"]["gen_args_0"]["arg_0"] == b["arguments"]["gen_args_0"]["arg_0"]
        assert a["rouge_l_recall"] == pytest.approx(b["rouge_l_recall"])


def config(**settings):
    docs = [dict(q="A tree?", a="oak"), dict(q="A bird?", a="owl")]
    return ConfigurableTask(config=dict(
        task="quiz", test_split="test", doc_to_text=lambda doc: doc["q"], **settings,
        custom_dataset=lambda **_: dict(test=Dataset.from_list(docs))))


def test_the_harness_own_multiple_choice(tmp_path):
    options = ["oak", "owl", "elm"]
    task = config(output_type="multiple_choice", doc_to_choice=lambda doc: options,
                  doc_to_target=lambda doc: options.index(doc["a"]),
                  metric_list=[dict(metric="acc", aggregation="mean", higher_is_better=True)])
    results, file, _ = run(tmp_path, task)
    table = read_answers(file)
    total = sum(map(math.exp, LOGP.values()))
    assert table.answer.tolist() == ["oak", "oak"] and table.reference.tolist() == ["oak", "owl"]
    assert table.probability.tolist() == pytest.approx([math.exp(-1) / total, math.exp(-2.5) / total])
    assert table.acc.mean() == results["acc,none"] == .5


def test_two_filters_of_the_harness_own(tmp_path, monkeypatch):
    monkeypatch.setattr(Told, "generate_until", lambda self, requests, **_: ["It is oak."] * len(requests))
    task = config(output_type="generate_until", doc_to_target=lambda doc: doc["a"],
                  generation_kwargs=dict(until=["\n"], do_sample=False),
                  metric_list=[dict(metric="exact_match", aggregation="mean", higher_is_better=True)],
                  filter_list=[dict(name="strict", filter=[dict(function="take_first")]), dict(name="loose", filter=[
                      dict(function="regex", regex_pattern=r"(oak|owl)"), dict(function="take_first")])])
    results, file, _ = run(tmp_path, task)
    with pytest.raises(ValueError, match="the scores of 2 filters, 'strict', 'loose': choose one"): read_answers(file)
    for name, marks in dict(strict=[0, 0], loose=[1, 0]).items():
        table = read_lm_eval(file, filter=name)
        assert table.exact_match.tolist() == marks and results[f"exact_match,{name}"] == np.mean(marks)
        assert table.answer.tolist() == ["It is oak."] * 2
