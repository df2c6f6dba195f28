"""A sum of gradients in different forms, and the inner products between these."""

from dataclasses import dataclass
from functools import reduce
from itertools import chain

import torch
from torch import Tensor

from geomkit.errors import GeometryError
from geomkit.gradients.factored import FactoredGradient
from geomkit.gradients.indexed import IndexedGradient
from geomkit.gradients.layer_gradient import Factors, LayerGradient
from geomkit.utils.saving import saveable


@saveable
@dataclass(frozen=True, eq=False)
class SumGradient(LayerGradient):
    """A sum of gradients in different forms, kept apart: a tied embedding and head, say.

    Attributes:
        parts: The gradients, of one shape, none of them itself a sum.
    """

    parts: tuple[LayerGradient, ...]

    def __post_init__(self) -> None:
        """Check the parts.

        Raises:
            GeometryError: If there is no part, shapes differ, or a part is itself a sum.
        """
        shapes = {part.shape for part in self.parts}
        if len(shapes) != 1 or any(isinstance(part, SumGradient) for part in self.parts):
            raise GeometryError(
                f"expected parts of one shape, none itself a sum, found {len(self.parts)} of {sorted(shapes)}; "
                "use geomkit.gradients.arithmetic.add"
            )

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Shape of the parameter."""
        return self.parts[0].shape

    @property
    def tokens(self) -> int:  # type: ignore[override]
        """The tokens of all parts together."""
        return sum(part.tokens for part in self.parts)

    @property
    def rank_bound(self) -> int:
        """No more than the parts' bounds together."""
        return min(*self.matrix_shape, sum(part.rank_bound for part in self.parts))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The numbers of all parts."""
        return tuple(chain.from_iterable(part.tensors for part in self.parts))

    def dense(self) -> Tensor:
        """Form the whole tensor."""
        total = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        self.add_to(total, 1.0)
        return total

    def add_to(self, weight: Tensor, scale: float) -> None:
        """Add ``scale`` times the gradient to ``weight`` in place."""
        for part in self.parts:
            part.add_to(weight, scale)

    def dot(self, weight: Tensor) -> float:
        """Return the inner product with a tensor of the parameter's shape."""
        return sum(part.dot(weight) for part in self.parts)

    def scaled(self, scale: float) -> "SumGradient":
        """Return ``scale`` times the gradient."""
        return SumGradient(tuple(part.scaled(scale) for part in self.parts))

    def take(self, rows: Tensor | slice, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return some rows of the gradient."""
        return reduce(torch.add, (part.take(rows, dtype) for part in self.parts))

    def matmul(self, operand: Tensor) -> Tensor:
        """Return G @ B, part by part."""
        return reduce(torch.add, (part.matmul(operand) for part in self.parts))

    def rmatmul(self, operand: Tensor) -> Tensor:
        """Return A @ G, part by part."""
        return reduce(torch.add, (part.rmatmul(operand) for part in self.parts))

    def factors(self) -> Factors | None:
        """Return the parts' factors one below the other, where all have some and fewer rows than either side."""
        # The bounds are looked at first: the one-hot factor of a part may be large.
        if sum(part.rank_bound for part in self.parts) >= min(self.matrix_shape):
            return None
        thin = [factors for part in self.parts if (factors := part.factors()) is not None]
        if len(thin) < len(self.parts):
            return None
        left, right = zip(*thin, strict=True)
        return torch.cat(left), torch.cat(right)

    def _squared_norm(self) -> float:
        own = sum(part.norm**2 for part in self.parts)
        pairs = ((a, b) for place, a in enumerate(self.parts) for b in self.parts[:place])
        return own + 2 * sum(product(a, b) for a, b in pairs)


def product(a: LayerGradient, b: LayerGradient) -> float:
    """Return ⟨A, B⟩ of two gradients of one shape that are not sums, accumulated in fp64.

    The thinner of the two is kept thin; :func:`geomkit.gradients.arithmetic.inner` takes any two, and checks their
    shapes.
    """
    if isinstance(b, IndexedGradient) and not (isinstance(a, IndexedGradient) and len(a.indices) < len(b.indices)):
        a, b = b, a
    if isinstance(a, IndexedGradient):
        return float((b.take(a.indices) * a.rows).sum())
    if isinstance(b, FactoredGradient) and not (isinstance(a, FactoredGradient) and a.tokens < b.tokens):
        a, b = b, a
    if isinstance(a, FactoredGradient):
        return float((b.rmatmul(a.left.double()) * a.right).sum())
    return a.dot(b.dense())
