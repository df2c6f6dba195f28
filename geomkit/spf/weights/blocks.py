"""Blocks of weights that a step is read from and corrected in: a tensor, a shard of one, or a product of two."""

from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor

from geomkit.gradients.dense import DenseGradient
from geomkit.gradients.factored import FactoredGradient
from geomkit.gradients.indexed import IndexedGradient
from geomkit.gradients.layer_gradient import LayerGradient
from geomkit.gradients.summed import SumGradient
from geomkit.utils.precision import at_least_fp32

Move = tuple[LayerGradient, float]
"""A gradient and how much of it is added."""


class Block(ABC):
    """One matrix W that training moves, whatever it is kept in; a vector is a matrix of one column.

    Attributes:
        rows: Which rows of W this process holds; ``None`` for all.
        free: Whether W moves along any gradient, rather than along a part of it.
        is_used: Whether W is what the model computes with: all of a parameter, in as many bits.
    """

    rows: slice | None = None
    free: bool = True
    is_used: bool = False

    @abstractmethod
    def times(self, right: Tensor) -> Tensor:
        """Return W @ B for B of shape (columns, k): (rows held, k)."""

    @abstractmethod
    def left_times(self, left: Tensor) -> Tensor:
        """Return A @ W for A of shape (k, rows), summed over the rows held."""

    @abstractmethod
    def dot(self, gradient: LayerGradient) -> float:
        """Return ⟨W, G⟩, summed over the rows held, in fp64."""

    @abstractmethod
    def apply(self, moves: Iterable[Move]) -> None:
        """Add gradients to W, or as much of them as it can move along."""

    @abstractmethod
    def reachable(self, gradient: LayerGradient) -> LayerGradient:
        """Return the part of a gradient that :meth:`apply` would add."""

    @property
    @abstractmethod
    def eps(self) -> float:
        """The relative rounding of the numbers that W is kept in."""


class TensorBlock(Block):
    """A tensor that holds W, or −W: the weights themselves, or a utility gradient whose step is its negative.

    Args:
        tensor: Where W is kept. Moves are made in place, in fp32 at least, and rounded once.
        scale: 1, or −1.
        rows: Which rows of the whole matrix it holds; ``None`` for all.
        master: Keep W in fp32 beside a tensor of fewer bits, of which that becomes the rounded value.
    """

    def __init__(self, tensor: Tensor, *, scale: float = 1.0, rows: slice | None = None, master: bool = False) -> None:
        """Start from the tensor as it is."""
        self._tensor = tensor
        self._scale = scale
        self.rows = rows
        low = torch.finfo(tensor.dtype).bits < 32
        self.master = tensor.float() if master and low else None
        self.is_used = rows is None and scale == 1.0 and self.master is None

    @property
    def _weight(self) -> Tensor:
        return self._tensor if self.master is None else self.master

    @property
    def _matrix(self) -> Tensor:
        weight = self._weight
        columns = weight.shape[-1] if weight.ndim > 1 else 1
        return at_least_fp32(weight.reshape(-1, columns))

    def times(self, right: Tensor) -> Tensor:
        """Return W @ B in fp32, or in fp64 if W or B is."""
        matrix = self._matrix
        dtype = torch.promote_types(matrix.dtype, right.dtype)
        # The product's columns are what is looked at one by one: each is kept in one piece.
        product = (right.to(dtype).T @ matrix.to(dtype).T).T
        return product if self._scale == 1.0 else self._scale * product

    def left_times(self, left: Tensor) -> Tensor:
        """Return A @ W."""
        matrix = self._matrix
        dtype = torch.promote_types(matrix.dtype, left.dtype)
        held = left if self.rows is None else left[:, self.rows]
        product = held.to(dtype) @ matrix.to(dtype)
        return product if self._scale == 1.0 else self._scale * product

    def dot(self, gradient: LayerGradient) -> float:
        """Return ⟨W, G⟩."""
        return self._scale * restricted(gradient, self.rows).dot(self._weight)

    def apply(self, moves: Iterable[Move]) -> None:
        """Add gradients to W."""
        low = torch.finfo(self._weight.dtype).bits < 32
        work = self._weight.float() if low else self._weight
        for gradient, amount in moves:
            restricted(gradient, self.rows).add_to(work, self._scale * amount)
        if low:
            self._weight.copy_(work)

    def reachable(self, gradient: LayerGradient) -> LayerGradient:
        """Return the gradient: a tensor moves anywhere."""
        return gradient

    @property
    def eps(self) -> float:
        """The relative rounding of the numbers that W is kept in, or of bases and factors, which are fp32 at best."""
        return max(torch.finfo(self._weight.dtype).eps, torch.finfo(torch.float32).eps)

    def settle(self) -> None:
        """Add to the master what the optimizer has added to its rounded value."""
        if self.master is not None:
            self.master += self._tensor.float() - self.master.to(self._tensor.dtype).float()

    def release(self) -> None:
        """Round the master into the parameter."""
        if self.master is not None:
            self._tensor.copy_(self.master)


