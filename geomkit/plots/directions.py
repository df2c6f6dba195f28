"""The figure of the directions that carry the conflict."""

from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from geomkit.plots.style import COLOURS, TEMPLATE, title, translucent, whole_ticks

if TYPE_CHECKING:
    import pandas as pd

    from geomkit.correlation.conflict_directions import ConflictDirections

_LABELLED = (1, 2, 5, 10, 20, 50)
_APART = 0.04  # of the energy: labels closer than that would cover each other


def plot_conflict_directions(directions: "ConflictDirections") -> go.Figure:
    """Draw how the conflict is divided among the singular directions of the mean safety gradient.

    Args:
        directions: The parts of every direction.

    Returns:
        The figure. Left, the cosine that the first k directions of each matrix hold against the energy they hold,
        with the interval over utility examples, beside the straight line of a conflict spread like the energy. Right,
        the part of each direction with its interval, beside its share by energy.
    """
    frame = directions.by_index()
    figure = make_subplots(
        1, 2, horizontal_spacing=0.12, subplot_titles=("the first k directions together", "each direction by itself")
    )
    for trace in _together(frame, directions.cosine):
        figure.add_trace(trace, row=1, col=1)
    for trace in _each(frame[frame["direction"] > 0]):
        figure.add_trace(trace, row=1, col=2)
    figure.add_hline(y=0, line={"color": "#222222", "width": 1})
    figure.update_layout(
        template=TEMPLATE,
        title=title("Which directions of the mean safety gradient carry the conflict", _subtitle(directions)),
        margin_t=104,
    )
    figure.update_annotations(font_size=13)
    figure.update_xaxes(title="share of the safety energy", tickformat=".0%", range=[-0.02, 1.04], row=1, col=1)
    ticks = whole_ticks(frame["direction"][frame["direction"] > 0])
    figure.update_xaxes(title="direction, by singular value", tickvals=ticks, row=1, col=2)
    figure.update_yaxes(title="part of the cosine, cumulative", row=1, col=1)
    figure.update_yaxes(title="part of the cosine", row=1, col=2)
    return figure


def _subtitle(directions: "ConflictDirections") -> str:
    held = f"the first {directions.rank} of each matrix hold {directions.energy:.1%} of the safety energy"
    low, high = directions.share_interval
    if np.isinf([low, high]).any():
        return f"{held}; the cosine, {directions.cosine:+.3f}, may be zero"
    return f"{held} and {directions.share:.1%} [{low:.1%}, {high:.1%}] of the cosine, {directions.cosine:+.3f}"


def _together(frame: "pd.DataFrame", cosine: float) -> list[go.Scatter]:
    energy = np.append(0.0, frame["cumulative_energy"])
    values, low, high = (np.append(0.0, frame[f"cumulative_{name}"]) for name in ("contribution", "low", "high"))
    places = [*range(len(frame)), len(frame)]
    names = ["none", *(f"first {place}" for place in places[1:-1]), "all"]
    labels = [""] * len(places)
    last = -1.0
    for place in (place for place in _LABELLED if place < len(frame)):
        if energy[place] - last > _APART:
            labels[place], last = str(place), energy[place]
    band = go.Scatter(
        x=[*energy, *energy[::-1]],
        y=[*high, *low[::-1]],
        fill="toself",
        fillcolor=translucent(COLOURS["utility"], 0.2),
        line={"width": 0},
        hoverinfo="skip",
        showlegend=False,
    )
    line = go.Scatter(
        x=energy,
        y=values,
        name="conflict",
        mode="lines+markers+text",
        text=labels,
        textposition="top center",
        textfont={"size": 11, "color": "#555555"},
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
    return [band, null, line]


def _each(frame: "pd.DataFrame") -> list[go.Scatter]:
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
            error_y={
                "array": frame["high"] - frame["contribution"],
                "arrayminus": frame["contribution"] - frame["low"],
                "thickness": 1.2,
                "width": 0,
            },
            customdata=frame[["low", "high", "energy", "p_value"]].to_numpy(),
            hovertemplate="direction %{x}, %{customdata[2]:.1%} of the energy<br><b>%{y:+.4f}</b> "
            "[%{customdata[0]:+.4f}, %{customdata[1]:+.4f}]<br>against its share by energy: p = %{customdata[3]:.2g}"
            "<extra></extra>",
            showlegend=False,
        ),
    ]
