"""Figures of whole spectra: singular values and cumulative energy, with their null."""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from geomkit.errors import GeometryError
from geomkit.inputs.parameters import Kind, Layers, as_selection, select
from geomkit.plots.axes import ending_at, whole_ticks
from geomkit.plots.labels import column_name, place_labels, place_of
from geomkit.plots.panels import Panels, panels
from geomkit.plots.style import Look, looks, title, translucent
from geomkit.plots.themes import palette
from geomkit.plots.traces import LEGEND_ONLY, band, error_bars
from geomkit.svd.layer_spectrum import LayerSpectrum
from geomkit.svd.spectrum import Spectrum
from geomkit.utils.display import counted

Facet = Literal["layer", "matrix"]
"""What has a panel of its own: each decoder layer, or each matrix of a layer, such as ``q_proj``."""

_Indices = NDArray[np.int64]
_Values = NDArray[np.float64]

_MOST_POINTS = 120
"""Longer curves are thinned to this many points, evenly on a log axis."""

_LONG = 50
"""Beyond this rank the energy is drawn over a log axis, since most of it lies in the first few directions."""

_QUANTILES = (0.05, 0.5, 0.95)
"""Quantiles over parameters: the ends of an interval in the hover text, and the line between them."""

_MARKS = 9
"""Number of places along a line at which the null of each of several spectra has its range."""

_TICKS = tuple(digit * 10**power for power in range(7) for digit in (1, 2, 5))


def plot_spectrum(
    *spectra: Spectrum,
    names: Sequence[str] | None = None,
    layers: Layers = "*",
    kinds: Kind | Collection[Kind] | None = None,
    facet: Facet | None = None,
) -> go.Figure:
    """Draw singular values relative to the largest, the median over parameters, with their null.

    Beyond a parameter's numeric rank its singular values count as zero.

    Args:
        spectra: One or more spectra of the same model.
        names: A name for each spectrum; two spectra are "safety" and "utility" by default, which have fixed colours.
        layers: Which parameters to draw, as in :func:`geomkit.collect_gradients`.
        kinds: Kinds of module, of which a parameter must have one, as in :func:`geomkit.select`; all when left out.
        facet: ``"layer"`` for a panel per decoder layer, ``"matrix"`` for a panel per matrix of a layer, such as
            ``q_proj``; when left out, one panel for all parameters.

    Returns:
        The figure: per spectrum a line for its median, and a dotted line for the median of its null. The range of the
        null over its draws is a band, or, of several spectra, short lines side by side.

    Raises:
        GeometryError: If there is no spectrum, not one name for each, no parameter matches, no such facet, or all
            gradients that match are zero.
    """
    curves = _curves(spectra, named(spectra, names), layers, kinds, facet, _RELATIVE)
    # Powers are written larger than plain numbers.
    curves.drawn.figure.update_yaxes(type="log", exponentformat="power", dtick=1, tickfont_size=11)
    heading = title("Singular values relative to the largest", curves.subtitle)
    return curves.drawn.finished(heading, "index i of the singular value", "σ<sub>i</sub> / σ<sub>1</sub>")


def plot_cer(
    *spectra: Spectrum,
    names: Sequence[str] | None = None,
    layers: Layers = "*",
    kinds: Kind | Collection[Kind] | None = None,
    facet: Facet | None = None,
) -> go.Figure:
    """Draw the cumulative energy ratio CER(k) = Σ_{i≤k} σ_i² / Σ σ_i², the median over parameters, with its null.

    Args:
        spectra: One or more spectra of the same model.
        names: A name for each spectrum; two spectra are "safety" and "utility" by default, which have fixed colours.
        layers: Which parameters to draw, as in :func:`geomkit.collect_gradients`.
        kinds: Kinds of module, of which a parameter must have one, as in :func:`geomkit.select`; all when left out.
        facet: What has a panel of its own, as in :func:`plot_spectrum`.

    Returns:
        The figure: per spectrum a line for its median, and a dotted line for the median of its null. The range of the
        null over its draws is a band, or, of several spectra, short lines side by side.

    Raises:
        GeometryError: If there is no spectrum, not one name for each, no parameter matches, no such facet, or all
            gradients that match are zero.
    """
    curves = _curves(spectra, named(spectra, names), layers, kinds, facet, _ENERGY)
    figure = curves.drawn.figure
    if curves.longest > _LONG:
        figure.update_xaxes(type="log", tickvals=_TICKS, **ending_at(0, float(np.log10(curves.longest))))
    figure.update_yaxes(tickformat=".0%", range=[0, 1.03])
    heading = title("Energy in the first k directions", curves.subtitle)
    return curves.drawn.finished(heading, "rank k", "CER(k), share of the energy")


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


