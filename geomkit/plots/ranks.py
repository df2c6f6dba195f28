"""Figures of one statistic of the spectra by layer, one panel per kind of matrix: its values, and their difference."""

from collections.abc import Iterator, Sequence

import pandas as pd
import plotly.graph_objects as go

from geomkit.errors import GeometryError
from geomkit.plots.axes import whole_ticks
from geomkit.plots.labels import WHOLE_LAYER, per_cent, place_labels, place_of, short, statistic_words
from geomkit.plots.panels import Panels, panels
from geomkit.plots.spectra import named
from geomkit.plots.style import Look, looks, title, translucent
from geomkit.plots.themes import COLOURS, palette
from geomkit.plots.traces import LEGEND_ONLY, error_bars, side_by_side
from geomkit.svd.spectrum import Spectrum
from geomkit.svd.spectrum_contrast import SpectrumContrast

_FEW_LAYERS = 16
"""Markers are smaller in panels of more layers."""

_OUTSIDE = "outside the layers"
"""The panel of matrices that belong to no decoder layer; the last panel."""

_RANK_HOVER = ["parameter", "low", "high", "null", "null_low", "null_high", "tokens", "rank_bound"]
_CONTRAST_HOVER = ["parameter", "low", "high", "a", "b", "p_value", "q_value", "tokens"]


def plot_effective_rank(
    *spectra: Spectrum, names: Sequence[str] | None = None, statistic: str = "effective_rank"
) -> go.Figure:
    """Draw a statistic of the spectrum by layer, one panel per kind of matrix, with the range of its null.

    Args:
        spectra: One or more spectra of the same model.
        names: A name for each spectrum; two spectra are "safety" and "utility" by default, which have fixed colours.
        statistic: A statistic in the spectra's data frames.

    Returns:
        The figure: a marker per gradient, with a line for its interval if there is one, and a wide bar for the range
        of its null.

    Raises:
        GeometryError: If there is no spectrum, no such statistic, or not as many names as spectra.
    """
    names = named(spectra, names)
    frames = [_rows_of(spectrum.to_frame(), statistic) for spectrum in spectra]
    drawn = _panels(frames)
    shifts = side_by_side(len(spectra), 0.3)
    series = zip(frames, names, spectra, looks(names), shifts, strict=True)
    for frame, name, spectrum, look, shift in series:
        for number, place in enumerate(drawn.names):
            rows = frame[frame["place"] == place]
            _add(drawn, number, _rank_traces(rows, name, spectrum.unit, look, float(shift)))
    words = _words_of(statistic, spectra[0])
    null = (
        "examples in orthogonal directions" if spectra[0].unit == "examples" else "random gradients, range of the draws"
    )
    by = "layer" if WHOLE_LAYER in drawn.names else "layer and matrix"
    intervals = any(frame["low"].notna().any() for frame in frames)
    lines = f"lines: {per_cent(spectra[0].confidence)} intervals over examples; " if intervals else ""
    if any(frame["null"].notna().any() for frame in frames):
        drawn.figure.add_trace(_null_in_legend())
    heading = title(_capitalised(f"{words} by {by}"), f"{lines}null: {null}")
    drawn.figure.update_yaxes(minallowed=0)
    return _laid_out(drawn, frames[0], heading, words)


