"""The figure of the principal angles between two subspaces, and of their overlap by layer."""

from collections.abc import Mapping

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from geomkit.errors import GeometryError
from geomkit.inputs.parameters import kind_of
from geomkit.plots.axes import columns_of, ending_at, labelled_columns, layer_axis, whole_ticks
from geomkit.plots.labels import column_of
from geomkit.plots.style import Look, fitted, looks, title
from geomkit.plots.themes import COLOURS, palette, template
from geomkit.plots.traces import side_by_side
from geomkit.svd.principal_angles import Angles, LayerAngles


def plot_angles(angles: Angles) -> go.Figure:
    """Draw the principal angles of every parameter, and their overlap by layer.

    Args:
        angles: Principal angles between two subspaces.

    Returns:
        The figure. Top: a thin line per parameter through its angles in ascending order, their median over
        parameters, and the edge above which almost all angles of random subspaces of these sizes lie. Bottom: the
        overlap, the mean squared cosine. Each parameter has a place of its own within its layer, at which also stand
        the expectation for random subspaces and, as an open circle on a line to the overlap, the control.

    Raises:
        GeometryError: If no parameter has a direction on both sides.
    """
    layers = {name: layer for name, layer in angles.layers.items() if len(layer.angles)}
    if not layers:
        raise GeometryError(
            "expected subspaces with directions, found none in any parameter; the gradients may be zero: check the "
            "loss masks"
        )
    figure = make_subplots(2, 1, vertical_spacing=0.22)
    places = _places(layers)
    kinds = list(dict.fromkeys(kind_of(parameter) for parameter in layers))
    for kind, look in zip(kinds, looks(kinds), strict=True):
        of_kind = {name: layer for name, layer in layers.items() if kind_of(name) == kind}
        figure.add_trace(_angle_lines(of_kind, kind, look.colour), row=1, col=1)
        figure.add_trace(_overlaps(of_kind, places, kind, look), row=2, col=1)
    figure.add_traces(_summary(layers), rows=1, cols=1)
    figure.add_trace(_expected_overlaps(layers, places), row=2, col=1)
    control = ""
    if not np.isnan(angles.mean_control):
        figure.add_traces(_control_overlaps(layers, places), rows=2, cols=1)
        control = f"control (open circles): {angles.mean_control:.3g}; "
    columns = columns_of(layers)
    labelled = labelled_columns(columns)
    figure.update_layout(
        template=template(),
        title=title(
            "Principal angles between two subspaces",
            f"of {angles.side} singular vectors; mean overlap {angles.mean_overlap:.3g}; {control}random subspaces: "
            f"{angles.mean_expected_overlap:.3g}",
        ),
        yaxis={"range": [-2, 92], "dtick": 15, "ticksuffix": "°", "title": "principal angle, degrees"},
        xaxis={
            "title": "index of the angle, ascending",
            "tickvals": whole_ticks(range(1, _longest(layers) + 1), 10),
            **ending_at(1, _longest(layers)),
        },
        xaxis2={
            "title": layer_axis(columns)["title"],
            "tickvals": [columns.index(label) for label in labelled],
            "ticktext": labelled,
            "range": [-0.5, len(columns) - 0.5],
            "showgrid": False,
        },
        yaxis2={"title": "overlap, mean cos²", "rangemode": "tozero"},
    )
    return fitted(figure, 500)


def _places(layers: Mapping[str, LayerAngles]) -> dict[str, float]:
    """Return the place of each parameter along the axis of layers, side by side with those of the same layer."""
    columns = columns_of(layers)
    places: dict[str, float] = {}
    for number, column in enumerate(columns):
        of_layer = [name for name in layers if column_of(name) == column]
        shifts = side_by_side(len(of_layer), 0.76)
        places |= {name: number + float(shift) for name, shift in zip(of_layer, shifts, strict=True)}
    return places


# ----------------------------------------------------------------------------------------------------------- angles


def _longest(layers: Mapping[str, LayerAngles]) -> int:
    return max(len(layer.angles) for layer in layers.values())


def _degrees(layer: LayerAngles) -> NDArray[np.float64]:
    """Return the angles of a layer in degrees, ascending."""
    degrees: NDArray[np.float64] = np.degrees(layer.angles[::-1])
    return degrees


