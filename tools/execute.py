"""Run notebooks in a fresh kernel and keep what they show: python tools/execute.py [--flags slow,cuda] [NOTEBOOK …]

A cell flagged `#| slow`, `#| cuda` or `#| eval: false` keeps the output of its last real run, unless its flag is named.
"""
import argparse
import json
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


STATE = "application/vnd.jupyter.widget-state+json"


def widgets(nb):
    "The states of a notebook's widgets, by model id; None where it has none."
    return nb.metadata.get("widgets", {}).get(STATE, {}).get("state")


def still_shown(nb, states):
    "Those of some states whose widgets stand in an output of `nb`, with the states of all that they consist of."
    found, ids = {}, re.findall(r'"model_id": "(\w+)"', json.dumps([cell.get("outputs", []) for cell in nb.cells]))
    while ids:
        one = ids.pop()
        if one in found or one not in states: continue
        found[one] = states[one]
        ids += re.findall(r"IPY_MODEL_(\w+)", json.dumps(states[one]))
    return found


def execute(path, flags):
    "Run the notebook at `path` and store its outputs in place."
    nb = nbformat.read(path, as_version=4)
    before = widgets(nb) or {}
    where = {"metadata": {"path": str(path.parent)}}
    client = NotebookClient(nb, timeout=3600, resources=where, store_widget_state=True)
    with client.setup_kernel():
        for i, cell in enumerate(nb.cells):
            if cell.cell_type == "code" and not skipped(cell, flags): client.execute_cell(cell, i)
        client.set_widgets_metadata()
    if widgets(nb) is not None: widgets(nb).update(still_shown(nb, before))     # of the cells that kept their outputs
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
