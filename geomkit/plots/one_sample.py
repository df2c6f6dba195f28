"""Figure of overlaps within and between sets of examples."""

from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go

from geomkit.plots.style import COLOURS, TEMPLATE, Look, legend_room, looks, title, translucent, wrapped
from geomkit.utils.display import counted

if TYPE_CHECKING:
    from geomkit.svd.one_sample.anchor_curve import AnchorCurve
    from geomkit.svd.one_sample.gradient_map import GradientMap
    from geomkit.svd.one_sample.overlaps import Overlaps


def plot_overlaps(overlaps: "Overlaps") -> go.Figure:
    """Draw the mean overlap of two examples' subspaces, within each set and between every two.

    Args:
        overlaps: Overlaps between the examples of several sets.

    Returns:
        The figure: a square per pair of sets with its mean; the intervals, and the contrast with the row's own mean,
        are where the pointer is.
    """
    names = list(overlaps.names)
    figure = go.Figure(layout={"template": TEMPLATE})
    figure.add_trace(
        go.Heatmap(
            z=overlaps.matrix,
            x=names,
            y=names,
            text=[[_text(overlaps, first, second) for second in names] for first in names],
            texttemplate="%{z:.3f}",
            textfont={"size": 14},
            hovertemplate="%{text}<extra></extra>",
            colorscale="Blues",
            zmin=min(overlaps.expected, float(np.min(overlaps.matrix))),
            zmax=float(np.max(overlaps.matrix)),
            xgap=2,
            ygap=2,
            colorbar={"title": {"text": "overlap, mean cos²", "side": "right"}, "thickness": 14},
        )
    )
    figure.update_layout(
        title=title(
            "Overlap of two examples' subspaces, within and between sets",
            f"rank at most {overlaps.rank}, {overlaps.side} singular vectors, mean over "
            f"{counted(len(overlaps.parameters), 'parameter')}; random subspaces: {overlaps.expected:.3g}",
        ),
        xaxis={**_axis(names, 12), "tickangle": 0},
        yaxis={**_axis(names, 20), "autorange": "reversed"},
        height=190 + 62 * len(names),
        margin_b=56,
    )
    return figure


def _axis(names: list[str], width: int) -> dict[str, object]:
    labels = {"tickvals": names, "ticktext": [wrapped(name, width) for name in names], "ticks": ""}
    return {**labels, "showgrid": False, "showline": False}


def _text(overlaps: "Overlaps", first: str, second: str) -> str:
    value = overlaps.matrix[overlaps.names.index(first), overlaps.names.index(second)]
    low, high = overlaps.intervals[first, second]
    text = f"{first} – {second}<br>overlap <b>{value:.3f}</b> [{low:.3f}, {high:.3f}]"
    contrast = overlaps.contrasts.get((first, second))
    return f"{text}<br>within {first} less this: {contrast}" if contrast else text


def plot_anchor_curve(curve: "AnchorCurve") -> go.Figure:
    """Draw the overlap with a disjoint reference over the number of anchors, beside the controls.

    Args:
        curve: Overlaps at several numbers of anchors.

    Returns:
        The figure: for each group a line through the means and a band for the central 90 % of the draws, a dotted line
        at the split-half reliability and a dashed one where random subspaces lie. The scale of anchors is logarithmic.
    """
    names = list(curve.draws)
    figure = go.Figure(layout={"template": TEMPLATE})
    for name, look in zip(names, _looks(names), strict=True):
        low, high = curve.band(name)
        figure.add_trace(
            go.Scatter(
                x=[*curve.counts, *curve.counts[::-1]],
                y=[*high, *low[::-1]],
                name=f"{name}: 90 % of draws",
                legendgroup=name,
                mode="lines",
                line={"width": 0},
                fill="toself",
                fillcolor=translucent(look.colour, 0.18),
                hoverinfo="skip",
                showlegend=False,
            )
        )
        figure.add_trace(
            go.Scatter(
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
        )
    figure.add_hline(
        y=curve.ceiling,
        line={"color": COLOURS["safety"], "dash": "dot", "width": 1.5},
        annotation={"text": f"split-half reliability: {curve.ceiling:.3g}", "font_size": 12},
        annotation_position="top left",
    )
    figure.add_hline(
        y=curve.expected,
        line={"color": "#222222", "dash": "dash", "width": 1.5},
        annotation={"text": f"random subspaces: {curve.expected:.3g}", "font_size": 12},
        annotation_position="bottom right",
    )
    figure.update_layout(
        title=title(
            "Overlap of the mean of n anchors with that of a disjoint reference",
            f"reference: {curve.reference} other safety examples; rank at most {curve.rank}, mean over "
            f"{counted(len(curve.layers), 'parameter')}; band: 90 % of {len(curve.draws['safety'])} random splits",
        ),
        xaxis={"type": "log", "tickvals": curve.counts, "ticktext": list(map(str, curve.counts)), "title": "anchors n"},
        yaxis={"title": "overlap, mean cos² of the principal angles", "rangemode": "tozero"},
        height=460 + legend_room(names),
    )
    return figure


def _looks(names: list[str]) -> list[Look]:
    """The first of the controls has their colour, whatever its name; others must be told apart from it."""
    unnamed = [name for name in names if name.casefold() not in {known.casefold() for known in COLOURS}]
    first = unnamed[:1] if "control" not in names else []
    return looks(["control" if name in first else name for name in names])


def plot_gradient_map(found: "GradientMap") -> go.Figure:
    """Draw every example as a point, in the colour of its set.

    Args:
        found: A map of single gradients.

    Returns:
        The figure; both axes have one scale, in units of a gradient's length where gradients were normalised.
    """
    names = list(found.names)
    frame = found.to_frame()
    figure = go.Figure(layout={"template": TEMPLATE})
    for name, look in zip(names, looks(names), strict=True):
        rows = frame[frame["set"] == name]
        figure.add_trace(
            go.Scatter(
                x=rows["x"],
                y=rows["y"],
                name=name,
                mode="markers",
                marker={
                    "color": look.colour,
                    "symbol": look.symbol,
                    "size": 8,
                    "opacity": 0.75,
                    "line": {"color": "white", "width": 0.5},
                },
                customdata=rows[["example", "silhouette"]],
                hovertemplate=f"{name}, example %{{customdata[0]}}<br>silhouette <b>%{{customdata[1]:+.3f}}</b>"
                "<extra></extra>",
            )
        )
    if found.method == "pca":
        shown, axis = f"{found.quality:.0%} of the variance shown", "principal component"
    else:
        shown, axis = f"stress {found.quality:.3f}", "scaled dimension"
    unit = "units of gradient length" if found.normalised else "gradient norm"
    figure.update_layout(
        title=title(
            "Gradients of single examples in the plane",
            f"{shown}; mean silhouette over all dimensions {found.separation:+.3f}, p = {found.p_value:.2g}",
        ),
        xaxis={"title": f"{axis} 1, {unit}"},
        yaxis={"title": f"{axis} 2, {unit}", "scaleanchor": "x"},
        height=560,
    )
    return figure
