"""Comparing gradients that should be the same: parameter by parameter, example by example."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from geomkit.collection.passes import run_pass
from geomkit.collection.target import Target
from geomkit.errors import GeometryError
from geomkit.gradients.accumulator import add
from geomkit.gradients.arithmetic import inner, zero_gradient
from geomkit.gradients.dense import DenseGradient
from geomkit.gradients.factored import FactoredGradient
from geomkit.gradients.indexed import IndexedGradient
from geomkit.gradients.layer_gradient import LayerGradient
from geomkit.gradients.summed import SumGradient
from geomkit.inputs.batches import Batch
from geomkit.utils.precision import no_autocast

Gradients = Mapping[str, LayerGradient]


@dataclass(frozen=True)
class Difference:
    """How far gradients are from those they should equal.

    Attributes:
        relative: The worst ‖a − b‖ / ‖b‖ of any parameter and example.
        parameter: Where it is worst.
        example: Of which example; ``None`` for the sum over all.
        cosine: The smallest cosine between whole gradients.
        identical: Whether every bit is the same.
    """

    relative: float
    parameter: str
    example: int | None
    cosine: float
    identical: bool


class Comparison:
    """Collects differences, an example at a time; no gradient is kept.

    Args:
        target: The parameters to compare.
        floor: A difference is taken relative to the parameter's own gradient, or to this share of the whole gradient
            if that is larger: what is zero on paper, such as the bias of OPT's keys, which softmax does not feel, is
            rounding noise.
    """

    def __init__(self, target: Target, floor: float) -> None:
        """Start with nothing."""
        self._parameters, self._floor = target.parameters, floor
        self._found: dict[int | None, dict[str, tuple[float, float, float, float]]] = {}
        self._identical = True

    def add(self, example: int | None, found: Gradients, expected: Gradients) -> None:
        """Compare one example, or the sum where that is ``None``; what only one side has, the other has as zero."""
        for name, parameter in self._parameters.items():
            if name in found or name in expected:
                zero = zero_gradient(parameter.shape, parameter.device)
                with torch.no_grad(), no_autocast(parameter.device):
                    self._add(example, name, found.get(name, zero), expected.get(name, zero))

    def _add(self, example: int | None, name: str, found: LayerGradient, expected: LayerGradient) -> None:
        same = identical(found, expected)
        self._identical &= same
        apart = 0.0 if same else add([found, expected.scaled(-1.0)], keep_factors=True).norm
        product = expected.norm**2 if same else inner(found, expected)
        self._found.setdefault(example, {})[name] = (apart, found.norm, expected.norm, product)

    def worst(self) -> Difference:
        """Return the worst of all.

        Raises:
            GeometryError: If nothing was compared.
        """
        if not self._found:
            raise GeometryError("expected gradients to compare, found none; add some first")
        differences, cosines = [], []
        for example, parameters in self._found.items():
            left, right = (math.hypot(*(norms[place] for norms in parameters.values())) for place in (1, 2))
            products = sum(norms[3] for norms in parameters.values())
            cosines.append(min(products / (left * right), 1.0) if left and right else float(left == right))
            for name, (apart, _, norm, _) in parameters.items():
                relative = apart / max(norm, self._floor * right) if apart else 0.0
                differences.append((relative, name, example))
        relative, name, example = max(differences, key=lambda difference: difference[0])
        return Difference(relative, name, example, min(cosines), self._identical)


def identical(a: LayerGradient, b: LayerGradient) -> bool:
    """Tell whether two gradients are the same form of the same numbers."""
    match a, b:
        case (SumGradient(), SumGradient()):
            return len(a.parts) == len(b.parts) and all(map(identical, a.parts, b.parts))
        case (FactoredGradient(), FactoredGradient()):
            return torch.equal(a.left, b.left) and torch.equal(a.right, b.right)
        case (IndexedGradient(), IndexedGradient()):
            return torch.equal(a.indices, b.indices) and torch.equal(a.rows, b.rows)
        case (DenseGradient(), DenseGradient()):
            return torch.equal(a.tensor, b.tensor)
        case _:
            return False


def example_gradients(target: Target, batch: Batch) -> list[dict[str, LayerGradient]]:
    """Collect the gradient of each example's own loss."""
    kept: list[dict[str, LayerGradient]] = [{} for _ in batch.examples]

    def keep(name: str, gradients: Sequence[LayerGradient]) -> None:
        for own, gradient in zip(kept, gradients, strict=True):
            own[name] = gradient

    run_pass(target, batch, reduction="example", samples=keep)
    return kept
