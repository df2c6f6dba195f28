"""The figure of the singular directions of the mean safety gradient that carry the conflict."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from geomkit.correlation.conflict_directions import ConflictDirections
from geomkit.plots.axes import ending_at, whole_ticks
from geomkit.plots.style import fitted, title, translucent
from geomkit.plots.themes import COLOURS, palette, template
from geomkit.plots.traces import band, error_bars

_LABELLED = (1, 2, 5, 10, 20, 50)
"""Numbers of directions that have a label in the upper panel."""

_APART = 0.04
"""Smallest distance of two labels, as a share of the energy: closer labels would overlap."""


def plot_conflict_directions(directions: ConflictDirections) -> go.Figure:
    """Draw how much of the conflict lies in each singular direction of the mean safety gradient.

    Args:
        directions: The contribution of each direction to the cosine.

    Returns:
        The figure. Top: the cosine within the first k directions of each matrix against their share of the energy,
        with its interval over utility examples, and the straight line of a conflict that is spread like the energy.
        Bottom: the contribution of each direction with its interval, and its share by energy.
    """
    frame = directions.by_index()
    named = frame[frame["direction"] > 0]  # the last row, direction 0, holds all others together
    figure = make_subplots(
        2, 1, vertical_spacing=0.24, subplot_titles=("the first k directions together", "each direction by itself")
    )
    figure.add_traces(_cumulative(frame, directions.cosine), rows=1, cols=1)
    figure.add_traces(_single(named), rows=2, cols=1)
    figure.add_hline(y=0, line={"color": palette().ink, "width": 1})
    figure.update_layout(
        template=template(),
        title=title("Which directions carry the conflict", _subtitle(directions)),
    )
    figure.update_annotations(font_size=13)
    figure.update_xaxes(title="share of the safety energy", tickformat=".0%", range=[-0.02, 1.04], row=1, col=1)
    ticks, ends = whole_ticks(named["direction"]), ending_at(1, named["direction"].max())
    figure.update_xaxes(title="direction, by singular value", tickvals=ticks, **ends, row=2, col=1)
    figure.update_yaxes(title="part of the cosine", row=1, col=1)
    figure.update_yaxes(title="part of the cosine", row=2, col=1)
    return fitted(figure, 470, panel_titles=1)


def _subtitle(directions: ConflictDirections) -> str:
    energy = (
        f"of the mean safety gradient: the first {directions.rank} of each matrix hold {directions.energy:.1%} of the "
        "safety energy"
    )
    low, high = directions.share_interval
    if np.isinf([low, high]).any():
        return f"{energy}; the cosine, {directions.cosine:+.3f}, may be zero"
    return f"{energy} and {directions.share:.1%} [{low:.1%}, {high:.1%}] of the cosine, {directions.cosine:+.3f}"


def _cumulative(frame: pd.DataFrame, cosine: float) -> list[go.Scatter]:
    """Return the traces of the upper panel: the band of the interval, the line of the null, and the curve."""
    energy = np.append(0.0, frame["cumulative_energy"])
    values, low, high = (np.append(0.0, frame[f"cumulative_{name}"]) for name in ("contribution", "low", "high"))
    names = ["none", *(f"first {number}" for number in range(1, len(frame))), "all"]
    curve = go.Scatter(
        x=energy,
        y=values,
        name="conflict",
        mode="lines+markers+text",
        text=_labels(energy),
        textposition="top center",
        textfont={"size": 11, "color": palette().faint},
        line={"color": COLOURS["utility"]},
        marker={"size": 6},
        customdata=np.array([names, *(np.char.mod("%+.4f", ends) for ends in (low, high))]).T,
        hovertemplate="%{customdata[0]}: %{x:.1%} of the energy<br><b>%{y:+.4f}</b> [%{customdata[1]}, "
        "%{customdata[2]}]<extra></extra>",
    )
    null = go.Scatter(
        x=[0, 1],
        y=[0, cosine],
        name="spread like the energy",
        mode="lines",
        line={"color": COLOURS["null"], "dash": "dash"},
        hoverinfo="skip",
    )
    return [band(energy, low, high, translucent(COLOURS["utility"], 0.2), mode=None), null, curve]


def _labels(energy: NDArray[np.float64]) -> list[str]:
    """Return the label of each point of the curve, empty for most points.

    Args:
        energy: (points,) share of the energy in the first k directions, for k = 0, 1, 2, …
    """
    labels = [""] * len(energy)
    last = -1.0
    for number in _LABELLED:
        if number < len(energy) - 1 and energy[number] - last > _APART:
            labels[number], last = str(number), energy[number]
    return labels


def _single(frame: pd.DataFrame) -> list[go.Scatter]:
    """Return the traces of the lower panel: the shares by energy, and the contributions."""
    return [
        go.Scatter(
            x=frame["direction"],
            y=frame["expected"],
            name="spread like the energy",
            mode="markers",
            marker={"symbol": "line-ew-open", "size": 11, "color": COLOURS["null"], "line": {"width": 2}},
            hovertemplate="direction %{x}<br>by energy %{y:+.4f}<extra></extra>",
            showlegend=False,
        ),
        go.Scatter(
            x=frame["direction"],
            y=frame["contribution"],
            name="conflict",
            mode="markers",
            marker={"size": 7, "color": COLOURS["utility"]},
            error_y=error_bars(frame["contribution"], frame["low"], frame["high"], thickness=1.2),
            customdata=frame[["low", "high", "energy", "p_value"]].to_numpy(),
            hovertemplate="direction %{x}, %{customdata[2]:.1%} of the energy<br><b>%{y:+.4f}</b> "
            "[%{customdata[0]:+.4f}, %{customdata[1]:+.4f}]<br>against its share by energy: p = %{customdata[3]:.2g}"
            "<extra></extra>",
            showlegend=False,
        ),
    ]
