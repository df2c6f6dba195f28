"""The gradient of one parameter: base class of its forms, and the arithmetic that the forms have in common.

The gradient of a linear layer over T tokens is G = LᵀR, with L of shape (T, rows) and R of shape (T, columns). With few
tokens the two thin factors are far smaller than the matrix; no method except ``dense`` and ``add_to`` forms the matrix.
The forms are :class:`~geomkit.gradients.factored.FactoredGradient`,
:class:`~geomkit.gradients.indexed.IndexedGradient`, :class:`~geomkit.gradients.dense.DenseGradient` and
:class:`~geomkit.gradients.summed.SumGradient`. Operations on two or more gradients are in
:mod:`geomkit.gradients.arithmetic` and :mod:`geomkit.gradients.accumulator`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property, reduce
from math import prod

import torch
from torch import Tensor

from geomkit.utils.precision import no_autocast

_STRIP_ROWS = 4096
"""Number of rows of a matrix that are converted to fp64 at a time, so that no full fp64 copy is made."""

_FEW_ROWS = 64
"""Number of rows up to which all of a symmetric product costs less than half of it does by numpy."""

Factors = tuple[Tensor, Tensor]
"""Thin factors of a matrix G: left (R, rows) and right (R, columns), with G = leftᵀ right."""


class LayerGradient(ABC):
    """The gradient of one parameter, in any form.

    Methods see the gradient as a matrix G: a vector has one column, and experts of shape (E, m, n) have E·m rows.

    Attributes:
        tokens: T, number of token positions that contribute to the gradient.
        shape: Shape of the parameter.
    """

    tokens: int
    shape: tuple[int, ...]

    @abstractmethod
    def dense(self) -> Tensor:
        """Return the gradient as a tensor with the shape of the parameter, in the dtype of the gradient."""

    @abstractmethod
    def add_to(self, weight: Tensor, scale: float) -> None:
        """Add ``scale`` times the gradient to ``weight`` in place."""

    @abstractmethod
    def dot(self, weight: Tensor) -> float:
        """Return the inner product with a tensor that has the shape of the parameter, accumulated in fp64."""

    @abstractmethod
    def scaled(self, scale: float) -> "LayerGradient":
        """Return ``scale`` times the gradient, in the same form."""

    @abstractmethod
    def take(self, rows: Tensor | slice, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return k rows of the matrix G, (k, columns), without forming the other rows."""

    @abstractmethod
    def matmul(self, operand: Tensor) -> Tensor:
        """Return G B, (rows, k), for B of shape (columns, k); fp64 if B is fp64, otherwise fp32."""

    @abstractmethod
    def rmatmul(self, operand: Tensor) -> Tensor:
        """Return A G, (k, columns), for A of shape (k, rows); fp64 if A is fp64, otherwise fp32."""

    @abstractmethod
    def factors(self) -> Factors | None:
        """Return left (R, rows) and right (R, columns) with G = leftᵀ right, or ``None`` without such factors."""

    @property
    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """Tensors that this form stores, fp32 or fp64."""

    @abstractmethod
    def _squared_norm(self) -> float:
        """Return ‖G‖_F², accumulated in fp64."""

    @property
    def device(self) -> torch.device:
        """Device of the stored tensors."""
        return self.tensors[0].device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the stored tensors: fp32, or fp64 for a model in fp64."""
        return reduce(torch.promote_types, (tensor.dtype for tensor in self.tensors))

    @property
    def floats(self) -> int:
        """Number of floating-point numbers that this form stores."""
        return sum(tensor.numel() for tensor in self.tensors)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix G: a vector has one column, experts (E, m, n) have E·m rows."""
        *rows, columns = self.shape if len(self.shape) > 1 else (*self.shape, 1)
        return prod(rows), columns

    @property
    def rank_bound(self) -> int:
        """Upper bound of the rank: min(rows, columns, T), because a gradient is a sum of T matrices of rank one."""
        return min(*self.matrix_shape, self.tokens)

    @cached_property
    def norm(self) -> float:
        """Frobenius norm, accumulated in fp64."""
        return float(max(self._squared_norm(), 0.0) ** 0.5)


def as_matrix(gradient: LayerGradient) -> Tensor:
    """Return the gradient as a dense matrix of shape :attr:`LayerGradient.matrix_shape`."""
    return gradient.dense().reshape(gradient.matrix_shape)


def thin_factors(gradient: LayerGradient) -> Factors | None:
    """Return the factors of a gradient if they have fewer rows than min(rows, columns), otherwise ``None``."""
    factors = gradient.factors()
    return factors if factors is not None and len(factors[0]) < min(gradient.matrix_shape) else None


def row_products(a: Tensor, b: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return A Bᵀ, the (n, m) inner products between the rows of A (n, d) and of B (m, d), multiplied in ``dtype``.

    On a CPU numpy multiplies many rows by themselves, as it computes only half of the symmetric product.
    """
    if a is b and a.device.type == "cpu" and len(a) > _FEW_ROWS:
        rows = a.detach().to(dtype).numpy()
        return torch.from_numpy(rows @ rows.T)
    left = a.to(dtype)
    return plain_matmul(left, (left if a is b else b.to(dtype)).T)


def plain_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Return A B in the dtype of the operands, also inside ``torch.autocast``."""
    with no_autocast(a.device):
        return a @ b


def to_common_dtype(operand: Tensor, *stored: Tensor) -> tuple[Tensor, ...]:
    """Return the stored tensors and then the operand, all as fp64 if the operand is fp64, otherwise as fp32."""
    dtype = torch.float64 if operand.dtype == torch.float64 else torch.float32
    return tuple(tensor.to(dtype) for tensor in (*stored, operand))


def strips(rows: int) -> Iterator[slice]:
    """Return slices that divide the rows of a matrix into strips, which are converted to fp64 one after the other."""
    return (slice(start, min(start + _STRIP_ROWS, rows)) for start in range(0, rows, _STRIP_ROWS))
