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
    def is_hidden(path): return any(part.startswith((".", "_")) for part in path.relative_to(NBS).parts)
    return sorted(path for path in NBS.rglob("*.ipynb") if not is_hidden(path))


def parts():
    "The part folders, in order: a digit, an underscore, a name."
    return sorted(p for p in NBS.iterdir() if re.fullmatch(r"\d_\w+", p.name))


def code_cells(path):
    "The code cells of the notebook at `path`, with nbdev's directives parsed."
    cells = NBProcessor(path, process=True).nb.cells
    return [cell for cell in cells if cell.cell_type == "code" and cell.source.strip()]


def skip_reason(cell, flags=()):
    "The flag for which nbdev_test leaves `cell` out, or None; `flags` are the ones asked for."
    directives = cell.directives_ or {}
    if directives.get("eval:", [""])[0].lower() == "false": return "eval: false"
    known = get_config(path=ROOT).tst_flags.split()
    return next((flag for flag in known if flag in directives and flag not in flags), None)


def main(flags):
    reasons = Counter(skip_reason(cell, flags) for path in notebooks() for cell in code_cells(path))
    ran = reasons.pop(None, 0)
    why = ", ".join(f"{n} {reason}" for reason, n in sorted(reasons.items()))
    skipped = f"{reasons.total()} skipped ({why})" if why else "0 skipped"
    print(f"{len(notebooks())} notebooks: {ran} cells run, {skipped}")


if __name__ == "__main__": main(sys.argv[1:])
