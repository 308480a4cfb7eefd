"""What a release says about itself is said once, or checked here: version, dependencies, the developers' tools."""
import ast
import re
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

import probunlearn

ROOT = Path(__file__).parent.parent
PYPROJECT = (ROOT/"pyproject.toml").read_text(encoding="utf-8")
LISTED = re.search(r"^dependencies = \[\n(.*?)^\]", PYPROJECT, re.M | re.S)[1]
DECLARED = {name.replace("-", "_") for name in re.findall(r'"([\w-]+)[^"]*"', LISTED)}
# picked up where they are installed, or they take us up
OPTIONAL = {"liger_kernel", "vllm", "inspect_ai", "lm_eval", "gguf"}


def read(name): return (ROOT/name).read_text(encoding="utf-8")


def imports(path):
    "The packages of others that a module imports anywhere."
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import): names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom) and not node.level: names = [node.module]
        yield from (name.split(".")[0] for name in names)


@pytest.mark.parametrize("path", sorted((ROOT/"probunlearn").glob("*.py")), ids=lambda path: path.stem)
def test_every_import_is_declared(path):
    foreign = {*imports(path)} - sys.stdlib_module_names - {"probunlearn"} - OPTIONAL
    assert foreign <= DECLARED


def test_one_version_everywhere():
    settings = ConfigParser()
    settings.read(ROOT/"settings.ini")
    version = settings["DEFAULT"]["version"]
    assert probunlearn.__version__ == version                   # nbdev_export writes it there
    assert re.search(r"^version: (.*)$", read("CITATION.cff"), re.M)[1] == version
    assert re.search(r"^## (\S+),", read("CHANGELOG.md"), re.M)[1] == version


def test_tools_are_named_once():
    pinned = [name for name in (".github/workflows/test.yml", "Makefile", ".ci/run") if "nbdev==" in read(name)]
    assert pinned == []
