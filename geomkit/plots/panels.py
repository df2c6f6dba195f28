"""Figures of several panels: the number of panels in a row, the place of a panel, and titles of shared axes."""

from collections.abc import Sequence
from typing import NamedTuple

import plotly.graph_objects as go
from plotly.basedatatypes import BaseTraceType
from plotly.subplots import make_subplots

from geomkit.plots.style import TEMPLATE, legend_room

_PER_ROW = 3
_NARROW_PER_ROW = 4


class Panels(NamedTuple):
    """A figure with a panel for each name, row by row.

    Attributes:
        figure: The figure.
        names: The title of each panel.
        rows: Number of rows of panels.
        columns: Number of panels in a full row.
    """

    figure: go.Figure
    names: Sequence[str]
    rows: int
    columns: int

    def at(self, number: int) -> dict[str, int]:
        """Return the row and the column of a panel, both from 1, as plotly takes them."""
        return {"row": number // self.columns + 1, "col": number % self.columns + 1}

    def add(self, number: int, *traces: BaseTraceType) -> None:
        """Add traces to a panel."""
        for trace in traces:
            self.figure.add_trace(trace, **self.at(number))

    def lowest(self) -> list[int]:
        """Return the numbers of the lowest panels, one for each column."""
        return list(range(max(0, len(self.names) - self.columns), len(self.names)))

    def name_lowest(self, text: str) -> None:
        """Write the title of the horizontal axis below the lowest panel of each column."""
        for number in self.lowest():
            self.figure.update_xaxes(title=text, **self.at(number))


def panels(
    names: Sequence[str], columns: int, *, across: float, down: float, shared_yaxes: bool | str = False
) -> Panels:
    """Return a figure with an empty panel for each name.

    Args:
        names: The title of each panel.
        columns: Number of panels in a row.
        across: Gap between two panels of a row, as a share of the figure's width.
        down: Gap between two rows, as a share of the height of a row.
        shared_yaxes: Whether panels share vertical axes, as plotly's ``make_subplots`` takes it.
    """
    rows = -(-len(names) // columns)
    figure = make_subplots(
        rows,
        columns,
        subplot_titles=list(names),
        shared_yaxes=shared_yaxes,
        horizontal_spacing=across,
        vertical_spacing=down / rows,
    )
    return Panels(figure, names, rows, columns)


def columns_for(number: int, most: int = _PER_ROW) -> int:
    """Return how many panels to put in a row, at most ``most``, so that the last row is not much shorter.

    Example:
        >>> [columns_for(number) for number in (1, 3, 4, 5, 6, 7)]
        [1, 3, 2, 3, 3, 3]
    """
    return -(-number // -(-number // most))


def wide_panels(names: Sequence[str]) -> Panels:
    """Return a figure with a wide empty panel for each name, whose vertical axes have titles and ticks."""
    return panels(names, columns_for(len(names)), across=0.08, down=0.28)


def narrow_panels(names: Sequence[str], height: int, gap: int) -> Panels:
    """Return a figure with a narrow empty panel for each name; panels of a row share their vertical axes.

    Args:
        names: The title of each panel.
        height: Height of a row of panels, in pixels.
        gap: Gap between two rows, in pixels.
    """
    columns = columns_for(len(names), _NARROW_PER_ROW)
    return panels(names, columns, across=0.03, down=gap / height, shared_yaxes=True)


def lay_out(drawn: Panels, legend: Sequence[str], title: dict[str, object], x_title: str, y_title: str) -> None:
    """Set size, legend, title and axis titles of a figure of :func:`wide_panels`.

    Args:
        drawn: The figure and its panels.
        legend: The entries of the legend.
        title: The title of the figure.
        x_title: The title of the horizontal axes.
        y_title: The title of the vertical axes.
    """
    room = legend_room(legend)
    drawn.figure.update_layout(
        template=TEMPLATE, title=title, height=150 + 235 * drawn.rows + room, margin={"t": 104, "b": 90 + room}
    )
    drawn.figure.update_annotations(font_size=13)
    drawn.figure.update_yaxes(title=y_title, col=1)
    drawn.name_lowest(x_title)
