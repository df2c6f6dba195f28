"""Parts of traces that several figures share: bands, error bars, marks that stand side by side, legend entries."""

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike, NDArray

LEGEND_ONLY = {"x": [None], "y": [None], "hoverinfo": "skip"}
"""Options of a trace that has an entry in the legend and no point in the figure."""

_FEW_POINTS = 40


def band(x: ArrayLike, low: ArrayLike, high: ArrayLike, colour: str, **options: object) -> go.Scatter:
    """Return the area between two curves as one closed outline, without hover and entry in the legend.

    Args:
        x: (n,) places of both curves.
        low: (n,) lower curve.
        high: (n,) upper curve.
        colour: Colour of the area, with its opacity.
        **options: Further options of the trace, such as ``name``.
    """
    look = {"mode": "lines", "line": {"width": 0}, "fill": "toself", "fillcolor": colour}
    return go.Scatter(
        x=_there_and_back(x, x),
        y=_there_and_back(high, low),
        hoverinfo="skip",
        showlegend=False,
        **{**look, **options},
    )


def _there_and_back(forwards: ArrayLike, backwards: ArrayLike) -> NDArray[np.generic]:
    return np.concatenate([np.asarray(forwards), np.asarray(backwards)[::-1]])


def error_bars(value: ArrayLike, low: ArrayLike, high: ArrayLike, **look: object) -> dict[str, object]:
    """Return the error bars of intervals around values; a bar whose interval is NaN is not drawn.

    Args:
        value: (n,) values, or one value.
        low: (n,) lower ends.
        high: (n,) upper ends.
        **look: Further options, such as ``thickness``; the bars have no caps unless ``width`` is given.
    """
    middle = np.atleast_1d(np.asarray(value, dtype=float))
    above, below = np.asarray(high, dtype=float) - middle, middle - np.asarray(low, dtype=float)
    return {"array": above, "arrayminus": below, "width": 0, **look}


def side_by_side(series: int, width: float) -> NDArray[np.float64]:
    """Return the shift of each series from a shared place, evenly over ``width``; zero for a single series.

    Example:
        >>> side_by_side(3, 0.5).tolist(), side_by_side(1, 0.5).tolist()
        ([-0.25, 0.0, 0.25], [0.0])
    """
    return np.linspace(-width / 2, width / 2, series) if series > 1 else np.zeros(1)


def line_mode(points: int, few: int = _FEW_POINTS) -> str:
    """Return the mode of a line: with a marker at each point if there are at most ``few`` points."""
    return "lines+markers" if points <= few else "lines"
