"""What all figures share: colours, the template, and how a series gets its look."""

from collections.abc import Iterable, Sequence
from html import escape
from itertools import count
from textwrap import shorten, wrap
from typing import NamedTuple

import plotly.graph_objects as go
import plotly.io

from geomkit.inputs.parameters import layer_index

COLOURS = {
    "safety": "#0072B2",
    "utility": "#D55E00",
    "control": "#8C6BB1",
    "null": "#767676",
    "SFT": "#CC79A7",
    "SPF": "#009E73",
}
"""The fixed colours, from the palette of Okabe and Ito (2008), which colour-blind readers tell apart."""

OUTSIDE = "–"
"""The label of the column of parameters that belong to no decoder layer."""

_LINE = 560
"""Width of a legend's line in a narrow figure, in pixels."""

_OTHERS = ("#444444", "#56B4E9", "#E69F00", "#0072B2", "#D55E00", "#7A5C00")
_DASHES = ("solid", "dash", "dashdot", "longdash", "dot")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x")

_AXIS = {
    "showgrid": True,
    "gridcolor": "#E6E6E6",
    "zeroline": False,
    "linecolor": "#8A8A8A",
    "showline": True,
    "ticks": "outside",
    "tickcolor": "#8A8A8A",
    "ticklen": 4,
    "title": {"standoff": 8, "font": {"size": 13}},
    "automargin": True,
}

TEMPLATE = go.layout.Template(
    layout={
        "font": {"family": "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif", "size": 13},
        "font_color": "#222222",
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "colorway": [*COLOURS.values(), *_OTHERS[:3]],
        "title": {"x": 0, "xref": "container", "xanchor": "left", "y": 1, "yref": "container", "yanchor": "top"},
        "title_font_size": 16,
        "title_pad": {"t": 14, "l": 12},
        "title_subtitle": {"font": {"size": 12, "color": "#555555"}},
        "margin": {"l": 64, "r": 32, "t": 82, "b": 84},
        "height": 420,
        "hoverlabel": {"bgcolor": "white", "bordercolor": "#8A8A8A", "font_size": 12, "align": "left"},
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "font_size": 12},
        "legend_y": 0,
        "legend_yref": "container",
        "legend_yanchor": "bottom",
        "xaxis": _AXIS,
        "yaxis": _AXIS,
    }
)
plotly.io.templates["geomkit"] = TEMPLATE


class Look(NamedTuple):
    """How one series is drawn; dash and symbol tell series apart where colour cannot, as in a grey print."""

    colour: str
    dash: str
    symbol: str


def looks(names: Sequence[str]) -> list[Look]:
    """Give each series its look: the fixed colour where its name has one, otherwise the next free colour."""
    fixed = {name.casefold(): colour for name, colour in COLOURS.items()}
    taken = [fixed[name.casefold()] for name in names if name.casefold() in fixed]
    free = [colour for colour in _OTHERS if colour not in taken] or list(_OTHERS)
    others = [name for name in names if name.casefold() not in fixed]
    drawn = {name: free[place % len(free)] for place, name in enumerate(others)}
    return [
        Look(
            fixed.get(name.casefold()) or drawn[name],
            _DASHES[place % len(_DASHES)],
            _SYMBOLS[place % len(_SYMBOLS)],
        )
        for place, name in enumerate(names)
    ]


def translucent(colour: str, alpha: float) -> str:
    """Return a ``#rrggbb`` colour with an opacity.

    Example:
        >>> translucent("#0072B2", 0.2)
        'rgba(0,114,178,0.2)'
    """
    red, green, blue = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def place_of(parameter: str) -> str:
    """Return a parameter's place within a decoder layer, the same for all layers; outside of them, its own name.

    Example:
        >>> place_of("model.layers.11.self_attn.q_proj.weight"), place_of("lm_head.weight")
        ('self_attn.q_proj', 'lm_head')
    """
    name = parameter.removesuffix(".weight")
    index = layer_index(parameter)
    if index is None:
        return name.removeprefix("model.")
    return name.partition(f".{index}.")[2]


