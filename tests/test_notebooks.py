"""Every notebook cell as a test of its own: `pytest -m notebook -k bounds`. With NBFLAGS="slow cuda" flagged ones, too.

`make test` leaves these out, as nbdev_test runs the same cells.
"""
import os
from functools import lru_cache

import pytest
from execnb.shell import CaptureShell

from cells import code_cells, notebooks, skip_reason

FLAGS = os.environ.get("NBFLAGS", "").split()
CELLS = {path: code_cells(path) for path in notebooks()}
NUMBERED = [pytest.param(path, i, id=f"{path.stem}-{i:02}") for path, cells in CELLS.items() for i in range(len(cells))]


@lru_cache(maxsize=1)
def lesson(path):
    "A shell for the notebook at `path`, and its cells that are still to run."
    return CaptureShell(path), list(enumerate(CELLS[path]))


@pytest.mark.notebook
@pytest.mark.parametrize("path, number", NUMBERED)
def test_cell(path, number, monkeypatch):
    if reason := skip_reason(CELLS[path][number], FLAGS): pytest.skip(reason)
    monkeypatch.setenv("IN_TEST", "1")      # as in nbdev_test
    monkeypatch.chdir(path.parent)
    shell, waiting = lesson(path)
    if shell.exc: pytest.skip("an earlier cell failed")
    while waiting and waiting[0][0] <= number:     # also the cells before, when this one is selected alone
        i, cell = waiting.pop(0)
        if not skip_reason(cell, FLAGS): shell.cell(cell)
        if shell.exc: pytest.fail(shell.prettytb(fname=f"{path}, cell {i}"), pytrace=False)
