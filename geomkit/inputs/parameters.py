"""Kind and decoder layer of a parameter, read from its name, and the choice of parameters by these."""

import logging
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from numbers import Integral
from typing import Any, Literal, get_args

import torch
from torch import nn

from geomkit.errors import CollectionError, GeomkitError
from geomkit.utils.workers import ALONE, Workers, running_workers

Kind = Literal["attention", "mlp", "embedding", "head", "norm", "other"]
"""Kind of module that a parameter belongs to."""

ALL_PARAMETERS = "all parameters"
"""Name in results of all parameters together, in place of the name of a parameter."""

_LOGGER = logging.getLogger(__name__)

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block|layer)\.(\d+)(?=\.|$)")
_KINDS: tuple[tuple[Kind, re.Pattern[str]], ...] = (
    ("norm", re.compile(r"norm|(?:^|\.)ln_|layernorm|layer_norm")),
    ("attention", re.compile(r"attn|attention")),
    ("mlp", re.compile(r"mlp|feed_forward|ffn|experts|fc1|fc2")),
    ("head", re.compile(r"lm_head|embed_out|output_projection|(?:^|\.)head(?:\.|$)")),
    ("embedding", re.compile(r"embed|(?:^|\.)w[tp]e\b")),
)


def layer_index(parameter: str) -> int | None:
    """Return the index of the decoder layer that a parameter belongs to, or ``None`` outside the decoder layers.

    Example:
        >>> layer_index("model.layers.11.mlp.up_proj.weight"), layer_index("lm_head.weight")
        (11, None)
    """
    match = _LAYER.search(parameter)
    return int(match[1]) if match else None


def layer_name(parameter: str) -> str:
    """Return the name of the decoder layer that a parameter belongs to; outside the decoder layers, its kind.

    Two stacks of layers in one model, such as those of a text and an image part, have the same names.

    Example:
        >>> layer_name("model.layers.11.mlp.up_proj.weight"), layer_name("lm_head.weight")
        ('layers.11', 'head')
    """
    index = layer_index(parameter)
    return kind_of(parameter) if index is None else f"layers.{index}"


def kind_of(parameter: str) -> Kind:
    """Return the kind of module that a parameter belongs to, such as ``"attention"`` or ``"mlp"``.

    Example:
        >>> kind_of("model.layers.0.self_attn.q_proj.weight"), kind_of("model.norm.weight")
        ('attention', 'norm')
    """
    lowered = parameter.lower()
    return next((kind for kind, pattern in _KINDS if pattern.search(lowered)), "other")


@dataclass(frozen=True)
class Selection:
    """A choice of parameters by three conditions, all of which the name of a parameter must satisfy.

    Attributes:
        globs: Glob patterns, of which the name must match at least one.
        kinds: Kinds of module, of which the parameter must have one; all kinds when ``None``.
        indices: Decoder layers, of which the parameter must be in one; when ``None`` all, and also parameters outside
            the decoder layers.
    """

    globs: tuple[str, ...] = ("*",)
    kinds: frozenset[Kind] | None = None
    indices: frozenset[int] | None = None

    def matches(self, name: str) -> bool:
        """Return whether a parameter with this name is chosen."""
        return (
            any(fnmatchcase(name, pattern) for pattern in self.globs)
            and (self.kinds is None or kind_of(name) in self.kinds)
            and (self.indices is None or layer_index(name) in self.indices)
        )

    def __str__(self) -> str:
        """Return the conditions as text."""
        conditions = [f"layers={list(self.globs)}"]
        conditions += [f"kinds={sorted(self.kinds)}"] if self.kinds is not None else []
        conditions += [f"indices={sorted(self.indices)}"] if self.indices is not None else []
        return ", ".join(conditions)


Layers = str | int | Sequence[str] | Sequence[int] | Selection
"""A choice of parameters: glob patterns on their names, numbers of decoder layers, or a :class:`Selection`."""


def select(
    names: str | Sequence[str] = "*",
    *,
    kinds: Kind | Collection[Kind] | None = None,
    indices: int | Collection[int] | None = None,
) -> Selection:
    """Return a choice of parameters by name, kind of module and decoder layer, for an argument ``layers=``.

    Args:
        names: Glob pattern on parameter names such as ``"*.mlp.*"``, or several patterns.
        kinds: ``"attention"``, ``"mlp"``, ``"head"``, ``"embedding"``, ``"norm"`` or ``"other"``, or several; all
            kinds when left out.
        indices: Number of a decoder layer, or several numbers such as ``range(4, 8)``; when left out, all layers and
            the parameters outside the layers.

    Returns:
        The choice of the parameters that satisfy all three conditions.

    Raises:
        CollectionError: If there is no pattern, a kind is unknown, or an index is no whole number.

    Example:
        >>> select(kinds="mlp", indices=range(2)).matches("model.layers.1.mlp.up_proj.weight")
        True
    """
    globs = _items(names)
    if not globs or not all(isinstance(glob, str) for glob in globs):
        raise CollectionError(f'expected patterns on parameter names like "*.mlp.*", found {names!r}; give one or more')
    kind_set = None if kinds is None else frozenset(_items(kinds))
    if unknown := sorted(map(str, (kind_set or frozenset()) - set(get_args(Kind)))):
        raise CollectionError(f"expected kinds among {', '.join(get_args(Kind))}, found {unknown}; give one of these")
    numbers = None if indices is None else _items(indices)
    if numbers is not None and not all(_is_number(number) for number in numbers):
        raise CollectionError(f"expected numbers of decoder layers, found {indices!r}; give e.g. range(4, 8)")
    return Selection(tuple(globs), kind_set, None if numbers is None else frozenset(map(int, numbers)))


