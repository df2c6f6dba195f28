"""Axes that several figures share: decoder layers, whole numbers, optimizer steps, and named rows."""

from collections.abc import Iterable, Sequence
from itertools import count
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike, NDArray

from geomkit.inputs.parameters import layer_index
from geomkit.plots.labels import OUTSIDE
from geomkit.plots.themes import palette

_FEW_STEPS = 40
"""A run of up to this many steps has a tick at chosen steps; the ticks of a longer run follow the zoom."""


def columns_of(parameters: Iterable[str]) -> list[str]:
    """Return the labels of the decoder layers of parameters in order, and :data:`OUTSIDE` last if it occurs."""
    names = list(parameters)
    indices = sorted({index for name in names if (index := layer_index(name)) is not None})
    outside = [OUTSIDE] if any(layer_index(name) is None for name in names) else []
    return [*map(str, indices), *outside]


def labelled_columns(columns: Sequence[str], most: int = 16) -> list[str]:
    """Return the columns of an axis of decoder layers that have a label, about ``most``."""
    return [label for label in columns if label == OUTSIDE or int(label) % (len(columns) // most + 1) == 0]


def layer_axis(columns: list[str]) -> dict[str, object]:
    """Return an axis with one category per decoder layer, of which some have a label."""
    text = f"layer ({OUTSIDE}: outside the layers)" if OUTSIDE in columns else "layer"
    labelled = labelled_columns(columns)
    order = {"categoryorder": "array", "categoryarray": columns, "tickvals": labelled, "tickangle": 0}
    return {"type": "category", "title": text, **order}


def whole_ticks(values: Iterable[float], most: int = 6) -> list[int]:
    """Return the ticks of an axis of whole numbers: all values, or values at least 1, 2, 5, 10, 20, … apart.

    Of whole numbers without a gap, the ticks are the first and multiples of a step.

    Example:
        >>> whole_ticks([0, 1]), whole_ticks(range(1, 24)), whole_ticks([0, 1, 2, 3, 31])
        ([0, 1], [1, 5, 10, 15, 20], [0, 31])
    """
    places = sorted(set(map(int, values)))
    span = places[-1] - places[0] if places else 0
    step = next(step for power in count() for step in (10**power, 2 * 10**power, 5 * 10**power) if most * step >= span)
    if step > 1 and span == len(places) - 1:
        return [places[0], *(place for place in places if place % step == 0 and 2 * (place - places[0]) >= step)]
    ticks: list[int] = []
    for place in places:
        if not ticks or place - ticks[-1] >= step:
            ticks.append(place)
    return ticks


class SignedLog(NamedTuple):
    """A scale that is logarithmic on both sides of zero, over some powers of ten, and linear between these.

    Attributes:
        smallest: The value up to which the scale is linear.
        ticks: The places of its ticks.
        labels: Their labels.
    """

    smallest: float
    ticks: list[float]
    labels: list[str]

    def places(self, values: ArrayLike) -> NDArray[np.float64]:
        """Return the places of values on the scale."""
        places: NDArray[np.float64] = np.arcsinh(np.asarray(values, dtype=float) / self.smallest)
        return places


def signed_log(values: ArrayLike, decades: int = 3) -> SignedLog:
    """Return a scale that holds all values, with ticks at zero and at powers of ten, the largest beyond all values.

    Example:
        >>> signed_log([-2e-3, 0.3]).labels
        ['−1', '−0.1', '−0.01', '−0.001', '0', '0.001', '0.01', '0.1', '1']
    """
    magnitudes = np.abs(np.asarray(values, dtype=float))
    largest = float(np.max(magnitudes, initial=0.0, where=np.isfinite(magnitudes))) or 1.0
    powers = [10.0 ** (np.ceil(np.log10(largest)) - down) for down in range(decades, -1, -1)]
    labels = [f"{power:.0e}" if power < 1e-4 else f"{power:g}" for power in powers]
    places = np.arcsinh(np.array(powers) / powers[0]).tolist()
    return SignedLog(
        float(powers[0]),
        [*(-place for place in places[::-1]), 0.0, *places],
        [*(f"−{label}" for label in labels[::-1]), "0", *labels],
    )


def ending_at(first: float, last: float) -> dict[str, object]:
    """Return the range of an axis that ends where the data end, with room for half a marker.

    Example:
        >>> ending_at(0, 100)
        {'range': [-2.0, 102.0]}
    """
    room = 0.02 * (last - first) or 0.5
    return {"range": [first - room, last + room]}


def step_ticks(steps: Iterable[int]) -> dict[str, object]:
    """Return the range of an axis of optimizer steps and its ticks: chosen steps of a short run, else whole numbers."""
    distinct = set(steps)
    ends = ending_at(min(distinct), max(distinct)) if distinct else {}
    return {**ends, **({"tickvals": whole_ticks(distinct)} if len(distinct) <= _FEW_STEPS else {"tickformat": "d"})}


def name_rows(figure: go.Figure, names: Sequence[str]) -> None:
    """Make the vertical axis one row per name, from the top, with a line between every two rows."""
    for boundary in range(1, len(names)):
        figure.add_hline(y=boundary - 0.5, line={"color": palette().grid, "width": 1})
    figure.update_yaxes(
        tickvals=list(range(len(names))), ticktext=list(names), range=[len(names) - 0.5, -0.5], showgrid=False
    )
