"""The figure of one statistic of the spectra, layer by layer."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from geomkit.errors import GeometryError
from geomkit.plots._profiles import named
from geomkit.plots._style import TEMPLATE, Look, looks, place_of, title, translucent

if TYPE_CHECKING:
    import pandas as pd

    from geomkit.spectra import Spectrum

_COLUMNS = 4
_FEW_LAYERS = 16
_OUTSIDE = "outside the layers"


def plot_effective_rank(
    *spectra: "Spectrum", names: Sequence[str] | None = None, statistic: str = "effective_rank"
) -> go.Figure:
    """Draw a statistic of the spectrum by layer, one panel for each kind of matrix, with the range of its null.

    Args:
        spectra: One or more spectra of the same model.
        names: A name for each, "safety" and "utility" when there are two; these have fixed colours.
        statistic: One of the statistics in the spectra's frames.

    Returns:
        The figure: markers are the gradients, the bars behind them the range of their nulls.

    Raises:
        GeometryError: If there is no spectrum, not one name for each, or no such statistic.
    """
    names = named(spectra, names)
    frames = [_rows(spectrum.to_frame(), statistic) for spectrum in spectra]
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
    shifts = np.linspace(-0.15, 0.15, len(spectra)) if len(spectra) > 1 else np.zeros(1)
    for frame, name, look, shift in zip(frames, names, looks(names), shifts, strict=True):
        for number, place in enumerate(places):
            for trace in _traces(frame[frame["place"] == place], name, look, float(shift)):
                trace.showlegend = number == 0
                figure.add_trace(trace, row=number // columns + 1, col=number % columns + 1)
    _lay_out(figure, statistic.replace("_", " "), rows)
    if places[-1] == _OUTSIDE:
        _name_ticks(figure, frames[0][frames[0]["place"] == _OUTSIDE], rows, (len(places) - 1) % columns + 1)
    return figure


def _rows(frame: "pd.DataFrame", statistic: str) -> "pd.DataFrame":
    known = list(dict.fromkeys(frame["statistic"]))
    if statistic not in known:
        raise GeometryError(f"expected a statistic among {', '.join(known)}, found '{statistic}'")
    chosen = frame[frame["statistic"] == statistic]
    outside = chosen["layer"].isna()
    places = chosen["parameter"].map(place_of).mask(outside, _OUTSIDE)
    return chosen.assign(place=places, x=chosen["layer"].mask(outside, outside.cumsum() - 1).astype(float))


def _traces(frame: "pd.DataFrame", name: str, look: Look, shift: float) -> Iterator[go.Scatter]:
    x = frame["x"] + shift
    size = 8 if len(frame) <= _FEW_LAYERS else 5
    yield go.Scatter(
        x=x,
        y=frame["null"],
        name=f"{name}: null",
        legendgroup=f"{name}: null",
        mode="markers",
        marker={"symbol": "line-ew-open", "size": 7, "color": look.colour},
        error_y={
            "array": frame["null_high"] - frame["null"],
            "arrayminus": frame["null"] - frame["null_low"],
            "color": translucent(look.colour, 0.3),
            "thickness": 6,
            "width": 0,
        },
        hoverinfo="skip",
    )
    yield go.Scatter(
        x=x,
        y=frame["value"],
        name=name,
        legendgroup=name,
        mode="markers",
        marker={
            "symbol": look.symbol,
            "size": size,
            "color": look.colour,
            "line": {"color": "white", "width": 1},
        },
        customdata=frame[["parameter", "null", "null_low", "null_high", "tokens", "rank_bound"]].to_numpy(),
        hovertemplate=(
            f"{name}, %{{customdata[0]}}<br><b>%{{y:.4g}}</b><br>null %{{customdata[1]:.4g}} "
            "[%{customdata[2]:.4g}, %{customdata[3]:.4g}]<br>%{customdata[4]} tokens, "
            "rank at most %{customdata[5]}<extra></extra>"
        ),
    )


def _lay_out(figure: go.Figure, word: str, rows: int) -> None:
    figure.update_layout(
        template=TEMPLATE,
        title=title(f"{word.capitalize()} by layer and kind of matrix", "bars: range of the null draws"),
        height=150 + 210 * rows,
        margin_t=104,
    )
    figure.update_annotations(font_size=13)
    figure.update_xaxes(tickformat="d", showgrid=False)
    figure.update_xaxes(title="layer", row=rows)
    figure.update_yaxes(rangemode="tozero")
    figure.update_yaxes(title=word, col=1)


def _name_ticks(figure: go.Figure, frame: "pd.DataFrame", row: int, column: int) -> None:
    labels = [place_of(parameter) for parameter in frame["parameter"]]
    limits = (-0.6, len(labels) - 0.4)
    figure.update_xaxes(
        tickvals=frame["x"], ticktext=labels, tickfont_size=11, range=limits, title="", row=row, col=column
    )
