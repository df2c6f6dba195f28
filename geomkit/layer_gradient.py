"""The gradient of one parameter, in the smallest form that is exact.

For a linear layer and T tokens the gradient is LᵀR with L of shape (T, rows) and R of shape (T, columns). With
few tokens the two thin factors are far smaller than the matrix; :func:`inner` and the methods here never form it.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from geomkit.errors import GeometryError

_STRIP = 4096
"""Rows of a weight that are converted to fp64 at a time: no full copy of a large matrix is ever made."""


class LayerGradient(ABC):
    """The gradient of one parameter, whatever form it is kept in.

    Attributes:
        tokens: T, the number of token positions with a non-zero share in it.
        shape: Shape of the parameter.
    """

    tokens: int
    shape: tuple[int, ...]

    @abstractmethod
    def dense(self) -> Tensor:
        """Return the gradient as a tensor of the parameter's shape, fp32."""

    @abstractmethod
    def add_to(self, weight: Tensor, scale: float) -> None:
        """Add ``scale`` times the gradient to ``weight`` in place."""

    @abstractmethod
    def dot(self, weight: Tensor) -> float:
        """Return the inner product with a tensor of the parameter's shape, accumulated in fp64."""

    @abstractmethod
    def scaled(self, scale: float) -> "LayerGradient":
        """Return ``scale`` times the gradient."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the numbers are."""

    @property
    @abstractmethod
    def floats(self) -> int:
        """How many numbers this form keeps."""

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Rows and columns: a vector counts as one column, experts (E, m, n) as E·m rows."""
        return _matrix_shape(self.shape)

    @property
    def rank_bound(self) -> int:
        """min(rows, columns, T): no gradient of T tokens has a higher rank."""
        return min(*self.matrix_shape, self.tokens)

    @cached_property
    def norm(self) -> float:
        """The Frobenius norm."""
        return float(max(inner(self, self), 0.0) ** 0.5)


@dataclass(frozen=True, eq=False)
class FactoredGradient(LayerGradient):
    """LᵀR, the gradient of a linear layer over T tokens.

    Attributes:
        left: (T, rows) factor, fp32.
        right: (T, columns) factor, fp32.
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
    def device(self) -> torch.device:
        """Where the numbers are."""
        return self.left.device

    @property
    def floats(self) -> int:
        """How many numbers this form keeps: T · (rows + columns)."""
        return self.left.numel() + self.right.numel()

    def dense(self) -> Tensor:
        """Form the matrix."""
        return self.left.T @ self.right

    def add_to(self, weight: Tensor, scale: float) -> None:
        """Add ``scale`` times the gradient to ``weight`` in place."""
        weight.addmm_(self.left.T.to(weight.dtype), self.right.to(weight.dtype), alpha=scale)

    def dot(self, weight: Tensor) -> float:
        """Return ⟨LᵀR, W⟩ = Σ_t l_tᵀ W r_t, two thin products over a few rows of W at a time."""
        right = self.right.double()
        starts = range(0, len(weight), _STRIP)
        strips = ((weight[start : start + _STRIP].double(), self.left[:, start : start + _STRIP]) for start in starts)
        return sum(float(((right @ rows.T) * left).sum()) for rows, left in strips)

    def scaled(self, scale: float) -> "FactoredGradient":
        """Return ``scale`` times the gradient."""
        return FactoredGradient(self.left * scale, self.right)


