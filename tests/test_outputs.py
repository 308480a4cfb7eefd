"""Lessons are committed as they were run: with outputs, without errors, without traces of somebody's machine."""
import re

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager

from cells import NBS, notebooks
from execute import widgets as widget_states

HOMES = re.compile(r"/(?:home|root|Users|work|tmp)/\w")


def code_cells(path): return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def text(output):
    "Everything readable in one cell output."
    data = output.get("data", {})
    return output.get("text", "") + "".join(str(data[kind]) for kind in data if not kind.startswith("image/"))


@pytest.mark.parametrize("path", notebooks(), ids=lambda path: path.stem)
def test_outputs_are_kept_and_clean(path):
    outputs = [output for cell in code_cells(path) for output in cell.outputs]
    assert outputs, "no cell has an output: run python tools/execute.py on it"
    assert [output.ename for output in outputs if output.output_type == "error"] == []
    assert [found for output in outputs for found in HOMES.findall(text(output))] == []


def test_widgets_are_kept_with_a_picture():
    outputs = [(path.stem, output) for path in notebooks() for cell in code_cells(path) for output in cell.outputs]
    shown = [(name, output.data) for name, output in outputs if "data" in output]
    widgets = [(name, data) for name, data in shown if "application/vnd.jupyter.widget-view+json" in data]
    assert len(widgets) > 10
    assert [name for name, data in widgets if "<img alt='" not in data.get("text/html", "")] == []


@pytest.mark.parametrize("path", notebooks(), ids=lambda path: path.stem)
def test_a_widget_that_is_shown_has_its_state(path):
    "Also where a cell kept the output of an earlier run."
    view, nb = "application/vnd.jupyter.widget-view+json", nbformat.read(path, as_version=4)
    outputs = [output.get("data", {}) for cell in code_cells(path) for output in cell.outputs]
    assert {data[view]["model_id"] for data in outputs if view in data} <= {*(widget_states(nb) or {})}


@pytest.mark.parametrize("path", sorted((NBS/"tutorials").glob("*.ipynb")), ids=lambda path: path.stem)
def test_on_colab_a_lesson_first_installs_the_package(path):
    source = code_cells(path)[0].source
    class Shell:
        ran = []
        def __init__(self, module): self.module = module
        def __str__(self): return f"<{self.module} object at 0x7f>"
        def run_line_magic(self, name, line): self.ran.append((self.module, name, line))
    for module in ("ipykernel.zmqshell.ZMQInteractiveShell", "google.colab._shell.Shell"):
        exec(TransformerManager().transform_cell(source), dict(get_ipython=lambda: Shell(module)))
    assert Shell.ran == [("google.colab._shell.Shell", "pip", "install -q probunlearn")]
    assert source.startswith("#| hide")
