"""A grid that is killed, shared and taken up again is the grid of one machine; its board says what its rows say."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

import probunlearn.grid
from probunlearn.data import Template, fictional_authors
from probunlearn.draws import Decoding
from probunlearn.grid import Cell, Grid, grid_cells, read_grid, run_cell, run_grid, verdict
from probunlearn.models import small_model
from probunlearn.training import UnlearnConfig, leak_probe

FORGET, RETAIN = fictional_authors("forget10"), fictional_authors("retain90")
SPLITS = dict(two=(FORGET[:2], RETAIN[:8], RETAIN[:2]), other=(FORGET[2:4], RETAIN[:8], RETAIN[:2]))
HOW = dict(n=8, n_retain=4, decoding=Decoding(max_new_tokens=12), progress=False)
TIMES = ["training_seconds", "seconds"]


def quick(**how):
    return UnlearnConfig(**dict(method="grad_diff", steps=1, batch_size=2, lr=1e-3, schedule="constant") | how)


CELLS = grid_cells(dict(gd=quick(), npo=quick(method="npo")), seeds=(0, 1), entropy=dict(lambda_f=1), splits=("two",))


@pytest.fixture(scope="module")
def model(): return small_model("full", device="cpu")


def run(model, folder, cells=CELLS, splits=SPLITS, **how): return run_grid(model, cells, splits, folder, **HOW | how)


def row(name, bound, retain=1., seed=0, split="s", **more):
    return dict(name=name, split=split, seed=seed, bound=bound, retain=retain, **more)


def same(a, b):
    "Fails unless two grids agree in all but their times."
    pd.testing.assert_frame_equal(a.to_frame().drop(columns=TIMES), b.to_frame().drop(columns=TIMES))


# --- cells ------------------------------------------------------------------------------------------------------------

def test_cells_are_all_combinations():
    cells = grid_cells(dict(a=quick(), b=quick(method="npo")), range(3), entropy=dict(lambda_f=2.), splits=("x", "y"))
    assert len({c.file for c in cells}) == len(cells) == 2 * 2 * 3 * 2
    assert {(c.name, c.config.lambda_f) for c in cells} == {("a", 0), ("b", 0), ("a + entropy", 2), ("b + entropy", 2)}
    seeds = [c.config.seed for c in cells]
    assert seeds == sorted(seeds)                   # a part of the grid compares all methods


def test_names_of_any_kind_become_different_files():
    names = ["a/b", "a b", "a%2Fb", "β = ½", "../x", "a-b", "a"]
    files = [Cell(n, quick(), s).file for n in names for s in ("s", "b-s")]
    assert len({f.lower() for f in files}) == len(files) and not any(set(f) & set("/\\ :") for f in files)


@pytest.mark.parametrize("shard", ["2/2", "-1/2", "1", "a/b", "0/0", "1/2/3"])
def test_a_shard_that_is_none_is_refused(model, tmp_path, shard):
    with pytest.raises(ValueError, match="shard must be i/N with 0 <= i < N"): run(model, tmp_path/"grid", shard=shard)
    assert not (tmp_path/"grid").exists()


# --- shared, cut off, taken up ----------------------------------------------------------------------------------------

def test_shards_share_the_cells_out(model, tmp_path, monkeypatch):
    def nothing(model, cell, split, **options): return dict(bound=0., retain=1.)
    monkeypatch.setattr(probunlearn.grid, "run_cell", nothing)
    for n in (1, 2, 3, 50):
        folder, shares = tmp_path/str(n), []
        for i in range(n):
            before = len(list(folder.glob("*.json")))
            if CELLS[i::n]: run(model, folder, shard=f"{i}/{n}")
            shares.append(len(list(folder.glob("*.json"))) - before)
        assert sum(shares) == len(CELLS) and max(shares) - min(shares) <= 1


def test_shards_and_one_process_give_the_same_grid_and_leave_the_model_alone(model, tmp_path):
    before = model.identity
    for i in (1, 0): shared = run(model, tmp_path/"shared", CELLS[1:3], shard=f"{i}/2")
    whole = run(model, tmp_path/"whole", CELLS[1:3])
    same(shared, whole)
    assert model.identity == before and len(whole.rows) == 2


def test_a_grid_that_was_cut_off_runs_only_what_is_missing(model, tmp_path, monkeypatch):
    ran = []
    def counted(model, cell, split, **how):
        ran.append(cell.file)
        if len(ran) == 2: raise KeyboardInterrupt
        return run_cell(model, cell, split, **how)
    monkeypatch.setattr(probunlearn.grid, "run_cell", counted)
    with pytest.raises(KeyboardInterrupt): run(model, tmp_path, CELLS[:3])
    assert [f.name for f in tmp_path.iterdir()] == [CELLS[0].file]          # nothing half done is left
    run(model, tmp_path, CELLS[:3])
    assert ran == [CELLS[0].file, CELLS[1].file, CELLS[1].file, CELLS[2].file]


def test_other_settings_are_refused_before_any_work(model, tmp_path):
    run(model, tmp_path, CELLS[:1])
    name = CELLS[0].name
    changed = [dict(n=9), dict(splits=SPLITS | dict(two=SPLITS["other"])),
               dict(cells=[Cell(name, quick(lr=2e-3), "two")]), dict(cells=[Cell(name, quick(), "two", lora=2)])]
    for how in changed:
        with pytest.raises(ValueError, match="other settings"): run(model, tmp_path, **dict(cells=CELLS[:1]) | how)
    others = small_model("retain", device="cpu"), model.replace(template=Template("{question}")), model.adaptive(.5)
    for other in others:
        with pytest.raises(ValueError, match="other settings"): run(other, tmp_path, CELLS[:1])
    with pytest.raises(ValueError, match="no questions for split 'two'"):
        run(model, tmp_path, splits=dict(other=SPLITS["other"]))
    more = SPLITS | dict(more=SPLITS["two"])        # splits that a cell doesn't use don't matter to it
    assert len(run(model, tmp_path, CELLS[:1], splits=more).rows) == 1


def test_a_cell_of_then_is_recognised(model, tmp_path, monkeypatch):
    "Two cells that the tree before `LocalModel` wrote, one with adaptive temperature."
    folder = shutil.copytree(Path(__file__).parent/"before"/"grid", tmp_path/"grid")
    monkeypatch.setattr(probunlearn.grid, "run_cell", lambda *args, **how: pytest.fail("run again"))
    for name, asked in (("then", model), ("ruled", model.adaptive(.9))):
        run(asked, folder, grid_cells({name: quick()}, [0], splits=["two"]))
        with pytest.raises(ValueError, match="other settings"):
            run(asked.adaptive(.5), folder, grid_cells({name: quick()}, [0], splits=["two"]))


def test_a_file_that_is_no_cell_is_named(model, tmp_path):
    file = tmp_path/CELLS[0].file
    wrong = {"{": "is not JSON", "[1]": "is no cell of a grid", '{"name": "gd"}': "is no cell of a grid"}
    for text, says in wrong.items():
        file.write_text(text)
        for work in (lambda: read_grid(tmp_path), lambda: run(model, tmp_path, CELLS[:1])):
            with pytest.raises(ValueError, match=says) as error: work()
            assert str(file) in str(error.value) and file.read_text() == text


def test_adapters_and_a_score_of_ones_own(model, tmp_path):
    def first_word(answer, qa): return float(answer.split()[:1] == qa.answer.split()[:1])
    cells = [Cell("gd", quick(), "two", lora=2)]
    for _ in range(2): grid = run(model, tmp_path, cells, score=first_word)
    settings = json.loads((tmp_path/cells[0].file).read_text())["settings"]
    assert len(grid.rows) == 1 and settings["options"]["score"] == "first_word"


def test_a_row_keeps_the_path_and_a_probe_is_a_setting_where_it_looks(model, tmp_path):
    looked = dict(two=quick(steps=3, probe_every=2), none=quick())
    cells = grid_cells(looked, (0,), splits=("two",))
    def probe(n): return leak_probe(FORGET[:2], RETAIN[:2], n=n, n_retain=2, decoding=HOW["decoding"])
    grid = run(model, tmp_path, cells, probe=probe(4))
    paths = {row["name"]: row["path"] for row in grid.rows}
    assert [row["step"] for row in paths["two"]] == [2, 3] and paths["none"] == []
    assert {"leak_bound", "drawn_retain"} < paths["two"][0].keys() and "path" not in grid.to_frame()
    same(run(model, tmp_path, cells, probe=probe(4)), grid)
    with pytest.raises(ValueError, match="other settings"): run(model, tmp_path, cells[:1], probe=probe(5))
    run(model, tmp_path, cells[1:], probe=probe(5))                             # it doesn't look


def test_training_that_breaks_down_stays_in_the_table(model, tmp_path, monkeypatch):
    def broken(*args, **options): raise FloatingPointError("the loss is nan at update 3")
    run(model, tmp_path, CELLS[:1])
    monkeypatch.setattr(probunlearn.grid, "unlearn", broken)
    table, failed = run(model, tmp_path, CELLS[:2]).table(), CELLS[1].name
    assert table.verdict["two", failed] == "training broke down"
    assert pd.isna(table["average P(leak) ≤"]["two", failed])
    assert table.index[-1][1] == failed


@pytest.mark.slow
def test_a_killed_process_leaves_a_grid_to_go_on_with(model, tmp_path):
    "SIGKILL after the first cell; what is there afterwards is whole, and the rest equals an undisturbed run."
    code = ("import sys; sys.path.insert(0, 'tests'); from test_grid import *; "
            "run(small_model('full', device='cpu'), sys.argv[1])")
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path/"cut")])
    while not list((tmp_path/"cut").glob("*.json")) and process.poll() is None: pass
    process.kill()
    process.wait()
    same(run(model, tmp_path/"cut"), run(model, tmp_path/"whole"))


# --- the board --------------------------------------------------------------------------------------------------------

def test_the_table_is_means_over_seeds_and_the_worst_of_them():
    grid = Grid([row("a", .2, 1., 0), row("a", .4, .8, 1), row("a + entropy", .1), row("a + entropy", .05, seed=1),
                 row("b", .9)])
    table = grid.table()
    assert list(table.index) == [("s", "a + entropy"), ("s", "a"), ("s", "b")] and list(table.seeds) == [2, 2, 1]
    assert table["average P(leak) ≤"]["s", "a"] == pytest.approx(.3)
    assert table["worst seed ≤"]["s", "a"] == .4
    assert table["retain, greedy"]["s", "a"] == pytest.approx(.9)
    assert grid.gains().to_dict() == {("s", "a"): pytest.approx(.25)}
    assert list(table.verdict) == ["", "", "bound above 0.8"]


def test_splits_are_told_apart():
    grid = Grid([row("a", .2), row("a + entropy", .1), row("a", .5, split="t"), row("a + entropy", 1., split="t")])
    assert grid.gains().to_dict() == {("s", "a"): .5, ("t", "a"): 2.}
    assert grid.plot().get_title() == "Entropy lowers the mean bound in 1 of 2 pairs"


VERDICTS = [(.1, .79, "retain below 0.8"), (.81, .8, "bound above 0.8"), (.8, .8, "")]

@pytest.mark.parametrize("bound, retain, expected", VERDICTS)
def test_verdicts(bound, retain, expected): assert verdict(pd.DataFrame([row("a", bound, retain)])) == expected


def test_a_model_that_has_fallen_silent_is_called_so():
    def silent(*shares): return pd.DataFrame([row("a", .1, seed=i, empty=share) for i, share in enumerate(shares)])
    assert verdict(silent(.9, .6)) == "says nothing" and verdict(silent(.9, 0.)) == ""


def test_a_grid_survives_a_file(tmp_path):
    grid = Grid([row("a", .2, .9, retain_distinct=.5), row("b", 1e-3, .7, 1, retain_distinct=.25)])
    grid.to_frame().to_csv(tmp_path/"grid.csv", index=False)
    pd.testing.assert_frame_equal(read_grid(tmp_path/"grid.csv").to_frame(), grid.to_frame())
    with pytest.raises(ValueError, match="no finished cell"): read_grid(tmp_path)


def test_the_board_shows_every_cell():
    grid = Grid([row("a", .2, .9, retain_distinct=.5), row("a + entropy", .1, .8, retain_distinct=.4),
                 row("b", .3, .7, retain_distinct=.3)])
    for against in ("retain", "retain_distinct"):
        ax = grid.plot(against)
        points = {tuple(xy) for part in ax.collections for xy in part.get_offsets().tolist()}
        assert points == {(r[against], r["bound"]) for r in grid.rows}
        assert {"a", "b"} <= {t.get_text() for t in ax.texts} and ax.get_yscale() == "log"


def test_a_probe_is_known_by_its_name(model):
    def mine(model): return {}
    settings = [probunlearn.grid._settings(model, {}, {}, probe) for probe in (mine, None)]
    assert [s["probe"] for s in settings] == ["mine", None]
