"""Low-rank adapters of PEFT: finding the two parameters whose product is added to a weight."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

_MORE_THAN_A_PRODUCT = ("use_dora", "use_qalora")
"""Attributes of PEFT's layers that say, for each adapter, whether it computes more than s·BA."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """One adapter of one linear layer, which adds s·BA to the layer's weight.

    Attributes:
        first: A, (r, columns).
        second: B, (rows, r).
        scaling: s.
        base: The frozen weight to which the product is added.
    """

    first: nn.Parameter
    second: nn.Parameter
    scaling: float
    base: nn.Parameter


def adapters(model: nn.Module, trained: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, Adapter]]:
    """Yield the adapters whose product s·BA is the whole change of a linear layer's weight, by the weight's name.

    Other adapters are skipped: DoRA, which also scales the sum, and adapters of embeddings and convolutions.

    Args:
        model: A model with or without adapters.
        trained: The trained parameters, by name.
    """
    trained_ids = {id(parameter) for parameter in trained.values()}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for module in model.modules():
        adapter = _adapter(module)
        if adapter is not None and id(adapter.second) in trained_ids:
            yield names[id(adapter.base)], adapter


def _adapter(module: Any) -> Adapter | None:
    """Return a module's adapter; ``None`` if it has no adapter, or an adapter that computes more than s·BA."""
    if not (hasattr(module, "lora_A") and hasattr(module, "lora_B")):
        return None
    base = module.get_base_layer()
    active = [name for name in module.active_adapters if name in module.lora_A]
    if type(base) is not nn.Linear or len(active) != 1 or not base.weight.is_floating_point():
        return None
    (name,) = active
    if any(_is_set(getattr(module, flag, None), name) for flag in _MORE_THAN_A_PRODUCT):
        return None
    if name in getattr(module, "lora_variant", {}):  # a variant computes its own forward pass
        return None
    first, second = module.lora_A[name], module.lora_B[name]
    if any(type(factor) is not nn.Linear or factor.bias is not None for factor in (first, second)):
        return None
    weights = (first.weight, second.weight, base.weight)
    a, b, frozen = (cast("nn.Parameter", weight) for weight in weights)
    return Adapter(a, b, float(module.scaling[name]), frozen)


def _is_set(flag: Any, name: str) -> bool:
    return bool(flag.get(name)) if isinstance(flag, Mapping) else bool(flag)
