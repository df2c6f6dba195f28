"""Gradients of the single examples for modules without a closed form: the module is run again on each example.

A module f has parameters w, an input x and the output gradient δ = ∂loss/∂f. If f treats the examples of a batch
independently, the gradient of example i is the vector-Jacobian product δ_iᵀ ∂f(x_i; w)/∂w, which autograd computes on
the module alone. Whether f does so is not known: :mod:`geomkit.collection.per_example` compares the sum over the
examples with the gradient that autograd computed for the whole batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map

from geomkit.collection.closed_form import example_order
from geomkit.collection.hooks import Call
from geomkit.gradients.dense import DenseGradient
from geomkit.gradients.layer_gradient import LayerGradient
from geomkit.utils.precision import at_least_fp32


class _WithoutHooks(nn.Module):
    """A module that runs the forward of another module without hooks, as recorded inputs are the inputs of forward."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.inner = module

    def forward(self, *inputs: Any, **keywords: Any) -> Any:
        return self.inner.forward(*inputs, **keywords)


@dataclass(frozen=True)
class Replay:
    """Gradients of a module's parameters, for each example of a batch.

    Attributes:
        gradients: Gradients by parameter, for each example.
        certain: Whether the order of the examples in all tensors is beyond doubt.
        elementwise: Whether the module was assumed to be affine in its weights, see :func:`replayed`.
    """

    gradients: Sequence[Mapping[str, LayerGradient]]
    certain: bool
    elementwise: bool = False


def replayed(call: Call, batch_size: int, length: int) -> Replay | None:
    """Return the gradients of a module's own parameters for each example, by running the module again.

    A module whose parameters are vectors of the size of its features, such as a norm, is assumed to be affine in each
    of them, which takes two runs for the whole batch. Other modules are run once per example.

    Args:
        call: A call with known output gradients (``deltas``).
        batch_size: B.
        length: L, the padded length.

    Returns:
        The gradients; ``None`` if the tensors do not hold the examples one after the other, or the module cannot be run
        alone, because it has submodules with parameters or values that were computed from its parameters.
    """
    # 1. Can the module be run alone?
    own_parameters = dict(call.module.named_parameters(recurse=False))
    deltas = [delta for delta in call.deltas if delta is not None]
    has_submodules = len(own_parameters) != len(list(call.module.parameters()))
    if not deltas or has_submodules or _holds_computed_values(call.module):
        return None
    # 2. Are the examples one after the other, in all output gradients and at least one input?
    inputs = [value for value in tree_leaves((call.inputs, call.keywords)) if isinstance(value, Tensor)]
    orders = [example_order(value, batch_size, length) for value in (*deltas, *inputs)]
    if "mixed" in orders[: len(deltas)] or set(orders[len(deltas) :]) <= {"mixed"}:
        return None
    # 3. The cheapest way that may be right.
    if _may_be_elementwise(call, own_parameters):
        gradients = _elementwise_gradients(call, own_parameters, batch_size)
        return Replay(gradients, orders[0] == "certain", elementwise=True)
    by_example = [_example_gradients(call, row, batch_size, length) for row in range(batch_size)]
    complete = [gradients for gradients in by_example if gradients is not None]
    return Replay(complete, "doubtful" not in orders) if len(complete) == batch_size else None


def _holds_computed_values(module: nn.Module) -> bool:
    """Return whether a module holds values computed from parameters, as pruned modules do, whose graph is freed."""
    return any(isinstance(value, Tensor) and value.grad_fn is not None for value in vars(module).values())


def _may_be_elementwise(call: Call, own_parameters: dict[str, nn.Parameter]) -> bool:
    (delta, *more) = call.deltas
    return (
        delta is not None
        and not more
        and all(parameter.shape == delta.shape[-1:] for parameter in own_parameters.values())
    )


