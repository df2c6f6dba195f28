"""Texts of figures: short names of parameters and sets, shares in per cent, and escaped tokens."""

from collections.abc import Iterable
from html import escape
from textwrap import shorten, wrap

from geomkit.inputs.parameters import layer_index

OUTSIDE = "–"
"""The column label of parameters that belong to no decoder layer."""


WHOLE_LAYER = "whole layer"
"""The place, as in :func:`place_of`, of the name of a decoder layer."""


def place_of(parameter: str) -> str:
    """Return a parameter's place within its decoder layer, the same in all layers; outside the layers, its name.

    A name that ends with the index is of the whole layer, see :func:`geomkit.inputs.parameters.layer_name`.

    Example:
        >>> place_of("model.layers.11.self_attn.q_proj.weight"), place_of("lm_head.weight")
        ('self_attn.q_proj', 'lm_head')
    """
    name = parameter.removesuffix(".weight")
    index = layer_index(parameter)
    if index is None:
        return name.removeprefix("model.")
    return name.partition(f".{index}.")[2] or WHOLE_LAYER


def column_of(parameter: str) -> str:
    """Return the index of a parameter's decoder layer as a label, :data:`OUTSIDE` for parameters outside the layers.

    Example:
        >>> column_of("model.layers.11.self_attn.q_proj.weight"), column_of("lm_head.weight")
        ('11', '–')
    """
    index = layer_index(parameter)
    return OUTSIDE if index is None else str(index)


_WORDS = (
    ("self_attn.", "attention "),
    ("attn.", "attention "),
    ("self_attention.", "attention "),
    ("mlp.", "MLP "),
    ("lm_head", "head"),
    ("embed_tokens", "embedding"),
    ("layernorm", "norm"),
)
"""Beginnings or parts of the names of modules, and what they are called in figures."""


def place_labels(parameters: Iterable[str]) -> dict[str, str]:
    """Return a short label in words for the place of each parameter; a place keeps its name if two had the same label.

    Example:
        >>> place_labels(["model.layers.0.self_attn.q_proj.weight", "lm_head.weight", "model.norm.weight"])
        {'self_attn.q_proj': 'attention q_proj', 'lm_head': 'head', 'norm': 'final norm'}
    """
    places = list(dict.fromkeys(map(place_of, parameters)))
    labels = [_in_words(place) for place in places]
    return {place: label if labels.count(label) == 1 else place for place, label in zip(places, labels, strict=True)}


def _in_words(place: str) -> str:
    """Return the name of a module with words in place of the abbreviations that most architectures share."""
    if place in {"norm", "ln_f", "final_layernorm"}:
        return "final norm"
    for part, words in _WORDS:
        place = place.replace(part, words) if part == "layernorm" or place.startswith(part) else place
    return place.replace("_", " ") if place.endswith("norm") else place


def column_name(parameter: str) -> str:
    """Return a parameter's decoder layer in words.

    Example:
        >>> column_name("model.layers.11.mlp.up_proj.weight"), column_name("lm_head.weight")
        ('layer 11', 'outside the layers')
    """
    index = layer_index(parameter)
    return "outside the layers" if index is None else f"layer {index}"


def statistic_words(statistic: str) -> str:
    """Return the name of a statistic as text.

    Example:
        >>> statistic_words("stable_rank"), statistic_words("cer10"), statistic_words("rank95")
        ('stable rank', 'CER(10)', 'rank at 95 % of the energy')
    """
    if statistic.startswith("cer"):
        return f"CER({statistic.removeprefix('cer')})"
    if statistic.removeprefix("rank").isdigit():
        return f"rank at {statistic.removeprefix('rank')} % of the energy"
    return statistic.replace("_", " ")


def per_cent(share: float) -> str:
    """Return a share, such as a confidence level, in per cent.

    Example:
        >>> per_cent(0.95), per_cent(0.999)
        ('95 %', '99.9 %')
    """
    return f"{100 * share:.4g} %"


def short(name: str, width: int = 26) -> str:
    """Return a name that fits a title; a long name is cut after a word.

    Example:
        >>> short("benign requests, refused in the model's own words")
        'benign requests, refused…'
    """
    return shorten(name, width, placeholder="…") if " " in name else name if len(name) <= width else f"{name[:width]}…"


def wrapped(name: str, width: int = 20) -> str:
    """Return a name broken into lines that fit beside an axis.

    Example:
        >>> wrapped("benign requests, refused in the model's own words")
        "benign requests,<br>refused in the<br>model's own words"
    """
    return "<br>".join(wrap(name, width)) or name


def escaped(text: str) -> str:
    """Return a text, such as the token ``<|end|>``, so that plotly does not read it as mark-up.

    Example:
        >>> escaped("<|end|>")
        '&lt;|end|&gt;'
    """
    return escape(text, quote=False)


def coloured(text: str, colour: str, *, bold: bool = False) -> str:
    """Return a text, such as a token, in a colour, for the texts that plotly draws.

    Example:
        >>> coloured("<|end|>", "#B2182B")
        '<span style="color:#B2182B">&lt;|end|&gt;</span>'
    """
    shown = f"<b>{escaped(text)}</b>" if bold else escaped(text)
    return f'<span style="color:{colour}">{shown}</span>'
