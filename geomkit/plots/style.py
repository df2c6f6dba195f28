"""The look of all figures: colours, the plotly template, and how a series gets its colour, dash and symbol."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import plotly.graph_objects as go
import plotly.io

COLOURS = {
    "safety": "#0072B2",
    "utility": "#D55E00",
    "control": "#8C6BB1",
    "null": "#767676",
    "SFT": "#CC79A7",
    "SPF": "#009E73",
}
"""The fixed colours, from the palette of Okabe and Ito (2008), which colour-blind readers can distinguish."""

INK = "#222222"
"""The colour of text, zero lines and summaries over all series."""

GRID = "#E6E6E6"
"""The colour of grid lines."""

_FRAME = "#8A8A8A"
_LEGEND_WIDTH = 560
"""Width of one line of the legend in a narrow figure, in pixels."""

_OTHERS = ("#444444", "#56B4E9", "#E69F00", "#0072B2", "#D55E00", "#7A5C00")
_DASHES = ("solid", "dash", "dashdot", "longdash", "dot")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x")

_AXIS = {
    "showgrid": True,
    "gridcolor": GRID,
    "zeroline": False,
    "linecolor": _FRAME,
    "showline": True,
    "ticks": "outside",
    "tickcolor": _FRAME,
    "ticklen": 4,
    "title": {"standoff": 8, "font": {"size": 13}},
    "automargin": True,
}

TEMPLATE = go.layout.Template(
    layout={
        "font": {"family": "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif", "size": 13},
        "font_color": INK,
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "colorway": [*COLOURS.values(), *_OTHERS[:3]],
        "title": {"x": 0, "xref": "container", "xanchor": "left", "y": 1, "yref": "container", "yanchor": "top"},
        "title_font_size": 16,
        "title_pad": {"t": 14, "l": 12},
        "title_subtitle": {"font": {"size": 12, "color": "#555555"}},
        "margin": {"l": 64, "r": 32, "t": 82, "b": 84},
        "height": 420,
        "hoverlabel": {"bgcolor": "white", "bordercolor": _FRAME, "font_size": 12, "align": "left"},
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "font_size": 12},
        "legend_y": 0,
        "legend_yref": "container",
        "legend_yanchor": "bottom",
        "xaxis": _AXIS,
        "yaxis": _AXIS,
    }
)
"""The template of all figures, registered with plotly as ``"geomkit"``."""

plotly.io.templates["geomkit"] = TEMPLATE


class Look(NamedTuple):
    """The look of one series; dash and symbol distinguish series where colour cannot, as in a grey print.

    Attributes:
        colour: The colour, ``#rrggbb``.
        dash: The dash of the line, by plotly's name.
        symbol: The symbol of the markers, by plotly's name.
    """

    colour: str
    dash: str
    symbol: str


def looks(names: Sequence[str]) -> list[Look]:
    """Return the look of each series: the fixed colour if its name has one, else the next free colour."""
    fixed = {name.casefold(): colour for name, colour in COLOURS.items()}
    named_colours = [fixed[name.casefold()] for name in names if name.casefold() in fixed]
    free = [colour for colour in _OTHERS if colour not in named_colours] or list(_OTHERS)
    unnamed = [name for name in names if name.casefold() not in fixed]
    drawn = {name: free[number % len(free)] for number, name in enumerate(unnamed)}
    return [
        Look(
            fixed.get(name.casefold()) or drawn[name],
            _DASHES[number % len(_DASHES)],
            _SYMBOLS[number % len(_SYMBOLS)],
        )
        for number, name in enumerate(names)
    ]


def translucent(colour: str, alpha: float) -> str:
    """Return a ``#rrggbb`` colour with an opacity.

    Example:
        >>> translucent("#0072B2", 0.2)
        'rgba(0,114,178,0.2)'
    """
    red, green, blue = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def title(text: str, subtitle: str = "") -> dict[str, object]:
    """Return a layout title with an optional second line."""
    return {"text": text, "subtitle": {"text": subtitle}} if subtitle else {"text": text}


def legend_room(names: Iterable[str]) -> int:
    """Return the height in pixels that a legend needs beyond its first line, in a narrow figure.

    Example:
        >>> legend_room(["safety", "utility"]), legend_room(["a very long name of a set"] * 4)
        (0, 22)
    """
    lines, line_width = 1, 0
    for width in (50 + 7 * len(name) for name in names):
        is_full = line_width > 0 and line_width + width > _LEGEND_WIDTH
        lines, line_width = lines + is_full, width if is_full else line_width + width
    return 22 * (lines - 1)
