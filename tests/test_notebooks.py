"""Every notebook cell as a test of its own: `pytest -m notebook -k bounds`. With NBFLAGS="slow cuda" the flagged cells run, too.

`make test` leaves these out, as nbdev_test runs the same cells.
"""
import os

import pytest
from execnb.shell import CaptureShell

from cells import code_cells, notebooks, skip_reason

FLAGS = os.environ.get("NBFLAGS", "").split()
CELLS = {path: code_cells(path) for path in notebooks()}


@pytest.fixture(scope="module")
def lesson(request):
    "A shell for one notebook, with its cells that are still to run."
    os.environ["IN_TEST"] = "1"     # as in nbdev_test
    yield CaptureShell(request.param), list(enumerate(CELLS[request.param]))
    del os.environ["IN_TEST"]


@pytest.mark.notebook
@pytest.mark.parametrize("lesson, number", [(path, i) for path, cells in CELLS.items() for i in range(len(cells))], indirect=["lesson"],
                         ids=[f"{path.stem}-{i:02}" for path, cells in CELLS.items() for i in range(len(cells))])
def test_cell(lesson, number, request, monkeypatch):
    shell, waiting = lesson
    path = request.node.callspec.params["lesson"]
    if reason := skip_reason(CELLS[path][number], FLAGS): pytest.skip(reason)
    if shell.exc: pytest.skip("an earlier cell failed")
    monkeypatch.chdir(path.parent)
    while waiting and waiting[0][0] <= number:     # also the cells before, when this one is selected alone
        i, cell = waiting.pop(0)
        if not skip_reason(cell, FLAGS): shell.cell(cell)
        if shell.exc: pytest.fail(shell.prettytb(fname=f"{path}, cell {i}"), pytrace=False)
