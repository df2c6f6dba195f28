"""What all figures share: colours, the template, and how a series gets its look."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import plotly.graph_objects as go
import plotly.io

from geomkit.names import layer_index

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

_MOST_LABELS = 16

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


def layer_axis(columns: list[str]) -> dict[str, object]:
    """Return an axis with one category per decoder layer."""
    text = f"layer ({OUTSIDE}: outside the layers)" if OUTSIDE in columns else "layer"
    labelled = [label for label in columns if label == OUTSIDE or int(label) % (len(columns) // _MOST_LABELS + 1) == 0]
    order = {"categoryorder": "array", "categoryarray": columns, "tickvals": labelled, "tickangle": 0}
    return {"type": "category", "title": text, **order}


def title(text: str, subtitle: str = "") -> dict[str, object]:
    """Return a layout title with an optional second line."""
    return {"text": text, "subtitle": {"text": subtitle}} if subtitle else {"text": text}