def _elementwise_gradients(
    call: Call, own_parameters: dict[str, nn.Parameter], batch_size: int
) -> list[dict[str, LayerGradient]]:
    """Return the gradients for a module y_t = w ∘ a_t + c_t: Σ_t δ_t ∘ a_t over the positions of each example.

    The slope is a_t = y_t(w = 1) − y_t(w = 0), with the other parameters at zero.
    """
    module = _WithoutHooks(call.module)
    zeros = {f"inner.{local}": torch.zeros_like(parameter) for local, parameter in own_parameters.items()}
    (delta,) = (at_least_fp32(delta) for delta in call.deltas if delta is not None)
    counts = delta.reshape(batch_size, -1, delta.shape[-1]).ne(0).any(2).sum(1).tolist()
    by_example: list[dict[str, LayerGradient]] = [{} for _ in range(batch_size)]
    with torch.no_grad():
        at_zero = functional_call(module, zeros, call.inputs, call.keywords)
        for local, name in call.parameters.items():
            with_one = zeros | {f"inner.{local}": torch.ones_like(own_parameters[local])}
            slope = functional_call(module, with_one, call.inputs, call.keywords) - at_zero
            sums = (delta * slope).reshape(batch_size, -1, delta.shape[-1]).sum(1)
            for row, value in enumerate(sums):
                by_example[row][name] = DenseGradient(value, counts[row])
    return by_example


def _example_gradients(call: Call, row: int, batch_size: int, length: int) -> dict[str, LayerGradient] | None:
    """Return the gradients of one example from a run of the module; ``None`` if an output has another shape than δ."""

    def of_example(value: Any) -> Any:
        if not isinstance(value, Tensor) or example_order(value, batch_size, length) == "mixed":
            return value
        step = len(value) // batch_size
        return value[row * step : (row + 1) * step]

    # 1. The example's inputs and output gradients, and the module's outputs for them.
    inputs, keywords, deltas = tree_map(of_example, (call.inputs, call.keywords, call.deltas))
    own_parameters = dict(call.module.named_parameters(recurse=False))
    with torch.enable_grad():
        outputs = [leaf for leaf in tree_leaves(call.module.forward(*inputs, **keywords)) if isinstance(leaf, Tensor)]
        pairs = [(output, delta) for output, delta in zip(outputs, deltas, strict=True) if delta is not None]
        if any(output.shape != delta.shape for output, delta in pairs):
            return None
        # 2. Σ_k δ_kᵀ ∂y_k/∂w over the outputs k.
        parameters = [own_parameters[local] for local in call.parameters]
        gradients = _vector_jacobian_products(_direct_gradients(pairs), parameters)
    positions = max(int(delta.reshape(-1, delta.shape[-1]).ne(0).any(1).sum()) for _, delta in pairs)
    return {
        name: DenseGradient(at_least_fp32(gradient), positions)
        for name, gradient in zip(call.parameters.values(), gradients, strict=True)
        if gradient is not None
    }


_OutputsAndGradients = Sequence[tuple[Tensor, Tensor]]


def _vector_jacobian_products(
    pairs: _OutputsAndGradients, sources: Sequence[Tensor], *, retain_graph: bool = False
) -> tuple[Tensor | None, ...]:
    outputs, deltas = zip(*pairs, strict=True)
    return torch.autograd.grad(outputs, sources, deltas, allow_unused=True, retain_graph=retain_graph)


def _direct_gradients(pairs: _OutputsAndGradients) -> _OutputsAndGradients:
    """Return the outputs with the part of each output gradient that does not come through a later output.

    A router returns logits and the scores computed from them. The gradient of the logits then includes the gradient
    that comes through the scores, which would be counted twice: δ_k − Σ_{j>k} δ_jᵀ ∂y_j/∂y_k is left.
    """
    later: list[tuple[Tensor, Tensor]] = []
    for output, delta in reversed(pairs):
        through = _vector_jacobian_products(later, [output], retain_graph=True)[0] if later else None
        later.append((output, delta if through is None else delta - through))
    return later
