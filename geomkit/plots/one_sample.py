"""Figures of subspaces of single examples: one example, n examples, two examples, and a map of all gradients."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from numpy.typing import NDArray

from geomkit.plots.labels import per_cent, short, wrapped
from geomkit.plots.style import Look, broken, colour_bar, fitted, looks, title, translucent
from geomkit.plots.themes import COLOURS, palette, template
from geomkit.plots.traces import band, error_bars
from geomkit.svd.one_sample.anchor_curve import AnchorCurve
from geomkit.svd.one_sample.gradient_map import GradientMap
from geomkit.svd.one_sample.leave_one_out import GroupMean
from geomkit.svd.one_sample.overlaps import Overlaps
from geomkit.svd.one_sample.results import OneSample
from geomkit.utils.display import counted, signed

_OVERLAP_AXIS = "overlap, mean cos² of the angles"

# ----------------------------------------------------------------------------- one example and the mean of the others


def plot_one_sample(study: OneSample) -> go.Figure:
    """Draw the overlap of each example's subspace with the subspace of the mean safety gradient, with the controls.

    Args:
        study: A leave-one-out study of single examples.

    Returns:
        The figure: a row per set of examples with a point per example, a box, and the mean with its interval; below
        each control its contrast with safety; and a line at the expectation for random subspaces.
    """
    names = [*reversed(study.controls), "safety"]
    figure = go.Figure(layout={"template": template()})
    for name in names:
        colour = COLOURS[name if name in {"safety", "utility"} else "control"]
        figure.add_trace(_examples(study.groups[name].overlaps, name, colour))
        figure.add_trace(_mean(study.groups[name].overlap, name))
    figure.add_vline(
        x=study.expected,
        line={"color": palette().ink, "dash": "dash", "width": 1.5},
        annotation={"text": f"random subspaces: {study.expected:.3g}", "font_size": 12, "yanchor": "bottom"},
        annotation_position="top right",
    )
    contrasts = [_contrast(study.groups[name].overlap, name) for name in study.controls]
    figure.update_layout(
        title=title(
            "One example against the mean gradient",
            f"overlap of their subspaces, rank at most {study.rank}, mean over parameters; below each control: safety "
            f"− control with its {per_cent(study.confidence)} interval",
        ),
        xaxis={"title": _OVERLAP_AXIS, "rangemode": "tozero"},
        yaxis={"tickvals": names, "ticktext": [wrapped(name, 14) for name in names], "showgrid": False, "ticks": ""},
        showlegend=False,
        annotations=[*figure.layout.annotations, *contrasts],
    )
    return fitted(figure, 30 + 86 * len(names), panel_titles=1)


def _examples(overlaps: NDArray[np.float64], name: str, colour: str) -> go.Box:
    return go.Box(
        x=np.asarray(overlaps),
        y=[name] * len(overlaps),
        name=name,
        orientation="h",
        boxpoints="all",
        jitter=0.5,
        pointpos=0,
        width=0.5,
        line={"color": colour, "width": 1.5},
        fillcolor=translucent(colour, 0.15),
        marker={"color": translucent(colour, 0.7), "size": 6},
        text=[str(index) for index in range(len(overlaps))],
        hovertemplate=f"{name} example %{{text}}<br>overlap <b>%{{x:.3g}}</b><extra></extra>",
        hoveron="points",
    )


def _mean(overlap: GroupMean, name: str) -> go.Scatter:
    return go.Scatter(
        x=[overlap.value],
        y=[name],
        name=f"{name}: mean",
        mode="markers",
        marker={
            "symbol": "diamond",
            "size": 11,
            "color": palette().ink,
            "line": {"color": palette().paper, "width": 1},
        },
        error_x=error_bars(overlap.value, *overlap.interval, thickness=2.5, width=6),
        hovertemplate=f"{name}: mean {overlap}<extra></extra>",
    )


def _contrast(overlap: GroupMean, name: str) -> dict[str, object]:
    text = f"safety − {short(name, 14)}: {overlap.contrast:+.3f} {signed(overlap.contrast_interval)}"
    place = {"x": 1, "xref": "paper", "xanchor": "right", "y": name, "yref": "y", "yshift": -34}
    return {"text": text, "showarrow": False, "font": {"size": 12}, **place}


# ------------------------------------------------------------------------------------- n examples and a reference


def plot_anchor_curve(curve: AnchorCurve) -> go.Figure:
    """Draw the overlap of the mean of n anchors with a disjoint reference over n, with the controls.

    Args:
        curve: Overlaps at several numbers of anchors.

    Returns:
        The figure: for each set of examples a line through the means and a band for the central 90 % of the draws, a
        dotted line at the split-half reliability and a dashed line at the expectation for random subspaces. The scale
        of n is logarithmic.
    """
    names = list(curve.draws)
    figure = go.Figure(layout={"template": template()})
    for name, look in zip(names, _looks_with_control(names), strict=True):
        figure.add_traces(_anchor_traces(curve, name, look))
    for height, what, dash, colour, position in (
        (curve.ceiling, "split-half reliability", "dot", COLOURS["safety"], "top left"),
        (curve.expected, "random subspaces", "dash", palette().ink, "bottom right"),
    ):
        figure.add_hline(
            y=height,
            line={"color": colour, "dash": dash, "width": 1.5},
            annotation={"text": f"{what}: {height:.3g}", "font_size": 12},
            annotation_position=position,
        )
    figure.update_layout(
        title=title(
            "Mean of n anchors against a reference",
            f"overlap of their subspaces; reference: {curve.reference} other safety examples; rank at most "
            f"{curve.rank}, mean over {counted(len(curve.layers), 'parameter')}; band: 90 % of "
            f"{len(curve.draws['safety'])} random splits",
        ),
        xaxis={"type": "log", "tickvals": curve.counts, "ticktext": list(map(str, curve.counts)), "title": "anchors n"},
        yaxis={"title": _OVERLAP_AXIS, "rangemode": "tozero"},
    )
    return fitted(figure, 280)


def _anchor_traces(curve: AnchorCurve, name: str, look: Look) -> list[go.Scatter]:
    low, high = curve.band(name)
    line = go.Scatter(
        x=curve.counts,
        y=curve.means(name),
        name=name,
        legendgroup=name,
        mode="lines+markers",
        line={"color": look.colour, "width": 2.5, "dash": look.dash},
        marker={"symbol": look.symbol, "size": 8},
        customdata=list(zip(low, high, strict=True)),
        hovertemplate=f"{name}, %{{x}} anchors<br>overlap <b>%{{y:.3f}}</b>, 90 % of draws "
        "%{customdata[0]:.3f} to %{customdata[1]:.3f}<extra></extra>",
    )
    colour = translucent(look.colour, 0.18)
    return [band(curve.counts, low, high, colour, name=f"{name}: 90 % of draws", legendgroup=name), line]


def _looks_with_control(names: list[str]) -> list[Look]:
    """Return the look of each set of examples; the first set without a fixed colour has the look of controls."""
    unnamed = [name for name in names if name.casefold() not in {fixed.casefold() for fixed in COLOURS}]
    first = unnamed[:1] if "control" not in names else []
    return looks(["control" if name in first else name for name in names])


# ---------------------------------------------------------------------------------------------------- two examples


def plot_overlaps(overlaps: Overlaps) -> go.Figure:
    """Draw the mean overlap of two examples' subspaces, within each set and between every two sets.

    Args:
        overlaps: Overlaps between the examples of several sets.

    Returns:
        The figure: a heat map with the mean of each pair of sets; hover shows its interval, and its contrast with the
        mean within the set of the row.
    """
    names = list(overlaps.names)
    figure = go.Figure(layout={"template": template()})
    figure.add_trace(
        go.Heatmap(
            z=overlaps.matrix,
            x=names,
            y=names,
            text=[[_overlap_hover(overlaps, row, column) for column in names] for row in names],
            texttemplate="%{z:.3f}",
            textfont={"size": 14},
            hovertemplate="%{text}<extra></extra>",
            colorscale=palette().sequential(),
            zmin=min(overlaps.expected, float(np.min(overlaps.matrix))),
            zmax=float(np.max(overlaps.matrix)),
            xgap=2,
            ygap=2,
            colorbar=colour_bar("mean cos²"),
        )
    )
    figure.update_layout(
        title=title(
            "Overlap of two examples' subspaces",
            f"within and between sets; rank at most {overlaps.rank}, {overlaps.side} singular vectors, mean over "
            f"{counted(len(overlaps.parameters), 'parameter')}; random subspaces: {overlaps.expected:.3g}",
        ),
        xaxis={**_axis_of_sets(names, 12), "tickangle": 0},
        yaxis={**_axis_of_sets(names, 20), "autorange": "reversed"},
    )
    return fitted(figure, 62 * len(names))


def _axis_of_sets(names: list[str], width: int) -> dict[str, object]:
    labels = {"tickvals": names, "ticktext": [wrapped(name, width) for name in names], "ticks": ""}
    return {**labels, "showgrid": False, "showline": False}


def _overlap_hover(overlaps: Overlaps, row: str, column: str) -> str:
    value = overlaps.matrix[overlaps.names.index(row), overlaps.names.index(column)]
    low, high = overlaps.intervals[row, column]
    text = f"{row} – {column}<br>overlap <b>{value:.3f}</b> [{low:.3f}, {high:.3f}]"
    contrast = overlaps.contrasts.get((row, column))
    return f"{text}<br>within {row} less this: {contrast}" if contrast else text


# ---------------------------------------------------------------------------------------------- all examples in a plane


def plot_gradient_map(gradient_map: GradientMap) -> go.Figure:
    """Draw the gradient of each example as a point in the plane, in the colour of its set.

    Args:
        gradient_map: The map of gradients of single examples.

    Returns:
        The figure; both axes have the same scale, in units of a gradient's length if gradients were normalised.
    """
    names = list(gradient_map.names)
    frame = gradient_map.to_frame()
    figure = go.Figure(layout={"template": template()})
    for name, look in zip(names, looks(names), strict=True):
        figure.add_trace(_points(frame[frame["set"] == name], name, look))
    if gradient_map.method == "pca":
        quality, axis = f"{gradient_map.quality:.0%} of the variance shown", "principal component"
    else:
        quality, axis = f"stress {gradient_map.quality:.3f}", "scaled dimension"
    unit = "units of gradient length" if gradient_map.normalised else "gradient norm"
    figure.update_layout(
        title=title(
            "Gradients of single examples in the plane",
            f"{quality}; mean silhouette over all dimensions {gradient_map.separation:+.3f}, p = "
            f"{gradient_map.p_value:.2g}",
        ),
        # With equal scales, the shorter axis ends where the data end, and takes less room.
        xaxis={"title": broken(f"{axis} 1, {unit}", 40), "constrain": "domain"},
        yaxis={"title": broken(f"{axis} 2, {unit}", 40), "scaleanchor": "x", "constrain": "domain"},
    )
    return fitted(figure, 380)


def _points(rows: pd.DataFrame, name: str, look: Look) -> go.Scatter:
    return go.Scatter(
        x=rows["x"],
        y=rows["y"],
        name=name,
        mode="markers",
        marker={
            "color": look.colour,
            "symbol": look.symbol,
            "size": 8,
            "opacity": 0.75,
            "line": {"color": palette().paper, "width": 0.5},
        },
        customdata=rows[["example", "silhouette"]],
        hovertemplate=f"{name}, example %{{customdata[0]}}<br>silhouette <b>%{{customdata[1]:+.3f}}</b><extra></extra>",
    )
