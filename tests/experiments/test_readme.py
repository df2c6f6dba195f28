"""The README's tables of experiments are what the shipped results say."""

import runpy
from pathlib import Path

import geomkit as gk
from geomkit.experiments.grid import load_grid

ROOT = Path(__file__).parents[2]


def test_the_tables_are_those_of_the_shipped_results():
    script = runpy.run_path(str(ROOT / ".ci" / "readme_experiments.py"))
    text = (ROOT / "README.md").read_text("utf-8")
    assert text.count(script["BEGIN"]) == text.count(script["END"]) == 1
    assert script["between_marks"](text, lambda: script["tables"](gk.load_results())) == text


def test_the_shipped_results_are_of_the_default_grid():
    """Cell by cell: a grid that was changed has to be run again."""
    assert [record["cell"] for record in gk.load_results().records] == [
        cell.describe() for cell in load_grid("default").cells
    ]
