"""Figure of overlaps within and between sets of examples."""

from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go

from geomkit._display import counted
from geomkit.plots._style import TEMPLATE, title, wrapped

if TYPE_CHECKING:
    from geomkit.similarity import Overlaps


def plot_overlaps(overlaps: "Overlaps") -> go.Figure:
    """Draw the mean overlap of two examples' subspaces, within each set and between every two.

    Args:
        overlaps: Overlaps between the examples of several sets.

    Returns:
        The figure: a square per pair of sets with its mean; the intervals, and the contrast with the row's own mean,
        are where the pointer is.
    """
    names = list(overlaps.names)
    figure = go.Figure(layout={"template": TEMPLATE})
    figure.add_trace(
        go.Heatmap(
            z=overlaps.matrix,
            x=names,
            y=names,
            text=[[_text(overlaps, first, second) for second in names] for first in names],
            texttemplate="%{z:.3f}",
            textfont={"size": 14},
            hovertemplate="%{text}<extra></extra>",
            colorscale="Blues",
            zmin=min(overlaps.expected, float(np.min(overlaps.matrix))),
            zmax=float(np.max(overlaps.matrix)),
            xgap=2,
            ygap=2,
            colorbar={"title": {"text": "overlap, mean cos²", "side": "right"}, "thickness": 14},
        )
    )
    figure.update_layout(
        title=title(
            "Overlap of two examples' subspaces, within and between sets",
            f"rank at most {overlaps.rank}, {overlaps.side} singular vectors, mean over "
            f"{counted(len(overlaps.parameters), 'parameter')}; random subspaces: {overlaps.expected:.3g}",
        ),
        xaxis={**_axis(names, 12), "tickangle": 0},
        yaxis={**_axis(names, 20), "autorange": "reversed"},
        height=190 + 62 * len(names),
        margin_b=56,
    )
    return figure


def _axis(names: list[str], width: int) -> dict[str, object]:
    labels = {"tickvals": names, "ticktext": [wrapped(name, width) for name in names], "ticks": ""}
    return {**labels, "showgrid": False, "showline": False}


def _text(overlaps: "Overlaps", first: str, second: str) -> str:
    value = overlaps.matrix[overlaps.names.index(first), overlaps.names.index(second)]
    low, high = overlaps.intervals[first, second]
    text = f"{first} – {second}<br>overlap <b>{value:.3f}</b> [{low:.3f}, {high:.3f}]"
    contrast = overlaps.contrasts.get((first, second))
    return f"{text}<br>within {first} less this: {contrast}" if contrast else text
