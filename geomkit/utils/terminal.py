"""Texts and tables on a terminal, broken between words only, with verdicts in their colours."""

from itertools import zip_longest
from typing import TYPE_CHECKING

from geomkit.utils.display import verdict_colour
from geomkit.utils.readable import is_numeric, number_text, readable, text_table, wrapped_cells

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console
    from rich.text import Text

_GAP = "  "


def say(text: str) -> None:
    """Print a text, broken between words."""
    _console().print(text)


def show_table(frame: "pd.DataFrame", title: str) -> None:
    """Print a table that fits the terminal.

    Where its longest words do not fit beside each other, columns with the same value in all rows become a line above
    the table; where that is not enough, each row becomes a paragraph.

    Args:
        frame: The table; see :func:`geomkit.utils.readable.readable` for what a cell shows.
        title: The title.
    """
    console = _console()
    console.print(f"\n{title}", style="bold")
    same = [name for name in frame.columns if len(frame) > 1 and frame[name].nunique(dropna=False) == 1]
    moved = 0
    while (lines := _table(readable(frame.drop(columns=same[:moved])), console.width)) is None and moved < len(same):
        moved += 1
    if moved:
        console.print(
            "in all rows: " + ", ".join(f"{name} {number_text(frame[name].iloc[0])}" for name in same[:moved])
        )
    for line in lines or _paragraphs(readable(frame.drop(columns=same)), console.width):
        console.print(line, soft_wrap=True)


def _table(shown: "pd.DataFrame", width: int) -> "list[Text] | None":
    """Return the lines of a table, heading and rule first; ``None`` if its longest words do not fit."""
    from rich.text import Text

    rows = [tuple(shown.columns), *shown.itertuples(index=False, name=None)]
    cells = wrapped_cells(rows, width - len(_GAP) * (len(shown.columns) - 1))
    widths = [max(len(line) for cell in column for line in cell) for column in zip(*cells, strict=True)]
    if sum(widths) + len(_GAP) * (len(widths) - 1) > width:
        return None
    right = [is_numeric(shown[name].tolist()) for name in shown.columns]
    lines = []
    for number, row in enumerate(cells):
        styles = [verdict_colour(" ".join(cell)) for cell in row]
        for parts in zip_longest(*row, fillvalue=""):
            texts = (
                Text(part.rjust(size) if at_right else part.ljust(size), style=style)
                for part, size, at_right, style in zip(parts, widths, right, styles, strict=True)
            )
            lines.append(Text(_GAP).join(texts))
        if number == 0:
            lines.append(Text("─" * len(lines[-1]), style="dim"))
    return lines


def _paragraphs(shown: "pd.DataFrame", width: int) -> "list[Text]":
    """Return the lines of a table with a paragraph per row, and a line per column in it."""
    from rich.text import Text

    lines = []
    for row in shown.itertuples(index=False, name=None):
        pairs = [(name, cell) for name, cell in zip(shown.columns, row, strict=True) if cell]
        lines += [Text(line) for line in (*text_table(pairs, width=width), "")]
    return lines


def _console() -> "Console":
    from rich.console import Console

    return Console(highlight=False, markup=False, emoji=False)
