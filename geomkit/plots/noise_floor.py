"""The figure of mean gradients' spectra above and below the sampling noise of their examples."""

from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go

from geomkit.errors import GeometryError
from geomkit.inputs.parameters import kind_of
from geomkit.plots.spectra import names_like
from geomkit.plots.style import COLOURS, TEMPLATE, looks, per_cent, title, translucent
from geomkit.utils.display import counted

if TYPE_CHECKING:
    from geomkit.svd.noise_floor import LayerNoiseFloor, NoiseFloor

_MOST_POINTS = 80
"""Longer spectra are thinned to this many points, evenly on a log axis."""

_LOWEST = 1e-3
"""Values further below the floor are not drawn: they would press together what is near it."""


def plot_noise_floor(noise: "NoiseFloor", *, layers: str = "*") -> go.Figure:
    """Draw each parameter's singular values relative to its floor: what is above the line is more than noise.

    Args:
        noise: From :func:`geomkit.svd.noise_floor.noise_floor`.
        layers: Glob pattern on parameter names, such as ``"*.mlp.*"`` or one name.

    Returns:
        The figure: a line per parameter in the colour of its kind, and the floor at 1.

    Raises:
        GeometryError: If no parameter matches, or all that match are zero.
    """
    shown = [layer for name in names_like(layers, noise.layers) if (layer := noise.layers[name]).floor > 0]
    if not shown:
        raise GeometryError(f"expected gradients, found only zeros in {layers!r}; measure examples with a loss")
    figure = go.Figure(layout={"template": TEMPLATE})
    kinds = list(dict.fromkeys(kind_of(layer.parameter) for layer in shown))
    colours = {kind: look.colour for kind, look in zip(kinds, looks(kinds), strict=True)}
    first = {kind_of(layer.parameter): layer.parameter for layer in reversed(shown)}
    for layer in shown:
        kind = kind_of(layer.parameter)
        figure.add_trace(_scree(layer, kind, colours[kind], named=first[kind] == layer.parameter))
    figure.add_hline(1.0, line={"color": COLOURS["null"], "width": 2})
    # An annotation of a log axis is placed by the logarithm.
    floor = {"text": "floor", "font_color": COLOURS["null"], "showarrow": False}
    figure.add_annotation(floor, x=1, xref="paper", xanchor="right", y=0, yref="y", yanchor="bottom")
    figure.update_layout(
        title=title("Mean gradients above their sampling noise", _subtitle(noise, shown)),
        xaxis={"title": "index i of the singular value", "type": "log", "dtick": 1},
        yaxis={"title": "σ<sub>i</sub> / floor", "type": "log", "dtick": 1},
    )
    return figure


def _subtitle(noise: "NoiseFloor", shown: list["LayerNoiseFloor"]) -> str:
    above = sum(layer.parameter in noise.significant for layer in shown)
    return (
        f"{above} of {len(shown)} matrices above noise (family-wise p ≤ {1 - noise.confidence:.2g}); grey line: "
        f"{per_cent(noise.confidence)} floor of {noise.draws} random signs, {counted(noise.examples, 'example')}"
    )


def _scree(layer: "LayerNoiseFloor", kind: str, colour: str, *, named: bool) -> go.Scatter:
    values = layer.singular_values
    index = np.unique(np.geomspace(1, len(values), _MOST_POINTS).round().astype(np.int64))
    drawn = index[values[index - 1] > _LOWEST * layer.floor]
    return go.Scatter(
        x=drawn,
        y=values[drawn - 1] / layer.floor,
        customdata=values[drawn - 1],
        name=kind,
        legendgroup=kind,
        showlegend=named,
        mode="lines+markers",
        line={"color": translucent(colour, 0.45), "width": 1.2},
        marker={"size": 4, "color": colour},
        hovertemplate=(
            f"{layer.parameter}<br>σ<sub>%{{x}}</sub> = <b>%{{y:.3g}}</b> × floor<br>%{{customdata:.3g}}, floor "
            f"{layer.floor:.3g}<br>signal rank {layer.signal_rank}, p = {layer.p_value:.2g}<extra></extra>"
        ),
    )
