"""The tables of data/experiments/README.md are those of the shipped results, which are those of the shipped grids."""

import runpy
from pathlib import Path

import pytest

from geomkit.experiments.grid import load_grid
from geomkit.experiments.records import KEYS
from geomkit.experiments.results import load_results

ROOT = Path(__file__).parents[2]


def test_the_tables_are_those_of_the_shipped_results():
    script = runpy.run_path(str(ROOT / ".ci" / "readme_experiments.py"))
    text = (ROOT / "data" / "experiments" / "README.md").read_text("utf-8")
    marks = [mark.format(name) for name in script["TABLES"] for mark in script["MARKS"]]
    assert [text.count(mark) for mark in marks] == [1] * 6
    assert script["with_tables"](text) == text


@pytest.mark.parametrize("grid", ["default", "limits"])
def test_the_shipped_results_are_of_the_grid_that_ships(grid):
    """Cell by cell: a grid that was changed has to be run again."""
    results = load_results(grid)
    assert results.name == grid
    assert [record["cell"] for record in results.records] == [cell.describe() for cell in load_grid(grid).cells]


def test_no_cell_ships_twice_and_an_arm_is_the_same_in_both_grids():
    grids = [load_grid(name).cells for name in ("default", "limits")]
    arms = [{cell.arm.name: cell.arm for cell in cells} for cells in grids]
    assert all(arms[0].get(name, arm) == arm for name, arm in arms[1].items())
    keys = [tuple(record["cell"][name] for name in KEYS) for record in load_results().records]
    assert len(set(keys)) == len(keys) == sum(map(len, grids))


def test_the_shipped_english_results_are_of_cells_of_the_grid_that_ships():
    """The grid is run in several sittings; what has been run is in the grid's order."""
    digests = [cell.digest for cell in load_grid("english").cells]
    shipped = [record["digest"] for record in load_results("english").records]
    assert shipped == [digest for digest in digests if digest in set(shipped)]
