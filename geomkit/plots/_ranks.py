"""The figure of one statistic of the spectra, layer by layer."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go

from geomkit.plots._panels import bars, lay_out, marker_size, panels, rows_of, words_for
from geomkit.plots._profiles import named
from geomkit.plots._style import Look, looks, per_cent, translucent

if TYPE_CHECKING:
    import pandas as pd

    from geomkit.spectra import Spectrum

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
