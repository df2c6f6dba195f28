"""Tables on a terminal fit it, whatever they hold, and cut no word."""

import pandas as pd
import pytest

from geomkit.experiments.results import load_results
from geomkit.utils.terminal import say, show_table


@pytest.fixture
def shown(capsys, monkeypatch):
    def show(frame, columns):
        monkeypatch.setenv("COLUMNS", str(columns))
        show_table(frame, "Title")
        return capsys.readouterr().out

    return show


@pytest.mark.parametrize("columns", [40, 80, 120, 200])
def test_a_wide_table_fits_with_all_its_words(shown, columns):
    table = load_results("limits").table()
    text = shown(table, columns)
    assert max(map(len, text.splitlines())) <= columns
    for name in table.columns:
        for cell in table[name]:
            assert all(word in text for word in str(cell).removesuffix(".0").split()), cell


def test_columns_that_are_the_same_move_above_the_table_until_it_fits(shown):
    frame = pd.DataFrame({"organism": [0, 0], "scenario": ["poison-10", "poison-10"], "arm": ["SFT", "SPF"]})
    assert "in all rows" not in shown(frame, 80)
    lines = shown(frame, 20).splitlines()
    assert lines[2].rstrip() == "in all rows:"
    assert lines[3].rstrip() == "organism 0"
    assert lines[4].split() == ["scenario", "arm"]


def test_a_row_becomes_a_paragraph_where_nothing_else_helps(shown):
    frame = pd.DataFrame({"one": ["interpretability", "b"], "two": ["certificate", "d"]})
    assert shown(frame, 24).splitlines()[2:] == [
        "one  interpretability", "two  certificate", "", "one  b", "two  d", "",
    ]  # fmt: skip


def test_names_are_no_markup(shown, capsys):
    assert "[red]" in shown(pd.DataFrame({"[red]": ["[bold]x"]}), 80)
    say("[red]a :smile:")
    assert capsys.readouterr().out == "[red]a :smile:\n"
