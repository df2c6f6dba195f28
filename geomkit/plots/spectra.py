"""Figures of whole spectra: singular values and cumulative energy, each with its null."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from geomkit.errors import GeometryError
from geomkit.plots.style import TEMPLATE, Look, legend_room, looks, title, translucent, whole_ticks

if TYPE_CHECKING:
    from geomkit.svd.layer_spectrum import LayerSpectrum
    from geomkit.svd.spectrum import Spectrum

_Indices = NDArray[np.int64]
_Values = NDArray[np.float64]

_MOST_POINTS = 120
"""Longer profiles are thinned to this many points, evenly on a log axis."""

_LONG = 50
"""Beyond this rank the energy is drawn over a log axis, since it gathers in the first few directions."""

_BAND = (0.05, 0.5, 0.95)
"""Quantiles over parameters, and for the null over draws too: a band lies between the outer ones."""

_TICKS = tuple(digit * 10**power for power in range(7) for digit in (1, 2, 5))


def plot_spectrum(*spectra: "Spectrum", names: Sequence[str] | None = None, layers: str = "*") -> go.Figure:
    """Draw singular values relative to the largest: the median over parameters, with the null.

    Beyond a parameter's numeric rank its singular values count as zero.

    Args:
        spectra: One or more spectra of the same model.
        names: A name for each, "safety" and "utility" when there are two; these have fixed colours.
        layers: Glob pattern on parameter names, such as ``"*.mlp.*"`` or one name.

    Returns:
        The figure: per spectrum a band and a dotted median for its null, and a line for its own median.

    Raises:
        GeometryError: If there is no spectrum, not one name for each, or no parameter matches.
    """
    figure = _profiles(spectra, named(spectra, names), layers, _RELATIVE)
    figure.update_layout(
        title=title("Singular values of the gradients, relative to the largest", _subtitle(spectra, layers)),
        xaxis_title="index i of the singular value",
        yaxis={"title": "σ<sub>i</sub> / σ<sub>1</sub>", "type": "log", "exponentformat": "power", "dtick": 1},
        yaxis_tickfont_size=11,  # powers are written larger than plain numbers
    )
    return figure


def plot_cer(*spectra: "Spectrum", names: Sequence[str] | None = None, layers: str = "*") -> go.Figure:
    """Draw the cumulative energy ratio CER(k) = Σ_{i≤k} σ_i² / Σ σ_i²: the median over parameters, with the null.

    Args:
        spectra: One or more spectra of the same model.
        names: A name for each, "safety" and "utility" when there are two; these have fixed colours.
        layers: Glob pattern on parameter names, such as ``"*.mlp.*"`` or one name.

    Returns:
        The figure: per spectrum a band and a dotted median for its null, and a line for its own median.

    Raises:
        GeometryError: If there is no spectrum, not one name for each, or no parameter matches.
    """
    figure = _profiles(spectra, named(spectra, names), layers, _ENERGY)
    long = figure.data[-1].x[-1] > _LONG
    figure.update_layout(
        title=title("Energy of the gradients in their first k directions", _subtitle(spectra, layers)),
        xaxis={"title": "rank k", "type": "log", "tickvals": _TICKS} if long else {"title": "rank k"},
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


def names_like(pattern: str, names: Iterable[str]) -> list[str]:
    """Return the parameters whose name matches a glob pattern.

    Raises:
        GeometryError: If none does.
    """
    known = list(names)
    if found := [name for name in known if fnmatchcase(name, pattern)]:
        return found
    some = ", ".join(known[:2])
    raise GeometryError(f"expected parameters like {pattern!r}, found none of {len(known)} ({some}, …); try '*'")


def _subtitle(spectra: Sequence["Spectrum"], layers: str) -> str:
    names = names_like(layers, spectra[0].layers)
    over = f"median of {len(names)} parameters" if len(names) > 1 else names[0]
    return f"{over}; dotted: the null, with its central 90 % over {'parameters and ' if len(names) > 1 else ''}draws"


def _relative(layer: "LayerSpectrum", indices: _Indices) -> _Values:
    """σ_i/σ_1 at indices from 1, zero beyond the numeric rank."""
    values = np.zeros(len(indices))
    inside = indices <= layer.numeric_rank
    values[inside] = layer.singular_values[indices[inside] - 1] / layer.singular_values[0]
    return values


def _energy(layer: "LayerSpectrum", indices: _Indices) -> _Values:
    return np.array([layer.cer(int(k)) for k in indices])


@dataclass(frozen=True)
class _Profile:
    """What is drawn of a spectrum, and how its values are written; ``{}`` is what plotly writes."""

    of: Callable[["LayerSpectrum", _Indices], _Values]
    place: str
    form: str

    def hover(self, name: str, over: str) -> str:
        low, high, null, null_low, null_high = (f"%{{customdata[{i}]:{self.form}}}" for i in range(5))
        spread = f", 90 % of {over} in [{low}, {high}]" if over else ""
        return (
            f"{name}<br>{self.place} %{{x}}: <b>%{{y:{self.form}}}</b>{spread}<br>null {null} [{null_low}, {null_high}]"
            "<extra></extra>"
        )


_RELATIVE = _Profile(_relative, "index", ".3g")
_ENERGY = _Profile(_energy, "rank", ".1%")


def _profiles(spectra: Sequence["Spectrum"], names: Sequence[str], layers: str, profile: _Profile) -> go.Figure:
    """Draw bands, then what the nulls and the gradients are at the median, so that no band lies on a line."""
    chosen = [names_like(layers, spectrum.layers) for spectrum in spectra]
    longest = max(
        spectrum.layers[name].rank_bound for spectrum, some in zip(spectra, chosen, strict=True) for name in some
    )
    indices = np.unique(np.geomspace(1, longest, _MOST_POINTS).round().astype(np.int64))
    bands, nulls, own = [], [], []
    for spectrum, name, some, look in zip(spectra, names, chosen, looks(names), strict=True):
        measured = [spectrum.layers[parameter] for parameter in some]
        values = _quantiles(profile, measured, indices)
        if values is None:
            raise GeometryError(f"expected gradients, found only zeros in '{name}'; measure examples with a loss")
        null = _quantiles(profile, [draw for parameter in some for draw in spectrum.null.get(parameter, ())], indices)
        if null is not None:
            bands.append(_band(indices, null, name, look))
            nulls.append(_null_line(indices, null[1], name, look))
        own.append(
            _line(indices, values, null, name, look, profile, "" if len(some) == 1 else f"{len(some)} parameters")
        )
    layout = {"template": TEMPLATE, "height": 420 + legend_room(names), "showlegend": True}
    few = {} if longest > _LONG else {"xaxis_tickvals": whole_ticks(indices, 10)}
    return go.Figure([*bands, *nulls, *own], layout={**layout, **few})


def _quantiles(profile: _Profile, layers: Iterable["LayerSpectrum"], indices: _Indices) -> _Values | None:
    """Return the low, middle and high quantile at each index, or nothing for no gradient but zeros."""
    found = [profile.of(layer, indices) for layer in layers if not layer.is_zero]
    return np.quantile(found, _BAND, axis=0) if found else None


def _line(
    x: _Indices, values: _Values, null: _Values | None, name: str, look: Look, profile: _Profile, over: str
) -> go.Scatter:
    low, middle, high = values
    beside = np.full((3, len(x)), np.nan) if null is None else null[[1, 0, 2]]
    return go.Scatter(
        x=x,
        y=_positive(middle),
        customdata=np.column_stack([low, high, *beside]),
        name=name,
        legendgroup=name,
        legendrank=900,
        mode="lines",
        line={"color": look.colour, "width": 2.5},
        hovertemplate=profile.hover(name, over),
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


def _band(x: _Indices, null: _Values, name: str, look: Look) -> go.Scatter:
    """One closed outline; zeros of its lower edge, which a log axis lacks, are lifted to the lowest median drawn."""
    low, middle, high = null
    inside = high > 0
    x, low, high = x[inside], low[inside], high[inside]
    low = np.minimum(np.where(low > 0, low, middle[middle > 0].min()), high)
    return go.Scatter(
        x=np.concatenate([x, x[::-1]]),
        y=np.concatenate([high, low[::-1]]),
        name=f"{name}: null",
        legendgroup=name,
        showlegend=False,
        mode="lines",
        line={"width": 0},
        fill="toself",
        fillcolor=translucent(look.colour, 0.15),
        hoverinfo="skip",
    )