def chosen_names(layers: Layers, names: Iterable[str], kinds: Kind | Collection[Kind] | None = None) -> list[str]:
    """Return the parameter names that belong to a choice of layers and, if given, to a choice of kinds.

    Raises:
        GeometryError: If no name belongs to both.
        CollectionError: If ``layers`` is no choice of layers, or a kind is unknown.
    """
    all_names, selection, of_kind = list(names), as_selection(layers), select(kinds=kinds)
    if matching := [name for name in all_names if selection.matches(name) and of_kind.matches(name)]:
        return matching
    examples = ", ".join(all_names[:2])
    among = f" of kind {kinds!r}" if kinds is not None else ""
    raise GeometryError(
        f"expected parameters like {layers!r}{among}, found none of {len(all_names)} ({examples}, …); try '*'"
    )


def facets(facet: Facet | None, parameters: Iterable[str]) -> dict[str, list[str]]:
    """Return the parameters of each panel by the title of the panel, which is empty without facets.

    Raises:
        GeometryError: If there is no such facet.
    """
    if facet is not None and facet not in get_args(Facet):
        raise GeometryError(f"expected a facet among {', '.join(get_args(Facet))}, found {facet!r}; give one of these")
    names = list(parameters)
    labels = place_labels(names)
    by_title: dict[str, list[str]] = {}
    for name in names:
        by_panel = {"layer": column_name(name), "matrix": labels[place_of(name)], None: ""}
        by_title.setdefault(by_panel[facet], []).append(name)
    return by_title


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


class _Curves(NamedTuple):
    """A figure of curves.

    Attributes:
        drawn: The panels.
        longest: The last index of a curve.
        subtitle: What the lines are.
    """

    drawn: Panels
    longest: int
    subtitle: str


def _curves(
    spectra: Sequence[Spectrum],
    names: Sequence[str],
    layers: Layers,
    kinds: Kind | Collection[Kind] | None,
    facet: Facet | None,
    quantity: _Quantity,
) -> _Curves:
    """Return the curves of each panel: first the nulls, then the medians of the gradients."""
    parameters = list(dict.fromkeys(name for spectrum in spectra for name in spectrum.layers))
    by_panel = facets(facet, chosen_names(layers, parameters, kinds))
    # 1. As many indices as the longest spectrum has, the same in all panels.
    chosen = [name for names_of_panel in by_panel.values() for name in names_of_panel]
    bounds = [spectrum.layers[name].rank_bound for spectrum in spectra for name in chosen if name in spectrum.layers]
    indices = np.unique(np.geomspace(1, max(bounds), _MOST_POINTS).round().astype(np.int64))
    _refuse_zeros(spectra, names, chosen)
    # 2. The curves of each panel; only those of the first panel are in the legend.
    height = 270 if facet is None else 150
    drawn = panels(list(by_panel), height=height, shared_yaxes="all" if facet else False)
    for number, of_panel in enumerate(by_panel.values()):
        traces = _panel(spectra, names, of_panel, quantity, indices)
        for trace in traces:
            trace.showlegend = number == 0 and trace.showlegend is not False
            drawn.add(number, trace)
    # 3. One entry in the legend for the nulls of all spectra, which have the colours of their spectra.
    has_null = any(draws for spectrum in spectra for draws in spectrum.null.values())
    if has_null:
        line = {"color": palette().ink, "dash": "dot", "width": 1.5}
        drawn.figure.add_trace(go.Scatter(**LEGEND_ONLY, name="null: random gradients", mode="lines", line=line))
    drawn.figure.update_xaxes(
        **ending_at(1, max(bounds)), tickvals=whole_ticks(range(1, max(bounds) + 1), 6), showticklabels=True
    )
    drawn.figure.update_layout(showlegend=True)
    over = {len(of_panel) for of_panel in by_panel.values()}
    medians = f"median of {' to '.join(str(number) for number in sorted({min(over), max(over)}))} parameters"
    subtitle = chosen[0] if len(chosen) == 1 else medians if max(over) > 1 else "one parameter in each panel"
    spread = "band" if len(spectra) == 1 else "upright lines"
    return _Curves(drawn, max(bounds), f"{subtitle}; {spread}: range of the null over its draws" * has_null or subtitle)


