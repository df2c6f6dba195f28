"""The gradient of one parameter, in the smallest form that is exact, and the arithmetic that the forms have in common.

For a linear layer and T tokens the gradient is LᵀR with L of shape (T, rows) and R of shape (T, columns). With
few tokens the two thin factors are far smaller than the matrix, and no method here but ``dense`` and ``add_to`` forms
it. The forms are in :mod:`geomkit.gradients`; what takes two gradients or more is in
:mod:`geomkit.gradients.arithmetic`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property, reduce
from math import prod

import torch
from torch import Tensor

from geomkit.utils.precision import no_autocast

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
        """Return the gradient as a tensor of the parameter's shape, in its own type."""

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
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that this form keeps its numbers in, fp32 or fp64."""

    @abstractmethod
    def _squared_norm(self) -> float:
        """Return ‖G‖_F², accumulated in fp64."""

    @property
    def device(self) -> torch.device:
        """Where the numbers are."""
        return self.tensors[0].device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the numbers: fp32, or fp64 for a model in fp64."""
        return reduce(torch.promote_types, (tensor.dtype for tensor in self.tensors))

    @property
    def floats(self) -> int:
        """How many numbers this form keeps."""
        return sum(tensor.numel() for tensor in self.tensors)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Rows and columns: a vector counts as one column, experts (E, m, n) as E·m rows."""
        *rows, columns = self.shape if len(self.shape) > 1 else (*self.shape, 1)
        return prod(rows), columns

    @property
    def rank_bound(self) -> int:
        """min(rows, columns, T): no gradient of T tokens has a higher rank."""
        return min(*self.matrix_shape, self.tokens)

    @cached_property
    def norm(self) -> float:
        """The Frobenius norm, accumulated in fp64."""
        return float(max(self._squared_norm(), 0.0) ** 0.5)


def thin_factors(gradient: LayerGradient) -> Factors | None:
    """Return the gradient's factors if they have fewer rows than the gradient has rows and columns."""
    factors = gradient.factors()
    return factors if factors is not None and len(factors[0]) < min(gradient.matrix_shape) else None


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


def plain_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b in the factors' own type, whatever autocast the caller is under."""
    with no_autocast(a.device):
        return a @ b


def to_common_dtype(operand: Tensor, *own: Tensor) -> tuple[Tensor, ...]:
    """Return a gradient's tensors and an operand, all fp64 if the operand is, else fp32."""
    dtype = torch.float64 if operand.dtype == torch.float64 else torch.float32
    return tuple(tensor.to(dtype) for tensor in (*own, operand))


def strips(rows: int) -> Iterator[slice]:
    """Divide the rows of a matrix into those that are converted at a time."""
    return (slice(start, min(start + _STRIP, rows)) for start in range(0, rows, _STRIP))
