"""The gradient of one parameter, in the smallest form that is exact.

For a linear layer and T tokens the gradient is LᵀR with L of shape (T, rows) and R of shape (T, columns). With
few tokens the two thin factors are far smaller than the matrix, and no method here but ``dense`` and ``add_to`` forms
it. What takes two gradients or more is in :mod:`geomkit.algebra`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from geomkit.errors import GeometryError

_STRIP = 4096
"""Rows of a matrix that are converted to fp64 at a time: no full copy of a large one is ever made."""

Factors = tuple[Tensor, Tensor]
"""A thin form of a matrix: left (R, rows) and right (R, columns), with G = leftᵀ right."""


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

    @abstractmethod
    def take(self, rows: Tensor | slice, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return some rows of the gradient as a matrix, (k, columns), without forming the others."""

    @abstractmethod
    def matmul(self, operand: Tensor) -> Tensor:
        """Return G @ B for B of shape (columns, k); fp64 if B is, else fp32."""

    @abstractmethod
    def rmatmul(self, operand: Tensor) -> Tensor:
        """Return A @ G for A of shape (k, rows); fp64 if A is, else fp32."""

    @abstractmethod
    def factors(self) -> Factors | None:
        """Return left (R, rows) and right (R, columns) with G = leftᵀ right, or ``None`` without such a form."""

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
        """The Frobenius norm, accumulated in fp64."""
        return float(max(self._squared_norm(), 0.0) ** 0.5)

    @abstractmethod
    def _squared_norm(self) -> float:
        """Return ‖G‖_F², accumulated in fp64."""


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
        strips = ((weight[strip].double(), self.left[:, strip]) for strip in _strips(len(weight)))
        return sum(float(((right @ rows.T) * left).sum()) for rows, left in strips)

    def scaled(self, scale: float) -> "FactoredGradient":
        """Return ``scale`` times the gradient."""
        return FactoredGradient(self.left * scale, self.right)

    def take(self, rows: Tensor | slice, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return some rows of the gradient, from the same columns of ``left``."""
        return self.left[:, rows].to(dtype).T @ self.right.to(dtype)

    def matmul(self, operand: Tensor) -> Tensor:
        """Return Lᵀ(RB), two thin products."""
        left, right, operand = _in_one_type(operand, self.left, self.right)
        return left.T @ (right @ operand)

    def rmatmul(self, operand: Tensor) -> Tensor:
        """Return (ALᵀ)R, two thin products."""
        left, right, operand = _in_one_type(operand, self.left, self.right)
        return (operand @ left.T) @ right

    def factors(self) -> Factors:
        """Return the two factors."""
        return self.left, self.right

    def _squared_norm(self) -> float:
        """Return Σ (LLᵀ) ∘ (RRᵀ), or with many tokens the sum over strips of the matrix."""
        rows, columns = self.shape
        if self.tokens * (rows + columns) >= rows * columns:
            return sum(float(self.take(strip, torch.float32).double().square().sum()) for strip in _strips(rows))
        left, right = self.left.double(), self.right.double()
        return float((row_products(left, left) * row_products(right, right)).sum())


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

    def take(self, rows: Tensor | slice, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return some rows of the gradient: those that were looked up, and zeros."""
        wanted = torch.arange(self.size, device=self.device)[rows] if isinstance(rows, slice) else rows
        if not len(self.indices):
            return self.rows.new_zeros(len(wanted), self.rows.shape[1], dtype=dtype)
        place = torch.searchsorted(self.indices, wanted).clamp_(max=len(self.indices) - 1)
        found = self.indices[place] == wanted
        return self.rows[place].to(dtype).mul_(found[:, None])

    def matmul(self, operand: Tensor) -> Tensor:
        """Return G @ B, whose rows are zero where nothing was looked up."""
        rows, operand = _in_one_type(operand, self.rows)
        return rows.new_zeros(self.size, operand.shape[1]).index_copy_(0, self.indices, rows @ operand)

    def rmatmul(self, operand: Tensor) -> Tensor:
        """Return A @ G, from the columns of A that were looked up."""
        rows, operand = _in_one_type(operand, self.rows)
        return operand[:, self.indices] @ rows

    def factors(self) -> Factors:
        """Return a one-hot row for each that was looked up, and the rows."""
        hot = self.rows.new_zeros(len(self.indices), self.size)
        return hot.scatter_(1, self.indices[:, None], 1.0), self.rows

    def _squared_norm(self) -> float:
        return float(self.rows.double().square().sum())


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
        own, other = self._matrix(), weight.reshape(self.matrix_shape)
        return sum(float((own[strip].double() * other[strip]).sum()) for strip in _strips(len(own)))

    def scaled(self, scale: float) -> "DenseGradient":
        """Return ``scale`` times the gradient."""
        return DenseGradient(self.tensor * scale, self.tokens)

    def take(self, rows: Tensor | slice, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return some rows of the gradient."""
        return self._matrix()[rows].to(dtype)

    def matmul(self, operand: Tensor) -> Tensor:
        """Return G @ B, a strip of rows at a time."""
        (operand,) = _in_one_type(operand)
        parts = [self.take(strip, operand.dtype) @ operand for strip in _strips(self.matrix_shape[0])]
        return torch.cat(parts) if parts else operand.new_zeros(0, operand.shape[1])

    def rmatmul(self, operand: Tensor) -> Tensor:
        """Return A @ G, summed over strips of rows."""
        (operand,) = _in_one_type(operand)
        rows, columns = self.matrix_shape
        product = operand.new_zeros(len(operand), columns)
        for strip in _strips(rows):
            product.addmm_(operand[:, strip], self.take(strip, operand.dtype))
        return product

    def factors(self) -> None:
        """Return nothing: there is no thin form."""

    def _matrix(self) -> Tensor:
        return self.tensor.reshape(self.matrix_shape)

    def _squared_norm(self) -> float:
        return self.dot(self.tensor)


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
                "use geomkit.algebra.add"
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
    def device(self) -> torch.device:
        """Where the numbers are."""
        return self.parts[0].device

    @property
    def floats(self) -> int:
        """How many numbers this form keeps."""
        return sum(part.floats for part in self.parts)

    def dense(self) -> Tensor:
        """Form the whole tensor."""
        total = torch.zeros(self.shape, device=self.device)
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
        return _total([part.take(rows, dtype) for part in self.parts])

    def matmul(self, operand: Tensor) -> Tensor:
        """Return G @ B, part by part."""
        return _total([part.matmul(operand) for part in self.parts])

    def rmatmul(self, operand: Tensor) -> Tensor:
        """Return A @ G, part by part."""
        return _total([part.rmatmul(operand) for part in self.parts])

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


def thin_factors(gradient: LayerGradient) -> Factors | None:
    """Return the gradient's factors if they have fewer rows than the gradient has rows and columns."""
    factors = gradient.factors()
    return factors if factors is not None and len(factors[0]) < min(gradient.matrix_shape) else None


def product(a: LayerGradient, b: LayerGradient) -> float:
    """Return ⟨A, B⟩ of two gradients of one shape that are not sums, accumulated in fp64.

    The thinner of the two is kept thin; :func:`geomkit.algebra.inner` takes any two, and checks their shapes.
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


def row_products(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner products between the rows of two matrices, fp64.

    On a CPU numpy multiplies: where both are one tensor it computes half of the product, which torch does not, and
    it is several times faster where the rows are few and long.
    """
    if a.device.type != "cpu":
        return a.double() @ b.double().T
    left = a.detach().double().numpy()
    right = left if a is b else b.detach().double().numpy()
    return torch.from_numpy(left @ right.T)


def _in_one_type(operand: Tensor, *own: Tensor) -> tuple[Tensor, ...]:
    """Return a gradient's tensors and an operand, all fp64 if the operand is, else fp32."""
    dtype = torch.float64 if operand.dtype == torch.float64 else torch.float32
    return tuple(tensor.to(dtype) for tensor in (*own, operand))


def _strips(rows: int) -> Iterator[slice]:
    return (slice(start, min(start + _STRIP, rows)) for start in range(0, rows, _STRIP))


def _total(tensors: list[Tensor]) -> Tensor:
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total


def _matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    if len(shape) < 2:
        return int(torch.Size(shape).numel()), 1
    return int(torch.Size(shape[:-1]).numel()), shape[-1]
