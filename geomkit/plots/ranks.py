"""The figure of one statistic of the spectra, layer by layer."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from geomkit.errors import GeometryError
from geomkit.plots.spectra import named
from geomkit.plots.style import (
    COLOURS,
    TEMPLATE,
    Look,
    legend_room,
    looks,
    per_cent,
    place_of,
    short,
    title,
    translucent,
    whole_ticks,
)

if TYPE_CHECKING:
    import pandas as pd

    from geomkit.svd.spectrum import Spectrum
    from geomkit.svd.spectrum_contrast import SpectrumContrast

_SHOWN = ["parameter", "low", "high", "null", "null_low", "null_high", "tokens", "rank_bound"]


def plot_effective_rank(
    *spectra: "Spectrum", names: Sequence[str] | None = None, statistic: str = "effective_rank"
) -> go.Figure:
    """Draw a statistic of the spectrum by layer, one panel for each kind of matrix, with the range of its null.

    Args:
        spectra: One or more spectra of the same model.
        names: A name for each, "safety" and "utility" when there are two; these have fixed colours.
        statistic: One of the statistics in the spectra's frames.

    Returns:
        The figure: markers are the gradients, with a line for their interval where there is one; the wide bars are
        the range of their nulls.

    Raises:
        GeometryError: If there is no spectrum, not one name for each, or no such statistic.
    """
    names = named(spectra, names)
    frames = [rows_of(spectrum.to_frame(), statistic) for spectrum in spectra]
    shown = panels(frames)
    shifts = np.linspace(-0.15, 0.15, len(spectra)) if len(spectra) > 1 else np.zeros(1)
    units = [spectrum.unit for spectrum in spectra]
    for frame, name, unit, look, shift in zip(frames, names, units, looks(names), shifts, strict=True):
        for number, place in enumerate(shown.places):
            for trace in _traces(frame[frame["place"] == place], name, unit, look, float(shift)):
                shown.add(number, trace)
    word = words_for(statistic)
    lay_out(shown, frames[0], f"{word} by layer and kind of matrix", _subtitle(spectra, frames), word)
    shown.figure.update_yaxes(minallowed=0)
    return shown.figure


def _subtitle(spectra: Sequence["Spectrum"], frames: Sequence["pd.DataFrame"]) -> str:
    intervals = any(frame["low"].notna().any() for frame in frames)
    lines = f"lines: {per_cent(spectra[0].confidence)} intervals over examples; " if intervals else ""
    return f"{lines}bars: range of the null draws"


def _traces(frame: "pd.DataFrame", name: str, unit: str, look: Look, shift: float) -> Iterator[go.Scatter]:
    x = frame["x"] + shift
    yield go.Scatter(
        x=x,
        y=frame["null"],
        name=f"{name}: null",
        legendgroup=name,
        showlegend=False,
        mode="markers",
        marker={"symbol": "line-ew-open", "size": 7, "color": look.colour},
        error_y=bars(frame, "null", "null_low", "null_high", color=translucent(look.colour, 0.3), thickness=6),
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
            "size": marker_size(frame),
            "color": look.colour,
            "line": {"color": "white", "width": 1},
        },
        error_y=bars(frame, "value", "low", "high", color=look.colour, thickness=1.5),
        customdata=frame[_SHOWN].to_numpy(),
        hovertemplate=(
            f"{name}, %{{customdata[0]}}<br><b>%{{y:.4g}}</b><br>{interval}null %{{customdata[3]:.4g}} "
            f"[%{{customdata[4]:.4g}}, %{{customdata[5]:.4g}}]<br>%{{customdata[6]}} {unit}, "
            "rank at most %{customdata[7]}<extra></extra>"
        ),
    )


_CONTRAST_COLUMNS = ["parameter", "low", "high", "a", "b", "p_value", "q_value", "tokens"]


def plot_spectrum_contrast(contrast: "SpectrumContrast", statistic: str = "effective_rank") -> go.Figure:
    """Draw the difference of a statistic by layer, one panel for each kind of matrix, with its interval.

    Args:
        contrast: A finished comparison of two spectra.
        statistic: One of the statistics in its frame that has an interval.

    Returns:
        The figure: full markers are differences that are significant after adjusting for the number of matrices,
        hollow ones are not; a line at zero, where the two sets are alike.

    Raises:
        GeometryError: If there is no such statistic.
    """
    frame = rows_of(contrast.to_frame(), statistic)
    shown = panels([frame])
    for number, place in enumerate(shown.places):
        for trace in _contrast_traces(contrast, frame[frame["place"] == place]):
            shown.add(number, trace)
    heading = f"{words_for(statistic)}: {' − '.join(map(short, contrast.names))}"
    lay_out(shown, frame, heading, _contrast_subtitle(contrast, statistic), "difference")
    shown.figure.add_hline(y=0, line={"color": COLOURS["null"], "width": 1}, row="all", col="all")
    return shown.figure


def _contrast_subtitle(contrast: "SpectrumContrast", statistic: str) -> str:
    difference, (low, high) = contrast.mean(statistic)
    lines = f"lines: {per_cent(contrast.confidence)} intervals over examples"
    return f"by layer and kind of matrix; mean {difference:+.3g} [{low:+.3g}, {high:+.3g}]; {lines}"


def _contrast_traces(contrast: "SpectrumContrast", frame: "pd.DataFrame") -> Iterator[go.Scatter]:
    level = 1 - contrast.confidence
    (look,) = looks(contrast.names[:1])
    found = frame["q_value"] < level
    for name, some, filling in (
        (f"differs (q < {level:.2g})", frame[found], look.colour),
        ("not told apart", frame[~found], "white"),
    ):
        yield go.Scatter(
            # A trace of no points would have no place in the legend; one of a missing point has.
            x=some["x"] if len(some) else [None],
            y=some["difference"] if len(some) else [None],
            name=name,
            legendgroup=name,
            mode="markers",
            marker={
                "symbol": look.symbol,
                "size": marker_size(frame),
                "color": filling,
                "line": {"color": look.colour, "width": 1.5},
            },
            error_y=bars(some, "difference", "low", "high", color=look.colour, thickness=1.5),
            customdata=some[_CONTRAST_COLUMNS].to_numpy(),
            hovertemplate=(
                "%{customdata[0]}<br><b>%{y:+.4g}</b> [%{customdata[1]:+.4g}, %{customdata[2]:+.4g}]<br>"
                f"{contrast.names[0]} %{{customdata[3]:.4g}}, {contrast.names[1]} %{{customdata[4]:.4g}}<br>"
                "p = %{customdata[5]:.2g}, q = %{customdata[6]:.2g}<br>"
                f"%{{customdata[7]}} {contrast.a.unit}<extra></extra>"
            ),
        )


_COLUMNS = 4
_FEW_LAYERS = 16
_OUTSIDE = "outside the layers"


class Panels(NamedTuple):
    """A figure with a panel for each of its places, row by row.

    Attributes:
        figure: The figure.
        places: What each panel shows, such as ``"mlp.up_proj"``.
        rows: Number of rows of panels.
        columns: Number of panels in a row.
    """

    figure: go.Figure
    places: Sequence[str]
    rows: int
    columns: int

    def add(self, number: int, trace: go.Scatter) -> None:
        """Put a trace into a panel; it is in the legend at most once, for the first."""
        trace.showlegend = number == 0 and trace.showlegend is not False
        self.figure.add_trace(trace, row=number // self.columns + 1, col=number % self.columns + 1)


def rows_of(frame: "pd.DataFrame", statistic: str) -> "pd.DataFrame":
    """Return the rows of one statistic, with their panel in ``place`` and where they are along it in ``x``.

    Raises:
        GeometryError: If there is no such statistic.
    """
    known = list(dict.fromkeys(frame["statistic"]))
    if statistic not in known:
        raise GeometryError(f"expected a statistic among {', '.join(known)}, found '{statistic}'")
    chosen = frame[frame["statistic"] == statistic]
    outside = chosen["layer"].isna()
    places = chosen["parameter"].map(place_of).mask(outside, _OUTSIDE)
    return chosen.assign(place=places, x=chosen["layer"].mask(outside, outside.cumsum() - 1).astype(float))


def panels(frames: Sequence["pd.DataFrame"]) -> Panels:
    """Make a panel for each kind of matrix, and one for those outside the decoder layers."""
    places = sorted({place: None for frame in frames for place in frame["place"]}, key=_OUTSIDE.__eq__)
    columns = min(_COLUMNS, len(places))
    rows = -(-len(places) // columns)
    figure = make_subplots(
        rows,
        columns,
        subplot_titles=places,
        shared_yaxes="all",
        horizontal_spacing=0.16 / columns,
        vertical_spacing=0.3 / rows,
    )
    return Panels(figure, places, rows, columns)


def words_for(statistic: str) -> str:
    """Write a statistic's short name out.

    Example:
        >>> words_for("stable_rank"), words_for("cer10"), words_for("rank95")
        ('stable rank', 'CER(10)', 'rank at 95 % of the energy')
    """
    if statistic.startswith("cer"):
        return f"CER({statistic.removeprefix('cer')})"
    if statistic.removeprefix("rank").isdigit():
        return f"rank at {statistic.removeprefix('rank')} % of the energy"
    return statistic.replace("_", " ")


def marker_size(frame: "pd.DataFrame") -> int:
    """Return the size of a panel's markers, smaller where there are many layers."""
    return 8 if len(frame) <= _FEW_LAYERS else 5


