"""How a series gets its colour, dash and symbol, and how titles and legends get the room that they need."""

from collections.abc import Iterable, Sequence
from textwrap import wrap
from typing import NamedTuple

import plotly.graph_objects as go
from plotly.basedatatypes import BaseTraceType

from geomkit.plots.themes import palette

_LEGEND_WIDTH = 420
"""Width of one line of the legend in a narrow figure, in pixels."""

_TITLE_WIDTH, _SUBTITLE_WIDTH = 41, 54
"""The most characters of a line of the title and of the subtitle: these fit into a figure of 360 pixels."""

_DASHES = ("solid", "dash", "dashdot", "longdash", "dot")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x")


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
    colours = palette()
    fixed = {name.casefold(): colour for name, colour in colours.series.items()}
    named_colours = [fixed[name.casefold()] for name in names if name.casefold() in fixed]
    free = [colour for colour in colours.others if colour not in named_colours] or list(colours.others)
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
    """Return a layout title with an optional subtitle, both broken into lines that fit a narrow figure.

    Example:
        >>> title("Cosine between safety and utility gradient, by parameter")["text"]
        'Cosine between safety and utility<br>gradient, by parameter'
    """
    heading = broken(text, _TITLE_WIDTH)
    return {"text": heading, "subtitle": {"text": broken(subtitle, _SUBTITLE_WIDTH)}} if subtitle else {"text": heading}


def broken(text: str, width: int) -> str:
    """Return a text with breaks between lines of at most ``width`` characters."""
    return "<br>".join(wrap(text, width, break_long_words=False, break_on_hyphens=False)) or text


def colour_bar(text: str, **options: object) -> dict[str, object]:
    """Return a colour bar with its title above it, where it meets neither ticks nor the edge of the figure."""
    title_above = {"text": broken(text, 12), "side": "top", "font": {"size": 12}}
    return {"title": title_above, "thickness": 12, "tickfont": {"size": 11}, "xpad": 6, **options}


def legend_room(names: Iterable[str]) -> int:
    """Return the height in pixels that a legend needs beyond its first line, in a narrow figure.

    Example:
        >>> legend_room(["safety", "utility"]), legend_room(["a very long name of a set"] * 4)
        (0, 66)
    """
    lines, line_width = 1, 0
    for width in (50 + 7 * len(name) for name in names):
        is_full = line_width > 0 and line_width + width > _LEGEND_WIDTH
        lines, line_width = lines + is_full, width if is_full else line_width + width
    return 22 * (lines - 1)


def fitted(figure: go.Figure, inner: float, *, panel_titles: int = 0) -> go.Figure:
    """Return a figure after giving it the height for its panels, its title and subtitle, and its legend.

    Args:
        figure: The figure.
        inner: Height from the top of the highest panel to the bottom of the lowest, in pixels.
        panel_titles: Number of lines of the titles above the highest panels.
    """
    heading = figure.layout.title
    title_lines, subtitle_lines = (_lines(text) for text in (heading.text, heading.subtitle.text))
    # plotly places a subtitle of one line lower than one of several.
    top = 24 + 22 * title_lines + 17 * subtitle_lines + 14 * (subtitle_lines == 1) + 20 * panel_titles
    entries = [trace.name for trace in figure.data if _is_in_legend(trace)]
    is_shown = figure.layout.showlegend or (figure.layout.showlegend is None and len(entries) > 1)
    bottom = 56 + (34 + legend_room(entries) if is_shown else 0)
    if title_lines > 1:  # plotly places the last line, not the first
        figure.update_layout(title_pad_t=14 + 10 * (title_lines - 1))
    figure.update_layout(margin={"t": top, "b": bottom}, height=round(inner) + top + bottom)
    return figure


def _lines(text: str | None) -> int:
    return text.count("<br>") + 1 if text else 0


def _is_in_legend(trace: BaseTraceType) -> bool:
    is_shown = trace.showlegend is not False and trace.visible is not False
    return bool(trace.name) and is_shown and not isinstance(trace, go.Heatmap)
