"""Low-rank adapters of PEFT: which layers' adapters add a product of two trained matrices to a weight, and which not.

Let the weight of a layer be W₀ + s·BA with W₀ frozen. A step moves it by ΔW = s(ΔB A + B ΔA + ΔB ΔA). Protected as one
block, ⟨ΔW, G⟩ ≤ 0 holds for all of ΔW, where G is the gradient of the weight. Protected factor by factor, both of
s⟨ΔB A, G⟩ ≤ 0 and s⟨B ΔA, G⟩ ≤ 0 hold: to first order in the trained parameters, without the term s⟨ΔB ΔA, G⟩.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from geomkit.collection.hooks import forward_form
from geomkit.spf.weights.blocks import Move, ProductBlock
from geomkit.spf.weights.sharding import is_sharded

_LOGGER = logging.getLogger(__name__)

_PRODUCT_FORWARDS = {
    "peft.tuners.lora.layer.Linear.forward": ("lora_A", "lora_B"),
    "peft.tuners.lora.layer.Embedding.forward": ("lora_embedding_A", "lora_embedding_B"),
}
"""Forward functions of PEFT that add s·BA to a layer's weight, or its transpose, and where the layer stores A and B."""

_MORE_THAN_A_PRODUCT = ("use_dora", "use_qalora")
"""Attributes of PEFT's layers that say, for each adapter, whether it computes more than s·BA; for PEFT below 0.18."""

_WEIGHTS_THEMSELVES = ("trainable_tokens", "ln_tuning")
"""Methods of PEFT whose parameters are rows of a weight or whole weights, so that no product is protected in parts."""


@dataclass(frozen=True, eq=False)
class LowRank:
    """One adapter of a layer.

    Attributes:
        first: A, (r, inputs).
        second: B, (outputs, r).
        scaling: s.
    """

    first: nn.Parameter
    second: nn.Parameter
    scaling: float


@dataclass(frozen=True, eq=False)
class Adapter:
    """The trained adapters of one layer, which add Σ s·BA, or its transpose Σ s·AᵀBᵀ, to the layer's weight.

    Attributes:
        base: The frozen weight to which the products are added.
        terms: The adapters: several where several are active at once.
        transposed: Whether the layer stores its weight as (inputs, outputs): GPT-2's ``Conv1D``, and embeddings.
        moves_second: Whether corrections move B. Embeddings start from A = 0, where A alone can be moved.
    """

    base: nn.Parameter
    terms: tuple[LowRank, ...]
    transposed: bool
    moves_second: bool

    def block(self) -> ProductBlock:
        """Return the block of the sum of products, which shares memory with the adapters' parameters."""
        return ProductBlock(
            [(*self._factors(term), term.scaling) for term in self.terms],
            moves_left=self.moves_second is not self.transposed,
        )

    def add_to_gradients(self, moves: Iterable[Move]) -> None:
        """Add gradients G of the product to ``.grad`` of the trained factors: s·GRᵀ for L, s·LᵀG for R, of W = s·LR."""
        for gradient, amount in moves:
            for term in self.terms:
                left, right = (factor.double() for factor in self._factors(term))
                parts = gradient.matmul(right.T), gradient.rmatmul(left.T)
                parameters = (term.first, term.second) if self.transposed else (term.second, term.first)
                for parameter, part in zip(parameters, parts, strict=True):
                    if parameter.requires_grad:
                        turned = part.T if self.transposed else part
                        make_gradient(parameter).add_((amount * term.scaling * turned).to(parameter.dtype))

    def _factors(self, term: LowRank) -> tuple[Tensor, Tensor]:
        """Return the factors L and R, which share memory with the parameters: B and A, or Aᵀ and Bᵀ."""
        first, second = term.first.detach(), term.second.detach()
        return (first.T, second.T) if self.transposed else (second, first)


@dataclass(frozen=True, eq=False)
class Adapters:
    """The adapted layers of a model.

    Attributes:
        products: The layers whose adapters are protected as products, by the name of the weight.
        by_factor: For each other layer with trained adapters, the reason why each of its parameters is protected alone.
    """

    products: Mapping[str, Adapter]
    by_factor: Mapping[str, str]


def find_adapters(model: nn.Module, trained: Mapping[str, nn.Parameter]) -> Adapters:
    """Return the adapted layers of a model, with those whose adapters add only products to a weight.

    Args:
        model: A model with or without adapters.
        trained: The trained parameters, by name.
    """
    every = list(model.named_parameters(remove_duplicate=False))
    names = {id(parameter): name for name, parameter in reversed(every)}  # the first name of a tied parameter
    uses = Counter(id(parameter) for _, parameter in every)
    trained_ids = {id(parameter) for parameter in trained.values()}
    products, by_factor = {}, {}
    for path, module in model.named_modules():
        if trained_ids.isdisjoint(map(id, _parameters_of_adapters(module))):
            continue
        result = _adapter(module, trained_ids, uses)
        if isinstance(result, Adapter):
            products[names[id(result.base)]] = result
        elif _method(module) not in _WEIGHTS_THEMSELVES:
            by_factor[path] = result
    return Adapters(products, by_factor)


def _parameters_of_adapters(module: Any) -> Iterator[nn.Parameter]:
    """Yield the parameters that PEFT has added to a layer; none for other modules."""
    if not hasattr(module, "get_base_layer"):
        return
    for attribute in getattr(module, "adapter_layer_names", ()):
        stored = getattr(module, attribute, None)
        if isinstance(stored, nn.Module):
            yield from stored.parameters()
        elif isinstance(stored, nn.Parameter):
            yield stored


