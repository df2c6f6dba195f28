"""Figure of single gradients in the plane."""

from typing import TYPE_CHECKING

import plotly.graph_objects as go

from geomkit.plots._style import TEMPLATE, looks, title

if TYPE_CHECKING:
    from geomkit.maps import GradientMap


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