def column_of(parameter: str) -> str:
    """Return the label of a parameter's decoder layer, :data:`OUTSIDE` for parameters of none.

    Example:
        >>> column_of("model.layers.11.self_attn.q_proj.weight"), column_of("lm_head.weight")
        ('11', '–')
    """
    index = layer_index(parameter)
    return OUTSIDE if index is None else str(index)


def columns_of(parameters: Iterable[str]) -> list[str]:
    """Return the labels of the decoder layers of some parameters in order, :data:`OUTSIDE` last where it occurs."""
    names = list(parameters)
    indices = sorted({index for name in names if (index := layer_index(name)) is not None})
    outside = [OUTSIDE] if any(layer_index(name) is None for name in names) else []
    return [*map(str, indices), *outside]


def layer_axis(columns: list[str], most: int = 16) -> dict[str, object]:
    """Return an axis with one category per decoder layer, and at most so many of them written out."""
    text = f"layer ({OUTSIDE}: outside the layers)" if OUTSIDE in columns else "layer"
    labelled = [label for label in columns if label == OUTSIDE or int(label) % (len(columns) // most + 1) == 0]
    order = {"categoryorder": "array", "categoryarray": columns, "tickvals": labelled, "tickangle": 0}
    return {"type": "category", "title": text, **order}


def whole_ticks(values: Iterable[float], most: int = 6) -> list[int]:
    """Return whole numbers among some to write along an axis: all, or as many as stand apart.

    Example:
        >>> whole_ticks([0, 1]), whole_ticks(range(24)), whole_ticks([0, 1, 2, 3, 31])
        ([0, 1], [0, 5, 10, 15, 20], [0, 31])
    """
    places = sorted(set(map(int, values)))
    span = places[-1] - places[0] if places else 0
    step = next(step for power in count() for step in (10**power, 2 * 10**power, 5 * 10**power) if most * step >= span)
    chosen: list[int] = []
    for place in places:
        if not chosen or place - chosen[-1] >= step:
            chosen.append(place)
    return chosen


def per_cent(share: float) -> str:
    """Write a confidence.

    Example:
        >>> per_cent(0.95), per_cent(0.999)
        ('95 %', '99.9 %')
    """
    return f"{100 * share:.4g} %"


def short(name: str, width: int = 26) -> str:
    """Return a name that fits a title, cut after a word where it is long.

    Example:
        >>> short("benign requests, refused in the model's own words")
        'benign requests, refused…'
    """
    return shorten(name, width, placeholder="…") if " " in name else name if len(name) <= width else f"{name[:width]}…"


def wrapped(name: str, width: int = 20) -> str:
    """Return a name in lines that leave room beside an axis.

    Example:
        >>> wrapped("benign requests, refused in the model's own words")
        "benign requests,<br>refused in the<br>model's own words"
    """
    return "<br>".join(wrap(name, width)) or name


def told(text: str) -> str:
    """Return a text that plotly shows as it is: a token such as ``<|end|>`` is no mark-up.

    Example:
        >>> told("<|end|>")
        '&lt;|end|&gt;'
    """
    return escape(text, quote=False)


def legend_room(names: Iterable[str]) -> int:
    """Return the height that a legend takes beyond its first line, in a narrow figure.

    Example:
        >>> legend_room(["safety", "utility"]), legend_room(["a very long name of a set"] * 4)
        (0, 22)
    """
    lines, used = 1, 0
    for width in (50 + 7 * len(name) for name in names):
        full = used > 0 and used + width > _LINE
        lines, used = lines + full, width if full else used + width
    return 22 * (lines - 1)


def title(text: str, subtitle: str = "") -> dict[str, object]:
    """Return a layout title with an optional second line."""
    return {"text": text, "subtitle": {"text": subtitle}} if subtitle else {"text": text}
