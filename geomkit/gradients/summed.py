"""A sum of gradients in different forms, and the inner product of two forms."""

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
    """A sum of gradients in different forms, stored part by part, e.g. for an embedding that is tied to the head.

    Attributes:
        parts: Gradients of one shape, none of which is a sum.
    """

    parts: tuple[LayerGradient, ...]

    def __post_init__(self) -> None:
        """Check the parts.

        Raises:
            GeometryError: If there is no part, the shapes differ, or a part is a sum.
        """
        shapes = {part.shape for part in self.parts}
        if len(shapes) != 1 or any(isinstance(part, SumGradient) for part in self.parts):
            raise GeometryError(
                f"expected parts of one shape, none itself a sum, found {len(self.parts)} of {sorted(shapes)}; "
                "use geomkit.gradients.accumulator.add"
            )

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Shape of the parameter."""
        return self.parts[0].shape

    @property
    def tokens(self) -> int:  # type: ignore[override]
        """Sum of the parts' numbers of tokens."""
        return sum(part.tokens for part in self.parts)

    @property
    def rank_bound(self) -> int:
        """Upper bound of the rank: the sum of the parts' bounds, at most min(rows, columns)."""
        return min(*self.matrix_shape, sum(part.rank_bound for part in self.parts))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors of all parts."""
        return tuple(chain.from_iterable(part.tensors for part in self.parts))

    def dense(self) -> Tensor:
        """Return the whole tensor."""
        total = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        self.add_to(total, 1.0)
        return total

    def add_to(self, weight: Tensor, scale: float) -> None:
        """Add ``scale`` times the gradient to ``weight`` in place, part by part."""
        for part in self.parts:
            part.add_to(weight, scale)

    def dot(self, weight: Tensor) -> float:
        """Return the inner product with a tensor that has the shape of the parameter: Σ_k ⟨P_k, W⟩."""
        return sum(part.dot(weight) for part in self.parts)

    def scaled(self, scale: float) -> "SumGradient":
        """Return ``scale`` times the gradient."""
        return SumGradient(tuple(part.scaled(scale) for part in self.parts))

    def take(self, rows: Tensor | slice, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return k rows of the matrix, summed over the parts."""
        return reduce(torch.add, (part.take(rows, dtype) for part in self.parts))

    def matmul(self, operand: Tensor) -> Tensor:
        """Return G B = Σ_k P_k B."""
        return reduce(torch.add, (part.matmul(operand) for part in self.parts))

    def rmatmul(self, operand: Tensor) -> Tensor:
        """Return A G = Σ_k A P_k."""
        return reduce(torch.add, (part.rmatmul(operand) for part in self.parts))

    def factors(self) -> Factors | None:
        """Return the concatenated factors of the parts; ``None`` if a part has none, or they would not be thin.

        With P_k = L_kᵀ R_k, the sum is Σ_k P_k = LᵀR, where L stacks all L_k and R stacks all R_k.
        """
        # 1. The rank bounds first, which cost nothing: the one-hot factor of an indexed part may be large.
        if sum(part.rank_bound for part in self.parts) >= min(self.matrix_shape):
            return None
        # 2. The factors of all parts.
        factors = [pair for part in self.parts if (pair := part.factors()) is not None]
        if len(factors) < len(self.parts):
            return None
        left, right = zip(*factors, strict=True)
        return torch.cat(left), torch.cat(right)

    def _squared_norm(self) -> float:
        """Return Σ_k ‖P_k‖² + 2 Σ_{j<k} ⟨P_j, P_k⟩."""
        squares = sum(part.norm**2 for part in self.parts)
        pairs = ((a, b) for index, a in enumerate(self.parts) for b in self.parts[:index])
        return squares + 2 * sum(inner_of_parts(a, b) for a, b in pairs)


def inner_of_parts(a: LayerGradient, b: LayerGradient) -> float:
    """Return ⟨A, B⟩ of two gradients of one shape, of which B may be a sum, accumulated in fp64.

    :func:`geomkit.gradients.arithmetic.inner` also takes sums, and checks the shapes.
    """
    # 1. An indexed gradient needs only its own rows of B: Σ_i ⟨a_i, B[i]⟩. Of two indexed, A is that with fewer rows.
    if isinstance(b, IndexedGradient) and not (isinstance(a, IndexedGradient) and len(a.indices) < len(b.indices)):
        a, b = b, a
    if isinstance(a, IndexedGradient):
        return float((b.take(a.indices) * a.rows).sum())
    # 2. A factored gradient needs a thin product with B: ⟨LᵀR, B⟩ = ⟨LB, R⟩. Of two factored, A has fewer tokens.
    if isinstance(b, FactoredGradient) and not (isinstance(a, FactoredGradient) and a.tokens < b.tokens):
        a, b = b, a
    if isinstance(a, FactoredGradient):
        return float((b.rmatmul(a.left.double()) * a.right).sum())
    # 3. Two dense gradients.
    return a.dot(b.dense())
