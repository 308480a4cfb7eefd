"""One direction: a module imports only modules of earlier parts, or earlier ones of its own; parts 1 to 4 load no torch."""

import ast
import re
import subprocess
import sys

import pytest

import probunlearn
from cells import code_cells, notebooks

CELLS = {path: [cell.source for cell in code_cells(path)] for path in notebooks()}
NAMED = re.compile(r"^#\| *default_exp +(\w+)", re.M)
MODULES = {name: path for path, cells in CELLS.items() for source in cells for name in NAMED.findall(source)}
FLOOR = [name for name, path in MODULES.items() if path.parent.name < "5"]     # torch-free


def loaded_by(*modules):
    "What a fresh Python has loaded after importing `modules`."
    code = f"import sys, {', '.join(modules)}; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def imported(source):
    "The modules of this package that `source` imports."
    for node in ast.walk(ast.parse(re.sub(r"^\s*[%!].*$", "", source, flags=re.M))):
        names = []
        if isinstance(node, ast.ImportFrom): names = [node.module or ""]
        if isinstance(node, ast.Import): names = [alias.name for alias in node.names]
        yield from (name.split(".")[1] for name in names if name.startswith("probunlearn."))


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module):
    order = list(MODULES)
    exported = [source for source in CELLS[MODULES[module]] if re.search(r"^#\| *export", source, re.M)]
    used = {name for source in exported for name in imported(source)} - {"_data"}
    assert used <= set(order[:order.index(module)])


def test_the_floor_loads_no_torch():
    loaded = loaded_by(*(f"probunlearn.{name}" for name in FLOOR))
    assert not loaded & {"torch", "transformers", "accelerate", "peft", "datasets"}


def test_statistics_load_fast():
    loaded = loaded_by("probunlearn.bounds", "probunlearn.metrics", "probunlearn.scores")
    assert not loaded & {"torch", "scipy.stats", "pandas", "seaborn", "nltk", "matplotlib"}


def test_the_package_itself_loads_nothing():
    assert not loaded_by("probunlearn") & {"torch", "numpy", "probunlearn.bounds"}


def test_public_names_are_found_on_first_use():
    assert probunlearn.binary_bound is probunlearn.bounds.binary_bound
    assert "binary_bound" in dir(probunlearn)
    with pytest.raises(AttributeError, match="no public name 'nonsense'"): probunlearn.nonsense
    with pytest.raises(ImportError): from probunlearn import nonsense


def test_every_public_name_has_one_home():
    names = [name for module in MODULES for name in getattr(probunlearn, module).__all__]
    twice = {name for name in names if names.count(name) > 1}
    assert not twice and not set(names) & set(MODULES)
