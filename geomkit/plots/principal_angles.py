"""The figure of the principal angles between two subspaces, and of their overlap by layer."""

from collections.abc import Mapping

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from geomkit.errors import GeometryError
from geomkit.inputs.parameters import kind_of
from geomkit.plots.axes import columns_of, layer_axis, whole_ticks
from geomkit.plots.labels import column_of
from geomkit.plots.style import COLOURS, INK, TEMPLATE, Look, looks, title
from geomkit.svd.principal_angles import Angles, LayerAngles


def plot_angles(angles: Angles) -> go.Figure:
    """Draw the principal angles of every parameter, and their overlap by layer.

    Args:
        angles: Principal angles between two subspaces.

    Returns:
        The figure. Left: a thin line per parameter through its angles in ascending order, their median over
        parameters, and the edge above which almost all angles of random subspaces of these sizes lie. Right: the
        overlap, the mean squared cosine, with its expectation for random subspaces and, as open circles, the overlap of
        the control.

    Raises:
        GeometryError: If no parameter has a direction on both sides.
    """
    layers = {name: layer for name, layer in angles.layers.items() if len(layer.angles)}
    if not layers:
        raise GeometryError("expected subspaces with directions, found none in any parameter; are gradients zero?")
    figure = make_subplots(1, 2, column_widths=[0.55, 0.45], horizontal_spacing=0.13)
    kinds = list(dict.fromkeys(kind_of(parameter) for parameter in layers))
    for kind, look in zip(kinds, looks(kinds), strict=True):
        of_kind = {name: layer for name, layer in layers.items() if kind_of(name) == kind}
        figure.add_trace(_angle_lines(of_kind, kind, look.colour), row=1, col=1)
        figure.add_traces([_expected_overlaps(of_kind), _overlaps(of_kind, kind, look)], rows=1, cols=2)
    figure.add_traces(_summary(layers), rows=1, cols=1)
    control = ""
    if not np.isnan(angles.mean_control):
        figure.add_trace(_control_overlaps(layers), row=1, col=2)
        control = f"control (open circles): {angles.mean_control:.3g}; "
    figure.update_layout(
        template=TEMPLATE,
        title=title(
            f"Principal angles between two {angles.side} subspaces",
            f"mean overlap {angles.mean_overlap:.3g}; {control}random subspaces: {angles.mean_expected_overlap:.3g}",
        ),
        yaxis={"range": [-2, 92], "dtick": 15, "ticksuffix": "°", "title": "principal angle, degrees"},
        xaxis={
            "title": "index of the angle, ascending",
            "tickvals": whole_ticks(range(1, _longest(layers) + 1), 10),
        },
        xaxis2={**layer_axis(columns_of(layers), most=8), "showgrid": False},
        yaxis2={"title": "overlap, mean cos²", "rangemode": "tozero"},
    )
    return figure


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
            line={"color": INK, "width": 2.5},
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


def _overlaps(layers: Mapping[str, LayerAngles], kind: str, look: Look) -> go.Scatter:
    marker = {"symbol": look.symbol, "size": 8, "color": look.colour, "line": {"color": "white", "width": 1}}
    values = {parameter: layer.overlap for parameter, layer in layers.items()}
    return _by_layer(values, "overlap", name=kind, legendgroup=kind, marker=marker)


def _expected_overlaps(layers: Mapping[str, LayerAngles]) -> go.Scatter:
    name = "expected for random subspaces"
    marker = {"symbol": "line-ew-open", "size": 12, "color": COLOURS["null"], "line": {"width": 2}}
    values = {parameter: layer.expected_overlap for parameter, layer in layers.items()}
    return _by_layer(values, name, name=name, legendgroup="expected", showlegend=False, marker=marker)


def _control_overlaps(layers: Mapping[str, LayerAngles]) -> go.Scatter:
    marker = {"symbol": "circle-open", "size": 8, "color": COLOURS["control"], "line": {"width": 1.5}}
    values = {parameter: layer.control for parameter, layer in layers.items()}
    return _by_layer(values, "overlap of the control", name="control", marker=marker)


def _by_layer(values: Mapping[str, float], what: str, **look: object) -> go.Scatter:
    """Return a marker per parameter at its layer; ``what`` names the values in the hover text."""
    return go.Scatter(
        x=[column_of(parameter) for parameter in values],
        y=list(values.values()),
        mode="markers",
        text=list(values),
        hovertemplate=f"%{{text}}<br>{what} <b>%{{y:.3g}}</b><extra></extra>",
        **look,
    )
