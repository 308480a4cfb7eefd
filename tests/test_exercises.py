"""Every lesson has steps to write: a hidden cell with solution and check, a starter, hint and solution folded below it,
and a cell that checks.

`Exercise` itself refuses a check that takes a wrong answer, so nbdev_test, which leaves starters out, runs that; here it
is seen that the pieces are there, in order, and folded.
"""
import ast
import re

import nbformat
import pytest

from probunlearn.widgets import Exercise

from cells import NBS

LESSONS = sorted((NBS/"tutorials").glob("*.ipynb"))


def flagged(source, flag): return bool(re.search(rf"^#\|\s*{flag}\s*$", source, re.M))
def functions(source): return {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
def is_open(node): return isinstance(node, ast.Constant) and node.value in (..., None)


# Steps

LEAST, MOST = 5, 8      # steps of a lesson
FOLDED = "<details><summary>{}"


def steps(cells):
    "Where the starters are, among (type, source) of all cells."
    return [i for i, (kind, source) in enumerate(cells) if kind == "code" and flagged(source, "eval: false")]


def wrong_answers(hidden, step):
    "The wrong answers that a hidden cell gives to `step = Exercise(…)`, or None where it makes none."
    for node in ast.parse(hidden).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == step and ast.unparse(node.value.func) == "Exercise":
            return next(k.value.elts for k in node.value.keywords if k.arg == "wrong")
    return None


def solution(markdown):
    "The code below the word Solution."
    found = re.search(r"<summary>Solution</summary>\n\n```python\n(.*?)\n```\n\n</details>", markdown, re.S)
    return found[1] if found else ""


def lacks(cells, at):
    "What the step with its starter at `at` lacks."
    hidden, starter, folded, check = (source for _, source in cells[at - 1:at + 3])
    name, left = next(iter(functions(starter).items()))
    if not is_open(getattr(left.body[-1], "value", None)): return [f"{name}: the starter is to be left open"]
    if not (flagged(hidden, "hide") and name in functions(hidden)): return [f"no hidden solution of {name}"]
    called = re.search(rf"^{name} = (\w+)\({name}\)$", check, re.M)
    if not called or flagged(check, "hide"): return [f"no visible check of {name}"]
    wrong = wrong_answers(hidden, called[1])
    if wrong is None or len(wrong) < 3: return [f"{name}: three wrong answers are to be tried"]
    if not all(ast.literal_eval(pair.elts[1]) for pair in wrong): return [f"{name}: a wrong answer without a message"]
    if FOLDED.format("Hint") not in folded: return [f"{name}: no folded hint"]
    if solution(folded) != ast.get_source_segment(hidden, functions(hidden)[name]):
        return [f"{name}: the folded solution isn't the hidden one"]
    return []


def told_above(cells):
    "Hints and solutions that stand above their starter."
    at = set(steps(cells))
    return [source[:40] for i, (kind, source) in enumerate(cells)
            if kind == "markdown" and "<summary>Solution" in source and i - 1 not in at]


def incomplete(cells):
    "What the steps of a lesson lack, given (type, source) of its cells."
    at = steps(cells)
    if not LEAST <= len(at) <= MOST: return [f"{len(at)} steps, and there should be {LEAST} to {MOST}"]
    return sum((lacks(cells, i) for i in at), told_above(cells))


def all_cells(path): return [(cell.cell_type, cell.source) for cell in nbformat.read(path, as_version=4).cells]


WHAT_IT_TAKES = re.compile(r"^[●○]{3} · \d+ minutes to work through[,.] .*\b(minute|seconds)\b", re.M)


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_says_what_it_takes_and_begins_with_few_imports(path):
    cells = all_cells(path)
    first = next(source for kind, source in cells if kind == "code" and not flagged(source, "hide"))
    assert WHAT_IT_TAKES.search(cells[0][1])
    assert all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse(first).body)
    assert len(ast.parse(first).body) <= 5


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_compares_with_the_package(path):
    heads = re.findall("^## .*$", "\n".join(source for kind, source in all_cells(path) if kind == "markdown"), re.M)
    assert any("the package" in head for head in heads[-2:])


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_steps_are_complete(path): assert incomplete(all_cells(path)) == []


HIDDEN = """#| hide
def f(x): return x

def check_f(answer):
    assert answer(1) == 1, 'one stays one'
    return 'one is one'

step_1 = Exercise(f, check_f, wrong=[(abs, 'one'), (min, 'one'), (max, 'one')])"""
BELOW = "<details><summary>Hint</summary>\n\nx\n\n</details>\n\n" + \
    "<details><summary>Solution</summary>\n\n```python\ndef f(x): return x\n```\n\n</details>"
STEP = [("code", HIDDEN), ("code", "#| eval: false\ndef f(x): ..."), ("markdown", BELOW), ("code", "f = step_1(f)")]
SPOILT_STEP = [     # cell, what is taken from it, what stands there instead
    (0, "#| hide\n", ""), (0, "(max, 'one')", ""), (0, "'one'), (min", "''), (min"), (0, "def f", "def g"),
    (1, "...", "return x"), (2, "Hint", "Help"), (2, "return x", "return y"), (3, "f = ", ""), (3, "f = ", "#| hide\nf = "),
]


@pytest.mark.parametrize("cell, old, new", SPOILT_STEP)
def test_an_incomplete_step_is_seen(cell, old, new):
    spoilt = list(STEP)
    spoilt[cell] = spoilt[cell][0], spoilt[cell][1].replace(old, new, 1)
    assert old in STEP[cell][1] and incomplete(STEP * LEAST) == []
    assert len(incomplete(STEP * (LEAST - 1) + spoilt)) == 1
    assert incomplete(STEP) and incomplete([*STEP * LEAST, ("markdown", BELOW)])


def test_a_check_that_takes_a_wrong_answer_is_refused(capsys):
    def check(answer):
        assert answer(3) == 6, "twice 3 is 6"
        return "Twice."
    double = Exercise(lambda x: 2 * x, check, wrong=[(lambda x: x, "twice")])
    assert double(abs) is double.solution and "Not yet. twice 3 is 6" in capsys.readouterr().out
    assert double(double.solution) is double.solution and "Right. Twice." in capsys.readouterr().out
    assert double(lambda x: x / 0) is double.solution and "ZeroDivisionError" in capsys.readouterr().out
    for solution, wrong in ((abs, []), (lambda x: 2 * x, [(lambda x: x + x, "")]), (lambda x: 2 * x, [(abs, "no")])):
        with pytest.raises(ValueError): Exercise(solution, check, wrong)


def code_cells(path): return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_hidden_cells_are_folded_in_jupyterlab(path):
    hidden = [cell for cell in code_cells(path) if flagged(cell.source, "hide")]
    open_ones = [cell.source for cell in hidden if not cell.metadata.get("jupyter", {}).get("source_hidden")]
    assert hidden and open_ones == []
