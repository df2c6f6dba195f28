"""Examples as text whose tokens are tinted by the sign and size of what they contribute."""

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from geomkit.attribution import ExampleTokens

_AGAINST = "178,24,43"
_WITH = "33,102,172"
_FULL = 0.95
"""Share of the scored tokens whose tint is not yet the darkest."""


def tinted(heading: str, examples: "Sequence[ExampleTokens]") -> str:
    """Render examples as HTML: red tokens are against safety, blue ones with it; what is not scored has no tint."""
    sizes = np.concatenate([np.abs(example.contributions[example.scored]) for example in examples])
    scale = float(np.quantile(sizes, _FULL)) or 1.0
    key = f"{_span('against safety', _AGAINST, 0.6)} {_span('with safety', _WITH, 0.6)} one example per paragraph"
    shown = "".join(_paragraph(example, scale) for example in examples)
    return f"<div><p><b>{escape(heading)}</b></p><p>{key}, the most conflicting first</p>{shown}</div>"


def _paragraph(example: "ExampleTokens", scale: float) -> str:
    tokens = "".join(
        _token(text, float(value), scale) if scored else f'<span style="color:#767676">{escape(text)}</span>'
        for text, value, scored in zip(example.tokens, example.contributions, example.scored, strict=True)
    )
    return f'<p style="white-space:pre-wrap"><b>{example.total:+.3g}</b> {tokens}</p>'


def _token(text: str, value: float, scale: float) -> str:
    colour = _AGAINST if value < 0 else _WITH
    return _span(text, colour, 0.75 * min(abs(value) / scale, 1.0), f"{value:+.3g}")


def _span(text: str, colour: str, opacity: float, hover: str = "") -> str:
    told = f' title="{escape(hover)}"' if hover else ""
    return f'<span{told} style="background:rgba({colour},{opacity:.2f})">{escape(text)}</span>'