@dataclass(frozen=True, eq=False)
class IndexedGradient(LayerGradient):
    """The gradient of an embedding: rows of a large matrix that is zero elsewhere.

    Attributes:
        indices: (R,) distinct row numbers, ascending.
        rows: (R, columns) their gradients, fp32.
        size: Number of rows of the parameter.
        tokens: Number of positions that looked a row up.
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
        """No more than the distinct rows that were looked up."""
        return min(len(self.indices), self.shape[1])

    @property
    def device(self) -> torch.device:
        """Where the numbers are."""
        return self.rows.device

    @property
    def floats(self) -> int:
        """How many numbers this form keeps."""
        return self.rows.numel()

    def dense(self) -> Tensor:
        """Form the whole matrix."""
        return self.rows.new_zeros(self.shape).index_copy_(0, self.indices, self.rows)

    def add_to(self, weight: Tensor, scale: float) -> None:
        """Add ``scale`` times the gradient to ``weight`` in place."""
        weight.index_add_(0, self.indices, self.rows.to(weight.dtype), alpha=scale)

    def dot(self, weight: Tensor) -> float:
        """Return the inner product with a tensor of the parameter's shape."""
        return float((weight.index_select(0, self.indices).double() * self.rows).sum())

    def scaled(self, scale: float) -> "IndexedGradient":
        """Return ``scale`` times the gradient."""
        return IndexedGradient(self.indices, self.rows * scale, self.size, self.tokens)


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
    def device(self) -> torch.device:
        """Where the numbers are."""
        return self.tensor.device

    @property
    def floats(self) -> int:
        """How many numbers this form keeps."""
        return self.tensor.numel()

    def dense(self) -> Tensor:
        """Return the tensor."""
        return self.tensor

    def add_to(self, weight: Tensor, scale: float) -> None:
        """Add ``scale`` times the gradient to ``weight`` in place."""
        weight.add_(self.tensor.to(weight.dtype), alpha=scale)

    def dot(self, weight: Tensor) -> float:
        """Return the inner product with a tensor of the same shape."""
        return float((weight.double() * self.tensor).sum())

    def scaled(self, scale: float) -> "DenseGradient":
        """Return ``scale`` times the gradient."""
        return DenseGradient(self.tensor * scale, self.tokens)


def _matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    if len(shape) < 2:
        return int(torch.Size(shape).numel()), 1
    return int(torch.Size(shape[:-1]).numel()), shape[-1]


def as_matrix(gradient: LayerGradient) -> Tensor:
    """Form the gradient as a matrix of :attr:`LayerGradient.matrix_shape`."""
    return gradient.dense().reshape(gradient.matrix_shape)


# --------------------------------------------------------------------------------------------------- algebra


def inner(a: LayerGradient, b: LayerGradient) -> float:
    """Return the Frobenius inner product ⟨A, B⟩, accumulated in fp64.

    Between factored gradients it is Σ (L_a L_bᵀ) ∘ (R_a R_bᵀ), from two T × T products; otherwise one thin product.

    Raises:
        GeometryError: If the two belong to parameters of different shape.
    """
    return float(gram([a], [b])[0, 0])


def gram(rows: Sequence[LayerGradient], columns: Sequence[LayerGradient]) -> Tensor:
    """Return every inner product between two lists of gradients of one parameter.

    Args:
        rows: N gradients.
        columns: M gradients of the same parameter.

    Returns:
        (N, M) inner products, fp64.

    Raises:
        GeometryError: If shapes differ.

    Example:
        >>> a = FactoredGradient(torch.eye(2), torch.eye(2))
        >>> b = DenseGradient(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), tokens=2)
        >>> gram([a], [a, b])
        tensor([[2., 5.]], dtype=torch.float64)
    """
    _check_one_shape([*rows, *columns])
    if _token_grams_are_cheaper(rows, columns):
        return _gram_by_tokens(_factored(rows), _factored(columns))
    if all(isinstance(gradient, IndexedGradient) for gradient in (*rows, *columns)):
        return torch.tensor([[_inner_indexed(a, b) for b in _indexed(columns)] for a in _indexed(rows)]).double()
    flat_rows = torch.stack([gradient.dense().flatten() for gradient in rows]).double()
    flat_columns = torch.stack([gradient.dense().flatten() for gradient in columns]).double()
    return flat_rows @ flat_columns.T


def _check_one_shape(gradients: Sequence[LayerGradient]) -> None:
    shapes = {gradient.shape for gradient in gradients}
    if len(shapes) != 1:
        raise GeometryError(f"expected gradients of one shape, found {sorted(shapes)}; compare the same parameter")


def _factored(gradients: Sequence[LayerGradient]) -> list[FactoredGradient]:
    return [gradient for gradient in gradients if isinstance(gradient, FactoredGradient)]


