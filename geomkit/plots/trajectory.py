"""The figure of the gradient geometry over training, one panel per measure."""

from collections.abc import Collection, Hashable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from geomkit.errors import GeometryError
from geomkit.plots.axes import whole_ticks
from geomkit.plots.labels import per_cent, wrapped
from geomkit.plots.panels import Panels, panels
from geomkit.plots.style import Look, looks, title, translucent
from geomkit.plots.themes import COLOURS, palette
from geomkit.plots.traces import LEGEND_ONLY, band

if TYPE_CHECKING:
    from geomkit.analysis.tracking import Trajectory  # imports transformers, which takes seconds

_DIFFERENCE = ", difference"
"""The end of a measure's name if the measure is a difference to the control."""


def plot_trajectory(trajectory: "Trajectory", *, questions: Collection[str] | None = None) -> go.Figure:
    """Draw the measures of a probe over the checkpoints of a training run.

    Args:
        trajectory: The measures of a probe at several steps or checkpoints.
        questions: Draw only the measures of these questions, such as ``["conflict?", "has it moved?"]``; all if left
            out.

    Returns:
        The figure: a panel per measure with a line per side, its interval over examples as a band, and dotted the null
        of that side, the value expected without any effect, with its interval in grey. Measures that are unknown at
        every step are left out.

    Raises:
        GeometryError: If a question is not among the trajectory's, or no measure has a value.
    """
    frame = _chosen(trajectory.to_frame(), questions)
    steps = all(isinstance(at, int) for at in trajectory.moments)
    frame = frame.assign(x=frame["at"] if steps else frame["at"].astype(str))
    measures = list(dict.fromkeys(zip(frame["question"], frame["measure"], strict=True)))
    drawn = panels([_short(measure) for _, measure in measures], height=130, gap=60)
    sides = list(dict.fromkeys(frame["of"]))
    # A difference to the control has the colour of the control: differences have panels of their own.
    look_of = dict(zip(sides, looks([side.rpartition(" − ")[2] for side in sides]), strict=True))
    in_legend: set[str] = set()
    for number, (question, measure) in enumerate(measures):
        rows = frame[(frame["question"] == question) & (frame["measure"] == measure)]
        for side, part in rows.groupby("of", sort=False):
            for trace in _traces(part, str(side), measure, look_of[str(side)]):
                trace.showlegend = bool(trace.showlegend) and trace.name not in in_legend
                in_legend |= {trace.name} if trace.showlegend else set()
                drawn.add(number, trace)
    if frame["null"].notna().any():
        line = {"color": palette().ink, "dash": "dot", "width": 1.5}
        drawn.figure.add_trace(go.Scatter(**LEGEND_ONLY, name="null of the same colour", mode="lines", line=line))
    _name_moments(drawn, list(trajectory.moments), steps)
    return drawn.finished(title("Gradient geometry along training", _subtitle(trajectory, frame)), "", "")


def _chosen(frame: pd.DataFrame, questions: Collection[str] | None) -> pd.DataFrame:
    """Return the rows of the questions, without measures that are unknown throughout.

    Where a value is unknown, its interval is removed too.
    """
    all_questions = list(dict.fromkeys(frame["question"]))
    if unknown := [question for question in questions or () if question not in all_questions]:
        raise GeometryError(f"expected questions among {', '.join(all_questions)}, found {', '.join(unknown)}")
    if questions is not None:
        frame = frame[frame["question"].isin(list(questions))]
    measured = frame.groupby(["question", "measure"])["value"].transform(lambda values: values.notna().any())
    if not measured.any():
        raise GeometryError(
            "expected a measure with a value, found none at any moment; the gradients may be zero: check the loss masks"
        )
    frame = frame[measured]
    missing = frame["value"].isna()
    return frame.assign(low=frame["low"].mask(missing), high=frame["high"].mask(missing))


def _short(measure: str) -> str:
    """Return a measure's name for the title of a narrow panel.

    Example:
        >>> _short("effective rank, difference")
        'Δ effective rank'
    """
    name = measure.removesuffix(_DIFFERENCE)
    return f"Δ {name}" if name != measure else name


def _subtitle(trajectory: "Trajectory", frame: pd.DataFrame) -> str:
    first = next(iter(trajectory.moments.values()))
    bands = f"bands: {per_cent(first.analysis.conflict.confidence)} intervals over examples; dotted: the null"
    grey = "; grey: its interval" if frame["null_low"].notna().any() else ""
    return f"{bands}{grey}{'; Δ: difference' if frame['measure'].str.endswith(_DIFFERENCE).any() else ''}"


def _name_moments(drawn: Panels, moments: list[int | str], steps: bool) -> None:
    """Write steps or names of checkpoints below the lowest panels only, since there is no room between panels."""
    if steps:
        axis = {"title": "optimizer step", "tickvals": whole_ticks(map(int, moments))}
    else:
        names = list(map(str, moments))
        axis = {"title": "checkpoint", "tickvals": names, "ticktext": [wrapped(name, 14) for name in names]}
        drawn.figure.update_xaxes(type="category")
    drawn.figure.update_xaxes(showgrid=False, showticklabels=False, tickvals=axis["tickvals"])
    for number in drawn.lowest():
        drawn.figure.update_xaxes(showticklabels=True, **axis, **drawn.at(number))


# ----------------------------------------------------------------------------------------------------------- traces


def _traces(frame: pd.DataFrame, side: str, measure: str, look: Look) -> Iterator[go.Scatter]:
    """Yield the bands, the null and the values of one side in one panel."""
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
        text=[_hover(row) for row in frame.to_dict("records")],
        hovertemplate=f"{measure}, {side}, %{{x}}<br><b>%{{y:.4g}}</b>%{{text}}<extra></extra>",
    )


def _band(frame: pd.DataFrame, low: str, high: str, name: str, side: str, colour: str) -> Iterator[go.Scatter]:
    """Yield a band between two columns over the rows where both columns are known, if there are at least two rows."""
    rows = frame.dropna(subset=[low, high])
    if len(rows) > 1:
        yield band(rows["x"], rows[low], rows[high], colour, name=name, legendgroup=side)


def _hover(row: Mapping[Hashable, float]) -> str:
    """Return the interval of a value and its null as text; a part that is unknown is left out."""
    interval = _interval(row["low"], row["high"])
    null = f" {row['null']:.4g}" if np.isfinite(row["null"]) else ""
    null_interval = _interval(row["null_low"], row["null_high"])
    return f"{interval}<br>null{null}{null_interval}" if null or null_interval else interval


def _interval(low: float, high: float) -> str:
    return f" [{low:.4g}, {high:.4g}]" if np.isfinite([low, high]).all() else ""
