"""Figure of how many anchors it takes."""

from typing import TYPE_CHECKING

import plotly.graph_objects as go

from geomkit._display import counted
from geomkit.plots._style import COLOURS, TEMPLATE, Look, legend_room, looks, title, translucent

if TYPE_CHECKING:
    from geomkit.anchor_counts import AnchorCurve


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
