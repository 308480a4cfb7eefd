"""The wheel carries its data and works where nothing else of this project is."""
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parent.parent
READS_ITS_DATA = """
import sys
sys.path[:0] = sys.argv[1:]
import probunlearn
from probunlearn.data import fictional_authors
from probunlearn.models import small_model
model = small_model("full")
print(len(fictional_authors("forget10")), model.lm.num_parameters() > 1e5, model.tok.eos_token is not None, probunlearn.__file__)
"""


def run(*command, **options):
    "What `command` prints; its error text is shown when it fails."
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "The wheel, built from a copy so that no old build folder leaks in."
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"): shutil.copy(ROOT/name, copy)
    left = shutil.ignore_patterns("__pycache__")
    for name in ("probunlearn", "data"): shutil.copytree(ROOT/name, copy/name, ignore=left)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", copy, cwd=copy)
    return next((copy/"dist").glob("*.whl"))


def test_every_data_file_is_inside(wheel):
    names = set(ZipFile(wheel).namelist())
    found = [p for p in (ROOT/"data").rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    files = [p.relative_to(ROOT/"data") for p in found]
    assert {f"probunlearn/_data/{p.as_posix()}" for p in files} <= names
    records = {"fictional_authors/forget10.jsonl", "library/forbidden.jsonl"}
    parts = ("model.safetensors", "tokenizer.json")
    models = {f"small_lm/{lm}/{file}" for lm in ("full", "retain", "npo", "librarian") for file in parts}
    assert {f"probunlearn/_data/{needed}" for needed in records | models} <= names
    assert not [name for name in names if not name.startswith(("probunlearn/", "probunlearn-"))]


def test_installed_it_reads_its_own_data(wheel, tmp_path):
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path/"site", wheel)
    *facts, where = run(sys.executable, "-I", "-c", READS_ITS_DATA, tmp_path/"site", cwd=tmp_path).split()
    assert facts == ["40", "True", "True"] and Path(where).is_relative_to(tmp_path)


@pytest.mark.slow
def test_an_empty_environment_is_enough(wheel, tmp_path):
    venv.create(tmp_path/"env", with_pip=True)
    python = tmp_path/"env"/("Scripts" if os.name == "nt" else "bin")/"python"
    run(python, "-m", "pip", "install", "-q", "-c", ROOT/"constraints.txt", wheel)
    *facts, where = run(python, "-I", "-c", READS_ITS_DATA, cwd=tmp_path).split()
    assert facts == ["40", "True", "True"] and Path(where).is_relative_to(tmp_path)
    assert "demo" in run(python.with_name("probunlearn"), "--help", cwd=tmp_path)
    shutil.copy(ROOT/"nbs"/"tutorials"/"01_greedy_misleads.ipynb", tmp_path/"lesson.ipynb")
    run(python, "-m", "pip", "install", "-q", "-c", ROOT/"constraints.txt", "nbclient", "ipykernel")
    assert "lesson.ipynb" in run(python, ROOT/"tools"/"execute.py", tmp_path/"lesson.ipynb", cwd=tmp_path)