def bars(frame: "pd.DataFrame", value: str, low: str, high: str, **look: object) -> dict[str, object]:
    """Return the error bars of an interval around a column; there are none where the interval is NaN."""
    above, below = frame[high] - frame[value], frame[value] - frame[low]
    return {"array": above.to_numpy(), "arrayminus": below.to_numpy(), "width": 0, **look}


def lay_out(shown: Panels, frame: "pd.DataFrame", heading: str, subtitle: str, axis: str) -> None:
    """Give the figure its title and the axes their names."""
    figure = shown.figure
    figure.update_layout(
        template=TEMPLATE,
        title=title(heading[0].upper() + heading[1:], subtitle),
        height=150 + 210 * shown.rows + legend_room(each.name for each in figure.data if each.showlegend),
        margin_t=104,
    )
    figure.update_annotations(font_size=13)
    figure.update_xaxes(tickvals=whole_ticks(frame["layer"].dropna()), tickangle=0, showgrid=False)
    figure.update_xaxes(title="layer", row=shown.rows)
    figure.update_yaxes(rangemode="tozero")
    figure.update_yaxes(title=axis, col=1)
    if shown.places[-1] == _OUTSIDE:
        _name_ticks(shown, frame[frame["place"] == _OUTSIDE])


def _name_ticks(shown: Panels, frame: "pd.DataFrame") -> None:
    """Write the parameters outside the layers along the last panel."""
    labels = [place_of(parameter) for parameter in frame["parameter"]]
    shown.figure.update_xaxes(
        tickvals=frame["x"],
        ticktext=labels,
        tickfont_size=11,
        range=(-0.6, len(labels) - 0.4),
        title="",
        row=shown.rows,
        col=(len(shown.places) - 1) % shown.columns + 1,
    )