def _refuse_zeros(spectra: Sequence[Spectrum], names: Sequence[str], parameters: Sequence[str]) -> None:
    for spectrum, name in zip(spectra, names, strict=True):
        if all(spectrum.layers[parameter].is_zero for parameter in parameters if parameter in spectrum.layers):
            raise GeometryError(f"expected gradients, found only zeros in '{name}'; measure examples with a loss")


def _panel(
    spectra: Sequence[Spectrum], names: Sequence[str], parameters: Sequence[str], quantity: _Quantity, indices: _Indices
) -> list[go.Scatter]:
    """Return the traces of one panel; of several spectra, the ranges of the nulls stand side by side."""
    nulls, lines = [], []
    for place, (spectrum, name, look) in enumerate(zip(spectra, names, looks(names), strict=True)):
        measured = [parameter for parameter in parameters if parameter in spectrum.layers]
        values = _quantiles(quantity, [spectrum.layers[parameter] for parameter in measured], indices)
        if values is None:  # all gradients of this panel are zero
            continue
        null = _null_range(quantity, [spectrum.null.get(parameter, ()) for parameter in measured], indices)
        if null is not None:
            nulls.append(_null_line(indices, null[1], name, look))
            at = slice(None) if len(spectra) == 1 else _marks(indices, place, len(spectra))
            nulls.append(_null_band(indices, null, name, look) if len(spectra) == 1 else
                         _null_marks(indices[at], null[:, at], name, look))  # fmt: skip
        hover = quantity.hover(name, "" if len(measured) == 1 else counted(len(measured), "parameter"))
        lines.append(_line(indices, values, null, name, look, hover))
    return [*nulls, *lines]


def _quantiles(quantity: _Quantity, layers: Iterable[LayerSpectrum], indices: _Indices) -> _Values | None:
    """Return the (3, n) quantiles at each index over the gradients that are not zero, ``None`` if all are."""
    values = [quantity.of(layer, indices) for layer in layers if not layer.is_zero]
    return np.quantile(values, _QUANTILES, axis=0) if values else None


def _null_range(quantity: _Quantity, draws: Sequence[Sequence[LayerSpectrum]], indices: _Indices) -> _Values | None:
    """Return the (3, n) smallest, middle and largest median over parameters of the draws of a null, ``None`` if none.

    The median of random gradients is what the median of the gradients is to be compared with. A parameter with fewer
    draws than others repeats its draws.
    """
    most = max(map(len, draws), default=0)
    medians = []
    for number in range(most):
        of_draw = [of_parameter[number % len(of_parameter)] for of_parameter in draws if of_parameter]
        if (quantiles := _quantiles(quantity, of_draw, indices)) is not None:
            medians.append(quantiles[1])
    return np.quantile(medians, (0, 0.5, 1), axis=0) if medians else None


def _marks(indices: _Indices, place: int, series: int) -> _Indices:
    """Return the places in ``indices`` at which one of several series has the range of its null, and no other has."""
    step = max(series, len(indices) // _MARKS)
    return np.arange(place * step // series, len(indices), step)


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


def _null_marks(x: _Indices, null: _Values, name: str, look: Look) -> go.Scatter:
    """Return the range of a null as upright lines, which do not cover those of other nulls as bands would."""
    low, middle, high = null
    bars = error_bars(middle, np.where(low > 0, low, middle), high, color=translucent(look.colour, 0.6), thickness=3)
    return go.Scatter(
        x=x,
        y=_positive(middle),
        name=f"{name}: range of the null",
        legendgroup=name,
        showlegend=False,
        mode="markers",
        marker={"size": 1, "color": look.colour},
        error_y=bars,
        hoverinfo="skip",
    )
