"""The house rules that a number can say: widths of lines, sizes of functions, how many doors.

`python tests/test_house.py MODULE …` prints them for some modules.
"""

import ast
import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/"tools"))
from cells import NBS, notebooks, code_cells      # noqa: E402

BY_POSITION = (".view", ".apply", ".save_for_backward")      # of PyTorch, which knows these arguments by place only
LIBRARY = sorted(p for p in (ROOT/"probunlearn").glob("*.py") if p.name != "_modidx.py")


def wide(texts, limit):
    "The non-blank lines of some texts, and those above a width."
    lines = [line for text in texts for line in text.splitlines() if line.strip()]
    return len(lines), [line for line in lines if len(line) > limit]


def sizes(paths):
    "The lines of each function and method."
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield node.end_lineno - node.lineno + 1, f"{path.stem}.{node.name}"


def body_sizes(paths):
    "The lines of each function's body: what stands behind its signature."
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield node.end_lineno - node.body[0].lineno + 1, f"{path.stem}.{node.name}"


def percentile(values, share):
    "The value that `share` of the values don't exceed."
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def export_cells(paths):
    "(lines, notebook, first line) of each cell that exports."
    for path in paths:
        for cell in code_cells(path):
            if {"export", "exports", "exporti"} & (cell.directives_ or {}).keys():
                lines = [line for line in cell.source.splitlines() if line.strip() and not line.startswith("#|")]
                if lines: yield len(lines), path.stem, lines[0]


def lesson_code():
    "The visible code of each lesson."
    for path in sorted((NBS/"tutorials").glob("*.ipynb")):
        for cell in code_cells(path):
            if "hide" not in (cell.directives_ or {}): yield path.stem, cell.source


def public():
    "Module → its public names."
    found = {}
    for path in LIBRARY:
        match = re.search(r"^__all__ = (\[.*?\])", path.read_text(encoding="utf-8"), re.M | re.S)
        if match: found[path.stem] = ast.literal_eval(match[1])
    return found


def positional(paths):
    "Calls that pass more than four arguments by position."
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and len(node.args) > 4 and not ast.unparse(node.func).endswith(BY_POSITION):
                yield f"{path.stem}:{node.lineno}", ast.unparse(node.func)


def folded(paths):
    "Lines that hold more than one statement, but for a short branch."
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for body in (getattr(node, name, []) for name in ("body", "orelse", "finalbody")):
                if not isinstance(body, list): continue
                for first, second in zip(body, body[1:]):
                    if first.end_lineno == second.lineno: yield f"{path.stem}:{second.lineno}"


def optional(node, skip):
    "(position, name) of each argument of a function that may be left out; the first `skip` aren't passed by a caller."
    plain = [*node.args.posonlyargs, *node.args.args][skip:]
    start = len(plain) - len(node.args.defaults)
    yield from ((i, arg.arg) for i, arg in enumerate(plain) if i >= start)
    yield from ((99, arg.arg) for arg, default in zip(node.args.kwonlyargs, node.args.kw_defaults) if default)


def options():
    "(function as it is called, position, option) of every public function and method."
    for module, names in public().items():
        for node in ast.parse((ROOT/"probunlearn"/f"{module}.py").read_text(encoding="utf-8")).body:
            if getattr(node, "name", None) not in names: continue
            if isinstance(node, ast.FunctionDef): yield from ((node.name, *option) for option in optional(node, 0))
            for method in getattr(node, "body", []) if isinstance(node, ast.ClassDef) else []:
                if not isinstance(method, ast.FunctionDef) or method.name[0] == "_" and method.name != "__init__":
                    continue
                called = node.name if method.name == "__init__" else method.name
                yield from ((called, *option) for option in optional(method, 1))


def given():
    "Every name that some call passes an argument by, and how many positions each function is called with."
    sources = [
        p.read_text(encoding="utf-8") for p in [*LIBRARY, *ROOT.glob("tests/*.py"), *ROOT.glob("benchmarks/*.py")]
    ]
    sources += ["\n".join(c.source.splitlines()) for p in notebooks() for c in code_cells(p)]
    names, positions = set(), {}
    for source in sources:
        try: tree = ast.parse(re.sub(r"^\s*[%!].*$", "", source, flags=re.M))
        except SyntaxError: continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call): continue
            names |= {k.arg for k in node.keywords}
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            positions[name] = max(positions.get(name, 0), len(node.args))
    return names, positions


def test_lines_of_the_library_can_be_read():
    total, over = wide([p.read_text(encoding="utf-8") for p in LIBRARY], 120)
    assert len(over) <= .02 * total, f"{len(over)} of {total} lines are wider than 120 characters"
    assert not wide(over, 140)[1]


def test_lines_of_tests_and_scripts_can_be_read():
    files = [*ROOT.glob("tests/*.py"), *ROOT.glob("tools/*.py"), *ROOT.glob("benchmarks/*.py")]
    total, over = wide([p.read_text(encoding="utf-8") for p in files], 120)
    assert len(over) <= .02 * total, f"{len(over)} of {total} lines are wider than 120 characters"
    assert not wide(over, 140)[1]


def test_visible_code_of_lessons_fits():
    assert [(name, line) for name, source in lesson_code() for line in wide([source], 100)[1]] == []


def test_functions_are_short():
    lines = [n for n, _ in body_sizes(LIBRARY)]
    assert statistics.median(lines) <= 8 and percentile(lines, .9) <= 20


def test_no_call_passes_more_than_four_arguments_by_position():
    assert list(positional(LIBRARY)) == []


def test_a_line_holds_one_statement():
    assert list(folded(LIBRARY)) == []


def test_no_option_is_there_that_nobody_gives():
    names, positions = given()
    idle = [(f, name) for f, i, name in options() if name not in names and positions.get(f, 0) <= i and name[0] != "_"]
    assert idle == []


def test_there_are_few_doors():
    assert sum(map(len, public().values())) <= 260


def test_cells_that_export_fit_on_a_screen():
    assert [cell for cell in export_cells(notebooks()) if cell[0] > 60] == []


def main(modules):
    paths = [p for p in LIBRARY if not modules or p.stem in modules]
    total, over = wide([p.read_text(encoding="utf-8") for p in paths], 120)
    lines = [n for n, _ in body_sizes(paths)]
    print(f"lines {total}, over 120: {len(over)} ({len(over) / total:.1%}), over 140: {len(wide(over, 140)[1])}")
    print(f"functions {len(lines)}: body median {statistics.median(lines)}, p90 {percentile(lines, .9)}")
    print("largest bodies:", *sorted(body_sizes(paths), reverse=True)[:6])
    homes = [p for p in notebooks() if p.parent.name[0].isdigit() and (not modules or p.stem[3:] in modules)]
    cells = sorted(export_cells(homes), reverse=True)
    print(f"export cells {len(cells)}, over 20 lines: {sum(n > 20 for n, *_ in cells)}; largest:", *cells[:6])
    names = {module: found for module, found in public().items() if not modules or module in modules}
    print("public names:", sum(map(len, names.values())))
    for module, found in names.items(): print(f"  {module} ({len(found)}): {' '.join(found)}")
    if not modules: print("lesson lines over 100:", len(wide([s for _, s in lesson_code()], 100)[1]))


if __name__ == "__main__": main(sys.argv[1:])
