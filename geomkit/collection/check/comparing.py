"""Comparison of gradients that should be equal: parameter by parameter, example by example."""

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
    """Largest difference between gradients and the gradients that they should equal.

    Attributes:
        relative: Largest ‖a − b‖ / ‖b‖ of any parameter and example.
        parameter: Parameter with the largest difference.
        example: Example with the largest difference; ``None`` for the sum over all examples.
        cosine: Smallest cosine, over examples, between the gradients over all parameters.
        identical: Whether all gradients are equal bit for bit.
    """

    relative: float
    parameter: str
    example: int | None
    cosine: float
    identical: bool


class Comparison:
    """Running comparison of gradients, an example at a time; no gradient is stored.

    Args:
        target: The parameters to compare.
        floor: A difference is relative to the norm of the parameter's gradient, or to ``floor`` times the norm over all
            parameters if that product is larger. A gradient may be zero up to rounding, e.g. of the bias of the keys in
            OPT, to which softmax is invariant.
    """

    def __init__(self, target: Target, floor: float) -> None:
        """Start an empty comparison."""
        self._parameters, self._floor = target.parameters, floor
        # By example and parameter: ‖a − b‖, ‖a‖, ‖b‖ and ⟨a, b⟩.
        self._numbers: dict[int | None, dict[str, tuple[float, float, float, float]]] = {}
        self._identical = True

    def add(self, example: int | None, actual: Gradients, expected: Gradients) -> None:
        """Compare the gradients of an example, or of the sum for ``None``; a missing gradient is zero."""
        for name, parameter in self._parameters.items():
            if name in actual or name in expected:
                zero = zero_gradient(parameter.shape, parameter.device)
                with torch.no_grad(), no_autocast(parameter.device):
                    self._add(example, name, actual.get(name, zero), expected.get(name, zero))

    def _add(self, example: int | None, name: str, actual: LayerGradient, expected: LayerGradient) -> None:
        same = identical(actual, expected)
        self._identical &= same
        distance = 0.0 if same else add([actual, expected.scaled(-1.0)], keep_factors=True).norm
        product = expected.norm**2 if same else inner(actual, expected)
        self._numbers.setdefault(example, {})[name] = (distance, actual.norm, expected.norm, product)

    def worst(self) -> Difference:
        """Return the largest difference.

        Raises:
            GeometryError: If no gradients were compared.
        """
        if not self._numbers:
            raise GeometryError("expected gradients to compare, found none; add some first")
        differences, cosines = [], []
        for example, parameters in self._numbers.items():
            # 1. The cosine over all parameters: Σ_p ⟨a_p, b_p⟩ / (‖a‖ ‖b‖).
            _, actual_norms, expected_norms, products = zip(*parameters.values(), strict=True)
            actual_norm, expected_norm = math.hypot(*actual_norms), math.hypot(*expected_norms)
            if actual_norm and expected_norm:
                cosine = min(sum(products) / (actual_norm * expected_norm), 1.0)
            else:  # equal only if both gradients are zero
                cosine = float(actual_norm == expected_norm)
            cosines.append(cosine)
            # 2. The relative difference of each parameter: ‖a_p − b_p‖ / max(‖b_p‖, floor · ‖b‖).
            for name, (distance, _, norm, _) in parameters.items():
                relative = distance / max(norm, self._floor * expected_norm) if distance else 0.0
                differences.append((relative, name, example))
        relative, name, example = max(differences, key=lambda difference: difference[0])
        return Difference(relative, name, example, min(cosines), self._identical)


def identical(a: LayerGradient, b: LayerGradient) -> bool:
    """Return whether two gradients have the same form and are equal bit for bit."""
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
    """Return the gradients of each example's loss, by parameter."""
    by_example: list[dict[str, LayerGradient]] = [{} for _ in batch.examples]

    def store(name: str, gradients: Sequence[LayerGradient]) -> None:
        for of_example, gradient in zip(by_example, gradients, strict=True):
            of_example[name] = gradient

    run_pass(target, batch, reduction="example", samples=store)
    return by_example
