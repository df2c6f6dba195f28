"""Figures of conflict: the map of the cosine over the network, and the cosines of single examples."""

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from geomkit.correlation.conflict import Conflict
from geomkit.correlation.layer_conflict import ControlDifference, LayerConflict
from geomkit.errors import GeometryError
from geomkit.inputs.parameters import kind_of
from geomkit.plots.axes import columns_of, layer_axis, whole_ticks
from geomkit.plots.labels import column_of, per_cent, place_labels, place_of
from geomkit.plots.style import colour_bar, fitted, title
from geomkit.plots.themes import COLOURS, palette, template
from geomkit.plots.traces import LEGEND_ONLY
from geomkit.utils.display import counted, signed

_Cells = dict[tuple[str, str], tuple[str, LayerConflict]]
"""By row and column of the map, a parameter's name and its conflict."""

_SHOWN = 0.95
"""Share of the matrices whose cosine lies within the scale of colours."""

_BINS = 30
_WHITE = "#FFFFFF"
_DARK = 0.6
"""Share of the scale of colours beyond which a mark must be light to be visible."""


# ---------------------------------------------------------------------------------------------------------- the map


def plot_conflict(conflict: Conflict, *, contrast: bool = False) -> go.Figure:
    """Draw the cosine between safety and utility gradient for every parameter, red where they conflict.

    Args:
        conflict: The conflict between two gradient sets.
        contrast: Draw the cosine minus the control's cosine instead, red where safety conflicts more than the control.

    Returns:
        The figure: a row per kind of parameter and a column per layer, with the cosine of the mean gradients (or the
        contrast) in colours centred at zero, whose ends may stand for the largest 5 % of the matrices, and for vectors
        such as those of norms; grey where the value is unknown, and a mark where the interval for the expected
        gradients covers zero.

    Raises:
        GeometryError: If the contrast is asked for and was not measured.
    """
    labels = place_labels(conflict.layers)
    rows, columns = list(labels.values()), columns_of(conflict.layers)
    cells = {(labels[place_of(name)], column_of(name)): (name, layer) for name, layer in conflict.layers.items()}
    figure = go.Figure(layout={"template": template()})
    figure.add_trace(_heatmap(cells, rows, columns, contrast))
    figure.add_traces(_marks(cells, contrast, figure.data[0].zmax, per_cent(conflict.confidence)))
    figure.add_traces(_unknown(cells, contrast))
    figure.update_layout(
        title=_title(conflict, contrast, *_limit(cells, contrast)),
        xaxis={**layer_axis(columns), "showgrid": False},
        yaxis={"type": "category", "categoryorder": "array", "categoryarray": rows, "autorange": "reversed"},
        yaxis_showgrid=False,
    )
    return fitted(figure, 26 * len(rows))


def _value(layer: LayerConflict, contrast: bool) -> float:
    """Return the value of a cell, NaN if it is unknown."""
    if not contrast:
        return layer.cosine
    return layer.contrast.value if layer.contrast else float("nan")


def _covers_zero(layer: LayerConflict, contrast: bool) -> bool:
    low, high = layer.contrast.interval if contrast and layer.contrast else layer.interval
    return low <= 0 <= high


def _heatmap(cells: _Cells, rows: list[str], columns: list[str], contrast: bool) -> go.Heatmap:
    values = np.full((len(rows), len(columns)), np.nan)
    texts = np.full(values.shape, "", dtype=object)
    for (row, column), (name, layer) in cells.items():
        place = rows.index(row), columns.index(column)
        values[place] = _value(layer, contrast)
        texts[place] = _hover(name, layer)
    limit, _ = _limit(cells, contrast)
    return go.Heatmap(
        z=values,
        x=columns,
        y=rows,
        text=texts,
        hovertemplate="%{text}<extra></extra>",
        hoverongaps=False,
        colorscale=palette().diverging(),
        zmin=-limit,
        zmid=0,
        zmax=limit,
        xgap=1,
        ygap=1,
        colorbar=colour_bar("safety − control" if contrast else "cosine"),
    )


def _limit(cells: _Cells, contrast: bool) -> tuple[float, bool]:
    """Return the end of the scale of colours, and whether a value is larger: a vector can exceed all matrices."""
    values = {name: abs(_value(layer, contrast)) for name, layer in cells.values()}
    known = {name: value for name, value in values.items() if np.isfinite(value)}
    of_matrices = [value for name, value in known.items() if kind_of(name) != "norm" and not name.endswith("bias")]
    scale = of_matrices if any(of_matrices) else list(known.values())
    if not any(scale):
        return 1.0, False
    limit = float(np.quantile(scale, _SHOWN, method="higher"))
    return limit, limit < max(known.values())


def _marks(cells: _Cells, contrast: bool, limit: float, confidence: str) -> list[go.Scatter]:
    """Return the marks of intervals that cover zero, light on dark cells and dark on light ones, and their legend."""
    values = {place: _value(layer, contrast) for place, (_, layer) in cells.items() if _covers_zero(layer, contrast)}
    covered = {place: value for place, value in values.items() if np.isfinite(value)}
    colours = [_WHITE if abs(value) > _DARK * limit else palette().ink for value in covered.values()]
    look = {"symbol": "x-thin", "size": 7}
    marks = go.Scatter(
        x=[column for _, column in covered],
        y=[row for row, _ in covered],
        mode="markers",
        marker={**look, "line": {"color": colours, "width": 1.2}},
        showlegend=False,
        hoverinfo="skip",
    )
    marker = {**look, "line": {"color": palette().ink, "width": 1.2}}
    return [marks, _legend_entry(f"{confidence} interval covers 0", marker, showlegend=True)]


