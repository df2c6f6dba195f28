"""Low-rank adapters of PEFT: which parameters are the two factors of one matrix."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

_MORE_THAN_A_PRODUCT = ("use_dora", "use_qalora")


@dataclass(frozen=True, eq=False)
class Adapter:
    """One adapter of one linear layer, which adds s·BA to its weight.

    Attributes:
        first: A, (r, columns).
        second: B, (rows, r).
        scaling: s.
        base: The weight that it is added to, frozen.
    """

    first: nn.Parameter
    second: nn.Parameter
    scaling: float
    base: nn.Parameter


def adapters(model: nn.Module, trained: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, Adapter]]:
    """Yield the adapters whose product is the change of a linear layer's weight, by the name of that weight.

    Others, such as DoRA, which also scales the sum, and those of embeddings and convolutions, are left out.

    Args:
        model: A model with or without adapters.
        trained: The parameters that are trained, by name.
    """
    known = {id(parameter) for parameter in trained.values()}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for module in model.modules():
        found = _adapter(module)
        if found is not None and id(found.second) in known:
            yield names[id(found.base)], found


def _adapter(module: Any) -> Adapter | None:
    if not (hasattr(module, "lora_A") and hasattr(module, "lora_B")):
        return None
    base = module.get_base_layer()
    active = [name for name in module.active_adapters if name in module.lora_A]
    if type(base) is not nn.Linear or len(active) != 1 or not base.weight.is_floating_point():
        return None
    (name,) = active
    if any(_says(getattr(module, flag, None), name) for flag in _MORE_THAN_A_PRODUCT):
        return None
    if name in getattr(module, "lora_variant", {}):  # a variant has a forward of its own
        return None
    first, second = module.lora_A[name], module.lora_B[name]
    if any(type(one) is not nn.Linear or one.bias is not None for one in (first, second)):
        return None
    weights = (first.weight, second.weight, base.weight)
    own, other, frozen = (cast("nn.Parameter", one) for one in weights)
    return Adapter(own, other, float(module.scaling[name]), frozen)


def _says(flag: Any, name: str) -> bool:
    return bool(flag.get(name)) if isinstance(flag, Mapping) else bool(flag)
