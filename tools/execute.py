"""Run notebooks in a fresh kernel and keep what they show: python tools/execute.py [--flags slow,cuda] [NOTEBOOK …]

A cell flagged `#| slow`, `#| cuda` or `#| eval: false` keeps the output of its last real run, unless its flag is named.
"""
import argparse
import os
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FLAG = re.compile(r"^#\|\s*(slow|cuda|eval:\s*false)", re.M)


def skipped(cell, flags):
    "Whether `cell` carries a flag that was not asked for."
    return any(flag not in flags for flag in FLAG.findall(cell.source))


def execute(path, flags):
    "Run the notebook at `path` and store its outputs in place."
    nb = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(path.parent)}}
    client = NotebookClient(nb, timeout=3600, resources=where, store_widget_state=True)
    with client.setup_kernel():
        for i, cell in enumerate(nb.cells):
            if cell.cell_type == "code" and not skipped(cell, flags): client.execute_cell(cell, i)
        client.set_widgets_metadata()
    nbformat.write(nb, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="*", type=Path)
    parser.add_argument("--flags", default="", help="comma-separated flags whose cells run too: slow,cuda")
    args = parser.parse_args()
    os.environ |= dict(TQDM_DISABLE="1", HF_HUB_DISABLE_PROGRESS_BARS="1")     # progress bars are for those who wait
    paths = args.paths
    if not paths:
        from cells import notebooks     # nbdev isn't needed to run a notebook by its name
        paths = notebooks()
    for path in paths:
        start = time.time()
        execute(path, args.flags.split(","))
        print(f"{path}: {time.time() - start:.0f} s", flush=True)


if __name__ == "__main__": sys.exit(main())