def plot_spectrum_contrast(contrast: SpectrumContrast, statistic: str = "effective_rank") -> go.Figure:
    """Draw the difference of a statistic between two spectra by layer, one panel per kind of matrix.

    Args:
        contrast: The comparison of two spectra.
        statistic: A statistic in its data frame, which has an interval.

    Returns:
        The figure: a marker per matrix with its interval, full if the difference is significant after adjusting for
        the number of matrices, else hollow; a line at zero, where the two sets are alike.

    Raises:
        GeometryError: If there is no such statistic.
    """
    frame = _rows_of(contrast.to_frame(), statistic)
    drawn = _panels([frame])
    for number, place in enumerate(drawn.names):
        _add(drawn, number, _contrast_traces(contrast, frame[frame["place"] == place]))
    # Layers and the few parameters outside them are no sample of the same kind, so their mean is not said.
    difference, (low, high) = contrast.mean(statistic)
    layers = WHOLE_LAYER in drawn.names
    by = "by layer" if layers else f"by layer and matrix; mean {difference:+.3g} [{low:+.3g}, {high:+.3g}]"
    heading = title(
        _capitalised(f"{_words_of(statistic, contrast.a)}: {' − '.join(map(short, contrast.names))}"),
        f"{by}; lines: {per_cent(contrast.confidence)} intervals over examples",
    )
    drawn.figure.add_hline(y=0, line={"color": COLOURS["null"], "width": 1}, row="all", col="all")
    return _laid_out(drawn, frame, heading, "difference")


# ---------------------------------------------------------------------------------------------------------- traces


def _rank_traces(frame: pd.DataFrame, name: str, unit: str, look: Look, shift: float) -> Iterator[go.Scatter]:
    """Yield the nulls of one spectrum in one panel, then its values with their intervals."""
    x = frame["x"] + shift
    range_of_null = {"color": translucent(look.colour, 0.3), "thickness": 6}
    yield go.Scatter(
        x=x,
        y=frame["null"],
        name=f"{name}: null",
        legendgroup=name,
        showlegend=False,
        mode="markers",
        marker={"symbol": "line-ew-open", "size": 7, "color": look.colour},
        error_y=error_bars(frame["null"], frame["null_low"], frame["null_high"], **range_of_null),
        hoverinfo="skip",
    )
    interval = "interval [%{customdata[1]:.4g}, %{customdata[2]:.4g}]<br>" if frame["low"].notna().any() else ""
    yield go.Scatter(
        x=x,
        y=frame["value"],
        name=name,
        legendgroup=name,
        mode="markers",
        marker={
            "symbol": look.symbol,
            "size": _marker_size(frame),
            "color": look.colour,
            "line": {"color": palette().paper, "width": 1},
        },
        error_y=error_bars(frame["value"], frame["low"], frame["high"], color=look.colour, thickness=1.5),
        customdata=frame[_RANK_HOVER].to_numpy(),
        hovertemplate=(
            f"{name}, %{{customdata[0]}}<br><b>%{{y:.4g}}</b><br>{interval}null %{{customdata[3]:.4g}} "
            f"[%{{customdata[4]:.4g}}, %{{customdata[5]:.4g}}]<br>%{{customdata[6]}} {unit}, "
            "rank at most %{customdata[7]}<extra></extra>"
        ),
    )


def _contrast_traces(contrast: SpectrumContrast, frame: pd.DataFrame) -> Iterator[go.Scatter]:
    """Yield the significant differences in one panel, then all others."""
    level = 1 - contrast.confidence
    (look,) = looks(contrast.names[:1])
    significant = frame["q_value"] < level
    for name, rows, filling in (
        (f"differs (q < {level:.2g})", frame[significant], look.colour),
        ("not told apart", frame[~significant], palette().paper),
    ):
        yield go.Scatter(
            # A trace without points has no entry in the legend; a trace with a missing point has an entry.
            x=rows["x"] if len(rows) else [None],
            y=rows["difference"] if len(rows) else [None],
            name=name,
            legendgroup=name,
            mode="markers",
            marker={
                "symbol": look.symbol,
                "size": _marker_size(frame),
                "color": filling,
                "line": {"color": look.colour, "width": 1.5},
            },
            error_y=error_bars(rows["difference"], rows["low"], rows["high"], color=look.colour, thickness=1.5),
            customdata=rows[_CONTRAST_HOVER].to_numpy(),
            hovertemplate=(
                "%{customdata[0]}<br><b>%{y:+.4g}</b> [%{customdata[1]:+.4g}, %{customdata[2]:+.4g}]<br>"
                f"{contrast.names[0]} %{{customdata[3]:.4g}}, {contrast.names[1]} %{{customdata[4]:.4g}}<br>"
                "p = %{customdata[5]:.2g}, q = %{customdata[6]:.2g}<br>"
                f"%{{customdata[7]}} {contrast.a.unit}<extra></extra>"
            ),
        )