def _angle_lines(layers: Mapping[str, LayerAngles], kind: str, colour: str) -> go.Scatter:
    """Return the lines of all parameters of a kind as one trace with gaps, since a large model has hundreds."""
    x, y, names = [], [], []
    for name, layer in layers.items():
        degrees = _degrees(layer)
        x += [*range(1, len(degrees) + 1), None]
        y += [*degrees, None]
        names += [name] * (len(degrees) + 1)
    return go.Scatter(
        x=x,
        y=y,
        text=names,
        name=kind,
        legendgroup=kind,
        mode="lines",
        opacity=0.3,
        line={"color": colour, "width": 1},
        hovertemplate="%{text}<br>angle %{x}: <b>%{y:.1f}°</b><extra></extra>",
        showlegend=False,
    )


def _summary(layers: Mapping[str, LayerAngles]) -> list[go.Scatter]:
    """Return the median of the angles over parameters, and the median of the edge for random subspaces."""
    longest = _longest(layers)
    padded = np.full((len(layers), longest), np.nan)
    for row, layer in zip(padded, layers.values(), strict=True):
        row[: len(layer.angles)] = _degrees(layer)
    edges = [np.degrees(np.arccos(min(layer.random_edge, 1.0))) for layer in layers.values()]
    return [
        go.Scatter(
            x=np.arange(1, longest + 1),
            y=np.nanmedian(padded, axis=0),
            name="median over parameters",
            mode="lines+markers",
            line={"color": palette().ink, "width": 2.5},
            marker={"size": 5},
            hovertemplate="median over parameters<br>angle %{x}: <b>%{y:.1f}°</b><extra></extra>",
        ),
        go.Scatter(
            x=[1, longest],
            y=[float(np.median(edges))] * 2,
            name="edge for random subspaces",
            mode="lines",
            line={"color": COLOURS["null"], "width": 2, "dash": "dash"},
            hovertemplate="random subspaces keep above <b>%{y:.1f}°</b> (median over parameters)<extra></extra>",
        ),
    ]


# --------------------------------------------------------------------------------------------------------- overlaps


def _overlaps(layers: Mapping[str, LayerAngles], places: Mapping[str, float], kind: str, look: Look) -> go.Scatter:
    marker = {"symbol": look.symbol, "size": 8, "color": look.colour, "line": {"color": palette().paper, "width": 1}}
    return go.Scatter(
        x=[places[name] for name in layers],
        y=[layer.overlap for layer in layers.values()],
        name=kind,
        legendgroup=kind,
        mode="markers",
        marker=marker,
        customdata=[[name, layer.expected_overlap, _control_text(layer)] for name, layer in layers.items()],
        hovertemplate=(
            "%{customdata[0]}<br>overlap <b>%{y:.3g}</b>%{customdata[2]}<br>random subspaces %{customdata[1]:.3g}"
            "<extra></extra>"
        ),
    )


def _control_text(layer: LayerAngles) -> str:
    return "" if np.isnan(layer.control) else f", control {layer.control:.3g}"


def _expected_overlaps(layers: Mapping[str, LayerAngles], places: Mapping[str, float]) -> go.Scatter:
    return go.Scatter(
        x=[places[name] for name in layers],
        y=[layer.expected_overlap for layer in layers.values()],
        name="null: random subspaces",
        mode="markers",
        marker={"symbol": "line-ew-open", "size": 9, "color": COLOURS["null"], "line": {"width": 2}},
        hoverinfo="skip",
    )


def _control_overlaps(layers: Mapping[str, LayerAngles], places: Mapping[str, float]) -> list[go.Scatter]:
    """Return a line from each overlap to the control's of the same parameter, and the control's as an open circle."""
    measured = {name: layer for name, layer in layers.items() if not np.isnan(layer.control)}
    lines = go.Scatter(
        x=[x for name in measured for x in (places[name], places[name], None)],
        y=[y for layer in measured.values() for y in (layer.overlap, layer.control, None)],
        mode="lines",
        line={"color": COLOURS["control"], "width": 1},
        legendgroup="control",
        showlegend=False,
        hoverinfo="skip",
    )
    circles = go.Scatter(
        x=[places[name] for name in measured],
        y=[layer.control for layer in measured.values()],
        name="control",
        legendgroup="control",
        mode="markers",
        marker={"symbol": "circle-open", "size": 8, "color": COLOURS["control"], "line": {"width": 1.5}},
        text=list(measured),
        hovertemplate="%{text}<br>overlap of the control <b>%{y:.3g}</b><extra></extra>",
    )
    return [lines, circles]