def _adapter(module: Any, trained: set[int], uses: Mapping[int, int]) -> Adapter | str:
    """Return a layer's trained adapters as products, or the reason why they are more than products.

    Args:
        module: The layer.
        trained: The trained parameters, by ``id``.
        uses: Number of the model's names for each parameter, by ``id``.
    """
    forward = type(module).forward
    places = _PRODUCT_FORWARDS.get(f"{forward.__module__}.{forward.__qualname__}")
    if places is None:
        return f"{_method(module)}.{type(module).__name__} adds no product of two matrices that geomkit knows"
    # 1. The forward pass is y = (W₀ + Σ s·BA) x. X-LoRA replaces it; accelerate's hooks, with their own mark, do not.
    if "forward" in vars(module) and not hasattr(module, "_hf_hook"):
        return "its forward pass is replaced"
    firsts, seconds = (getattr(module, place) for place in places)
    active = [name for name in module.active_adapters if name in firsts]
    if more := [reason for name in active if (reason := _more_than_a_product(module, name))]:
        return more[0]
    # 2. The gradient of W₀ is the gradient of the sum: both are used in one place, with the same inputs.
    base = module.get_base_layer()
    if reason := _unlike_the_sum(module, base, trained, uses):
        return reason
    # 3. The parameters of the adapters that are trained; a frozen adapter is a constant, as W₀ is.
    pairs = [(_weight(firsts[name]), _weight(seconds[name]), float(module.scaling[name])) for name in active]
    terms = tuple(LowRank(*pair) for pair in pairs if not trained.isdisjoint(map(id, pair[:2])))
    if any(uses[id(factor)] > 1 for term in terms for factor in (term.first, term.second)):
        return "its factors are shared with another layer"
    # 4. The factor that corrections move: the one that starts from zero, unless it is frozen.
    form = forward_form(base)
    lookup = form in {"lookup", "scaled lookup"}
    if lookup and base.padding_idx is not None and any(term.first[:, base.padding_idx].any() for term in terms):
        return "its A is not zero at the padding token, whose gradient torch leaves out"
    moves_second = not lookup
    if not _all_trained(terms, trained, second=moves_second):
        moves_second = not moves_second
        if not _all_trained(terms, trained, second=moves_second):
            return "its adapters train different factors"
    return Adapter(base.weight, terms, transposed=form != "linear", moves_second=moves_second) if terms else "unused"


def _more_than_a_product(module: Any, name: str) -> str:
    """Return why an adapter computes more than s·BA; an empty string if it does not."""
    variant = getattr(module, "lora_variant", {}).get(name)
    if variant is not None:
        return f"{type(variant).__name__} computes more than s·BA"
    flags = {flag: getattr(module, flag, None) for flag in _MORE_THAN_A_PRODUCT}
    return next((f"{flag} computes more than s·BA" for flag, value in flags.items() if _is_set(value, name)), "")


def _unlike_the_sum(module: Any, base: Any, trained: set[int], uses: Mapping[int, int]) -> str:
    """Return why the gradient of a layer's weight is not the gradient of the sum of weight and products, or ``""``."""
    if isinstance(base, NonDynamicallyQuantizableLinear):
        return "torch's MultiheadAttention computes with its weight in its own way"
    if forward_form(base) is None:
        return f"the gradient of {type(base).__name__} has no closed form"
    weight = base.weight
    if not weight.is_floating_point() or not (type(weight) is nn.Parameter or is_sharded(weight)):
        return "its weight is quantised"
    if module.merged or module.disable_adapters:
        return "its adapters are merged or disabled"
    if uses[id(weight)] > 1:
        return "its weight is tied to another layer's, which the adapter does not change"
    return "its weight is trained as well" if id(weight) in trained else ""


def _all_trained(terms: Sequence[LowRank], trained: set[int], *, second: bool) -> bool:
    return all(id(term.second if second else term.first) in trained for term in terms)


def _weight(factor: Any) -> nn.Parameter:
    return cast("nn.Parameter", factor if isinstance(factor, nn.Parameter) else factor.weight)


def _method(module: Any) -> str:
    """Return the name of PEFT's method that a layer belongs to, such as ``"lora"``."""
    return type(module).__module__.removeprefix("peft.tuners.").split(".")[0]


def _is_set(flag: Any, name: str) -> bool:
    return bool(flag.get(name)) if isinstance(flag, Mapping) else bool(flag)


def make_gradient(parameter: nn.Parameter) -> Tensor:
    """Return a parameter's gradient, created as zeros if it has none."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def warn_of_factors(by_factor: Mapping[str, str]) -> None:
    """Log a warning that names the adapted layers that are protected factor by factor, and says what that means.

    Args:
        by_factor: The reason by layer.
    """
    for reason in dict.fromkeys(by_factor.values()):
        layers = [layer for layer, why in by_factor.items() if why == reason]
        _LOGGER.warning(
            "protected factor by factor: the adapters of %s%s (%d in all), since %s; the promise there is about the "
            "adapters' own parameters, to first order, and leaves out products of their changes, such as ΔB ΔA",
            ", ".join(layers[:3]), ", …" if len(layers) > 3 else "", len(layers), reason,
        )  # fmt: skip
