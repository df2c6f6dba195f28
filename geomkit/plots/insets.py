"""An inset in a panel: the markers that lie on one spot, side by side in a corner where no marker is."""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from geomkit.plots.themes import palette

_NEAR = 0.09
"""Markers closer than this to a marker, along both axes, lie on its spot."""

_MARGIN = 0.06
"""Room around the spot, in the units of the panel's axes."""

_FEWEST = 3
"""The fewest markers on a spot that have an inset."""

_SIZE = 0.42
"""Width and height of an inset, as a share of the panel's."""

_CORNERS = ((0.14, 0.12), (0.14, 0.46), (0.56, 0.12))
"""Left and lower edge of the insets that are tried, as shares of the panel."""


def add_inset(figure: go.Figure, place: dict[str, int], points: Sequence[go.Scatter]) -> None:
    """Add an inset to a panel if at least three markers lie on one spot, and a corner has no marker.

    Args:
        figure: The figure.
        place: Row and column of the panel, as plotly takes them.
        points: The traces of the panel, of one marker each.
    """
    places = np.array([[trace.x[0], trace.y[0]] for trace in points], dtype=float)
    on_spot = _spot(places)
    panel = figure.get_subplot(**place)
    corner = _free_corner(places, panel)
    if on_spot.sum() < _FEWEST or corner is None:
        return
    low, high = places[on_spot].min(axis=0) - _MARGIN, places[on_spot].max(axis=0) + _MARGIN
    ends = ((-0.7, on_spot.sum() - 0.3), (low[1], high[1]))
    # 1. A pair of axes inside the panel, without ticks: hover text has the numbers.
    number = 1 + max(int(name.removeprefix("xaxis") or 1) for name in figure.layout if name.startswith("xaxis"))
    frame = {"showline": True, "mirror": True, "showticklabels": False, "ticks": "", "showgrid": False}
    for letter, axis, start, reach in zip("xy", panel, corner, ends, strict=True):
        other = "y" if letter == "x" else "x"
        figure.layout[f"{letter}axis{number}"] = {
            "domain": _within(axis.domain, start),
            "range": list(reach),
            "anchor": f"{other}{number}",
            **frame,
            "linecolor": palette().faint,
        }
    # 2. The markers of the spot side by side, at their heights, and in the panel a frame around them.
    for slot, at in enumerate(np.flatnonzero(on_spot).tolist()):
        copy = go.Scatter(points[at]).update(x=[slot], xaxis=f"x{number}", yaxis=f"y{number}", marker_size=10)
        figure.add_trace(copy.update(error_x={"visible": False}))
    line = {"color": palette().faint, "width": 1, "dash": "dot"}
    figure.add_shape(type="rect", x0=low[0], x1=high[0], y0=low[1], y1=high[1], line=line, **place)


def _spot(places: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which of (n, 2) places lie near the place that has most others near it."""
    near = np.all(np.abs(places[:, None] - places[None]) < _NEAR, axis=2)
    chosen: NDArray[np.bool_] = np.asarray(near)[int(np.argmax(np.sum(near, axis=1)))]
    return chosen


def _free_corner(
    places: NDArray[np.float64], panel: tuple[go.layout.XAxis, go.layout.YAxis]
) -> tuple[float, float] | None:
    """Return the left and the lower edge of an inset that covers no marker, as shares of the panel."""
    starts, ends = (np.array([axis.range[end] for axis in panel]) for end in (0, 1))
    shares = (places - starts) / (ends - starts)
    for corner in _CORNERS:
        inside = (shares > np.array(corner) - 0.08) & (shares < np.array(corner) + _SIZE + 0.04)
        if not inside.all(axis=1).any():
            return corner
    return None


def _within(domain: Sequence[float], start: float) -> list[float]:
    width = domain[1] - domain[0]
    return [domain[0] + start * width, domain[0] + (start + _SIZE) * width]
