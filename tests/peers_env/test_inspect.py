"""inspect writes what we read, and reads what we write: make test-peers."""
import math
import subprocess
import sys

import numpy as np
import pytest
from inspect_ai import Task, eval, score
from inspect_ai.dataset import Sample
from inspect_ai.log import read_eval_log
from inspect_ai.model import ChatCompletionChoice, ChatMessageAssistant, ModelOutput
from inspect_ai.scorer import choice, includes, precomputed_scores
from inspect_ai.solver import solver
from rouge_score.rouge_scorer import RougeScorer
from scipy.optimize import brentq

from probunlearn.formats import read_answers
from probunlearn.scores import score_draws
from probunlearn.tables import draws_from_table, scores_from_table
from probunlearn.writers import write_inspect_scores

TARGETS = {"001": ["In Tessmark."], "b/2": ["Ines Sorrel wrote it.", "Sorrel"], "7": ["Nobody knows."]}
SAID = {"001": ["In Lisbon.", "In Tessmark.", "", "Tessmark, in the north"], "b/2": ["Sorrel", "Me.", None, "Ines"],
        "7": ["Nobody knows.", "Nobody.", "I know.", "Löwe – \"x\"\n"]}
SAMPLES = [Sample(id=id, input=f"Question {id}?", target=target) for id, target in TARGETS.items()]


@solver
def told():
    "Answers as the table says; one is withheld by a content filter."
    async def solve(state, generate):
        text = SAID[state.sample_id][state.epoch - 1]
        stop = "content_filter" if text is None else "stop"
        message = ChatMessageAssistant(content=text or "")
        state.output = ModelOutput(model="told", choices=[ChatCompletionChoice(message=message, stop_reason=stop)])
        return state
    return solve


def run(folder, scorer, **how):
    task = Task(dataset=SAMPLES, solver=told(), scorer=scorer, epochs=4)
    [log] = eval(task, model="mockllm/model", log_dir=str(folder), display="none", **how)
    assert log.status == "success"
    return log


def recall(text, targets):
    "The best ROUGE-L recall among the targets, by the package that we didn't write."
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return max(scorer.score(target, text)["rougeL"].recall for target in targets)


def test_our_scorer_is_found_by_its_entry_point_and_its_numbers_are_right(tmp_path):
    written = run(tmp_path, includes()).location
    scored = tmp_path/"scored.eval"
    command = [sys.executable, "-m", "inspect_ai", "score", written, "--scorer", "probunlearn/leak", "--action",
               "overwrite", "--output-file", str(scored), "--display", "none"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    log = read_eval_log(str(scored))
    marks = {(s.id, s.epoch): s.scores["leak"].value for s in log.samples if "leak" in (s.scores or {})}
    assert marks == pytest.approx({(id, i + 1): recall(text, TARGETS[id]) for id, texts in SAID.items()
                                   for i, text in enumerate(texts) if text is not None})
    means = [np.mean([m for (i, _), m in marks.items() if i == id]) for id in TARGETS]
    seen = log.results.scores[0].metrics
    assert seen["mean"].value == pytest.approx(np.mean(means))
    def kl(p, q): return sum(a * math.log(a / b) for a, b in ((p, q), (1 - p, 1 - q)) if a)
    bound = brentq(lambda q: 3 * kl(np.mean(means), q) - math.log(100), np.mean(means), 1 - 1e-12)
    assert seen["at_most"].value == pytest.approx(bound, abs=1e-6)


@pytest.mark.parametrize("form", ["eval", "json"])
def test_epochs_are_draws_in_both_forms_of_a_log(tmp_path, form):
    log = run(tmp_path, includes(), log_format=form)
    table = read_answers(log.location)
    draws, qas = draws_from_table(table)
    assert {d.id: d.texts for d in draws} == SAID
    assert {qa.id: [qa.answer, *qa.alternatives] for qa in qas} == TARGETS
    marks = dict(zip([d.id for d in draws], scores_from_table(table, "includes")))
    for id, texts in SAID.items():
        expected = [math.nan if t is None else any(a.lower() in t.lower() for a in TARGETS[id]) for t in texts]
        np.testing.assert_array_equal(marks[id], np.array(expected, float))


def test_inspect_takes_our_scores(tmp_path):
    log = run(tmp_path, includes())
    draws, qas = draws_from_table(read_answers(log.location))
    x = score_draws(draws, qas, "rouge_l_f1")
    file = write_inspect_scores(tmp_path/"scores.jsonl", draws, x)
    scored = score(read_eval_log(log.location), precomputed_scores(str(file)), action="overwrite", display="none")
    seen = {(s.id, s.epoch): s.scores["precomputed_scores"].value for s in scored.samples
            if "precomputed_scores" in (s.scores or {})}
    assert seen == pytest.approx({(d.id, i + 1): float(v) for d, row in zip(draws, x) for i, v in enumerate(row)
                                  if not math.isnan(v)})
    assert len(seen) == 11


@solver
def lettered():
    "The first epoch says A, the second B."
    async def solve(state, generate):
        for i in range(2): state.choices.mark_choice(i, i == state.epoch - 1)
        state.output = ModelOutput.from_content("told", f"ANSWER: {'AB'[state.epoch - 1]}")
        return state
    return solve


def test_letters_of_a_multiple_choice_become_its_options(tmp_path):
    sample = Sample(id=1, input="A tree?", choices=["oak", "owl"], target="A")
    [log] = eval(Task(dataset=[sample], solver=lettered(), scorer=choice(), epochs=2), model="mockllm/model",
                 log_dir=str(tmp_path), display="none")
    assert log.status == "success", log.error
    table = read_answers(log.location)
    assert table.reference.tolist() == ["oak", "oak"] and table.answer.tolist() == ["ANSWER: A", "ANSWER: B"]
    assert table.choice.tolist() == [1, 0]
