"""The gradient as a tensor with the shape of the parameter."""

from dataclasses import dataclass

import torch
from torch import Tensor

from geomkit.gradients.layer_gradient import LayerGradient, plain_matmul, strips, to_common_dtype
from geomkit.utils.saving import saveable


@saveable
@dataclass(frozen=True, eq=False)
class DenseGradient(LayerGradient):
    """The gradient as a tensor with the shape of the parameter: for vectors, experts, and sums over many tokens.

    Attributes:
        tensor: The gradient, fp32 or fp64.
        tokens: Number of token positions that contribute to it.
    """

    tensor: Tensor
    tokens: int

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Shape of the parameter."""
        return tuple(self.tensor.shape)

    @property
    def rank_bound(self) -> int:
        """Upper bound of the rank: min(rows, columns, T); for experts min(rows, columns), as a token uses several."""
        token_uses_several_experts = self.tokens and len(self.shape) > 2
        return min(self.matrix_shape) if token_uses_several_experts else min(*self.matrix_shape, self.tokens)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensor."""
        return (self.tensor,)

    def dense(self) -> Tensor:
        """Return the tensor, not a copy."""
        return self.tensor

    def add_to(self, weight: Tensor, scale: float) -> None:
        """Add ``scale`` times the gradient to ``weight`` in place."""
        weight.add_(self.tensor.to(weight.dtype), alpha=scale)

    def dot(self, weight: Tensor) -> float:
        """Return the inner product with a tensor of the same shape, a strip of rows at a time, accumulated in fp64."""
        matrix, other = self._matrix(), weight.reshape(self.matrix_shape)
        return sum(float((matrix[strip].double() * other[strip]).sum()) for strip in strips(len(matrix)))

    def scaled(self, scale: float) -> "DenseGradient":
        """Return ``scale`` times the gradient."""
        return DenseGradient(self.tensor * scale, self.tokens)

    def take(self, rows: Tensor | slice, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return k rows of the matrix."""
        return self._matrix()[rows].to(dtype)

    def matmul(self, operand: Tensor) -> Tensor:
        """Return G B, a strip of rows at a time."""
        (operand,) = to_common_dtype(operand)
        parts = [plain_matmul(self.take(strip, operand.dtype), operand) for strip in strips(self.matrix_shape[0])]
        return torch.cat(parts) if parts else operand.new_zeros(0, operand.shape[1])

    def rmatmul(self, operand: Tensor) -> Tensor:
        """Return A G, a sum over strips of rows of G."""
        (operand,) = to_common_dtype(operand)
        rows, columns = self.matrix_shape
        product = operand.new_zeros(len(operand), columns)
        for strip in strips(rows):
            product.addmm_(operand[:, strip], self.take(strip, operand.dtype))
        return product

    def factors(self) -> None:
        """Return ``None``: a dense gradient has no thin factors."""

    def _matrix(self) -> Tensor:
        return self.tensor.reshape(self.matrix_shape)

    def _squared_norm(self) -> float:
        return self.dot(self.tensor)
