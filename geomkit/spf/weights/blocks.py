"""Blocks of weights, in which a step is read and corrected: a tensor, a shard of a tensor, or a product of two."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

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
    """The sum W = Σ s·LR of products that adapters add to a weight, corrected through one factor, in which W is linear.

    1. The factors of several adapters side by side are the factors of one product: with L = [s₁L₁ s₂L₂ …] and
       R = [R₁; R₂; …], W = LR.
    2. For a fixed R the rows of W lie in the row space of R: of a gradient G only G P can be added, with the projection
       P = R⁺R onto that space (R⁺ = Rᵀ(RRᵀ)⁻¹ the pseudo-inverse, which R of lower rank has as well). For a fixed L
       it is P G, with P = LL⁺.
    3. L ← L + G R⁺ moves W by G R⁺R = G P; R ← R + L⁺G moves W by LL⁺G = P G.
    4. ⟨G P, H⟩ is therefore what a move along G adds to ⟨W, H⟩; it is 0 for gradients H outside that space.

    Args:
        products: For each adapter L (rows, r), R (r, columns) and s. Moves are made in place.
        moves_left: Whether L is moved, rather than R.
    """

    free = False

    def __init__(self, products: Sequence[tuple[Tensor, Tensor, float]], *, moves_left: bool = True) -> None:
        """Store the factors."""
        self._products, self._moves_left = products, moves_left

    @property
    def _left(self) -> Tensor:
        return torch.cat([scaling * left.double() for left, _, scaling in self._products], 1)

    @property
    def _right(self) -> Tensor:
        return torch.cat([right.double() for _, right, _ in self._products])

    @property
    def can_be_closed(self) -> bool:
        """Whether moves can keep UᵀW as it is now for any U, whatever the optimizer does: from L = 0, and moving L."""
        return self._moves_left and not self._left.any()

    def times(self, right: Tensor) -> Tensor:
        """Return L(R right), in fp64, which costs little for thin factors."""
        return self._left @ (self._right @ right.double())

    def left_times(self, left: Tensor) -> Tensor:
        """Return (left L)R."""
        return (left.double() @ self._left) @ self._right

    def dot(self, gradient: LayerGradient) -> float:
        """Return ⟨LR, G⟩ = ⟨L, GRᵀ⟩."""
        return float((gradient.matmul(self._right.T) * self._left).sum())

    def apply(self, moves: Iterable[Move]) -> None:
        """Add the reachable part of gradients to W."""
        inverse = self._inverse()
        steps = [
            amount * (gradient.matmul(inverse) if self._moves_left else gradient.rmatmul(inverse))
            for gradient, amount in moves
        ]
        if not steps:
            return
        ranks = [len(right) for _, right, _ in self._products]
        parts = torch.split(torch.stack(steps).sum(0), ranks, dim=1 if self._moves_left else 0)
        for (left, right, scaling), part in zip(self._products, parts, strict=True):
            if self._moves_left:
                left.copy_(left.double() + part / scaling)
            else:
                right.copy_(right.double() + part)

    def reachable(self, gradient: LayerGradient) -> LayerGradient:
        """Return G P, as the r factors G R⁺ and R; or P G, as L and L⁺G."""
        inverse = self._inverse()
        if self._moves_left:
            return FactoredGradient(gradient.matmul(inverse).T.float(), self._right.float())
        return FactoredGradient(self._left.T.float(), gradient.rmatmul(inverse).float())

    def _inverse(self) -> Tensor:
        """Return the pseudo-inverse of the fixed factor: R⁺, (columns, r), or L⁺, (r, rows)."""
        inverse: Tensor = torch.linalg.pinv(self._right if self._moves_left else self._left)
        return inverse

    @property
    def eps(self) -> float:
        """Relative rounding of the product: twice the rounding of its factors."""
        types = {factor.dtype for left, right, _ in self._products for factor in (left, right)} | {torch.float32}
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
