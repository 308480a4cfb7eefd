"""Every lesson ends with an exercise: a hidden reference, a starter, a check for the reader, and hidden wrong answers.

The starter stands behind the reference, so that the reader's own answer is what is checked. A wrong answer fails the
check with a message that helps. nbdev_test, which leaves starters out, runs the hidden cells; here it is only seen that
they are there and folded.
"""
import ast
import re

import nbformat
import pytest

from cells import NBS

LESSONS = sorted((NBS/"tutorials").glob("*.ipynb"))


def flagged(source, flag): return bool(re.search(rf"^#\|\s*{flag}\s*$", source, re.M))
def functions(source): return {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
def is_open(node): return isinstance(node, ast.Constant) and node.value in (..., None)


def complaints(sources):
    "What the exercise of a lesson lacks, given the sources of its code cells."
    starts = [i for i, source in enumerate(sources) if flagged(source, "eval: false")]
    if len(starts) != 1 or len(sources) - starts[0] != 3 or not starts[0]:
        return ["a lesson ends with four code cells: reference, starter (eval: false), check, wrong answers"]
    reference, starter, check, wrong = sources[-4:]
    name, left = next(iter(functions(starter).items()))
    found = []
    if not is_open(getattr(left.body[-1], "value", None)): found.append("the starter is to be left open")
    if not (flagged(reference, "hide") and name in functions(reference)): found.append(f"no hidden reference of {name}")
    if is_unchecked(check, name): return [*found, f"no visible check({name})"]
    asserts = [node for node in ast.walk(functions(check)["check"]) if isinstance(node, ast.Assert)]
    if not all(node.msg for node in asserts): found.append("an assert of the check says nothing")
    return found + untried(wrong)


def is_unchecked(check, name):
    "Whether a cell lacks a visible function `check` and its call."
    called = re.search(rf"^check\({name}\)$", check, re.M)
    return flagged(check, "hide") or "check" not in functions(check) or not called


def untried(wrong):
    "What the loop over wrong answers lacks."
    body = ast.parse(wrong).body
    loop = next((node for node in body if isinstance(node, ast.For)), None)
    if not (flagged(wrong, "hide") and loop): return ["no hidden loop over wrong answers"]
    lists = {node.targets[0].id: node.value for node in body if isinstance(node, ast.Assign)}
    pairs = lists[loop.iter.id] if isinstance(loop.iter, ast.Name) else loop.iter
    found, answers = [], [pair.elts[0] for pair in pairs.elts]
    starter_too = any(isinstance(answer, ast.Lambda) and is_open(answer.body) for answer in answers)
    if len(answers) < 3 or not starter_too: found.append("the starter and two plausible wrong answers are to be tried")
    parts = r"try: check\(wrong\)", r"assert why in str\(", r"else: raise AssertionError"
    if not all(re.search(part, wrong) for part in parts): found.append("a wrong answer must fail with its message")
    return found


def code_cells(path): return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
def code(path): return [cell.source for cell in code_cells(path) if cell.source.strip()]


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_exercise_is_complete(path): assert complaints(code(path)) == []


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_hidden_cells_are_folded_in_jupyterlab(path):
    hidden = [cell for cell in code_cells(path) if flagged(cell.source, "hide")]
    open_ones = [cell.source for cell in hidden if not cell.metadata.get("jupyter", {}).get("source_hidden")]
    assert hidden and open_ones == []


GOOD = [
    "import math",
    "#| hide\ndef f(x): return x",
    "#| eval: false\ndef f(x): ...",
    "def check(g):\n    assert g(1) == 1, 'one stays one'\ncheck(f)",
    """#| hide
for wrong, why in ((lambda x: ..., 'one'), (lambda x: -x, 'one'), (lambda x: 2, 'one')):
    try: check(wrong)
    except AssertionError as e: assert why in str(e)
    else: raise AssertionError('passed')""",
]
SPOILT = [      # cell, what is taken from it, what stands there instead
    (2, "#| eval: false\n", ""),
    (2, "...", "return x"),
    (1, "#| hide\n", ""),
    (1, "def f", "def h"),
    (3, "check(f)", ""),
    (3, ", 'one stays one'", ""),
    (3, "def", "#| hide\ndef"),
    (4, "#| hide\n", ""),
    (4, "(lambda x: ..., 'one'), ", ""),
    (4, "lambda x: ...", "lambda x: 3"),
    (4, "assert why in str(e)", "pass"),
    (4, "else: raise AssertionError('passed')", ""),
]


@pytest.mark.parametrize("cell, old, new", SPOILT)
def test_an_incomplete_exercise_is_seen(cell, old, new):
    assert complaints(GOOD) == [] and old in GOOD[cell]
    assert len(complaints([*GOOD[:cell], GOOD[cell].replace(old, new, 1), *GOOD[cell + 1:]])) == 1
    assert complaints(GOOD[:cell] + GOOD[cell + 1:]) and complaints([])
