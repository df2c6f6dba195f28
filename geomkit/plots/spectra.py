"""Figures of whole spectra: singular values and cumulative energy, with their null."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from geomkit.errors import GeometryError
from geomkit.inputs.parameters import Layers, as_selection
from geomkit.plots.axes import whole_ticks
from geomkit.plots.style import TEMPLATE, Look, legend_room, looks, title, translucent
from geomkit.plots.traces import band
from geomkit.svd.layer_spectrum import LayerSpectrum
from geomkit.svd.spectrum import Spectrum

_Indices = NDArray[np.int64]
_Values = NDArray[np.float64]

_MOST_POINTS = 120
"""Longer curves are thinned to this many points, evenly on a log axis."""

_LONG = 50
"""Beyond this rank the energy is drawn over a log axis, since most of it lies in the first few directions."""

_QUANTILES = (0.05, 0.5, 0.95)
"""Quantiles over parameters, and for the null over draws too: the ends of a band, and the line between them."""

_TICKS = tuple(digit * 10**power for power in range(7) for digit in (1, 2, 5))


def plot_spectrum(*spectra: Spectrum, names: Sequence[str] | None = None, layers: Layers = "*") -> go.Figure:
    """Draw singular values relative to the largest, the median over parameters, with their null.

    Beyond a parameter's numeric rank its singular values count as zero.

    Args:
        spectra: One or more spectra of the same model.
        names: A name for each spectrum; two spectra are "safety" and "utility" by default, which have fixed colours.
        layers: Which parameters to draw, as in :func:`geomkit.collect_gradients`.

    Returns:
        The figure: per spectrum a line for its median, and a dotted line and a band for its null.

    Raises:
        GeometryError: If there is no spectrum, not one name for each, no parameter matches, or all gradients that
            match are zero.
    """
    figure = _curves(spectra, named(spectra, names), layers, _RELATIVE)
    figure.update_layout(
        title=title("Singular values of the gradients, relative to the largest", _subtitle(spectra, layers)),
        xaxis_title="index i of the singular value",
        yaxis={"title": "σ<sub>i</sub> / σ<sub>1</sub>", "type": "log", "exponentformat": "power", "dtick": 1},
        yaxis_tickfont_size=11,  # powers are written larger than plain numbers
    )
    return figure


def plot_cer(*spectra: Spectrum, names: Sequence[str] | None = None, layers: Layers = "*") -> go.Figure:
    """Draw the cumulative energy ratio CER(k) = Σ_{i≤k} σ_i² / Σ σ_i², the median over parameters, with its null.

    Args:
        spectra: One or more spectra of the same model.
        names: A name for each spectrum; two spectra are "safety" and "utility" by default, which have fixed colours.
        layers: Which parameters to draw, as in :func:`geomkit.collect_gradients`.

    Returns:
        The figure: per spectrum a line for its median, and a dotted line and a band for its null.

    Raises:
        GeometryError: If there is no spectrum, not one name for each, no parameter matches, or all gradients that
            match are zero.
    """
    figure = _curves(spectra, named(spectra, names), layers, _ENERGY)
    long = figure.data[-1].x[-1] > _LONG
    figure.update_layout(
        title=title("Energy of the gradients in their first k directions", _subtitle(spectra, layers)),
        xaxis={"title": "rank k", "type": "log", "tickvals": _TICKS} if long else {"title": "rank k"},
        yaxis={"title": "CER(k), share of the squared norm", "tickformat": ".0%", "range": [0, 1.03]},
    )
    return figure


def named(spectra: Sequence[Spectrum], names: Sequence[str] | None) -> Sequence[str]:
    """Return the names of spectra: ``names``, or the default names of one spectrum or two.

    Raises:
        GeometryError: If there is no spectrum, or not one name for each.
    """
    names = names if names is not None else ("gradient",) if len(spectra) == 1 else ("safety", "utility")
    if not spectra or len(names) != len(spectra):
        raise GeometryError(
            f"expected at least one spectrum and a name for each, found {len(spectra)} spectra and {len(names)} "
            "names; pass names="
        )
    return names


def chosen_names(layers: Layers, names: Iterable[str]) -> list[str]:
    """Return the parameter names that belong to a choice of layers.

    Raises:
        GeometryError: If no name belongs to it.
        CollectionError: If ``layers`` is no choice of layers.
    """
    all_names, selection = list(names), as_selection(layers)
    if matching := [name for name in all_names if selection.matches(name)]:
        return matching
    examples = ", ".join(all_names[:2])
    raise GeometryError(f"expected parameters like {layers!r}, found none of {len(all_names)} ({examples}, …); try '*'")


def _subtitle(spectra: Sequence[Spectrum], layers: Layers) -> str:
    names = chosen_names(layers, spectra[0].layers)
    over = f"median of {len(names)} parameters" if len(names) > 1 else names[0]
    return f"{over}; dotted: the null, with its central 90 % over {'parameters and ' if len(names) > 1 else ''}draws"


# ------------------------------------------------------------------------------------------------- what is drawn


@dataclass(frozen=True)
class _Quantity:
    """A function of the index of a singular value, and how its values are written.

    Attributes:
        of: Function of a layer's spectrum and indices from 1, which returns the values at these indices.
        index: Name of the index.
        form: Format of the values, in d3's notation.
    """

    of: Callable[[LayerSpectrum, _Indices], _Values]
    index: str
    form: str

    def hover(self, name: str, over: str) -> str:
        """Return the hover text of a line whose customdata are the ends of its band, and the null's middle and ends."""
        low, high, null, null_low, null_high = (f"%{{customdata[{i}]:{self.form}}}" for i in range(5))
        spread = f", 90 % of {over} in [{low}, {high}]" if over else ""
        return (
            f"{name}<br>{self.index} %{{x}}: <b>%{{y:{self.form}}}</b>{spread}<br>null {null} [{null_low}, {null_high}]"
            "<extra></extra>"
        )