class ProductBlock(Block):
    """W = s·BA, the weights that a low-rank adapter adds; moved through B alone, in which W is linear.

    For a given A the rows of W lie in the row space of A, so of a gradient G only G P can be added, with
    P = Aᵀ(AAᵀ)⁻¹A, and B moves by G Aᵀ(AAᵀ)⁻¹ / s.

    Args:
        first: A, (r, columns).
        second: B, (rows, r).
        scaling: s.
    """

    free = False

    def __init__(self, first: Tensor, second: Tensor, scaling: float) -> None:
        """Keep the two factors."""
        self._first, self._second, self._scaling = first, second, scaling

    def times(self, right: Tensor) -> Tensor:
        """Return s·B(A right), in fp64: the product is thin."""
        return self._scaling * (self._second.double() @ (self._first.double() @ right.double()))

    def left_times(self, left: Tensor) -> Tensor:
        """Return s·(left B)A."""
        return self._scaling * ((left.double() @ self._second.double()) @ self._first.double())

    def dot(self, gradient: LayerGradient) -> float:
        """Return ⟨s·BA, G⟩ = s·⟨B, GAᵀ⟩."""
        return self._scaling * float((gradient.matmul(self._first.double().T) * self._second.double()).sum())

    def apply(self, moves: Iterable[Move]) -> None:
        """Add the reachable part of gradients to W."""
        inverse = self._inverse()
        moved = self._second.double()
        for gradient, amount in moves:
            moved = moved + amount / self._scaling * gradient.matmul(inverse)
        self._second.copy_(moved)

    def reachable(self, gradient: LayerGradient) -> LayerGradient:
        """Return G P in the r factors that it has."""
        left = gradient.matmul(self._inverse()).T
        return FactoredGradient(left.float(), self._first.float())

    def _inverse(self) -> Tensor:
        """Return Aᵀ(AAᵀ)⁻¹, (columns, r)."""
        inverse: Tensor = torch.linalg.pinv(self._first.double())
        return inverse

    @property
    def eps(self) -> float:
        """The relative rounding of the factors; a product has that of both."""
        kept = (self._first.dtype, self._second.dtype, torch.float32)
        return 2 * max(torch.finfo(dtype).eps for dtype in kept)


def restricted(gradient: LayerGradient, rows: slice | None) -> LayerGradient:
    """Return some rows of a gradient.

    Args:
        gradient: The gradient of the whole parameter.
        rows: Consecutive rows of the matrix that it is; all for ``None``.
    """
    if rows is None:
        return gradient
    if isinstance(gradient, FactoredGradient):
        return FactoredGradient(gradient.left[:, rows], gradient.right)
    if isinstance(gradient, IndexedGradient):
        held = (gradient.indices >= rows.start) & (gradient.indices < rows.stop)
        size = rows.stop - rows.start
        return IndexedGradient(gradient.indices[held] - rows.start, gradient.rows[held], size, gradient.tokens)
    if isinstance(gradient, SumGradient):
        return SumGradient(tuple(restricted(part, rows) for part in gradient.parts))
    whole = gradient.dense()
    each = gradient.matrix_shape[0] // max(len(whole), 1)  # of experts (E, m, n) a row of the first dimension has m
    return DenseGradient(whole[rows.start // each : rows.stop // each], gradient.tokens)
