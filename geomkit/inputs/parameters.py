"""Reading a parameter's place in the network out of its name."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, get_args

from torch import nn

from geomkit.errors import CollectionError, GeomkitError

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


@dataclass(frozen=True)
class Selection:
    """What a parameter must satisfy to be chosen: all three conditions.

    Attributes:
        globs: Patterns, one of which its name matches.
        kinds: Kinds of module, one of which it belongs to; any when ``None``.
        indices: Decoder layers, one of which it belongs to; any, and outside the layers too, when ``None``.
    """

    globs: tuple[str, ...] = ("*",)
    kinds: frozenset[Kind] | None = None
    indices: frozenset[int] | None = None

    def matches(self, name: str) -> bool:
        """Tell whether a parameter of this name is chosen."""
        return (
            any(fnmatchcase(name, pattern) for pattern in self.globs)
            and (self.kinds is None or kind_of(name) in self.kinds)
            and (self.indices is None or layer_index(name) in self.indices)
        )

    def __str__(self) -> str:
        """Say the conditions, as they would be written."""
        said = [f"layers={list(self.globs)}"]
        said += [f"kinds={sorted(self.kinds)}"] if self.kinds is not None else []
        said += [f"indices={sorted(self.indices)}"] if self.indices is not None else []
        return ", ".join(said)


Layers = str | int | Sequence[str] | Sequence[int] | Selection
"""A choice of parameters: glob patterns on their names, numbers of decoder layers, or a :class:`Selection`."""


def select(
    names: str | Sequence[str] = "*",
    *,
    kinds: Kind | Collection[Kind] | None = None,
    indices: int | Collection[int] | None = None,
) -> Selection:
    """Return a choice of parameters by name, kind of module and decoder layer, for any argument ``layers=``.

    Args:
        names: Glob pattern, or several, on parameter names, such as ``"*.mlp.*"``.
        kinds: ``"attention"``, ``"mlp"``, ``"head"``, ``"embedding"``, ``"norm"`` or ``"other"``, or several; all kinds
            when left out.
        indices: Number of a decoder layer, or several, such as ``range(4, 8)``; when left out all, and the parameters
            outside the decoder layers too.

    Returns:
        The choice: a parameter belongs to it when it satisfies all three conditions.

    Raises:
        CollectionError: If there is no such kind.

    Example:
        >>> select(kinds="mlp", indices=range(2)).matches("model.layers.1.mlp.up_proj.weight")
        True
    """
    chosen = None if kinds is None else frozenset([kinds] if isinstance(kinds, str) else kinds)
    if unknown := (chosen or frozenset()) - set(get_args(Kind)):
        raise CollectionError(f"expected kinds among {', '.join(get_args(Kind))}, found {sorted(unknown)}")
    return Selection(
        globs=(names,) if isinstance(names, str) else tuple(names),
        kinds=chosen,
        indices=None if indices is None else frozenset([indices] if isinstance(indices, int) else indices),
    )


def as_selection(layers: Layers) -> Selection:
    """Return the choice of parameters that a user gave as ``layers=``.

    Args:
        layers: Glob pattern on parameter names, number of a decoder layer, a list of either, or a :class:`Selection`.

    Raises:
        CollectionError: If it is something else.

    Example:
        >>> str(as_selection("*.mlp.*")), str(as_selection([10, 20]))
        ("layers=['*.mlp.*']", "layers=['*'], indices=[10, 20]")
    """
    if isinstance(layers, Selection):
        return layers
    items = [layers] if isinstance(layers, str | int) else list(layers) if isinstance(layers, Iterable) else []
    names = [item for item in items if isinstance(item, str)]
    numbers = [item for item in items if isinstance(item, int) and not isinstance(item, bool)]
    if items and len(names) == len(items):
        return select(names)
    if items and len(numbers) == len(items):
        return select(indices=numbers)
    raise CollectionError(
        'expected layers= as a pattern like "*.mlp.*", numbers of decoder layers or geomkit.select(…), found '
        f"{layers!r}"
    )


def chosen_parameters(model: nn.Module, chosen: Selection) -> dict[str, str]:
    """Map every name of each chosen trainable parameter (a tied one has two) to the first of its names.

    A tied parameter is chosen when any of its names matches.

    Raises:
        CollectionError: If no trainable parameter matches, or the model lacks a decoder layer asked for.
    """
    named = list(model.named_parameters(remove_duplicate=False))
    numbers = {number for name, _ in named if (number := layer_index(name)) is not None}
    if absent := sorted((chosen.indices or frozenset()) - numbers):
        present = f"{min(numbers)} to {max(numbers)}" if numbers else "none"
        raise CollectionError(f"expected decoder layers among {present}, found {absent}; choose others")
    first: dict[int, str] = {}
    for name, parameter in named:
        first.setdefault(id(parameter), name)
    wanted = {id(parameter) for name, parameter in named if parameter.requires_grad and chosen.matches(name)}
    if not wanted:
        trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        some = ", ".join(trainable[:3]) or "none"
        raise CollectionError(
            f"expected trainable parameters that match {chosen}, found none among {len(trainable)} ({some}, …); "
            "change the choice or unfreeze the model"
        )
    return {name: first[id(parameter)] for name, parameter in named if id(parameter) in wanted}


def refuse_unseen_values(parameters: Mapping[str, nn.Parameter], error: type[GeomkitError]) -> None:
    """Refuse parameters whose values are not whole on this process.

    Args:
        parameters: Parameters by name.
        error: The exception to raise.
    """
    for name, parameter in parameters.items():
        if hasattr(parameter, "device_mesh") or hasattr(parameter, "ds_id") or parameter.numel() == 0:
            raise error(
                f"expected whole weights, found '{name}' sharded over processes, which geomkit cannot see yet; "
                "use DDP or one device"
            )
        if parameter.is_inference():
            raise error(f"expected weights that can be trained, found '{name}' made in inference mode; load it outside")
        if parameter.is_meta:
            raise error(f"expected weights with values, found '{name}' on the meta device; load the model first")


def unwrapped_model(model: nn.Module) -> nn.Module:
    """Return the model inside DDP, DataParallel or ``torch.compile``, whose parameters have the plain names."""
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    inner = model.module if isinstance(model, wrappers) else getattr(model, "_orig_mod", None)
    return unwrapped_model(inner) if isinstance(inner, nn.Module) else model