def _relative(layer: LayerSpectrum, indices: _Indices) -> _Values:
    """Return σ_i/σ_1 at indices from 1, zero beyond the numeric rank."""
    values = np.zeros(len(indices))
    inside = indices <= layer.numeric_rank
    values[inside] = layer.singular_values[indices[inside] - 1] / layer.singular_values[0]
    return values


def _energy(layer: LayerSpectrum, indices: _Indices) -> _Values:
    return np.array([layer.cer(int(k)) for k in indices])


_RELATIVE = _Quantity(_relative, "index", ".3g")
_ENERGY = _Quantity(_energy, "rank", ".1%")


# ---------------------------------------------------------------------------------------------------- its curves


def _curves(spectra: Sequence[Spectrum], names: Sequence[str], layers: Layers, quantity: _Quantity) -> go.Figure:
    """Return a figure of bands, then the medians of nulls, then the medians of gradients: no band covers a line."""
    matching = [chosen_names(layers, spectrum.layers) for spectrum in spectra]
    longest = max(
        spectrum.layers[parameter].rank_bound
        for spectrum, parameters in zip(spectra, matching, strict=True)
        for parameter in parameters
    )
    indices = np.unique(np.geomspace(1, longest, _MOST_POINTS).round().astype(np.int64))
    bands, null_lines, lines = [], [], []
    for spectrum, name, parameters, look in zip(spectra, names, matching, looks(names), strict=True):
        values = _quantiles(quantity, [spectrum.layers[parameter] for parameter in parameters], indices)
        if values is None:
            raise GeometryError(f"expected gradients, found only zeros in '{name}'; measure examples with a loss")
        draws = [draw for parameter in parameters for draw in spectrum.null.get(parameter, ())]
        null = _quantiles(quantity, draws, indices)
        if null is not None:
            bands.append(_null_band(indices, null, name, look))
            null_lines.append(_null_line(indices, null[1], name, look))
        hover = quantity.hover(name, "" if len(parameters) == 1 else f"{len(parameters)} parameters")
        lines.append(_line(indices, values, null, name, look, hover))
    layout = {"template": TEMPLATE, "height": 420 + legend_room(names), "showlegend": True}
    ticks = {} if longest > _LONG else {"xaxis_tickvals": whole_ticks(indices, 10)}
    return go.Figure([*bands, *null_lines, *lines], layout={**layout, **ticks})


def _quantiles(quantity: _Quantity, layers: Iterable[LayerSpectrum], indices: _Indices) -> _Values | None:
    """Return the (3, n) quantiles at each index over the gradients that are not zero, ``None`` if all are."""
    values = [quantity.of(layer, indices) for layer in layers if not layer.is_zero]
    return np.quantile(values, _QUANTILES, axis=0) if values else None


def _line(x: _Indices, values: _Values, null: _Values | None, name: str, look: Look, hover: str) -> go.Scatter:
    low, middle, high = values
    null_middle_and_ends = np.full((3, len(x)), np.nan) if null is None else null[[1, 0, 2]]
    return go.Scatter(
        x=x,
        y=_positive(middle),
        customdata=np.column_stack([low, high, *null_middle_and_ends]),
        name=name,
        legendgroup=name,
        legendrank=900,
        mode="lines",
        line={"color": look.colour, "width": 2.5},
        hovertemplate=hover,
    )


def _null_line(x: _Indices, middle: _Values, name: str, look: Look) -> go.Scatter:
    return go.Scatter(
        x=x,
        y=_positive(middle),
        name=f"{name}: null",
        legendgroup=name,
        showlegend=False,
        mode="lines",
        line={"color": look.colour, "dash": "dot", "width": 1.5},
        hoverinfo="skip",
    )


def _positive(values: _Values) -> _Values:
    return np.where(values > 0, values, np.nan)


def _null_band(x: _Indices, null: _Values, name: str, look: Look) -> go.Scatter:
    """Return the band of a null; a log axis has no zero, so zeros of its lower edge become the lowest median."""
    low, middle, high = null
    inside = high > 0
    x, low, high = x[inside], low[inside], high[inside]
    low = np.minimum(np.where(low > 0, low, middle[middle > 0].min()), high)
    return band(x, low, high, translucent(look.colour, 0.15), name=f"{name}: null", legendgroup=name)