def _words_of(statistic: str, spectrum: Spectrum) -> str:
    """Return a statistic in words, with the span if it is one of spans."""
    return f"{statistic_words(statistic)}{' of the span' if spectrum.unit == 'examples' else ''}"


def _marker_size(frame: pd.DataFrame) -> int:
    return 8 if len(frame) <= _FEW_LAYERS else 5


# ---------------------------------------------------------------------------------------------------------- panels


def _rows_of(frame: pd.DataFrame, statistic: str) -> pd.DataFrame:
    """Return the rows of a statistic, with two new columns: ``place``, the title of the panel, and ``x``.

    Raises:
        GeometryError: If there is no such statistic.
    """
    statistics = list(dict.fromkeys(frame["statistic"]))
    if statistic not in statistics:
        raise GeometryError(f"expected a statistic among {', '.join(statistics)}, found '{statistic}'")
    rows = frame[frame["statistic"] == statistic]
    outside = rows["layer"].isna()
    places = rows["parameter"].map(place_of).map(place_labels(rows["parameter"])).mask(outside, _OUTSIDE)
    # Matrices outside the layers stand at 0, 1, 2, … of their panel.
    return rows.assign(place=places, x=rows["layer"].mask(outside, outside.cumsum() - 1).astype(float))


def _panels(frames: Sequence[pd.DataFrame]) -> Panels:
    """Return a panel for each kind of matrix, and a last one for matrices outside the decoder layers."""
    places = sorted({place: None for frame in frames for place in frame["place"]}, key=_OUTSIDE.__eq__)
    return panels(places, height=130, shared_yaxes="all")


def _add(drawn: Panels, number: int, traces: Iterator[go.Scatter]) -> None:
    """Add traces to a panel; only traces of the first panel are in the legend."""
    for trace in traces:
        trace.showlegend = number == 0 and trace.showlegend is not False
        drawn.add(number, trace)


def _null_in_legend() -> go.Scatter:
    """Return one entry of the legend for the nulls of all spectra, which have the colours of their spectra."""
    ink = palette().ink
    marker = {"symbol": "line-ew-open", "size": 11, "color": ink, "line": {"width": 3, "color": translucent(ink, 0.5)}}
    return go.Scatter(**LEGEND_ONLY, name="null of the same colour", mode="markers", marker=marker, showlegend=True)


def _laid_out(drawn: Panels, frame: pd.DataFrame, heading: dict[str, object], y_title: str) -> go.Figure:
    """Return the figure, with a panel for each kind of matrix, after setting its title, size and axes."""
    drawn.figure.update_xaxes(tickvals=whole_ticks(frame["layer"].dropna()), tickangle=0, showgrid=False)
    drawn.figure.update_yaxes(rangemode="tozero")
    figure = drawn.finished(heading, "layer", y_title)
    if drawn.names[-1] == _OUTSIDE:
        _name_outside(drawn, frame[frame["place"] == _OUTSIDE])
    return figure


def _name_outside(drawn: Panels, frame: pd.DataFrame) -> None:
    """Write the names of the matrices outside the layers along the last panel."""
    labels = list(place_labels(frame["parameter"]).values())
    drawn.figure.update_xaxes(
        tickvals=frame["x"],
        ticktext=labels,
        tickfont_size=11,
        range=(-0.6, len(labels) - 0.4),
        title="",
        **drawn.at(len(drawn.names) - 1),
    )


def _capitalised(text: str) -> str:
    return text[0].upper() + text[1:]
