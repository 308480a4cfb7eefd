"""Benchmarks are run by hand; here only that each one still finds what it imports."""
import importlib.util
from pathlib import Path

import pytest


SCRIPTS = sorted((Path(__file__).parent.parent/"benchmarks").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_a_benchmark_finds_its_imports(script):
    spec = importlib.util.spec_from_file_location(f"benchmark_{script.stem}", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert callable(module.main)