def _indexed(gradients: Sequence[LayerGradient]) -> list[IndexedGradient]:
    return [gradient for gradient in gradients if isinstance(gradient, IndexedGradient)]


def _token_grams_are_cheaper(rows: Sequence[LayerGradient], columns: Sequence[LayerGradient]) -> bool:
    if len(_factored(rows)) < len(rows) or len(_factored(columns)) < len(columns):
        return False
    height, width = rows[0].matrix_shape
    row_tokens, column_tokens = (sum(gradient.tokens for gradient in side) for side in (rows, columns))
    by_tokens = row_tokens * column_tokens * (height + width)
    by_forming = (row_tokens + column_tokens + len(rows) * len(columns)) * height * width
    return by_tokens < by_forming


def _gram_by_tokens(rows: list[FactoredGradient], columns: list[FactoredGradient]) -> Tensor:
    left = torch.cat([g.left for g in rows]).double() @ torch.cat([g.left for g in columns]).double().T
    right = torch.cat([g.right for g in rows]).double() @ torch.cat([g.right for g in columns]).double().T
    products = left * right
    by_row = _sum_segments(products, [g.tokens for g in rows])
    return _sum_segments(by_row.T, [g.tokens for g in columns]).T


def _sum_segments(values: Tensor, lengths: list[int]) -> Tensor:
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(values.device)
    return values.new_zeros(len(lengths), values.shape[1]).index_add_(0, segment, values)


def _inner_indexed(a: IndexedGradient, b: IndexedGradient) -> float:
    shared, place = torch.cat([a.indices, b.indices]).unique(return_inverse=True)  # type: ignore[no-untyped-call]
    spread_a = a.rows.new_zeros(len(shared), a.rows.shape[1]).index_copy_(0, place[: len(a.indices)], a.rows)
    spread_b = b.rows.new_zeros(len(shared), b.rows.shape[1]).index_copy_(0, place[len(a.indices) :], b.rows)
    return float((spread_a.double() * spread_b).sum())


def add(parts: Sequence[LayerGradient], *, keep_factors: bool = False) -> LayerGradient:
    """Sum gradients of one parameter, in factored form while that is the smaller one.

    Args:
        parts: At least one gradient.
        keep_factors: Keep the factors even where the dense form is smaller; nulls need them.

    Returns:
        Their sum. Mixed forms (a tied embedding and head) become dense.

    Raises:
        GeometryError: If shapes differ.
    """
    _check_one_shape(parts)
    if len(parts) == 1 and (keep_factors or parts[0].floats <= torch.Size(parts[0].shape).numel()):
        return parts[0]
    if len(_factored(parts)) == len(parts) and (
        keep_factors or sum(part.floats for part in parts) <= torch.Size(parts[0].shape).numel()
    ):
        return FactoredGradient(
            torch.cat([part.left for part in _factored(parts)]), torch.cat([part.right for part in _factored(parts)])
        )
    if len(_indexed(parts)) == len(parts):
        return _add_indexed(_indexed(parts))
    total = parts[0].dense().clone()
    for part in parts[1:]:
        part.add_to(total, 1.0)
    return DenseGradient(total, sum(part.tokens for part in parts))


def _add_indexed(parts: list[IndexedGradient]) -> IndexedGradient:
    indices = torch.cat([part.indices for part in parts])
    rows = torch.cat([part.rows for part in parts])
    return coalesce(indices, rows, parts[0].size, sum(part.tokens for part in parts))


def coalesce(indices: Tensor, rows: Tensor, size: int, tokens: int) -> IndexedGradient:
    """Sum rows that share an index.

    Args:
        indices: (T,) row numbers, repeated or not.
        rows: (T, columns) a gradient for each.
        size: Number of rows of the parameter.
        tokens: Number of positions that looked a row up.
    """
    distinct, place = indices.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    summed = rows.new_zeros(len(distinct), rows.shape[1]).index_add_(0, place, rows)
    return IndexedGradient(distinct, summed, size, tokens)
