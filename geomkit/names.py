"""Reading a parameter's place in the network out of its name."""

import re
from typing import Literal

Kind = Literal["attention", "mlp", "embedding", "head", "norm", "other"]

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block|layer)\.(\d+)(?=\.|$)")
_KINDS: tuple[tuple[Kind, re.Pattern[str]], ...] = (
    ("norm", re.compile(r"norm|(?:^|\.)ln_|layernorm|layer_norm")),
    ("attention", re.compile(r"attn|attention")),
    ("mlp", re.compile(r"mlp|feed_forward|ffn|experts|fc1|fc2")),
    ("head", re.compile(r"lm_head|embed_out|output_projection")),
    ("embedding", re.compile(r"embed|(?:^|\.)w[tp]e\b")),
)


def layer_index(parameter: str) -> int | None:
    """Return the index of the decoder layer a parameter belongs to, or ``None`` outside the layers.

    Example:
        >>> layer_index("model.layers.11.mlp.up_proj.weight"), layer_index("lm_head.weight")
        (11, None)
    """
    match = _LAYER.search(parameter)
    return int(match[1]) if match else None


def kind_of(parameter: str) -> Kind:
    """Return the kind of module a parameter belongs to.

    Example:
        >>> kind_of("model.layers.0.self_attn.q_proj.weight"), kind_of("model.norm.weight")
        ('attention', 'norm')
    """
    lowered = parameter.lower()
    return next((kind for kind, pattern in _KINDS if pattern.search(lowered)), "other")
