"""Wherever a bound is printed behind ≤ or ≥, the printed number is on the safe side: 200 bounds from 1e-6 to 1 through
each place. Nearest rounding fails half of them."""
import re
from dataclasses import replace
from types import SimpleNamespace

import matplotlib
matplotlib.use("Agg")

import numpy as np
import pandas as pd
import pytest

from probunlearn import cli, evaluation, reading, shell, statement
from probunlearn.data import QA
from probunlearn.draws import draws_from_texts
from probunlearn.grid import Grid
from probunlearn.report import Asked, Board, Report
from probunlearn.stress import Rounds
from probunlearn.temperature import Sweep

VALUES = np.exp(np.random.default_rng(0).uniform(np.log(1e-6), 0, 200))


def check(printed, values, side="upper"):
    "Every printed number is at least (for a lower bound: at most) its value, and by less than 10 %."
    printed, values = np.array(printed, float), np.asarray(values, float)
    assert printed.shape == values.shape
    assert (printed >= values if side == "upper" else printed <= values).all()
    np.testing.assert_allclose(printed, values, rtol=.1)


def a_report(leaks, n=512):
    qas = [QA(f"q{i}", f"Question {i}?", "Zorplax.", ("Zorplax",)) for i in range(len(leaks))]
    draws = [draws_from_texts(qa.id, ["Zorplax"] * int(k) + ["no"] * (n - int(k))) for qa, k in zip(qas, leaks)]
    return Report("m", Asked(qas, draws, [draws_from_texts(qa.id, ["no"]) for qa in qas]))


def cells(html):
    "Rows of the tables in a page, as texts."
    rows = [
        re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.S) for row in re.findall(r"<tr[^>]*>(.*?)</tr>", html, re.S)
    ]
    return [[re.sub("<[^>]+>", "", cell) for cell in row] for row in rows]


def column(rows, name):
    "Numbers below a heading, in the order of the rows' first cells."
    head = next(row for row in rows if name in row)
    found = {row[0]: row[head.index(name)] for row in rows if len(row) == len(head) and row is not head}
    return [found[key] for key in sorted(found)]


def test_the_page_of_a_report():
    report = a_report(np.unique(np.random.default_rng(0).integers(0, 512, 60)))
    rows, frame = cells(report.body()), report.to_frame().sort_index()
    for name, side in dict(rate_lower="lower", rate_upper="upper", mean_upper="upper", ed_upper="upper").items():
        check(column(rows, statement._SHOWN[name]), frame[name], side)


def a_board(monkeypatch):
    "A board of 200 rows whose bounds are `VALUES`."
    report = a_report([0, 3], 64)
    board, row = Board([replace(report, name=f"m{i:03}") for i in range(3)]), report.summary()
    names = pd.Index([f"m{i:03}" for i in range(len(VALUES))], name="model")
    frame = pd.DataFrame([row | dict(bound=v, worst=v) for v in VALUES], index=names)
    monkeypatch.setattr(board, "to_frame", lambda: frame)
    monkeypatch.setattr(board, "plot", lambda ax: ax.set_title("not drawn here"))
    return board


def test_the_page_and_the_card_of_a_board(monkeypatch):
    board = a_board(monkeypatch)
    rows = cells(board.body())
    lines = [line.strip("|").replace("\\", "") for line in board.card().splitlines() if line.startswith("| m")]
    card = [[cell.strip() for cell in line.split("|")] for line in lines]
    for name in ("average P(leak) ≤", "worst P(leak) ≤"):
        check(column(rows, name), VALUES)
        check(column(card, name), VALUES)


def test_the_rounds_of_re_unlearning():
    row = dict(round=1, leaks=0, draws=9, new=0)
    said = [Rounds(alpha, 3).claim(row | dict(bound=v)) for v, alpha in zip(VALUES, VALUES[::-1])]
    check([re.search(r"at most (\S+);", s)[1] for s in said], VALUES)
    check([re.search(r"α = (\S+) of", s)[1] for s in said], VALUES[::-1] / 3)


def test_the_bar_of_a_run(monkeypatch):
    found, shown = iter(sorted(VALUES)), []
    monkeypatch.setattr(evaluation, "binary_bound", lambda leaks, n, alpha: next(found))
    watch = evaluation._live("exact_match", 1.0, .01)
    for i in range(len(VALUES)): shown.append(watch(draws_from_texts(f"q{i}", ["!"]), QA(f"q{i}", "?", "!")))
    check([text.split("≤ ")[1] for text in shown], sorted(VALUES))


def test_a_sweep():
    frame = pd.DataFrame(dict(rule="none", temperature=1., bound=VALUES))
    check([row[2] for row in cells(Sweep(frame, .01, "leak", 9)._repr_html_())[1:]], VALUES)


def test_a_grid():
    same = dict(split="s", seed=0, greedy=0., rate=0., retain=1.)
    rows = [same | dict(name=f"m{i:03}", bound=v, worst=v) for i, v in enumerate(VALUES)]
    grid, by_bound = Grid(rows), np.sort(VALUES)
    shown = [row for row in cells(grid._repr_html_()) if any(re.fullmatch(r"m\d{3}", cell) for cell in row)]
    lines = [line.replace("bound above 0.8", "").split() for line in repr(grid).splitlines()[2:]]  # without the verdict
    names = list(grid.table())
    for name in ("average P(leak) ≤", "worst seed ≤", "worst P(leak) ≤"):
        check([row[names.index(name) - len(names)] for row in shown], by_bound)
        check([line[names.index(name) - len(names) + 1] for line in lines], by_bound)


@pytest.mark.parametrize("command", ["versus", "demo"])
def test_tables_of_the_command_line(monkeypatch, capsys, command):
    frame = a_board(monkeypatch).to_frame().assign(retain=1., retain_draws=1.)
    board = SimpleNamespace(to_frame=lambda: frame, notes=[], reports=[], save=lambda path: path)
    monkeypatch.setattr(shell, "_read", lambda *_, **__: None)
    monkeypatch.setattr(reading, "versus", lambda *_, **__: board)
    monkeypatch.setattr(cli, "demo_models", lambda seed: {})
    monkeypatch.setattr(cli, "demo_board", lambda *_, **__: board)
    (shell.Versus(runs="a,b") if command == "versus" else cli.Demo()).run()
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if re.match(r"m\d{3}", line)]
    for place in (3, 4): check([line[place] for line in lines], VALUES)