def _unknown(cells: _Cells, contrast: bool) -> list[go.Heatmap | go.Scatter]:
    """Return grey cells for parameters whose value is unknown, and their legend; nothing if there are none."""
    unknown = {place: cell for place, cell in cells.items() if not np.isfinite(_value(cell[1], contrast))}
    if not unknown:
        return []
    grey = go.Heatmap(
        x=[column for _, column in unknown],
        y=[row for row, _ in unknown],
        z=[0] * len(unknown),
        text=[_hover(*cell) for cell in unknown.values()],
        hovertemplate="%{text}<extra></extra>",
        hoverongaps=False,
        colorscale=[[0, palette().unknown], [1, palette().unknown]],
        showscale=False,
        xgap=1,
        ygap=1,
    )
    return [grey, _legend_entry("unknown", {"symbol": "square", "size": 10, "color": palette().unknown})]


def _legend_entry(name: str, marker: dict[str, object], **options: bool) -> go.Scatter:
    return go.Scatter(**LEGEND_ONLY, mode="markers", name=name, marker=marker, **options)


def _title(conflict: Conflict, contrast: bool, limit: float, clipped: bool) -> dict[str, object]:
    """Return the title of the map, with the values over all parameters, and where the colours end if values are larger.

    Raises:
        GeometryError: If the contrast is asked for and was not measured.
    """
    ends = f"; colours end at ±{limit:.2g}" if clipped else ""
    if not contrast:
        summary = f"all parameters: {_summary(conflict)}{ends}"
        return title("Cosine of safety and utility gradients", summary)
    if conflict.contrast is None:
        raise GeometryError("expected a conflict with a control to draw the contrast, found none; pass control= to it")
    summary = f"all parameters: {_contrast_summary(conflict.contrast)}{ends}"
    return title("Cosine with utility: safety − control", summary)


def _hover(name: str, layer: LayerConflict) -> str:
    lines = [name, _summary(layer, "<br>") if np.isfinite(layer.cosine) else "cosine unknown: a gradient is zero"]
    if np.isfinite(layer.weight):
        lines.append(f"{layer.weight:.1%} of the norms")
    if layer.contrast is not None:
        lines.append(f"minus control {_contrast_summary(layer.contrast, '<br>')}")
    return "<br>".join(lines)


def _summary(conflict: Conflict | LayerConflict, separator: str = "; ") -> str:
    return (
        f"{conflict.cosine:+.3f} (shuffled {signed(conflict.null_interval)}, p = {conflict.p_value:.2g}){separator}"
        f"expected gradients {_number(conflict.corrected)} {signed(conflict.interval)}"
    )


def _contrast_summary(contrast: ControlDifference, separator: str = "; ") -> str:
    return (
        f"{_number(contrast.value)} {signed(contrast.interval)}, p = {contrast.p_value:.2g}{separator}"
        f"control {_number(contrast.control)} {signed(contrast.control_interval)}"
    )


def _number(value: float) -> str:
    return f"{value:+.3f}" if np.isfinite(value) else "unknown"


# ------------------------------------------------------------------------------------------------- single examples


def plot_conflict_examples(conflict: Conflict) -> go.Figure:
    """Draw the distribution of the cosines of single utility examples with the mean safety gradient.

    Args:
        conflict: The conflict between two gradient sets.

    Returns:
        The figure: a histogram with a line at zero; with a control, below it in the same bins and at the same scale the
        histogram of the same examples' cosines with the mean control gradient.
    """
    cosines = {"safety": np.asarray(conflict.per_example)}
    if conflict.control_per_example is not None:
        cosines["control"] = np.asarray(conflict.control_per_example)
    bins, most = _bins(list(cosines.values()))
    figure = make_subplots(len(cosines), 1, shared_xaxes=True, vertical_spacing=0.06)
    for row, (name, values) in enumerate(cosines.items(), start=1):
        figure.add_trace(
            go.Histogram(
                x=values,
                name=f"with the mean {name} gradient",
                marker={"color": COLOURS[name], "line": {"color": palette().paper, "width": 1}},
                xbins=bins,
                autobinx=False,
                hovertemplate=f"cosine with {name} %{{x}}<br>%{{y}} examples<extra></extra>",
            ),
            row=row,
            col=1,
        )
    figure.add_vline(x=0, line={"color": palette().ink, "width": 1.5}, row="all", col="all")
    figure.update_yaxes(title="examples", tickvals=whole_ticks(range(most + 1), 4), range=[0, 1.05 * most])
    figure.update_xaxes(title="cosine with the mean gradient", row=len(cosines))
    figure.update_layout(
        template=template(),
        title=title(
            "Cosines of single utility examples",
            f"with the mean {' and '.join(cosines)} gradient{'s' * (len(cosines) > 1)}; with safety "
            f"{conflict.negative} of {counted(conflict.negative.n, 'example')} are negative",
        ),
        showlegend=len(cosines) > 1,
    )
    return fitted(figure, 110 + 130 * len(cosines))


def _bins(histograms: list[NDArray[np.float64]]) -> tuple[dict[str, float], int]:
    """Return bins that cover all finite values, and the largest number of values in a bin of one histogram."""
    finite = [values[np.isfinite(values)] for values in histograms]
    all_values = np.concatenate(finite)
    if not len(all_values):
        return {}, 0
    low, high = float(all_values.min()), float(all_values.max())
    size = max((high - low) / _BINS, 1e-9)
    most = max(np.bincount(((values - low) / size).astype(np.int64), minlength=1).max() for values in finite)
    return {"start": low, "end": high + 1e-9, "size": size}, int(most)
