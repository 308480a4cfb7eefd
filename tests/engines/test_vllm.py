"""`Vllm` with a real engine: make test-engines."""
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from scipy import stats

from real_engine import CAPITALS, OPTIONS, REAL, folder, local  # noqa: F401
from probunlearn.data import Template, encode_prompt
from probunlearn.draws import Decoding
from probunlearn.engines import Vllm
from probunlearn.evaluation import evaluate
from probunlearn.exact import sequence_logprobs
from probunlearn.runs import read_run

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason="needs vLLM: make test-engines")
TWO = Decoding(max_new_tokens=2)


@pytest.fixture(scope="module")
def model(folder): return Vllm(folder, **OPTIONS)


def exact(local, qa, sequences, decoding):
    prompt = encode_prompt(local.tok, qa.question, local.template)
    return sequence_logprobs(local, prompt, sequences, decoding)


def test_greedy_is_the_same_here_and_there(model, local):
    short = Decoding(max_new_tokens=12)
    here, there = ([d.texts for d in m.greedy(CAPITALS, short)] for m in (local, model))
    assert here == there and (not REAL or "Paris" in there[0][0])


@pytest.mark.parametrize("decoding", [
    Decoding(max_new_tokens=8), Decoding(temperature=.7, top_p=.9, max_new_tokens=8),
    Decoding(top_k=5, max_new_tokens=8)])
def test_log_probabilities_are_those_of_the_decoding(model, local, decoding):
    for qa, d in zip(CAPITALS, model.draw(CAPITALS, 32, decoding)):
        np.testing.assert_allclose(d.logprobs, exact(local, qa, d.tokens, decoding), atol=2e-3)


def pvalue(d, p):
    "χ² of the distinct answers that are expected at least five times, the others together."
    expected, seen = d.n * p, d.counts.astype(float)
    large = expected >= 5
    f = np.append(expected[large], d.n - expected[large].sum())
    o = np.append(seen[large], d.n - seen[large].sum())
    return stats.chi2.sf(((o - f)**2 / f).sum(), len(f) - 1) if len(f) > 1 else 1.


@pytest.mark.parametrize("seed", range(5))
def test_first_two_tokens_follow_the_exact_law(model, local, seed):
    "A right engine fails one of the 15 tests with probability 1.5e-3. A bare prompt is short, and many answers flat."
    short = Template("{question}")
    found = model.replace(template=short).draw(CAPITALS, 1024, TWO, seed)
    here = local.replace(template=short)
    values = [pvalue(d, np.exp(exact(here, qa, d.tokens, TWO))) for qa, d in zip(CAPITALS, found)]
    print(f"seed {seed}: p = {np.round(values, 4)}, {[len(d.answers) for d in found]} distinct")
    assert min(values) > 1e-4


def test_the_same_seed_repeats_nearly_all_draws(model):
    once, again = (model.draw(CAPITALS, 64, TWO, 7) for _ in range(2))
    share = np.mean([a == b for x, y in zip(once, again) for a, b in zip(x.texts, y.texts)])
    part = model.draw(CAPITALS[:1], 64, TWO, 7, start=48)[0].texts
    assert share > .98 and np.mean([a == b for a, b in zip(part, once[0].texts[48:])]) > .85
    assert model.draw(CAPITALS[:1], 64, TWO, 8)[0].texts != once[0].texts


RUN = """
import sys
sys.path[:0] = {path!r}
from real_engine import CAPITALS, OPTIONS
from probunlearn.draws import Decoding
from probunlearn.engines import Vllm
from probunlearn.evaluation import evaluate
model = Vllm({folder!r}, at_once=24, **OPTIONS)
evaluate(model, CAPITALS, 128, decoding=Decoding(max_new_tokens=4), out={out!r}, progress=False)
"""


def there(out):
    if not (out/"run.json").exists(): return {}
    run = read_run(out)
    found = {qa.id: run.draws(qa) for qa in CAPITALS}
    return {(id, i): t for id, d in found.items() if d for i, t in enumerate(d.texts) if t is not None}


def test_a_run_that_is_killed_five_times_goes_on(folder, tmp_path):
    "It ends in the draws of a run that nobody killed, but for those few that vLLM rounds otherwise in another batch."
    fixed = dict(path=sys.path[:6], folder=str(folder))
    script, calm = (RUN.format(**fixed, out=str(tmp_path/name)) for name in ("run", "calm"))
    before = {}
    for _ in range(5):
        child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while child.poll() is None and len(there(tmp_path/"run")) < len(before) + 24: time.sleep(.05)
        assert child.poll() is None                                     # still at work
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        now = there(tmp_path/"run")
        assert before.items() <= now.items() and len(now) > len(before)
        before = now
    for code in (script, calm): subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    found, whole = there(tmp_path/"run"), there(tmp_path/"calm")
    assert before.items() <= found.items() and found.keys() == whole.keys() and len(found) == 128 * len(CAPITALS)
    share = np.mean([found[draw] == whole[draw] for draw in whole])
    print(f"killed after draws {len(before)} of {len(found)} for the fifth time; {share:.2%} are those of a calm run")
    assert share > .98


def test_an_evaluation_is_the_same_call(model, tmp_path):
    report = evaluate(model, CAPITALS, 64, decoding=Decoding(max_new_tokens=12), out=tmp_path/"run", progress=False)
    assert json.loads((tmp_path/"run"/"run.json").read_text())["settings"]["engine"] == "vllm"
    assert "drawn by vLLM: a seed repeats a draw up to rounding" in report.claims[-1]
    print("\n".join(report.claims))
    assert not REAL or report.leaks.any()
