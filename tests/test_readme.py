"""README.md cannot rot: it is nbs/index.ipynb as text, whose cells are run as a notebook, and what it names exists."""
import re
from pathlib import Path

import pytest

from readme import readme
from test_imports import MODULES

ROOT = Path(__file__).parent.parent
README = (ROOT/"README.md").read_text(encoding="utf-8")
COMMANDS = " ".join(re.findall(r"`([^`\n]+)`", README) + re.findall(r"^```bash\n(.*?)^```", README, re.M | re.S))


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


def test_every_module_is_in_the_table():
    table = dict(re.findall(r"^\| \[(\w+)\]\((\S+)\) \|", README, re.M))
    assert table == {name: path.relative_to(ROOT).as_posix() for name, path in MODULES.items()}
