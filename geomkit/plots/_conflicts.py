"""Figures of conflict: the signed map over the network, and the cosine of each example."""

from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go

from geomkit.plots._style import COLOURS, TEMPLATE, column_of, columns_of, layer_axis, place_of, title

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from geomkit.correlation import Conflict, LayerConflict

_SHOWN = 0.95
"""Share of the parameters whose cosine lies within the scale of colours."""


def plot_conflict(conflict: "Conflict") -> go.Figure:
    """Draw the cosine between safety and utility gradient for every parameter, red where they conflict.

    Args:
        conflict: The conflict between two gradient sets.

    Returns:
        The figure: a row per kind of parameter, a column per layer, the cosine of the mean gradients in colours
        centred at zero (the largest 5 % may share the last colour), and a mark where the interval for the expected
        gradients covers zero.
    """
    rows = list(dict.fromkeys(place_of(name) for name in conflict.layers))
    columns = columns_of(conflict.layers)
    cells = {(place_of(name), column_of(name)): (name, layer) for name, layer in conflict.layers.items()}
    figure = go.Figure(layout={"template": TEMPLATE})
    figure.add_trace(_heatmap(cells, rows, columns))
    figure.add_trace(_marks(cells))
    figure.update_layout(
        title=title(
            "Cosine between safety and utility gradient, by parameter", f"all parameters: {_summary(conflict)}"
        ),
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
        The figure: a histogram with a line at zero and a tick for every example.
    """
    cosines = np.asarray(conflict.per_example)
    figure = go.Figure(layout={"template": TEMPLATE})
    figure.add_trace(
        go.Histogram(
            x=cosines,
            name="utility examples",
            marker={"color": COLOURS["utility"], "line": {"color": "white", "width": 1}},
            nbinsx=30,
            hovertemplate="cosine %{x}<br>%{y} examples<extra></extra>",
        )
    )
    figure.add_vline(x=0, line={"color": "#222222", "width": 1.5})
    figure.update_layout(
        title=title(
            "Cosine of each utility example with the mean safety gradient",
            f"{conflict.negative} of {conflict.negative.n} examples are negative",
        ),
        xaxis_title="cosine with the mean safety gradient",
        yaxis_title="examples",
        showlegend=False,
    )
    return figure


def _summary(conflict: "Conflict | LayerConflict", new_line: str = "; ") -> str:
    return (
        f"{conflict.cosine:+.3f} (shuffled {_span(conflict.null_interval)}, p = {conflict.p_value:.2g}){new_line}"
        f"expected gradients {conflict.corrected:+.3f} {_span(conflict.interval)}"
    )


def _span(interval: tuple[float, float]) -> str:
    return f"[{interval[0]:+.3f}, {interval[1]:+.3f}]"


def _heatmap(
    cells: "dict[tuple[str, str], tuple[str, LayerConflict]]",
    rows: list[str],
    columns: list[str],
) -> go.Heatmap:
    values = np.full((len(rows), len(columns)), np.nan)
    texts = np.full(values.shape, "", dtype=object)
    for (row, column), (name, layer) in cells.items():
        place = rows.index(row), columns.index(column)
        values[place] = layer.cosine
        texts[place] = f"{name}<br>{_summary(layer, '<br>')}"
    limit, clipped = _limit(np.abs(values[np.isfinite(values)]))
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
            "title": {"text": f"cosine, clipped at ±{limit:.2g}" if clipped else "cosine", "side": "right"},
            "thickness": 14,
        },
    )


def _limit(magnitudes: "NDArray[np.float64]") -> tuple[float, bool]:
    """Where the colours end, and whether a value lies beyond: one norm can dwarf all matrices."""
    if not magnitudes.any():
        return 1.0, False
    limit = float(np.quantile(magnitudes, _SHOWN, method="higher"))
    return limit, limit < magnitudes.max()


def _signed(layer: "LayerConflict") -> bool:
    """Whether the interval leaves zero out; an undefined one does not."""
    low, high = layer.interval
    return low > 0 or high < 0


def _marks(cells: "dict[tuple[str, str], tuple[str, LayerConflict]]") -> go.Scatter:
    covered = [place for place, (_, layer) in cells.items() if not _signed(layer)]
    return go.Scatter(
        x=[column for _, column in covered],
        y=[row for row, _ in covered],
        name="interval covers 0",
        mode="markers",
        marker={"symbol": "x-thin", "size": 7, "line": {"color": "#222222", "width": 1.2}},
        showlegend=True,
        hoverinfo="skip",
    )
