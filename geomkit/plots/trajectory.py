"""The figure of how the geometry moves in training: a panel for each measure."""

from collections.abc import Collection, Hashable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from geomkit.errors import GeometryError
from geomkit.plots.style import COLOURS, TEMPLATE, Look, looks, per_cent, title, translucent, whole_ticks, wrapped

if TYPE_CHECKING:
    import pandas as pd

    from geomkit.analysis.tracking import Trajectory

_COLUMNS = 3
_DIFFERENCE = ", difference"


def plot_trajectory(trajectory: "Trajectory", *, questions: Collection[str] | None = None) -> go.Figure:
    """Draw the measures of a probe over the moments of training.

    Args:
        trajectory: What a probe found at several moments.
        questions: Only the measures of these, such as ``["conflict?", "has it moved?"]``; all when left out.

    Returns:
        The figure: a panel per measure; a line per side with its interval over examples as a band, and dotted the null
        of that side, what it would be if there were nothing to find, with its interval in grey. Measures that are
        unknown at every moment are left out.

    Raises:
        GeometryError: If a question is not among the trajectory's, or nothing has a value.
    """
    frame = _asked(trajectory.to_frame(), questions)
    steps = all(isinstance(at, int) for at in trajectory.moments)
    frame = frame.assign(x=frame["at"] if steps else frame["at"].astype(str))
    panels = list(dict.fromkeys(zip(frame["question"], frame["measure"], strict=True)))
    rows = -(-len(panels) // _COLUMNS)
    figure = make_subplots(
        rows,
        _COLUMNS,
        subplot_titles=[_short(measure) for _, measure in panels],
        horizontal_spacing=0.07,
        vertical_spacing=0.24 / rows,
    )
    sides = list(dict.fromkeys(frame["of"]))
    # A difference has the colour of what safety is compared with: it is in panels of its own.
    drawn = dict(zip(sides, looks([side.rpartition(" − ")[2] for side in sides]), strict=True))
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
        title=title("Gradient geometry along training", _subtitle(trajectory, frame)),
        height=170 + 190 * rows,
        margin_t=104,
    )
    figure.update_annotations(font_size=12)
    _name_moments(figure, list(trajectory.moments), steps, len(panels))
    return figure


def _asked(frame: "pd.DataFrame", questions: Collection[str] | None) -> "pd.DataFrame":
    """Return the rows of the questions, without measures that are unknown throughout; no value has no interval."""
    known = list(dict.fromkeys(frame["question"]))
    if unknown := [question for question in questions or () if question not in known]:
        raise GeometryError(f"expected questions among {', '.join(known)}, found {', '.join(unknown)}")
    if questions is not None:
        frame = frame[frame["question"].isin(list(questions))]
    measured = frame.groupby(["question", "measure"])["value"].transform(lambda values: values.notna().any())
    if not measured.any():
        raise GeometryError("expected a measure with a value, found none at any moment; are the gradients zero?")
    frame = frame[measured]
    missing = frame["value"].isna()
    return frame.assign(low=frame["low"].mask(missing), high=frame["high"].mask(missing))


def _short(measure: str) -> str:
    """Write a measure's name for the title of a narrow panel.

    Example:
        >>> _short("effective rank, difference")
        'Δ effective rank'
    """
    name = measure.removesuffix(_DIFFERENCE)
    return f"Δ {name}" if name != measure else name


def _subtitle(trajectory: "Trajectory", frame: "pd.DataFrame") -> str:
    first = next(iter(trajectory.moments.values()))
    bands = f"bands: {per_cent(first.analysis.conflict.confidence)} intervals over examples; dotted: the null"
    grey = "; grey: its interval" if frame["null_low"].notna().any() else ""
    return f"{bands}{grey}{'; Δ: difference' if frame['measure'].str.endswith(_DIFFERENCE).any() else ''}"


def _name_moments(figure: go.Figure, moments: list[int | str], steps: bool, panels: int) -> None:
    """Write the moments below the lowest panel of each column only: above there is no room for names."""
    if steps:
        axis = {"title": "optimizer step", "tickvals": whole_ticks(map(int, moments))}
    else:
        names = list(map(str, moments))
        axis = {"title": "checkpoint", "tickvals": names, "ticktext": [wrapped(name, 14) for name in names]}
        figure.update_xaxes(type="category")
    figure.update_xaxes(showgrid=False, showticklabels=False, tickvals=axis["tickvals"])
    for number in range(max(0, panels - _COLUMNS), panels):
        place = {"row": number // _COLUMNS + 1, "col": number % _COLUMNS + 1}
        figure.update_xaxes(showticklabels=True, **axis, **place)


def _traces(frame: "pd.DataFrame", side: str, measure: str, look: Look) -> Iterator[go.Scatter]:
    yield from _band(frame, "null_low", "null_high", f"{side}: null interval", side, translucent(COLOURS["null"], 0.2))
    yield from _band(frame, "low", "high", f"{side}: interval", side, translucent(look.colour, 0.15))
    if frame["null"].notna().any():
        yield go.Scatter(
            x=frame["x"],
            y=frame["null"],
            name=f"{side}: null",
            legendgroup=side,
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
        text=[_told(row) for row in frame.to_dict("records")],
        hovertemplate=f"{measure}, {side}, %{{x}}<br><b>%{{y:.4g}}</b>%{{text}}<extra></extra>",
    )


def _band(frame: "pd.DataFrame", low: str, high: str, name: str, side: str, colour: str) -> Iterator[go.Scatter]:
    """A band between two columns where both are known, if that is at two moments at least."""
    banded = frame.dropna(subset=[low, high])
    if len(banded) > 1:
        yield go.Scatter(
            x=[*banded["x"], *banded["x"][::-1]],
            y=[*banded[high], *banded[low][::-1]],
            name=name,
            legendgroup=side,
            showlegend=False,
            mode="lines",
            line={"width": 0},
            fill="toself",
            fillcolor=colour,
            hoverinfo="skip",
        )


def _told(row: Mapping[Hashable, float]) -> str:
    """Write the interval and the null behind a value, as far as they are known."""
    interval = _span(row["low"], row["high"])
    null = f" {row['null']:.4g}" if np.isfinite(row["null"]) else ""
    around = _span(row["null_low"], row["null_high"])
    return f"{interval}<br>null{null}{around}" if null or around else interval


def _span(low: float, high: float) -> str:
    return f" [{low:.4g}, {high:.4g}]" if np.isfinite([low, high]).all() else ""
