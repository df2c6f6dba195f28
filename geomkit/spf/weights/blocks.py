"""Blocks of weights, in which a step is read and corrected: a tensor, a shard of a tensor, or a product of two."""

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
"""A gradient and its coefficient: coefficient × gradient is added to a block."""


class Block(ABC):
    """One matrix W that training moves, independent of how it is stored; a vector is a matrix of one column.

    Attributes:
        rows: Rows of W on this process; ``None`` for all rows.
        free: Whether W can move along every gradient, rather than along a part of it.
        is_used: Whether the model computes with W itself: with the whole parameter, in the same number of bits.
    """

    rows: slice | None = None
    free: bool = True
    is_used: bool = False

    @abstractmethod
    def times(self, right: Tensor) -> Tensor:
        """Return W @ B for B of shape (columns, k): (rows on this process, k)."""

    @abstractmethod
    def left_times(self, left: Tensor) -> Tensor:
        """Return A @ W for A of shape (k, rows), summed over the rows on this process."""

    @abstractmethod
    def dot(self, gradient: LayerGradient) -> float:
        """Return ⟨W, G⟩ in fp64, summed over the rows on this process."""

    @abstractmethod
    def apply(self, moves: Iterable[Move]) -> None:
        """Add gradients to W, or their :meth:`reachable` parts."""

    @abstractmethod
    def reachable(self, gradient: LayerGradient) -> LayerGradient:
        """Return the part of a gradient along which W can move."""

    @property
    @abstractmethod
    def eps(self) -> float:
        """Relative rounding of the numbers in which W is stored."""


class TensorBlock(Block):
    """A block stored in one tensor: W = tensor for weights, W = −tensor for the step of a utility gradient.

    Args:
        tensor: The tensor. Moves are made in place, in fp32 at least, and rounded once.
        scale: 1 or −1, the factor between the tensor and W.
        rows: Rows of the whole matrix that the tensor holds; ``None`` for all rows.
        master: Whether to store a master weight: W in fp32, in addition to a tensor of fewer bits, which is then W
            rounded once.

    Attributes:
        master: The master weight; ``None`` without one.
    """

    def __init__(self, tensor: Tensor, *, scale: float = 1.0, rows: slice | None = None, master: bool = False) -> None:
        """Start from the present values of the tensor."""
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
        """Return W @ B in fp32, or in fp64 if W or B is fp64."""
        matrix = self._matrix
        dtype = torch.promote_types(matrix.dtype, right.dtype)
        # Columns of the product are read one by one: this order keeps each column contiguous.
        product = (right.to(dtype).T @ matrix.to(dtype).T).T
        return product if self._scale == 1.0 else self._scale * product

    def left_times(self, left: Tensor) -> Tensor:
        """Return A @ W."""
        matrix = self._matrix
        dtype = torch.promote_types(matrix.dtype, left.dtype)
        local = left if self.rows is None else left[:, self.rows]
        product = local.to(dtype) @ matrix.to(dtype)
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
        """Return the gradient itself: a tensor can move along every gradient."""
        return gradient

    @property
    def eps(self) -> float:
        """Relative rounding of the numbers in which W is stored; not below fp32's, since bases and factors are fp32."""
        return max(torch.finfo(self._weight.dtype).eps, torch.finfo(torch.float32).eps)

    # The optimizer moves the rounded weights w, SPF corrects the fp32 master m, of which w is the rounded value:
    #   before a correction  m ← m + (w − round(m)), which adds the optimizer's update to m;
    #   after a correction   w ← round(m).

    def pull_update_into_master(self) -> None:
        """Add the optimizer's change of the rounded weights to their fp32 master weights."""
        if self.master is not None:
            self.master += self._tensor.float() - self.master.to(self._tensor.dtype).float()

    def round_master_into_weight(self) -> None:
        """Set the weights to their rounded fp32 master weights."""
        if self.master is not None:
            self._tensor.copy_(self.master)


class ProductBlock(Block):
    """The product W = s·BA that a low-rank adapter adds to a weight, corrected through B alone, in which W is linear.

    1. For a fixed A the rows of W lie in the row space of A: of a gradient G only G P can be added, with the projection
       P = Aᵀ(AAᵀ)⁻¹A = A⁺A onto that space (A⁺ the pseudo-inverse, which A of lower rank has as well).
    2. B ← B + G A⁺ / s moves W by s·(G A⁺ / s)·A = G P.
    3. ⟨G P, H⟩ is therefore what a move along G adds to ⟨W, H⟩; it is 0 for gradients H outside the row space.

    Args:
        first: A, (r, columns).
        second: B, (rows, r).
        scaling: s.
    """

    free = False

    def __init__(self, first: Tensor, second: Tensor, scaling: float) -> None:
        """Store the two factors."""
        self._first, self._second, self._scaling = first, second, scaling

    def times(self, right: Tensor) -> Tensor:
        """Return s·B(A right), in fp64, which costs little for thin factors."""
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
        """Return G P, as the r factors G A⁺ and A."""
        left = gradient.matmul(self._inverse()).T
        return FactoredGradient(left.float(), self._first.float())

    def _inverse(self) -> Tensor:
        """Return the pseudo-inverse A⁺ = Aᵀ(AAᵀ)⁻¹, (columns, r)."""
        inverse: Tensor = torch.linalg.pinv(self._first.double())
        return inverse

    @property
    def eps(self) -> float:
        """Relative rounding of the product: twice the rounding of its factors."""
        types = (self._first.dtype, self._second.dtype, torch.float32)
        return 2 * max(torch.finfo(dtype).eps for dtype in types)


def restricted(gradient: LayerGradient, rows: slice | None) -> LayerGradient:
    """Return a range of rows of a gradient, in the same form.

    Args:
        gradient: The gradient of the whole parameter.
        rows: Consecutive rows of its matrix; ``None`` for all rows.
    """
    if rows is None:
        return gradient
    if isinstance(gradient, FactoredGradient):
        return FactoredGradient(gradient.left[:, rows], gradient.right)
    if isinstance(gradient, IndexedGradient):
        inside = (gradient.indices >= rows.start) & (gradient.indices < rows.stop)
        size = rows.stop - rows.start
        return IndexedGradient(gradient.indices[inside] - rows.start, gradient.rows[inside], size, gradient.tokens)
    if isinstance(gradient, SumGradient):
        return SumGradient(tuple(restricted(part, rows) for part in gradient.parts))
    whole = gradient.dense()
    # The matrix of experts (E, m, n) has E·m rows, m for each index of the first dimension, the sharded one.
    height = gradient.matrix_shape[0] // max(len(whole), 1)
    return DenseGradient(whole[rows.start // height : rows.stop // height], gradient.tokens)
