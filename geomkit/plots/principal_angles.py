"""Figures of subspaces: principal angles, and what one sample captures."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from geomkit.errors import GeometryError
from geomkit.inputs.parameters import kind_of
from geomkit.plots.style import (
    COLOURS,
    TEMPLATE,
    column_of,
    columns_of,
    layer_axis,
    looks,
    per_cent,
    title,
    translucent,
    whole_ticks,
    wrapped,
)
from geomkit.utils.display import signed

if TYPE_CHECKING:
    from geomkit.svd.one_sample.leave_one_out import Estimate
    from geomkit.svd.one_sample.results import OneSample
    from geomkit.svd.principal_angles import Angles, LayerAngles


def plot_angles(angles: "Angles") -> go.Figure:
    """Draw the principal angles of every parameter, and the overlap they amount to by layer.

    Args:
        angles: Principal angles between two subspaces.

    Returns:
        The figure. Left: one thin line per parameter, the angles ascending, the median over parameters, and the
        edge below which the angles of random subspaces of these sizes hardly fall. Right: the overlap, the mean
        squared cosine, with its expectation for random subspaces and, as open circles, what a control shows.

    Raises:
        GeometryError: If no parameter has a direction on both sides.
    """
    layers = {name: layer for name, layer in angles.layers.items() if len(layer.angles)}
    if not layers:
        raise GeometryError("expected subspaces with directions, found none in any parameter; are gradients zero?")
    figure = make_subplots(1, 2, column_widths=[0.55, 0.45], horizontal_spacing=0.13)
    kinds = list(dict.fromkeys(kind_of(parameter) for parameter in layers))
    for kind, look in zip(kinds, looks(kinds), strict=True):
        chosen = {name: layer for name, layer in layers.items() if kind_of(name) == kind}
        figure.add_trace(_angle_lines(chosen, kind, look.colour), row=1, col=1)
        for trace in _overlaps(chosen, kind, look.colour, look.symbol):
            figure.add_trace(trace, row=1, col=2)
    figure.add_traces(_angle_summary(layers), rows=1, cols=1)
    control = ""
    if not np.isnan(angles.mean_control):
        figure.add_trace(_controls(layers), row=1, col=2)
        control = f"control (open circles): {angles.mean_control:.3g}; "
    figure.update_layout(
        template=TEMPLATE,
        title=title(
            f"Principal angles between two {angles.side} subspaces",
            f"mean overlap {angles.mean_overlap:.3g}; {control}random subspaces: {angles.mean_expected_overlap:.3g}",
        ),
        yaxis={"range": [-2, 92], "dtick": 15, "ticksuffix": "°", "title": "principal angle, degrees"},
        xaxis={"title": "index of the angle, ascending", "tickvals": _indices(layers)},
        xaxis2={**layer_axis(columns_of(layers), most=8), "showgrid": False},
        yaxis2={"title": "overlap, mean cos²", "rangemode": "tozero"},
    )
    return figure


def plot_one_sample(study: "OneSample") -> go.Figure:
    """Draw how much of the mean safety subspace one example finds, anchor by anchor, beside the controls.

    Args:
        study: A leave-one-out study of single examples.

    Returns:
        The figure: a point per safety example and per control, a box for each group, the mean with its
        interval, the contrast of each control, and the expectation for random subspaces.
    """
    names = [*reversed(study.controls), "safety"]
    figure = go.Figure(layout={"template": TEMPLATE})
    for name in names:
        figure.add_trace(_strip(study.groups[name].overlaps, name, _colour(name)))
        figure.add_trace(_mean(study.groups[name].overlap, name))
    figure.add_vline(
        x=study.expected,
        line={"color": "#222222", "dash": "dash", "width": 1.5},
        annotation={"text": f"random subspaces: {study.expected:.3g}", "font_size": 12, "yanchor": "bottom"},
        annotation_position="top right",
    )
    figure.update_layout(
        title=title(
            "Overlap of one example's subspace with that of the mean safety gradient",
            f"rank at most {study.rank}, mean over parameters; right of each control: safety − control with its "
            f"{per_cent(study.confidence)} interval",
        ),
        xaxis={"title": "overlap, mean cos² of the principal angles", "rangemode": "tozero"},
        yaxis={"tickvals": names, "ticktext": [wrapped(name) for name in names], "showgrid": False, "ticks": ""},
        height=220 + 62 * len(names),
        margin={"b": 56, "r": 172},
        showlegend=False,
        annotations=[
            *figure.layout.annotations,
            *(_contrast(study.groups[name].overlap, name) for name in study.controls),
        ],
    )
    return figure


def _colour(group: str) -> str:
    """Return a set's own colour; all others are controls."""
    return COLOURS[group if group in {"safety", "utility"} else "control"]