def _items(value: object) -> list[Any]:
    """Return one value, or the values of a collection, as a list."""
    return list(value) if isinstance(value, Iterable) and not isinstance(value, str) else [value]


def _is_number(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def as_selection(layers: Layers) -> Selection:
    """Return the argument ``layers=`` of a function as a :class:`Selection`.

    Args:
        layers: Glob pattern on parameter names, number of a decoder layer, a list of patterns or of numbers, or a
            :class:`Selection`.

    Raises:
        CollectionError: If ``layers`` is something else, or an empty list.

    Example:
        >>> str(as_selection("*.mlp.*")), str(as_selection([10, 20]))
        ("layers=['*.mlp.*']", "layers=['*'], indices=[10, 20]")
    """
    if isinstance(layers, Selection):
        return layers
    items = _items(layers)
    if items and all(isinstance(item, str) for item in items):
        return select(items)
    if items and all(_is_number(item) for item in items):
        return select(indices=items)
    raise CollectionError(
        'expected layers= as a pattern like "*.mlp.*", numbers of decoder layers or geomkit.select(…), found '
        f"{layers!r}"
    )


def chosen_parameters(model: nn.Module, selection: Selection) -> dict[str, str]:
    """Return all names of the chosen trainable parameters, each mapped to the first name of its parameter.

    A tied parameter has two names, and is chosen if at least one of them matches. Its gradient is collected under the
    first name.

    Args:
        model: A model; only its trainable parameters are chosen.
        selection: Conditions on names, kinds and decoder layers.

    Raises:
        CollectionError: If no trainable parameter matches, a pattern matches no parameter, or the model lacks one of
            the decoder layers.
    """
    named = list(model.named_parameters(remove_duplicate=False))
    numbers = {number for name, _ in named if (number := layer_index(name)) is not None}
    if absent := sorted((selection.indices or frozenset()) - numbers):
        present = f"{min(numbers)} to {max(numbers)}" if numbers else "none"
        raise CollectionError(f"expected decoder layers among {present}, found {absent}; choose others")
    first_names: dict[int, str] = {}
    for name, parameter in named:
        first_names.setdefault(id(parameter), name)
    chosen = {id(parameter) for name, parameter in named if parameter.requires_grad and selection.matches(name)}
    if not chosen:
        trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        examples = ", ".join(trainable[:3]) or "none"
        raise CollectionError(
            f"expected trainable parameters that match {selection}, found none among {len(trainable)} ({examples}, …); "
            "change the choice or unfreeze the model"
        )
    names = [name for name, _ in named]
    if idle := [glob for glob in selection.globs if not any(fnmatchcase(name, glob) for name in names)]:
        raise CollectionError(
            f"expected patterns that match a parameter each, found {idle}, which match none; correct or drop them"
        )
    return {name: first_names[id(parameter)] for name, parameter in named if id(parameter) in chosen}


def is_sharded(parameter: nn.Parameter) -> bool:
    """Return whether this process holds only a part of a parameter: of FSDP, tensor parallelism or DeepSpeed."""
    return hasattr(parameter, "device_mesh") or hasattr(parameter, "ds_id") or parameter.numel() == 0


def workers_of(model: nn.Module) -> Workers:
    """Return the workers that divide the examples of a call: the processes of this run.

    Processes that hold one model together cannot work on different examples; each of them does the whole call.
    """
    workers = running_workers()
    return ALONE if workers.count > 1 and any(map(is_sharded, model.parameters())) else workers


def refuse_unseen_values(parameters: Mapping[str, nn.Parameter], error: type[GeomkitError]) -> None:
    """Raise an error if the values of a parameter are not complete in this process.

    Args:
        parameters: Parameters by name.
        error: Type of the exception to raise.

    Raises:
        GeomkitError: Of type ``error``, if a parameter is sharded, made in inference mode or on the meta device.
    """
    for name, parameter in parameters.items():
        if is_sharded(parameter):
            raise error(
                f"expected whole weights, found '{name}' sharded over processes, which geomkit cannot see yet; "
                "use DDP or one device"
            )
        if parameter.is_inference():
            raise error(f"expected weights that can be trained, found '{name}' made in inference mode; load it outside")
        if parameter.is_meta:
            raise error(
                f"expected weights with values, found '{name}' on the meta device; load the model, without offloading"
            )


def warn_of_lost_updates(parameters: Mapping[str, nn.Parameter]) -> None:
    """Log a warning if weights that are trained have so few bits that most updates are rounded away.

    A bfloat16 number has 8 bits: an update below 1/512 of a weight leaves it as it was, and AdamW at the usual learning
    rates moves weights by less.

    Args:
        parameters: Parameters by name; those that are not trainable do not count.
    """
    trained = [parameter for parameter in parameters.values() if parameter.requires_grad]
    few = [parameter for parameter in trained if parameter.dtype in {torch.bfloat16, torch.float16}]
    if few:
        numbers = [sum(parameter.numel() for parameter in group) for group in (few, trained)]
        names = ", ".join(sorted({str(parameter.dtype).removeprefix("torch.") for parameter in few}))
        _LOGGER.warning(
            "%.0f%% of the trained weights are %s: the optimizer rounds most small updates away, so they hardly move; "
            'load the model with dtype="float32" (--dtype float32) and compute in bfloat16 with bf16=True, or train '
            "LoRA adapters, which peft keeps in float32",
            100 * numbers[0] / numbers[1], names,
        )  # fmt: skip


def unwrapped_model(model: nn.Module) -> nn.Module:
    """Return the model inside DDP, DataParallel or ``torch.compile``, whose parameter names have no prefix."""
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    inner = model.module if isinstance(model, wrappers) else getattr(model, "_orig_mod", None)
    return unwrapped_model(inner) if isinstance(inner, nn.Module) else model
