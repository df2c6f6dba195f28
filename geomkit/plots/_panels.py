"""What figures of one number per matrix share: a panel for each kind of matrix, the decoder layers along it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from geomkit.errors import GeometryError
from geomkit.plots._style import TEMPLATE, legend_room, place_of, title, whole_ticks

if TYPE_CHECKING:
    import pandas as pd

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
