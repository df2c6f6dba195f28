"""The gradient of a linear layer: two factors with a row per token."""

from dataclasses import dataclass

import torch
from torch import Tensor

from geomkit.gradients.layer_gradient import (
    Factors,
    LayerGradient,
    plain_matmul,
    row_products,
    strips,
    to_common_dtype,
)
from geomkit.utils.saving import saveable


@saveable
@dataclass(frozen=True, eq=False)
class FactoredGradient(LayerGradient):
    """The gradient G = LᵀR of a linear layer over T tokens.

    Row t of L is the gradient of the loss with respect to the layer's output at token t, row t of R is its input.

    Attributes:
        left: L, (T, rows), fp32 or fp64.
        right: R, (T, columns), fp32 or fp64.
    """

    left: Tensor
    right: Tensor

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        """Rows and columns of the parameter."""
        return self.left.shape[1], self.right.shape[1]

    @property
    def tokens(self) -> int:  # type: ignore[override]
        """T, the number of rows of both factors."""
        return self.left.shape[0]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The two factors: T · (rows + columns) numbers."""
        return self.left, self.right

    def dense(self) -> Tensor:
        """Return the matrix LᵀR."""
        return plain_matmul(self.left.T, self.right)

    def add_to(self, weight: Tensor, scale: float) -> None:
        """Add ``scale`` times the gradient to ``weight`` in place."""
        weight.addmm_(self.left.T.to(weight.dtype), self.right.to(weight.dtype), alpha=scale)

    def dot(self, weight: Tensor) -> float:
        """Return ⟨LᵀR, W⟩ = Σ_t l_tᵀ W r_t = ⟨RWᵀ, L⟩, a strip of rows of W at a time, accumulated in fp64."""
        right = self.right.double()
        pieces = ((weight[strip].double(), self.left[:, strip]) for strip in strips(len(weight)))
        return sum(float(((right @ rows.T) * left).sum()) for rows, left in pieces)

    def scaled(self, scale: float) -> "FactoredGradient":
        """Return ``scale`` times the gradient; the smaller factor is scaled, and the larger is shared, not copied."""
        if self.right.numel() < self.left.numel():
            return FactoredGradient(self.left, self.right * scale)
        return FactoredGradient(self.left * scale, self.right)

    def take(self, rows: Tensor | slice, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return k rows of the matrix, from the same k columns of L."""
        return plain_matmul(self.left[:, rows].to(dtype).T, self.right.to(dtype))

    def matmul(self, operand: Tensor) -> Tensor:
        """Return Lᵀ(RB), two thin products."""
        left, right, operand = to_common_dtype(operand, self.left, self.right)
        return plain_matmul(left.T, plain_matmul(right, operand))

    def rmatmul(self, operand: Tensor) -> Tensor:
        """Return (ALᵀ)R, two thin products."""
        left, right, operand = to_common_dtype(operand, self.left, self.right)
        return plain_matmul(plain_matmul(operand, left.T), right)

    def factors(self) -> Factors:
        """Return L and R."""
        return self.left, self.right

    def _squared_norm(self) -> float:
        """Return Σ_st (LLᵀ)_st (RRᵀ)_st, or with many tokens the squared entries of the matrix, strip by strip."""
        rows, columns = self.shape
        if self.tokens * (rows + columns) >= rows * columns:
            return sum(float(self.take(strip, torch.float32).double().square().sum()) for strip in strips(rows))
        left, right = self.left.double(), self.right.double()
        return float((row_products(left, left) * row_products(right, right)).sum())
