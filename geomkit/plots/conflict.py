"""Figures of conflict: the signed map over the network, and the cosine of each example."""

from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go

from geomkit.correlation.conflict import Conflict
from geomkit.correlation.layer_conflict import ControlDifference, LayerConflict
from geomkit.errors import GeometryError
from geomkit.plots.style import (
    COLOURS,
    TEMPLATE,
    column_of,
    columns_of,
    layer_axis,
    per_cent,
    place_of,
    title,
    whole_ticks,
)
from geomkit.utils.display import counted, signed

if TYPE_CHECKING:
    from numpy.typing import NDArray

Cells = dict[tuple[str, str], tuple[str, LayerConflict]]
"""By layer and kind, a parameter's name and its conflict."""


_SHOWN = 0.95
"""Share of the parameters whose cosine lies within the scale of colours."""

_BINS = 30
_DARK = 0.6
"""Share of the scale of colours from which on a mark must be light to be seen."""
_UNKNOWN = "#D0D0D0"
_NO_DATA = {"x": [None], "y": [None], "mode": "markers", "hoverinfo": "skip"}
"""A trace that has a place in the legend only."""


def plot_conflict(conflict: "Conflict", *, contrast: bool = False) -> go.Figure:
    """Draw the cosine between safety and utility gradient for every parameter, red where they conflict.

    Args:
        conflict: The conflict between two gradient sets.
        contrast: Draw how much lower the cosine is than the control's instead, red where safety conflicts more.

    Returns:
        The figure: a row per kind of parameter, a column per layer, the cosine of the mean gradients (or the contrast)
        in colours centred at zero (the largest 5 % may share the last colour), grey where it is unknown, and a mark
        where the interval for the expected gradients covers zero.

    Raises:
        GeometryError: If the contrast is asked for and was not measured.
    """
    rows = list(dict.fromkeys(place_of(name) for name in conflict.layers))
    columns = columns_of(conflict.layers)
    cells = {(place_of(name), column_of(name)): (name, layer) for name, layer in conflict.layers.items()}
    figure = go.Figure(layout={"template": TEMPLATE})
    figure.add_trace(_heatmap(cells, rows, columns, contrast))
    figure.add_traces(_marks(cells, contrast, figure.data[0].zmax, per_cent(conflict.confidence)))
    figure.add_traces(_unknown(cells, contrast))
    figure.update_layout(
        title=_contrast_title(conflict.contrast) if contrast else _cosine_title(conflict),
        xaxis={**layer_axis(columns), "showgrid": False},
        yaxis={"type": "category", "categoryorder": "array", "categoryarray": rows, "autorange": "reversed"},
        yaxis_showgrid=False,
        height=180 + 26 * len(rows),
    )
    return figure


def plot_conflict_examples(conflict: "Conflict") -> go.Figure:
    """Draw how the cosines of single utility examples with the mean safety gradient are distributed.

    Args:
        conflict: The conflict between two gradient sets.

    Returns:
        The figure: a histogram with a line at zero; with a control, behind it that of the same examples' cosines with
        the mean control gradient.
    """
    drawn = {"safety": np.asarray(conflict.per_example)}
    if conflict.control_per_example is not None:
        drawn["control"] = np.asarray(conflict.control_per_example)
    bins, most = _bins(list(drawn.values()))
    figure = go.Figure(layout={"template": TEMPLATE, "barmode": "overlay"})
    for name, cosines in drawn.items():
        figure.add_trace(
            go.Histogram(
                x=cosines,
                name=f"with the mean {name} gradient",
                marker={"color": COLOURS[name], "line": {"color": "white", "width": 1}},
                opacity=0.75 if len(drawn) > 1 else 1.0,
                xbins=bins,
                autobinx=False,
                hovertemplate=f"cosine with {name} %{{x}}<br>%{{y}} examples<extra></extra>",
            )
        )
    figure.add_vline(x=0, line={"color": "#222222", "width": 1.5})
    figure.update_layout(
        title=title(
            f"Cosine of each utility example with the mean {' and '.join(drawn)} gradient{'s' * (len(drawn) > 1)}",
            f"with safety {conflict.negative} of {counted(conflict.negative.n, 'example')} are negative",
        ),
        xaxis_title="cosine with the mean gradient",
        yaxis={"title": "examples", "tickvals": whole_ticks(range(most + 1))},
        showlegend=len(drawn) > 1,
    )
    return figure


def _bins(drawn: "list[NDArray[np.float64]]") -> tuple[dict[str, float], int]:
    """Return bins that hold all the values, and at most how many lie in one."""
    known = [values[np.isfinite(values)] for values in drawn]
    everything = np.concatenate(known)
    if not len(everything):
        return {}, 0
    low, high = float(everything.min()), float(everything.max())
    size = max((high - low) / _BINS, 1e-9)
    most = max(np.bincount(((values - low) / size).astype(np.int64), minlength=1).max() for values in known)
    return {"start": low, "end": high + 1e-9, "size": size}, int(most)


def _cosine_title(conflict: "Conflict") -> dict[str, object]:
    return title("Cosine between safety and utility gradient, by parameter", f"all parameters: {_summary(conflict)}")


