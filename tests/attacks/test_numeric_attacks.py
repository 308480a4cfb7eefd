"""Numbers that are none, infinite, or out of range: refused by name before they reach a bound."""
import math

import numpy as np
import pytest

from parrot import QAS, SHORT, Parrot
from probunlearn.bounds import binary_bound, draws_needed, mean_bound
from probunlearn.checks import whole
from probunlearn.draws import Decoding, draws_from_texts, join_draws, load_draws, save_draws
from probunlearn.evaluation import evaluate
from probunlearn.loop import TrainConfig
from probunlearn.metrics import dataset_claims, seen_mass_bounds
from probunlearn.planning import RunPlan
from probunlearn.report import Asked, Report
from probunlearn.runs import checked_plan
from probunlearn.scores import keywords_leaked, score_answers
from probunlearn.training import UnlearnConfig

NAN, INF = math.nan, math.inf
X = np.array([0., .5, 1.])

CASES = {       # what is tried → part of the sentence
    "mean_bound NaN": (lambda: mean_bound(np.array([0., NAN])), "got nan in row 0"),
    "mean_bound inf": (lambda: mean_bound(np.array([0., INF])), "got inf in row 0"),
    "mean_bound below": (lambda: mean_bound(np.array([-.1, 0.])), "got -0.1 in row 0"),
    "mean_bound above": (lambda: mean_bound(np.array([1.1, 0.])), "got 1.1 in row 0"),
    "mean_bound empty": (lambda: mean_bound(np.array([])), "got (0,)"),
    "mean_bound of texts": (lambda: mean_bound(np.array(["a"])), "could not convert string"),
    "mean_bound alpha 0": (lambda: mean_bound(X, 0), "alpha must lie"),
    "mean_bound alpha 1": (lambda: mean_bound(X, 1), "alpha must lie"),
    "mean_bound alpha NaN": (lambda: mean_bound(X, NAN), "alpha must lie"),
    "mean_bound alpha text": (lambda: mean_bound(X, "x"), "alpha must lie"),
    "mean_bound method": (lambda: mean_bound(X, method="magic"), "method"),
    "mean_bound side": (lambda: mean_bound(X, side="left"), "side"),
    "binary_bound too many": (lambda: binary_bound(5, 4), "0..n, got 5"),
    "binary_bound below": (lambda: binary_bound(-1, 4), "0..n, got -1"),
    "binary_bound NaN": (lambda: binary_bound(NAN, 4), "0..n, got nan"),
    "binary_bound half": (lambda: binary_bound(.5, 4), "0..n, got 0.5"),
    "binary_bound none": (lambda: binary_bound(0, 0), "at least 1, got 0"),
    "binary_bound alpha": (lambda: binary_bound(0, 4, INF), "alpha must lie"),
    "draws_needed 0": (lambda: draws_needed(0), "got 0"), "draws_needed NaN": (lambda: draws_needed(NAN), "got nan"),
    "claims NaN": (lambda: dataset_claims(np.array([[NAN, 0.]]), alpha=.01, leak_at=1.), "got nan in row 0"),
    "claims leak_at": (lambda: dataset_claims(np.array([[0., 1.]]), alpha=.01, leak_at=NAN), "leak_at must lie"),
    "claims alpha": (lambda: dataset_claims(np.array([[0., 1.]]), alpha=2, leak_at=1.), "alpha must lie"),
    "seen mass above 1": (lambda: seen_mass_bounds(np.array([.9, .9]), np.array([0., 1.])), "sum 1.8"),
    "seen mass NaN": (lambda: seen_mass_bounds(np.array([NAN]), np.array([0.])), "sum nan"),
    "seen mass below 0": (lambda: seen_mass_bounds(np.array([-.1]), np.array([0.])), "sum -0.1"),
    "plan n": (lambda: RunPlan(0), "n must be"),
    "plan n NaN": (lambda: RunPlan(NAN), "n must be"),
    "plan n inf": (lambda: RunPlan(INF), "n must be"),
    "plan questions": (lambda: RunPlan(1, 0), "questions must be"),
    "plan tau": (lambda: RunPlan(1, 1, tau=1), "tau must lie"),
    "score NaN": (lambda: score_answers(["a"], QAS[0], lambda a, qa: NAN), "must lie in [0, 1], got nan"),
    "score None": (lambda: score_answers(["a"], QAS[0], lambda a, qa: None), "got None"),
    "score 2": (lambda: score_answers(["a"], QAS[0], lambda a, qa: 2), "must lie in [0, 1], got 2"),
    "score -1": (lambda: score_answers(["a"], QAS[0], lambda a, qa: -1), "got -1"),
    "score inf": (lambda: score_answers(["a"], QAS[0], lambda a, qa: INF), "must lie in [0, 1], got inf"),
    "no key word": (lambda: keywords_leaked("a", []), "at least one key word"),
    "empty key word": (lambda: keywords_leaked("a", [" "]), "at least one visible character"),
    "key word a text": (lambda: keywords_leaked("a", "abc"), "keywords must be a list"),
    "temperature": (lambda: Decoding(temperature=NAN), "temperature must be"),
    "temperature -1": (lambda: Decoding(temperature=-1), "temperature must be"),
    "temperature inf": (lambda: Decoding(temperature=INF), "temperature must be"),
    "temperature text": (lambda: Decoding(temperature="hot"), "temperature must be"),
    "temperature None": (lambda: Decoding(temperature=None), "temperature must be"),
    "top_p 0": (lambda: Decoding(top_p=0), "top_p must be"),
    "top_p 2": (lambda: Decoding(top_p=2), "top_p must be"),
    "top_p NaN": (lambda: Decoding(top_p=NAN), "top_p must be"),
    "top_k half": (lambda: Decoding(top_k=.5), "top_k must be"),
    "top_k inf": (lambda: Decoding(top_k=INF), "top_k must be"),
    "no tokens": (lambda: Decoding(max_new_tokens=0), "max_new_tokens must be"),
    "NaN tokens": (lambda: Decoding(max_new_tokens=NAN), "max_new_tokens must be"),
    "lr NaN": (lambda: TrainConfig(lr=NAN), "lr must be"),
    "lr inf": (lambda: TrainConfig(lr=INF), "lr must be a finite number"),
    "lr 0": (lambda: TrainConfig(lr=0), "lr must be"),
    "epochs NaN": (lambda: TrainConfig(epochs=NAN), "epochs must be"),
    "epochs inf": (lambda: TrainConfig(epochs=INF), "epochs must be a finite number"),
    "steps inf": (lambda: TrainConfig(steps=INF), "steps must be"),
    "steps half": (lambda: TrainConfig(steps=1.5), "steps must be"),
    "warmup NaN": (lambda: TrainConfig(warmup=NAN), "warmup must be"),
    "decay NaN": (lambda: TrainConfig(weight_decay=NAN), "weight_decay must be"),
    "norm NaN": (lambda: TrainConfig(max_grad_norm=NAN), "max_grad_norm must be"),
    "batch inf": (lambda: TrainConfig(batch_size=INF), "batch_size must be"),
    "batch NaN": (lambda: TrainConfig(batch_size=NAN), "batch_size must be"),
    "epochs 1e300": (lambda: TrainConfig(epochs=1e300).updates(4), "epochs=1e+300"),
    "batch 1e9": (lambda: TrainConfig(batch_size=10**9).updates(4), "batch_size=1000000000"),
    "steps 1e18": (lambda: TrainConfig(steps=10**18).updates(4), "steps=1000000000000000000"),
    "accumulate 1e9": (lambda: TrainConfig(accumulate=10**9).updates(4), "accumulate=1000000000"),
    "lambda NaN": (lambda: UnlearnConfig(lambda_f=NAN), "lambda_f must be"),
    "lambda inf": (lambda: UnlearnConfig(lambda_r=INF), "lambda_r must be"),
    "beta NaN": (lambda: UnlearnConfig(beta=NAN), "beta must be"),
    "n 0": (lambda: evaluate(Parrot(), QAS, 0), "n must be"),
    "n NaN": (lambda: evaluate(Parrot(), QAS, NAN), "n must be"),
    "n inf": (lambda: evaluate(Parrot(), QAS, INF), "n must be"),
    "n text": (lambda: evaluate(Parrot(), QAS, "many"), "n must be"),
    "seed NaN": (lambda: evaluate(Parrot(), QAS, 4, seed=NAN), "seed must be"),
    "seed -1": (lambda: evaluate(Parrot(), QAS, 4, seed=-1), "seed must be"),
    "alpha None": (lambda: evaluate(Parrot(), QAS, 4, alpha=None), "alpha must lie"),
    "leak_at NaN": (lambda: evaluate(Parrot(), QAS, 4, leak_at=NAN), "leak_at must lie"),
    **{f"limit {limit}": (lambda limit=limit: evaluate(Parrot(), QAS, 4, limit=limit), "limit must be an average leak")
       for limit in ("0.5", [.5], NAN, 0, 1, True)},
    "about 7": (lambda: evaluate(Parrot(), QAS, 4, about=7), "about must be a sentence, as text, got int"),
    "name 7": (lambda: evaluate(Parrot(), QAS, 4, name=7), "name must be a text, or None, got int"),
    "n_retain 0": (lambda: evaluate(Parrot(), QAS, 4, n_retain=0), "n_retain must be"),
    "no questions": (lambda: evaluate(Parrot(), [], 4), "no questions"),
    "looks evil": (lambda: checked_plan("evil"), "looks must be"),
    "looks NaN": (lambda: checked_plan(NAN), "looks must be"),
    "looks 10,000,000": (lambda: checked_plan(10**7), "looks must be"),
    "looks of NaN": (lambda: checked_plan([NAN]), "looks must be"),
    "looks falling": (lambda: checked_plan([4, 2]), "looks must be"),
    "looks twice": (lambda: checked_plan([4, 4]), "looks must be"),
    "whole NaN": (lambda: whole("x", NAN), "x must be a whole number"),
    "whole most": (lambda: whole("x", 5, most=4), "x must be at most 4, got 5"),
    "whole text": (lambda: whole("x", "1"), "x must be"),
    "joined": (lambda: join_draws(draws_from_texts("a", ["x"]), draws_from_texts("b", ["x"])), "only draws of one run"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_number_that_is_none_is_refused_by_name(name):
    tried, sentence = CASES[name]
    with pytest.raises(ValueError) as error: tried()
    assert sentence in str(error.value) and str(error.value)


@pytest.mark.parametrize("looks, models", [(0, 1), (1, 0), (NAN, 1), (1, 1.5), (-1, 1)])
def test_a_report_counts_looks_and_models(looks, models):
    asked = Asked(QAS, Parrot().draw(QAS, 4), Parrot().greedy(QAS))
    with pytest.raises(ValueError, match="must be a whole number >= 1"): Report("m", asked, looks=looks, models=models)


ASKED = "must be what was asked, Asked(questions, draws, greedy answers), got"
FIELDS = [      # of a report, values of the wrong kind, what is said
    ("limit", ("0.5", [.5], {}, True, NAN, 0, 1, 1 + 0j), "limit must be an average leak probability between 0 and 1"),
    ("alpha", ("0.01", None, 0, 1, NAN), "alpha must lie strictly between 0 and 1"),
    ("leak_at", ("1", None, 0, 2, NAN), "leak_at must lie in (0, 1]"),
    ("looks", ("2", None, 0), "looks must be a whole number >= 1"),
    ("models", ("2", None, .5), "models must be a whole number >= 1"),
    ("name", (7, None, b"m"), "name must be a text, got"),
    ("about", (7, None, ["x"]), "about must be a sentence, as text, got"),
    ("control_name", (7, None), "control_name must be a text, got"),
    ("how", (None, "x", [1]), "how must be a dict, got"),
    ("known", (None, {}), "known must be a list of dicts, got"),
    ("forget", (None, QAS), f"forget {ASKED}"),
    ("retain", (QAS, 7), "retain must be None, or what was asked"),
    ("control", ("model", 7), "control must be None, or what was asked"),
    ("score", (None, 7, "bleu"), "score must be a function or one of"),
]


@pytest.mark.parametrize("field, value, sentence", [(field, value, said) for field, values, said in FIELDS
                                                    for value in values])
def test_a_report_refuses_what_is_of_the_wrong_kind(field, value, sentence):
    asked = Asked(QAS, Parrot().draw(QAS, 4), Parrot().greedy(QAS))
    with pytest.raises(ValueError) as error: Report(**dict(name="m", forget=asked) | {field: value})
    assert sentence in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize("logprobs", [[.5], [INF], [5.]])
def test_a_probability_above_1_is_not_read_back(logprobs, tmp_path):
    from dataclasses import replace
    d = replace(draws_from_texts("q", ["a", "a"], decoding=SHORT), logprobs=np.array(logprobs))
    save_draws(d, tmp_path/"d.parquet")
    with pytest.raises(ValueError, match="d.parquet is not a whole file of draws .a log-probability lies above 0"):
        load_draws(tmp_path/"d.parquet")
