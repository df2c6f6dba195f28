"""The gradient as a tensor of the parameter's shape."""

from dataclasses import dataclass

import torch
from torch import Tensor

from geomkit.gradients.layer_gradient import LayerGradient, plain_matmul, strips, to_common_dtype
from geomkit.utils.saving import saveable


@saveable
@dataclass(frozen=True, eq=False)
class DenseGradient(LayerGradient):
    """The gradient as a tensor of the parameter's own shape: vectors, experts, and sums over many tokens.

    Attributes:
        tensor: The gradient, fp32.
        tokens: Number of token positions it sums over.
    """

    tensor: Tensor
    tokens: int

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Shape of the parameter."""
        return tuple(self.tensor.shape)

    @property
    def rank_bound(self) -> int:
        """min(rows, columns, T); of experts min(rows, columns), as a token goes to several."""
        several = self.tokens and len(self.shape) > 2
        return min(self.matrix_shape) if several else min(*self.matrix_shape, self.tokens)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensor."""
        return (self.tensor,)

    def dense(self) -> Tensor:
        """Return the tensor."""
        return self.tensor

    def add_to(self, weight: Tensor, scale: float) -> None:
        """Add ``scale`` times the gradient to ``weight`` in place."""
        weight.add_(self.tensor.to(weight.dtype), alpha=scale)

    def dot(self, weight: Tensor) -> float:
        """Return the inner product with a tensor of the same shape."""
        own, other = self._matrix(), weight.reshape(self.matrix_shape)
        return sum(float((own[strip].double() * other[strip]).sum()) for strip in strips(len(own)))

    def scaled(self, scale: float) -> "DenseGradient":
        """Return ``scale`` times the gradient."""
        return DenseGradient(self.tensor * scale, self.tokens)

    def take(self, rows: Tensor | slice, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return some rows of the gradient."""
        return self._matrix()[rows].to(dtype)

    def matmul(self, operand: Tensor) -> Tensor:
        """Return G @ B, a strip of rows at a time."""
        (operand,) = to_common_dtype(operand)
        parts = [plain_matmul(self.take(strip, operand.dtype), operand) for strip in strips(self.matrix_shape[0])]
        return torch.cat(parts) if parts else operand.new_zeros(0, operand.shape[1])

    def rmatmul(self, operand: Tensor) -> Tensor:
        """Return A @ G, summed over strips of rows."""
        (operand,) = to_common_dtype(operand)
        rows, columns = self.matrix_shape
        product = operand.new_zeros(len(operand), columns)
        for strip in strips(rows):
            product.addmm_(operand[:, strip], self.take(strip, operand.dtype))
        return product

    def factors(self) -> None:
        """Return nothing: there is no thin form."""

    def _matrix(self) -> Tensor:
        return self.tensor.reshape(self.matrix_shape)

    def _squared_norm(self) -> float:
        return self.dot(self.tensor)
