"""Every lesson has steps to write: a hidden cell with solution and check, a starter, hint and solution folded below it,
and a cell that checks.

`Exercise` itself refuses a check that takes a wrong answer, so nbdev_test, which leaves starters out, runs that; here it
is seen that the pieces are there, in order, and folded. A lesson may also end with one exercise in the older form:
reference, starter, check, wrong answers.
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


# Steps

LEAST = 5       # steps of a lesson
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
    if len(at) < LEAST: return [f"{len(at)} steps, and there should be {LEAST}"]
    return sum((lacks(cells, i) for i in at), told_above(cells))


def in_steps(path): return "import Exercise" in path.read_text(encoding="utf-8")
def all_cells(path): return [(cell.cell_type, cell.source) for cell in nbformat.read(path, as_version=4).cells]


@pytest.mark.parametrize("path", [*filter(in_steps, LESSONS)], ids=lambda path: path.stem)
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
SPOILT_STEP = [
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


# The older form

def code_cells(path): return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
def code(path): return [cell.source for cell in code_cells(path) if cell.source.strip()]


OLDER = [path for path in LESSONS if not in_steps(path)]


@pytest.mark.parametrize("path", OLDER, ids=lambda path: path.stem)
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