def _contrast(found: "Estimate", name: str) -> dict[str, object]:
    text = f"{found.contrast:+.3f} {signed(found.contrast_interval)}"
    place = {"x": 1.01, "xref": "paper", "xanchor": "left", "y": name, "yref": "y"}
    return {"text": text, "showarrow": False, "font": {"size": 12}, **place}


def _strip(values: "NDArray[np.float64]", name: str, colour: str) -> go.Box:
    return go.Box(
        x=np.asarray(values),
        y=[name] * len(values),
        name=name,
        orientation="h",
        boxpoints="all",
        jitter=0.5,
        pointpos=0,
        width=0.5,
        line={"color": colour, "width": 1.5},
        fillcolor=translucent(colour, 0.15),
        marker={"color": translucent(colour, 0.7), "size": 6},
        text=[str(place) for place in range(len(values))],
        hovertemplate=f"{name} example %{{text}}<br>overlap <b>%{{x:.3g}}</b><extra></extra>",
        hoveron="points",
    )


def _mean(found: "Estimate", name: str) -> go.Scatter:
    low, high = found.interval
    return go.Scatter(
        x=[found.value],
        y=[name],
        name=f"{name}: mean",
        mode="markers",
        marker={"symbol": "diamond", "size": 11, "color": "#222222", "line": {"color": "white", "width": 1}},
        error_x={"array": [high - found.value], "arrayminus": [found.value - low], "thickness": 2.5, "width": 6},
        hovertemplate=f"{name}: mean {found}<extra></extra>",
    )


def _angle_lines(layers: "Mapping[str, LayerAngles]", kind: str, colour: str) -> go.Scatter:
    """All lines of one kind in one trace, a gap between them: a large model has hundreds."""
    x, y, labels = [], [], []
    for name, layer in layers.items():
        degrees = np.degrees(layer.angles[::-1])
        x += [*range(1, len(degrees) + 1), None]
        y += [*degrees, None]
        labels += [name] * (len(degrees) + 1)
    return go.Scatter(
        x=x,
        y=y,
        text=labels,
        name=kind,
        legendgroup=kind,
        mode="lines",
        opacity=0.3,
        line={"color": colour, "width": 1},
        hovertemplate="%{text}<br>angle %{x}: <b>%{y:.1f}°</b><extra></extra>",
        showlegend=False,
    )


def _indices(layers: "Mapping[str, LayerAngles]") -> list[int]:
    return whole_ticks(range(1, max(len(layer.angles) for layer in layers.values()) + 1), 10)


def _angle_summary(layers: "Mapping[str, LayerAngles]") -> list[go.Scatter]:
    longest = max(len(layer.angles) for layer in layers.values())
    padded = np.full((len(layers), longest), np.nan)
    for row, layer in zip(padded, layers.values(), strict=True):
        row[: len(layer.angles)] = np.degrees(layer.angles[::-1])
    edges = [np.degrees(np.arccos(min(layer.random_edge, 1.0))) for layer in layers.values()]
    return [
        go.Scatter(
            x=np.arange(1, longest + 1),
            y=np.nanmedian(padded, axis=0),
            name="median over parameters",
            mode="lines+markers",
            line={"color": "#222222", "width": 2.5},
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


def _controls(layers: "Mapping[str, LayerAngles]") -> go.Scatter:
    return go.Scatter(
        x=[column_of(name) for name in layers],
        y=[layer.control for layer in layers.values()],
        name="control",
        mode="markers",
        marker={"symbol": "circle-open", "size": 8, "color": COLOURS["control"], "line": {"width": 1.5}},
        text=list(layers),
        hovertemplate="%{text}<br>overlap of the control <b>%{y:.3g}</b><extra></extra>",
    )


def _overlaps(layers: "Mapping[str, LayerAngles]", kind: str, colour: str, symbol: str) -> Iterator[go.Scatter]:
    x = [column_of(name) for name in layers]
    yield go.Scatter(
        x=x,
        y=[layer.expected_overlap for layer in layers.values()],
        name="expected for random subspaces",
        legendgroup="expected",
        showlegend=False,
        mode="markers",
        marker={"symbol": "line-ew-open", "size": 12, "color": COLOURS["null"], "line": {"width": 2}},
        text=list(layers),
        hovertemplate="%{text}<br>expected for random subspaces <b>%{y:.3g}</b><extra></extra>",
    )
    yield go.Scatter(
        x=x,
        y=[layer.overlap for layer in layers.values()],
        name=kind,
        legendgroup=kind,
        mode="markers",
        marker={"symbol": symbol, "size": 8, "color": colour, "line": {"color": "white", "width": 1}},
        text=list(layers),
        hovertemplate="%{text}<br>overlap <b>%{y:.3g}</b><extra></extra>",
    )
