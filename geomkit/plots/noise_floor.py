"""The figure of mean gradients' singular values above and below the sampling noise of their examples."""

import numpy as np
import plotly.graph_objects as go

from geomkit.errors import GeometryError
from geomkit.inputs.parameters import Layers, kind_of
from geomkit.plots.axes import ending_at
from geomkit.plots.labels import per_cent
from geomkit.plots.spectra import chosen_names
from geomkit.plots.style import fitted, looks, title, translucent
from geomkit.plots.themes import COLOURS, template
from geomkit.svd.noise_floor import LayerNoiseFloor, NoiseFloor
from geomkit.utils.display import counted

_MOST_POINTS = 80
"""Longer spectra are thinned to this many points, evenly on a log axis."""

_LOWEST = 1e-3
"""Values below this multiple of the floor are not drawn, since they would compress the range around the floor."""


def plot_noise_floor(noise: NoiseFloor, *, layers: Layers = "*") -> go.Figure:
    """Draw each parameter's singular values relative to its noise floor: values above the floor are signal.

    Args:
        noise: The noise floor, from :func:`geomkit.svd.noise_floor.noise_floor`.
        layers: Which parameters to draw, as in :func:`geomkit.collect_gradients`.

    Returns:
        The figure: a line per parameter in the colour of its kind, and the floor at 1.

    Raises:
        GeometryError: If no parameter matches, or all that match are zero.
    """
    shown = [layer for name in chosen_names(layers, noise.layers) if (layer := noise.layers[name]).floor > 0]
    if not shown:
        raise GeometryError(f"expected gradients, found only zeros in {layers!r}; measure examples with a loss")
    figure = go.Figure(layout={"template": template()})
    kinds = list(dict.fromkeys(kind_of(layer.parameter) for layer in shown))
    colours = {kind: look.colour for kind, look in zip(kinds, looks(kinds), strict=True)}
    first = {kind_of(layer.parameter): layer.parameter for layer in reversed(shown)}
    for layer in shown:
        kind = kind_of(layer.parameter)
        figure.add_trace(_scree(layer, kind, colours[kind], in_legend=first[kind] == layer.parameter))
    figure.add_hline(1.0, line={"color": COLOURS["null"], "width": 2})
    # The place of an annotation on a log axis is the logarithm: y = 0 is the floor at 1.
    floor = {"text": "floor", "font_color": COLOURS["null"], "showarrow": False}
    figure.add_annotation(floor, x=1, xref="paper", xanchor="right", y=0, yref="y", yanchor="bottom")
    above = sum(layer.parameter in noise.significant for layer in shown)
    figure.update_layout(
        title=title(
            "Mean gradients above their sampling noise",
            f"{above} of {len(shown)} matrices above noise (family-wise p ≤ {1 - noise.confidence:.2g}); grey line: "
            f"{per_cent(noise.confidence)} floor of {noise.draws} random signs, {counted(noise.examples, 'example')}",
        ),
        xaxis={"title": "index i of the singular value", "type": "log", "dtick": 1},
        xaxis_range=ending_at(0, float(np.log10(max(trace.x[-1] for trace in figure.data))))["range"],
        yaxis={"title": "σ<sub>i</sub> / floor", "type": "log", "dtick": 1},
    )
    return fitted(figure, 280)


def _scree(layer: LayerNoiseFloor, kind: str, colour: str, *, in_legend: bool) -> go.Scatter:
    values = layer.singular_values
    indices = np.unique(np.geomspace(1, len(values), _MOST_POINTS).round().astype(np.int64))
    drawn = indices[values[indices - 1] > _LOWEST * layer.floor]
    return go.Scatter(
        x=drawn,
        y=values[drawn - 1] / layer.floor,
        customdata=values[drawn - 1],
        name=kind,
        legendgroup=kind,
        showlegend=in_legend,
        mode="lines+markers",
        line={"color": translucent(colour, 0.45), "width": 1.2},
        marker={"size": 4, "color": colour},
        hovertemplate=(
            f"{layer.parameter}<br>σ<sub>%{{x}}</sub> = <b>%{{y:.3g}}</b> × floor<br>%{{customdata:.3g}}, floor "
            f"{layer.floor:.3g}<br>signal rank {layer.signal_rank}, p = {layer.p_value:.2g}<extra></extra>"
        ),
    )
