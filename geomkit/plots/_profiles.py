"""Figures of whole spectra: singular values and cumulative energy, each with its null."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from geomkit.errors import GeometryError
from geomkit.plots._style import TEMPLATE, looks, title, translucent

if TYPE_CHECKING:
    from geomkit.spectra import LayerSpectrum, Spectrum

_Indices = NDArray[np.int64]
_Values = NDArray[np.float64]

_MOST_POINTS = 120
"""Longer profiles are thinned to this many points, evenly on a log axis."""

_LONG = 50
"""Beyond this rank the energy is drawn over a log axis, since it gathers in the first few directions."""

_BAND = (0.05, 0.95)
"""Quantiles of the null, over parameters and draws, between which a band lies."""

_SUBTITLE = "median over parameters; dotted: the null, with its central 90 % over parameters and draws"


def plot_spectrum(*spectra: "Spectrum", names: Sequence[str] | None = None) -> go.Figure:
    """Draw singular values relative to the largest: the median over parameters, with the null.

    Beyond a parameter's numeric rank its singular values count as zero.

    Args:
        spectra: One or more spectra of the same model.
        names: A name for each, "safety" and "utility" when there are two; these have fixed colours.

    Returns:
        The figure: per spectrum a band and a dotted median for its null, and a line for its own median.

    Raises:
        GeometryError: If there is no spectrum, or not one name for each.
    """
    figure = _profiles(spectra, named(spectra, names), _relative, "σ<sub>i</sub>/σ<sub>1</sub> = %{y:.3g}")
    figure.update_layout(
        title=title("Singular values of the gradients, relative to the largest", _SUBTITLE),
        xaxis_title="index i of the singular value",
        yaxis={"title": "σ<sub>i</sub> / σ<sub>1</sub>", "type": "log", "exponentformat": "power", "dtick": 1},
    )
    return figure


def plot_cer(*spectra: "Spectrum", names: Sequence[str] | None = None) -> go.Figure:
    """Draw the cumulative energy ratio CER(k) = Σ_{i≤k} σ_i² / Σ σ_i²: the median over parameters, with the null.

    Args:
        spectra: One or more spectra of the same model.
        names: A name for each, "safety" and "utility" when there are two; these have fixed colours.

    Returns:
        The figure: per spectrum a band and a dotted median for its null, and a line for its own median.

    Raises:
        GeometryError: If there is no spectrum, or not one name for each.
    """
    figure = _profiles(spectra, named(spectra, names), _energy, "CER = %{y:.1%}")
    figure.update_layout(
        title=title("Energy of the gradients in their first k directions", _SUBTITLE),
        xaxis={"title": "rank k", "type": "log" if figure.data[-1].x[-1] > _LONG else "linear"},
        yaxis={"title": "CER(k), share of the squared norm", "tickformat": ".0%", "range": [0, 1.03]},
    )
    return figure


def named(spectra: Sequence["Spectrum"], names: Sequence[str] | None) -> Sequence[str]:
    """Return the names given, or the usual ones for one or two spectra.

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


def _relative(layer: "LayerSpectrum", indices: _Indices) -> _Values:
    """σ_i/σ_1 at indices from 1, zero beyond the numeric rank."""
    values = np.zeros(len(indices))
    inside = indices <= layer.numeric_rank
    values[inside] = layer.singular_values[indices[inside] - 1] / layer.singular_values[0]
    return values


def _energy(layer: "LayerSpectrum", indices: _Indices) -> _Values:
    return np.array([layer.cer(int(k)) for k in indices])


def _profiles(
    spectra: Sequence["Spectrum"],
    names: Sequence[str],
    profile: Callable[["LayerSpectrum", _Indices], _Values],
    hover: str,
) -> go.Figure:
    figure = go.Figure(layout={"template": TEMPLATE})
    longest = max(layer.rank_bound for spectrum in spectra for layer in spectrum.layers.values())
    indices = np.unique(np.geomspace(1, longest, _MOST_POINTS).round().astype(np.int64))
    for spectrum, name, look in zip(spectra, names, looks(names), strict=True):
        measured = [profile(layer, indices) for layer in spectrum.layers.values() if not layer.is_zero]
        draws = [profile(draw, indices) for some in spectrum.null.values() for draw in some if not draw.is_zero]
        if not measured:
            raise GeometryError(f"expected gradients, found only zeros in '{name}'; measure examples with a loss")
        if draws:
            low, middle, high = np.quantile(draws, (_BAND[0], 0.5, _BAND[1]), axis=0)
            floor = float(middle[middle > 0].min())
            figure.add_trace(_band(indices, low, high, floor, name, look.colour))
            figure.add_trace(_line(indices, middle, f"{name}: null", hover, color=look.colour, dash="dot", width=1.5))
        own = np.median(measured, axis=0)
        figure.add_trace(_line(indices, own, name, hover, color=look.colour, width=2.5))
    return figure


def _line(x: _Indices, y: _Values, name: str, hover: str, **line: object) -> go.Scatter:
    return go.Scatter(
        x=x,
        y=np.where(y > 0, y, np.nan),
        name=name,
        legendgroup=name,
        mode="lines",
        line=line,
        hovertemplate=f"{name}<br>index %{{x}}<br>{hover}<extra></extra>",
    )


def _band(x: _Indices, low: _Values, high: _Values, floor: float, name: str, colour: str) -> go.Scatter:
    """One closed outline; zeros of its lower edge, which a log axis lacks, are lifted to the lowest value drawn."""
    inside = high > 0
    x, low, high = x[inside], low[inside], high[inside]
    low = np.minimum(np.where(low > 0, low, floor), high)
    return go.Scatter(
        x=np.concatenate([x, x[::-1]]),
        y=np.concatenate([high, low[::-1]]),
        legendgroup=f"{name}: null",
        showlegend=False,
        mode="lines",
        line={"width": 0},
        fill="toself",
        fillcolor=translucent(colour, 0.15),
        hoverinfo="skip",
    )
