"""Figures of several panels: the number of panels in a row, the place of a panel, and titles of shared axes."""

from collections.abc import Sequence
from typing import NamedTuple

import plotly.graph_objects as go
from plotly.basedatatypes import BaseTraceType
from plotly.subplots import make_subplots

from geomkit.plots.labels import wrapped
from geomkit.plots.style import fitted
from geomkit.plots.themes import template

_PER_ROW = 2
"""Number of panels in a row: plotly cannot move panels, and more than two cannot be read at a phone's width."""

_TITLE_WIDTH = 22
"""The most characters of a line of a panel's title."""


class Panels(NamedTuple):
    """A figure with a panel for each name, row by row.

    Attributes:
        figure: The figure.
        names: The name of each panel.
        columns: Number of panels in a full row.
        inner: Height from the top of the highest panel to the bottom of the lowest, in pixels.
    """

    figure: go.Figure
    names: Sequence[str]
    columns: int
    inner: float

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

    def finished(self, heading: dict[str, object], x_title: str, y_title: str) -> go.Figure:
        """Return the figure with the theme, titles of axes, and room for titles and legend.

        Args:
            heading: The title of the figure.
            x_title: The title of the horizontal axes, empty if they have titles.
            y_title: The title of the vertical axes at the left, empty if they have titles.
        """
        self.figure.update_layout(template=template(), title=heading)
        if x_title:
            self.name_lowest(x_title)
        if y_title:
            self.figure.update_yaxes(title=y_title, col=1)
        highest = [wrapped(name, _TITLE_WIDTH) for name in self.names[: self.columns] if name]
        lines = max((name.count("<br>") + 1 for name in highest), default=0)
        return fitted(self.figure, self.inner, panel_titles=lines)


def panels(
    names: Sequence[str], *, height: float, gap: float = 70, shared_yaxes: bool | str = False, columns: int = _PER_ROW
) -> Panels:
    """Return a figure with an empty panel for each name.

    Args:
        names: The title of each panel.
        height: Height of a panel, in pixels.
        gap: Gap between two rows, in pixels, with the room for the titles of panels.
        shared_yaxes: Whether panels share vertical axes, as plotly's ``make_subplots`` takes it.
        columns: Number of panels in a row; fewer if there are fewer panels.
    """
    columns = min(columns, len(names))
    rows = -(-len(names) // columns)
    inner = rows * height + (rows - 1) * gap
    figure = make_subplots(
        rows,
        columns,
        subplot_titles=[wrapped(name, _TITLE_WIDTH) for name in names],
        shared_yaxes=shared_yaxes,
        horizontal_spacing=0.05 if shared_yaxes else 0.15,
        vertical_spacing=gap / inner if rows > 1 else 0,
    )
    figure.update_annotations(font_size=13)
    return Panels(figure, names, columns, inner)


def wide_panels(names: Sequence[str]) -> Panels:
    """Return a figure with a panel for each name, whose vertical axes have titles and ticks."""
    return panels(names, height=170, gap=84)
