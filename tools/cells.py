"""The notebooks' code cells as nbdev_test sees them, and how many there are: python tools/cells.py [FLAG …]"""
import re
import sys
from collections import Counter
from pathlib import Path

from nbdev.config import get_config
from nbdev.process import NBProcessor

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT/"nbs"


def notebooks():
    "Every notebook of the project: the parts in the order in which data flows, then all else."
    return sorted(p for p in NBS.rglob("*.ipynb") if not any(part.startswith((".", "_")) for part in p.relative_to(NBS).parts))


def parts():
    "The part folders, in order: a digit, an underscore, a name."
    return sorted(p for p in NBS.iterdir() if re.fullmatch(r"\d_\w+", p.name))


def code_cells(path):
    "The code cells of the notebook at `path`, with nbdev's directives parsed."
    return [cell for cell in NBProcessor(path, process=True).nb.cells if cell.cell_type == "code" and cell.source.strip()]


def skip_reason(cell, flags=()):
    "The flag for which nbdev_test leaves `cell` out, or None; `flags` are the ones asked for."
    directives = cell.directives_ or {}
    if directives.get("eval:", [""])[0].lower() == "false": return "eval: false"
    return next((flag for flag in get_config(path=ROOT).tst_flags.split() if flag in directives and flag not in flags), None)


def main(flags):
    reasons = Counter(skip_reason(cell, flags) for path in notebooks() for cell in code_cells(path))
    ran, skipped = reasons.pop(None, 0), ", ".join(f"{n} {reason}" for reason, n in sorted(reasons.items()))
    print(f"{len(notebooks())} notebooks: {ran} cells run, {reasons.total()} skipped" + f" ({skipped})"*bool(skipped))


if __name__ == "__main__": main(sys.argv[1:])
