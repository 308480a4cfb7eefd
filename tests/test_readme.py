"""README.md cannot rot: it is nbs/index.ipynb as text, whose cells are run as a notebook, and what it names exists."""
import re
from pathlib import Path

import pytest

from cells import parts
from readme import readme
from test_imports import MODULES

ROOT = Path(__file__).parent.parent
README = (ROOT/"README.md").read_text(encoding="utf-8")
COMMANDS = "\n".join(re.findall(r"`([^`\n]+)`", README) + re.findall(r"^```bash\n(.*?)^```", README, re.M | re.S))


def test_readme_is_the_index():
    assert README == readme(), "run make readme"


@pytest.mark.parametrize("link", re.findall(r"\]\((?!\w+:|#)([^)\s]+)\)", README))
def test_links_lead_somewhere(link):
    assert (ROOT/link).is_file()


def test_commands_exist():
    targets = re.findall(r"\bmake ([\w-]+)", COMMANDS)
    assert {"demo", "test"} <= set(targets) <= set(re.findall(r"^([\w-]+):", (ROOT/"Makefile").read_text(), re.M))
    from probunlearn.shell import COMMANDS as known
    assert set(re.findall(r"\bprobunlearn (\w+)", COMMANDS)) <= set(known)


def rows():
    "The table of the parts: name of the part, its question, its modules."
    return [[cell.strip() for cell in row.split("|")[1:4]] for row in re.findall(r"^\| \d \w+ \|.*\|$", README, re.M)]


def test_every_part_has_a_row_that_asks():
    assert [part.replace(" ", "_") for part, *_ in rows()] == [folder.name for folder in parts()]
    assert all(re.match(r"[A-Z][^?]*\? [A-Z]", question) for _, question, _ in rows())


def test_every_module_is_in_its_parts_row():
    listed = [(part, link) for part, _, modules in rows() for link in re.findall(r"\[(\w+)\]\((\S+)\)", modules)]
    for part, (_, path) in listed: assert path.startswith(f"nbs/{part.replace(' ', '_')}/")
    expected = [(name, path.relative_to(ROOT).as_posix()) for name, path in MODULES.items()]
    assert [link for _, link in listed] == expected


def test_the_tree_is_what_stands_there():
    lines = re.search(r"^```text\n(nbs/\n.*?)^```", README, re.M | re.S)[1].splitlines()
    named = [line.split(None, 1) for line in lines if line.strip()]
    assert all(len(words[1].split()) <= 6 for words in named[1:])
    inside = [ROOT/("nbs" if line.startswith(" ") else "")/line.split()[0] for line in lines if line.strip()]
    assert all(path.is_dir() for path in inside)
    assert {path.name for path in inside} >= {folder.name for folder in parts()}


def test_lessons_stand_above_modules():
    assert README.index("nbs/tutorials/01_") < README.index("| part |")
