"""The figure of how the geometry moves in training: a panel for each measure."""

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from geomkit.errors import GeometryError
from geomkit.plots._style import TEMPLATE, Look, looks, title, translucent

if TYPE_CHECKING:
    import pandas as pd

    from geomkit.tracking import Trajectory

_COLUMNS = 3


def plot_trajectory(trajectory: "Trajectory", *, questions: Collection[str] | None = None) -> go.Figure:
    """Draw the measures of a probe over the moments of training.

    Args:
        trajectory: What a probe found at several moments.
        questions: Only the measures of these, such as ``["conflict?", "has it moved?"]``; all when left out.

    Returns:
        The figure: a panel per measure; a line per side with its interval over examples as a band, and dotted the null
        of that side, what it would be if there were nothing to find.

    Raises:
        GeometryError: If a question is not among the trajectory's.
    """
    frame = trajectory.to_frame()
    asked = list(dict.fromkeys(frame["question"]))
    if unknown := [question for question in questions or () if question not in asked]:
        raise GeometryError(f"expected questions among {', '.join(asked)}, found {', '.join(unknown)}")
    if questions is not None:
        frame = frame[frame["question"].isin(list(questions))]
    steps = all(isinstance(at, int) for at in trajectory.moments)
    frame = frame.assign(x=frame["at"] if steps else frame["at"].astype(str))
    panels = list(dict.fromkeys(zip(frame["question"], frame["measure"], strict=True)))
    rows = -(-len(panels) // _COLUMNS)
    figure = make_subplots(
        rows,
        _COLUMNS,
        subplot_titles=[measure for _, measure in panels],
        horizontal_spacing=0.07,
        vertical_spacing=0.32 / rows,
    )
    sides = list(dict.fromkeys(frame["of"]))
    drawn = dict(zip(sides, looks(sides), strict=True))
    shown: set[str] = set()
    for number, (question, measure) in enumerate(panels):
        chosen = frame[(frame["question"] == question) & (frame["measure"] == measure)]
        for side, part in chosen.groupby("of", sort=False):
            for trace in _traces(part, str(side), measure, drawn[str(side)]):
                trace.showlegend = bool(trace.showlegend) and trace.name not in shown
                shown |= {trace.name} if trace.showlegend else set()
                figure.add_trace(trace, row=number // _COLUMNS + 1, col=number % _COLUMNS + 1)
    figure.update_layout(
        template=TEMPLATE,
        title=title("Gradient geometry along training", "bands: 95 % intervals over examples; dotted: the null"),
        height=130 + 220 * rows,
        margin_t=104,
    )
    figure.update_annotations(font_size=13)
    figure.update_xaxes(showgrid=False, **({"tickformat": "d"} if steps else {"type": "category"}))
    figure.update_xaxes(title="optimizer step" if steps else "checkpoint", row=rows)
    return figure


def _traces(frame: "pd.DataFrame", side: str, measure: str, look: Look) -> Iterator[go.Scatter]:
    banded = frame.dropna(subset=["low", "high"])
    if len(banded) > 1:
        yield go.Scatter(
            x=[*banded["x"], *banded["x"][::-1]],
            y=[*banded["high"], *banded["low"][::-1]],
            name=f"{side}: interval",
            legendgroup=side,
            showlegend=False,
            mode="lines",
            line={"width": 0},
            fill="toself",
            fillcolor=translucent(look.colour, 0.15),
            hoverinfo="skip",
        )
    if frame["null"].notna().any():
        yield go.Scatter(
            x=frame["x"],
            y=frame["null"],
            name=f"{side}: null",
            legendgroup=f"{side}: null",
            showlegend=False,
            mode="lines",
            line={"color": look.colour, "dash": "dot", "width": 1.5},
            hovertemplate=f"{measure}, {side}: null <b>%{{y:.4g}}</b><extra></extra>",
        )
    yield go.Scatter(
        x=frame["x"],
        y=frame["value"],
        name=side,
        legendgroup=side,
        showlegend=True,
        mode="lines+markers",
        line={"color": look.colour, "width": 2},
        marker={"symbol": look.symbol, "size": 7},
        customdata=frame[["low", "high", "null"]].to_numpy(),
        hovertemplate=(
            f"{measure}, {side}, %{{x}}<br><b>%{{y:.4g}}</b> [%{{customdata[0]:.4g}}, %{{customdata[1]:.4g}}]"
            "<br>null %{customdata[2]:.4g}<extra></extra>"
        ),
    )
