"""Axes that several figures share: decoder layers, whole numbers, optimizer steps, and named rows."""

from collections.abc import Iterable, Sequence
from itertools import count

import plotly.graph_objects as go

from geomkit.inputs.parameters import layer_index
from geomkit.plots.labels import OUTSIDE
from geomkit.plots.style import GRID

_FEW_STEPS = 40
"""A run of up to this many steps has a tick at chosen steps; the ticks of a longer run follow the zoom."""


def columns_of(parameters: Iterable[str]) -> list[str]:
    """Return the labels of the decoder layers of parameters in order, and :data:`OUTSIDE` last if it occurs."""
    names = list(parameters)
    indices = sorted({index for name in names if (index := layer_index(name)) is not None})
    outside = [OUTSIDE] if any(layer_index(name) is None for name in names) else []
    return [*map(str, indices), *outside]


def layer_axis(columns: list[str], most: int = 16) -> dict[str, object]:
    """Return an axis with one category per decoder layer, of which about ``most`` have a label."""
    text = f"layer ({OUTSIDE}: outside the layers)" if OUTSIDE in columns else "layer"
    labelled = [label for label in columns if label == OUTSIDE or int(label) % (len(columns) // most + 1) == 0]
    order = {"categoryorder": "array", "categoryarray": columns, "tickvals": labelled, "tickangle": 0}
    return {"type": "category", "title": text, **order}


def whole_ticks(values: Iterable[float], most: int = 6) -> list[int]:
    """Return the ticks of an axis of whole numbers: all values, or values at least 1, 2, 5, 10, 20, … apart.

    Example:
        >>> whole_ticks([0, 1]), whole_ticks(range(24)), whole_ticks([0, 1, 2, 3, 31])
        ([0, 1], [0, 5, 10, 15, 20], [0, 31])
    """
    places = sorted(set(map(int, values)))
    span = places[-1] - places[0] if places else 0
    step = next(step for power in count() for step in (10**power, 2 * 10**power, 5 * 10**power) if most * step >= span)
    ticks: list[int] = []
    for place in places:
        if not ticks or place - ticks[-1] >= step:
            ticks.append(place)
    return ticks


def step_ticks(steps: Iterable[int]) -> dict[str, object]:
    """Return the ticks of an axis of optimizer steps: chosen steps of a short run, whole numbers of a long run."""
    distinct = set(steps)
    return {"tickvals": whole_ticks(distinct, 10)} if len(distinct) <= _FEW_STEPS else {"tickformat": "d"}


def name_rows(figure: go.Figure, names: Sequence[str]) -> None:
    """Make the vertical axis one row per name, from the top, with a line between every two rows."""
    for boundary in range(1, len(names)):
        figure.add_hline(y=boundary - 0.5, line={"color": GRID, "width": 1})
    figure.update_yaxes(
        tickvals=list(range(len(names))), ticktext=list(names), range=[len(names) - 0.5, -0.5], showgrid=False
    )
