"""The figure of how two sets' spectra differ, layer by layer."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import plotly.graph_objects as go

from geomkit.plots._panels import bars, lay_out, marker_size, panels, rows_of, words_for
from geomkit.plots._style import COLOURS, looks, per_cent, short

if TYPE_CHECKING:
    import pandas as pd

    from geomkit.contrasts import SpectrumContrast

_SHOWN = ["parameter", "low", "high", "a", "b", "p_value", "q_value", "tokens"]


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
        for trace in _traces(contrast, frame[frame["place"] == place]):
            shown.add(number, trace)
    heading = f"{words_for(statistic)}: {' − '.join(map(short, contrast.names))}"
    lay_out(shown, frame, heading, _subtitle(contrast, statistic), "difference")
    shown.figure.add_hline(y=0, line={"color": COLOURS["null"], "width": 1}, row="all", col="all")
    return shown.figure


def _subtitle(contrast: "SpectrumContrast", statistic: str) -> str:
    difference, (low, high) = contrast.mean(statistic)
    lines = f"lines: {per_cent(contrast.confidence)} intervals over examples"
    return f"by layer and kind of matrix; mean {difference:+.3g} [{low:+.3g}, {high:+.3g}]; {lines}"


def _traces(contrast: "SpectrumContrast", frame: "pd.DataFrame") -> Iterator[go.Scatter]:
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
            customdata=some[_SHOWN].to_numpy(),
            hovertemplate=(
                "%{customdata[0]}<br><b>%{y:+.4g}</b> [%{customdata[1]:+.4g}, %{customdata[2]:+.4g}]<br>"
                f"{contrast.names[0]} %{{customdata[3]:.4g}}, {contrast.names[1]} %{{customdata[4]:.4g}}<br>"
                "p = %{customdata[5]:.2g}, q = %{customdata[6]:.2g}<br>"
                f"%{{customdata[7]}} {contrast.a.unit}<extra></extra>"
            ),
        )
