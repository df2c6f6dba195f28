"""Gradients of one parameter in coordinates that they share, in which their sums and leading subspaces are cheap.

Only inner products between the bases matter to an overlap, and a rotation of the space changes none. So rows of an
embedding that no example looks up are left away, and where all tokens together are fewer than either dimension, one
QR turns every gradient into a middle of that size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from geomkit.errors import GeometryError
from geomkit.gradients.indexed import IndexedGradient
from geomkit.gradients.layer_gradient import Factors, LayerGradient, row_products
from geomkit.svd.singular_values import rank_tolerance
from geomkit.svd.singular_vectors import Side
from geomkit.utils.arguments import check_finite

_KEPT = 2**25  # numbers of formed gradients that are kept
_FEWEST_SUMS = 4  # from this many on, sums of what was formed are cheaper than of factors
_ALL_AT_ONCE = 160  # up to this size, all eigenvectors take no longer than the largest


def to_common_basis(gradients: Sequence[LayerGradient], side: Side) -> "CommonBasis":
    """Bring gradients of one parameter into common coordinates.

    Args:
        gradients: N gradients of one matrix, whatever their forms.
        side: Whose singular vectors are asked for.

    Raises:
        GeometryError: If there is no such side, or a gradient is not finite.
    """
    if side not in get_args(Side):
        raise GeometryError(f"expected the side {' or '.join(get_args(Side))}, found {side!r}; compare one at a time")
    shape = gradients[0].matrix_shape
    pairs = _looked_up(gradients) or [_factors(gradient) for gradient in gradients]
    own, other = (
        list(parts) for parts in zip(*(pair if side == "left" else pair[::-1] for pair in pairs), strict=True)
    )
    # Cheaper than looking at each: a sum is finite where all that it is of is.
    check_finite(torch.stack([part.sum() for part in (*own, *other)]), f"a parameter of shape {shape}")
    if sum(map(len, own)) < min(shape):
        own, other = _middles(own), _middles(other)
    return CommonBasis(own, other, shape)


def _looked_up(gradients: Sequence[LayerGradient]) -> list[Factors] | None:
    """Return factors over the rows that any of the gradients has, if all are rows that were looked up."""
    indexed = [gradient for gradient in gradients if isinstance(gradient, IndexedGradient)]
    if len(indexed) < len(gradients):
        return None
    union: Tensor = torch.cat([gradient.indices for gradient in indexed]).unique()  # type: ignore[no-untyped-call]
    return [((gradient.indices[:, None] == union).double(), gradient.rows.double()) for gradient in indexed]


def _factors(gradient: LayerGradient) -> Factors:
    """Return a factored form in fp64; one of the factors of a dense gradient is the identity."""
    if factors := gradient.factors():
        return factors[0].double(), factors[1].double()
    matrix = gradient.take(slice(None))
    identity = torch.eye(min(matrix.shape), dtype=matrix.dtype, device=matrix.device)
    return (identity, matrix) if matrix.shape[0] <= matrix.shape[1] else (matrix.T, identity)


def _middles(factors: list[Tensor]) -> list[Tensor]:
    triangle: Tensor = torch.linalg.qr(torch.cat(factors).T, mode="r").R
    return [part.T for part in torch.split(triangle, [len(factor) for factor in factors], 1)]


@dataclass(frozen=True, eq=False)
class CommonBasis:
    """N gradients ownᵀ other of one parameter, T_i tokens each.

    Attributes:
        own: (T_i, p) factors on the side whose singular vectors are asked for, fp64.
        other: (T_i, q) factors on the other side.
        shape: Rows and columns of the parameter itself.
    """

    own: list[Tensor]
    other: list[Tensor]
    shape: tuple[int, int]

    def basis(self, places: Sequence[int], rank: int) -> Tensor:
        """Return the leading singular vectors of the sum of some of the gradients; see :meth:`bases_of`."""
        return self.bases_of([places], rank)[0]

    def bases_of(self, sums: Sequence[Sequence[int]], rank: int) -> list[Tensor]:
        """Return the leading singular vectors of sums of some of the gradients.

        Args:
            sums: The places of the gradients in each sum.
            rank: How many vectors, at most; never beyond the numeric rank.

        Returns:
            (p, k) orthonormal columns for each sum, fp64.
        """
        long = [place for place, parts in enumerate(sums) if 2 * self._tokens(parts) >= self._room]
        if self.formed is None or len(long) < _FEWEST_SUMS:
            return [self._basis(parts, rank) for parts in sums]
        found = {place: self._basis(parts, rank) for place, parts in enumerate(sums) if place not in set(long)}
        step = max(1, _KEPT // self.formed[0].numel())
        for start in range(0, len(long), step):
            chunk = long[start : start + step]
            weights = self.formed.new_zeros(len(chunk), len(self.own))
            for row, place in zip(weights, chunk, strict=True):
                row[list(sums[place])] = 1.0
            totals = torch.tensordot(weights, self.formed, dims=1)
            found |= zip(chunk, self._leading(totals, rank), strict=True)
        return [found[place] for place in range(len(sums))]

    def _basis(self, places: Sequence[int], rank: int) -> Tensor:
        own, other = (torch.cat([side[place] for place in places]) for side in (self.own, self.other))
        if len(own) >= self._room:
            return self._leading((own.T @ other)[None], rank)[0]
        return self._leading_of_factors(own[None], other[None], rank)[0]

    def _tokens(self, places: Sequence[int]) -> int:
        return sum(len(self.own[place]) for place in places)

    def bases(self, rank: int) -> list[Tensor]:
        """Return the leading singular vectors of every single gradient."""
        if max(map(len, self.own)) >= self._room:
            return [self.basis([place], rank) for place in range(len(self.own))]
        own, other = (pad_sequence(side, batch_first=True) for side in (self.own, self.other))
        return self._leading_of_factors(own, other, rank)

    def bases_without_each(self, count: int, rank: int) -> list[Tensor]:
        """Return those of the sum of the first ``count`` gradients but one, for each in turn, and of all of them."""
        total = torch.cat(self.own[:count]).T @ torch.cat(self.other[:count])
        if self.formed is not None:
            return self._leading(torch.cat([total - self.formed[:count], total[None]]), rank)
        parts = (total - self.own[place].T @ self.other[place] for place in range(count))
        return [self._leading(part[None], rank)[0] for part in (*parts, total)]

    @cached_property
    def formed(self) -> Tensor | None:
        """(N, p, q) all gradients, where that is small enough to keep."""
        numbers = len(self.own) * self.own[0].shape[1] * self.other[0].shape[1]
        if numbers > _KEPT:
            return None
        return torch.stack([own.T @ other for own, other in zip(self.own, self.other, strict=True)])

    def gram(self) -> Tensor | None:
        """Return the (N, N) inner products between all gradients, fp64, where they are small enough to be formed."""
        if self.formed is None:
            return None
        flat = self.formed.flatten(1)
        return row_products(flat, flat)

    @property
    def _room(self) -> int:
        """Fewer tokens than this are fewer than both dimensions."""
        return min(self.own[0].shape[1], self.other[0].shape[1])

    def _leading_of_factors(self, own: Tensor, other: Tensor, rank: int) -> list[Tensor]:
        """Return the leading left singular vectors of each ownᵀ other, of fewer tokens than either side has room.

        Rows of zeros, which fill (B, T, p) and (B, T, q) up, add none.
        """
        frames, triangles = torch.linalg.qr(own.mT)
        found = self._leading(triangles @ other, rank)
        # In QR's own layout, products of many rows with few columns are 14 times slower.
        return [frame.contiguous() @ basis for frame, basis in zip(frames, found, strict=True)]

    def _leading(self, matrices: Tensor, rank: int) -> list[Tensor]:
        """Return the leading left singular vectors of each of (B, p, q) from the squares of its smaller side.

        Squaring costs half of fp64's digits, which is nothing above the tolerance for fp32 factors.
        """
        tall = matrices.shape[1] > matrices.shape[2]
        squared, vectors = _largest(matrices.mT @ matrices if tall else matrices @ matrices.mT, rank)
        values = squared.clamp(min=0).sqrt()
        kept = [int((row > rank_tolerance(row, self.shape)).sum()) for row in values.cpu().numpy()]
        if not tall:
            return [basis[:, :count] for basis, count in zip(vectors, kept, strict=True)]
        each = zip(matrices @ vectors, values, kept, strict=True)
        return [turned[:, :count] / lengths[:count] for turned, lengths, count in each]


def _largest(squares: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the largest eigenvalues, descending, and their vectors; on a CPU no others of a large matrix."""
    size = squares.shape[-1]
    if size <= _ALL_AT_ONCE or squares.device.type != "cpu":
        values, vectors = torch.linalg.eigh(squares)
        return values.flip(-1)[..., :count], vectors.flip(-1)[..., :count]
    from scipy.linalg import eigh

    wanted = max(size - count, 0), size - 1
    found = zip(*(eigh(each, subset_by_index=wanted, check_finite=False) for each in squares.numpy()), strict=True)
    values, vectors = (torch.from_numpy(np.stack(parts)[..., ::-1].copy()) for parts in found)
    return values, vectors


def overlaps_between(a: Sequence[Tensor], b: Sequence[Tensor], rank: int) -> Tensor:
    """Return the overlap ‖U_iᵀV_j‖_F²/k between every two bases, cut to k columns.

    Args:
        a: N bases (p, ≥ k) with orthonormal columns.
        b: M of the same space.
        rank: k.

    Returns:
        (N, M) overlaps between 0 and 1, fp64 on the CPU.
    """
    left, right = (torch.cat([basis[:, :rank] for basis in side], 1) for side in (a, b))
    squared = (left.T @ right).square().reshape(len(a), rank, len(b), rank)
    overlaps: Tensor = squared.sum((1, 3)).cpu() / rank
    return overlaps
