"""The gradient of an embedding: the rows that were looked up."""

from dataclasses import dataclass

import torch
from torch import Tensor

from geomkit.gradients.layer_gradient import Factors, LayerGradient, plain_matmul, to_common_dtype
from geomkit.utils.saving import saveable


@saveable
@dataclass(frozen=True, eq=False)
class IndexedGradient(LayerGradient):
    """The gradient of an embedding: R rows of a large matrix whose other rows are zero.

    Attributes:
        indices: (R,) distinct row numbers, ascending.
        rows: (R, columns) values of these rows, fp32 or fp64.
        size: Number of rows of the parameter.
        tokens: Number of token positions that looked up a row.
    """

    indices: Tensor
    rows: Tensor
    size: int
    tokens: int

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        """Rows and columns of the parameter."""
        return self.size, self.rows.shape[1]

    @property
    def rank_bound(self) -> int:
        """Upper bound of the rank: min(R, columns)."""
        return min(len(self.indices), self.shape[1])

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The rows that were looked up."""
        return (self.rows,)

    def dense(self) -> Tensor:
        """Return the whole matrix."""
        return self.rows.new_zeros(self.shape).index_copy_(0, self.indices, self.rows)

    def add_to(self, weight: Tensor, scale: float) -> None:
        """Add ``scale`` times the gradient to ``weight`` in place."""
        weight.index_add_(0, self.indices, self.rows.to(weight.dtype), alpha=scale)

    def dot(self, weight: Tensor) -> float:
        """Return the inner product with a tensor that has the shape of the parameter, from R of its rows, in fp64."""
        return float((weight.index_select(0, self.indices).double() * self.rows).sum())

    def scaled(self, scale: float) -> "IndexedGradient":
        """Return ``scale`` times the gradient."""
        return IndexedGradient(self.indices, self.rows * scale, self.size, self.tokens)

    def take(self, rows: Tensor | slice, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return k rows of the matrix: rows that were looked up, and zeros."""
        numbers = torch.arange(self.size, device=self.device)[rows] if isinstance(rows, slice) else rows
        if not len(self.indices):
            return self.rows.new_zeros(len(numbers), self.rows.shape[1], dtype=dtype)
        position = torch.searchsorted(self.indices, numbers).clamp_(max=len(self.indices) - 1)
        looked_up = self.indices[position] == numbers
        return self.rows[position].to(dtype).mul_(looked_up[:, None])

    def matmul(self, operand: Tensor) -> Tensor:
        """Return G B, whose rows are zero where G has no row that was looked up."""
        rows, operand = to_common_dtype(operand, self.rows)
        product = plain_matmul(rows, operand)
        return rows.new_zeros(self.size, operand.shape[1]).index_copy_(0, self.indices, product)

    def rmatmul(self, operand: Tensor) -> Tensor:
        """Return A G, from the columns of A that belong to the rows that were looked up."""
        rows, operand = to_common_dtype(operand, self.rows)
        return plain_matmul(operand[:, self.indices], rows)

    def factors(self) -> Factors:
        """Return a one-hot matrix, (R, rows of the parameter), and the rows that were looked up."""
        one_hot = self.rows.new_zeros(len(self.indices), self.size)
        return one_hot.scatter_(1, self.indices[:, None], 1.0), self.rows

    def _squared_norm(self) -> float:
        return float(self.rows.double().square().sum())


def coalesce(indices: Tensor, rows: Tensor, size: int, tokens: int) -> IndexedGradient:
    """Return an indexed gradient in which rows with the same index are added up.

    Args:
        indices: (T,) row numbers, in any order and with repetitions.
        rows: (T, columns) values.
        size: Number of rows of the parameter.
        tokens: Number of token positions that looked up a row.
    """
    distinct, position = indices.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    summed = rows.new_zeros(len(distinct), rows.shape[1]).index_add_(0, position, rows)
    return IndexedGradient(distinct, summed, size, tokens)
