"""What the tree before `LocalModel` made: the same seeds give the same draws and weights, and a run folder of then goes on."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from probunlearn.data import fictional_authors
from probunlearn.draws import Decoding
from probunlearn.evaluation import evaluate
from probunlearn.models import small_model
from probunlearn.reading import report_run
from probunlearn.runs import read_run

BEFORE = Path(__file__).parent/"before"
VALUES = json.loads((BEFORE/"values.json").read_text())
FORGET, RETAIN = fictional_authors("forget10"), fictional_authors("retain90")
SHORT = Decoding(max_new_tokens=48)


def digest(draws): return hashlib.sha256(json.dumps([d.texts for d in draws]).encode()).hexdigest()


def test_the_same_seed_gives_the_same_draws():
    kept, model = VALUES["draws"], small_model("retain", device="cpu", dtype=torch.float64)
    draws = model.draw(FORGET[:10], kept["n"], SHORT, kept["seed"], progress=False)
    assert digest(draws) == kept["texts"] and [len(d.answers) for d in draws] == kept["distinct"]
    assert [float(sum(d.logprobs)) for d in draws] == pytest.approx(kept["logprob"], abs=1e-6)
    assert [d.texts[0] for d in model.greedy(FORGET[:10], SHORT)] == kept["greedy"]


def test_an_npo_run_ends_with_the_same_weights():
    from probunlearn.training import UnlearnConfig, unlearn
    kept, model = VALUES["npo"], small_model("full", device="cpu", dtype=torch.float64)
    config = UnlearnConfig(method="npo", beta=8, retain_weight=3, lr=1e-4, steps=6, batch_size=4, lambda_f=1,
                           lambda_r=-.25, entropy_on="own", seed=3)
    history = unlearn(model, FORGET[:8], RETAIN[:16], config)
    assert [row["loss"] for row in history.rows] == pytest.approx(kept["loss"], abs=1e-9)
    norms = {name: float(p.detach().norm()) for name, p in model.lm.named_parameters()}
    assert norms == pytest.approx(kept["norms"], rel=1e-9)


@pytest.fixture
def run(tmp_path): return Path(shutil.copytree(BEFORE/"run", tmp_path/"run"))


def test_a_run_of_then_reports_the_same(run, tmp_path):
    then = json.loads((BEFORE/"report.json").read_text())
    report_run(run, n=256, name="before", n_retain=64, source=then["how"]["source"]).save(tmp_path/"report.html")
    now = json.loads((tmp_path/"report.json").read_text())
    for name in ("score", "leak_at", "alpha", "looks", "models", "anytime"): assert now[name] == then[name]
    for name in ("average leak", "worst question", "certified questions"):
        was, new = then["bounds"][name], now["bounds"][name]
        assert {k: new[k] for k in ("alpha", "n", "sampling")} == {k: was[k] for k in ("alpha", "n", "sampling")}
        if name == "average leak": assert (new["value"], new["method"]) == (was["value"], was["method"])   # exact
        elif name == "worst question": assert new["value"] < was["value"]       # pays for one question, not for all
        else: assert new["value"] >= was["value"]
    assert now["summary"].keys() >= then["summary"].keys()
    same = [name for name in then["summary"] if name != "worst"]
    was, new = ([report["summary"][name] for name in same] for report in (then, now))
    assert new == pytest.approx(was, rel=1e-12)             # the last bit is that of numpy's version
    for was, row in zip(then["questions"], now["questions"], strict=True):
        means = {name for name in was if name.startswith(("mean_", "std_", "ed_"))}
        for name in was.keys() - means - {"prompt", "asked"}: assert row[name] == was[name], name
        for name in means: assert row[name] <= was[name] * 1.05, name           # bounds on means became tighter


def test_a_run_of_then_goes_on(run):
    model, notes = small_model("retain", device="cpu"), json.loads((run/"run.json").read_text())
    (run/"run.json").write_text(json.dumps(notes | dict(made=model.made)))      # whatever versions are here today
    how = dict(decoding=SHORT, seed=7, retain=RETAIN[:2], n_retain=64, name="before", progress=False)
    kept = read_run(run)
    kept = np.array([kept.draws(qa).texts for qa in FORGET[:3]])
    grown = evaluate(model, FORGET[:3], 512, out=run, **how)
    fresh = evaluate(model, FORGET[:3], 512, **how)
    there, here = (np.array([d.texts for d in report.forget.draws]) for report in (grown, fresh))
    assert (there[:, :256] == kept).all() and (there[:, 256:] == here[:, 256:]).all()
    assert (kept != here[:, :256]).mean() < .01     # on the border another processor rounds otherwise
    assert grown.anytime and not fresh.anytime
    with pytest.raises(ValueError, match="another run|another model"):
        evaluate(small_model("full", device="cpu"), FORGET[:3], 512, out=run, **how)