def _contrast_title(contrast: "ControlDifference | None") -> dict[str, object]:
    if contrast is None:
        raise GeometryError("expected a conflict with a control to draw the contrast, found none; pass control= to it")
    return title(
        "Cosine with the utility gradient: safety minus control, by parameter",
        f"all parameters: {_contrast_summary(contrast)}",
    )


def _summary(conflict: "Conflict | LayerConflict", new_line: str = "; ") -> str:
    return (
        f"{conflict.cosine:+.3f} (shuffled {signed(conflict.null_interval)}, p = {conflict.p_value:.2g}){new_line}"
        f"expected gradients {_number(conflict.corrected)} {signed(conflict.interval)}"
    )


def _contrast_summary(contrast: "ControlDifference", new_line: str = "; ") -> str:
    return (
        f"{_number(contrast.value)} {signed(contrast.interval)}, p = {contrast.p_value:.2g}{new_line}"
        f"control {_number(contrast.control)} {signed(contrast.control_interval)}"
    )


def _told(name: str, layer: "LayerConflict") -> str:
    lines = [name, _summary(layer, "<br>") if np.isfinite(layer.cosine) else "cosine unknown: a gradient is zero"]
    if np.isfinite(layer.weight):
        lines.append(f"{layer.weight:.1%} of the norms")
    if layer.contrast is not None:
        lines.append(f"minus control {_contrast_summary(layer.contrast, '<br>')}")
    return "<br>".join(lines)


def _number(value: float) -> str:
    return f"{value:+.3f}" if np.isfinite(value) else "unknown"


def _heatmap(cells: "Cells", rows: list[str], columns: list[str], contrast: bool) -> go.Heatmap:
    values = np.full((len(rows), len(columns)), np.nan)
    texts = np.full(values.shape, "", dtype=object)
    for (row, column), (name, layer) in cells.items():
        place = rows.index(row), columns.index(column)
        values[place] = _value(layer, contrast)
        texts[place] = _told(name, layer)
    limit, clipped = _limit(np.abs(values[np.isfinite(values)]))
    said = "safety minus control" if contrast else "cosine"
    return go.Heatmap(
        z=values,
        x=columns,
        y=rows,
        text=texts,
        hovertemplate="%{text}<extra></extra>",
        hoverongaps=False,
        colorscale="RdBu",
        zmin=-limit,
        zmid=0,
        zmax=limit,
        xgap=1,
        ygap=1,
        colorbar={
            "title": {"text": f"{said}, clipped at ±{limit:.2g}" if clipped else said, "side": "right"},
            "thickness": 14,
        },
    )


def _limit(magnitudes: "NDArray[np.float64]") -> tuple[float, bool]:
    """Where the colours end, and whether a value lies beyond: one norm can dwarf all matrices."""
    if not magnitudes.any():
        return 1.0, False
    limit = float(np.quantile(magnitudes, _SHOWN, method="higher"))
    return limit, limit < magnitudes.max()


def _value(layer: "LayerConflict", contrast: bool) -> float:
    """What a cell shows, NaN where it is unknown."""
    if not contrast:
        return layer.cosine
    return layer.contrast.value if layer.contrast else float("nan")


def _covers_zero(layer: "LayerConflict", contrast: bool) -> bool:
    low, high = layer.contrast.interval if contrast and layer.contrast else layer.interval
    return low <= 0 <= high


def _marks(cells: "Cells", contrast: bool, limit: float, confidence: str) -> list[go.Scatter]:
    """The marks, light on dark cells and dark on light ones, and their place in the legend."""
    values = {place: _value(layer, contrast) for place, (_, layer) in cells.items() if _covers_zero(layer, contrast)}
    covered = {place: value for place, value in values.items() if np.isfinite(value)}
    colours = ["white" if abs(value) > _DARK * limit else "#222222" for value in covered.values()]
    look = {"symbol": "x-thin", "size": 7}
    marks = go.Scatter(
        x=[column for _, column in covered],
        y=[row for row, _ in covered],
        mode="markers",
        marker={**look, "line": {"color": colours, "width": 1.2}},
        showlegend=False,
        hoverinfo="skip",
    )
    line = {"color": "#222222", "width": 1.2}
    key = go.Scatter(**_NO_DATA, name=f"{confidence} interval covers 0", marker={**look, "line": line}, showlegend=True)
    return [marks, key]


def _unknown(cells: "Cells", contrast: bool) -> list[go.Heatmap | go.Scatter]:
    """Grey cells for parameters of an unknown value, and their place in the legend; nothing if there are none."""
    found = {place: told for place, told in cells.items() if not np.isfinite(_value(told[1], contrast))}
    if not found:
        return []
    grey = go.Heatmap(
        x=[column for _, column in found],
        y=[row for row, _ in found],
        z=[0] * len(found),
        text=[_told(*told) for told in found.values()],
        hovertemplate="%{text}<extra></extra>",
        hoverongaps=False,
        colorscale=[[0, _UNKNOWN], [1, _UNKNOWN]],
        showscale=False,
        xgap=1,
        ygap=1,
    )
    return [grey, go.Scatter(**_NO_DATA, name="unknown", marker={"symbol": "square", "size": 10, "color": _UNKNOWN})]
