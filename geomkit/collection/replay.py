"""The gradients of each example for modules without a closed form, by running the module alone once more.

What comes out is not trusted blindly: ``separation`` compares its sum with autograd's own gradient.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map

from geomkit.collection.closed_form import layout
from geomkit.collection.hooks import Call
from geomkit.gradients.dense import DenseGradient
from geomkit.gradients.layer_gradient import LayerGradient
from geomkit.utils.precision import at_least_fp32


class _Bare(nn.Module):
    """A module without its hooks: the inputs are those behind its pre-hooks, the output the one before its hooks."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.bare = module

    def forward(self, *inputs: Any, **keywords: Any) -> Any:
        return self.bare.forward(*inputs, **keywords)


@dataclass(frozen=True)
class Replay:
    """What running a module again gave.

    Attributes:
        gradients: Each example's gradients by parameter name.
        certain: Whether the examples were told apart beyond doubt.
        elementwise: Whether the module was taken for one that is affine in its weights.
    """

    gradients: Sequence[Mapping[str, LayerGradient]]
    certain: bool
    elementwise: bool = False


def replayed(call: Call, examples: int, length: int) -> Replay | None:
    """Compute each example's gradient of a module's own parameters.

    Args:
        call: A call whose ``deltas`` are known.
        examples: B, the batch size.
        length: L, the padded length.

    Returns:
        The gradients, or ``None`` if the call does not keep the examples apart, or the module cannot be run alone: it
        holds others with parameters of their own, or values that were made of its parameters.
    """
    own = dict(call.module.named_parameters(recurse=False))
    deltas = [delta for delta in call.deltas if delta is not None]
    if not deltas or len(own) != len(list(call.module.parameters())) or _holds_derived(call.module):
        return None
    given = [value for value in tree_leaves((call.inputs, call.keywords)) if isinstance(value, Tensor)]
    layouts = [layout(value, examples, length) for value in (*deltas, *given)]
    if "mixed" in layouts[: len(deltas)] or set(layouts[len(deltas) :]) <= {"mixed"}:
        return None
    if _may_be_elementwise(call, own):
        return Replay(_elementwise(call, own, examples), layouts[0] == "certain", elementwise=True)
    rows = [_one(call, row, examples, length) for row in range(examples)]
    whole = [row for row in rows if row is not None]
    return Replay(whole, "doubtful" not in layouts) if len(whole) == examples else None


def _holds_derived(module: nn.Module) -> bool:
    """Tell whether a module works with values made of its parameters, as pruned ones do, whose graph is gone."""
    return any(isinstance(value, Tensor) and value.grad_fn is not None for value in vars(module).values())


def _may_be_elementwise(call: Call, own: dict[str, nn.Parameter]) -> bool:
    (delta, *more) = call.deltas
    return delta is not None and not more and all(weight.shape == delta.shape[-1:] for weight in own.values())


def _elementwise(call: Call, own: dict[str, nn.Parameter], examples: int) -> list[dict[str, LayerGradient]]:
    """Use that a norm is affine in each weight: with y = a·w + c, the slope a is y at w = 1 less y at w = 0.

    Two evaluations then serve the whole batch.
    """
    zeros = {f"bare.{local}": torch.zeros_like(weight) for local, weight in own.items()}
    bare = _Bare(call.module)
    (delta,) = (at_least_fp32(delta) for delta in call.deltas if delta is not None)
    counts = delta.reshape(examples, -1, delta.shape[-1]).ne(0).any(2).sum(1).tolist()
    found: list[dict[str, LayerGradient]] = [{} for _ in range(examples)]
    with torch.no_grad():
        at_zero = functional_call(bare, zeros, call.inputs, call.keywords)
        for local, name in call.parameters.items():
            one = zeros | {f"bare.{local}": torch.ones_like(own[local])}
            slope = functional_call(bare, one, call.inputs, call.keywords) - at_zero
            sums = (delta * slope).reshape(examples, -1, delta.shape[-1]).sum(1)
            for row, value in enumerate(sums):
                found[row][name] = DenseGradient(value, counts[row])
    return found


def _one(call: Call, row: int, examples: int, length: int) -> dict[str, LayerGradient] | None:
    """Run the module on one example and pull its output gradients back, if its output is as large as they are."""

    def part(value: Any) -> Any:
        if not isinstance(value, Tensor) or layout(value, examples, length) == "mixed":
            return value
        step = len(value) // examples
        return value[row * step : (row + 1) * step]

    inputs, keywords, deltas = tree_map(part, (call.inputs, call.keywords, call.deltas))
    own = dict(call.module.named_parameters(recurse=False))
    with torch.enable_grad():
        outputs = [leaf for leaf in tree_leaves(call.module.forward(*inputs, **keywords)) if isinstance(leaf, Tensor)]
        known = [(output, delta) for output, delta in zip(outputs, deltas, strict=True) if delta is not None]
        if any(output.shape != delta.shape for output, delta in known):
            return None
        results = _pulled_back(_apart(known), [own[local] for local in call.parameters])
    positions = max(int(delta.reshape(-1, delta.shape[-1]).ne(0).any(1).sum()) for _, delta in known)
    return {
        name: DenseGradient(at_least_fp32(result), positions)
        for name, result in zip(call.parameters.values(), results, strict=True)
        if result is not None
    }


_Pairs = Sequence[tuple[Tensor, Tensor]]


def _pulled_back(known: _Pairs, sources: Sequence[Tensor], *, keep: bool = False) -> tuple[Tensor | None, ...]:
    outputs, deltas = zip(*known, strict=True)
    return torch.autograd.grad(outputs, sources, deltas, allow_unused=True, retain_graph=keep)


def _apart(known: _Pairs) -> _Pairs:
    """Take from each output's gradient what reaches it through another output of the same module.

    A router returns logits and the scores it made of them: the gradient of the logits holds that of the scores.
    """
    later: list[tuple[Tensor, Tensor]] = []
    for output, delta in reversed(known):
        through = _pulled_back(later, [output], keep=True)[0] if later else None
        later.append((output, delta if through is None else delta - through))
    return later
