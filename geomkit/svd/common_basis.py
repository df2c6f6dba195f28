"""Gradients of one parameter in common coordinates, in which their sums and leading singular vectors are cheap.

Overlaps need only inner products between bases, which a rotation of the space does not change. Therefore rows of an
embedding that no example looks up are left out, and if all tokens together are fewer than rows and columns, one QR
replaces every gradient by a matrix of the size of the token count.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from geomkit.gradients.indexed import IndexedGradient
from geomkit.gradients.layer_gradient import Factors, LayerGradient, row_products
from geomkit.svd.eigenpairs import largest_eigenpairs
from geomkit.svd.singular_values import rank_tolerance
from geomkit.svd.singular_vectors import Side, check_side
from geomkit.utils.arguments import check_finite

_FORMED = 2**25
"""Largest number of entries, together, of gradients that are formed as matrices and kept in memory."""
_MIN_SUMS = 4
"""Number of sums from which on sums of formed gradients are cheaper than sums of factors."""


def to_common_basis(gradients: Sequence[LayerGradient], side: Side) -> "CommonBasis":
    """Return gradients of one parameter in common coordinates.

    Args:
        gradients: N gradients of one matrix, in any forms.
        side: Side of the singular vectors that are needed.

    Raises:
        GeometryError: If there is no such side, or a gradient is not finite.
    """
    check_side(side)
    shape = gradients[0].matrix_shape
    # 1. Thin factors of every gradient; right singular vectors are the left vectors of the transpose.
    pairs = _looked_up(gradients) or [_factors(gradient) for gradient in gradients]
    left, right = (
        list(factors) for factors in zip(*(pair if side == "left" else pair[::-1] for pair in pairs), strict=True)
    )
    # Cheaper than a test of every entry: a sum with a NaN or infinite term is not finite.
    check_finite(torch.stack([factor.sum() for factor in (*left, *right)]), f"a parameter of shape {shape}")
    # 2. If all T tokens are fewer than rows and columns: all left factors together are Lᵀ = QS, and the columns of S
    #    are the tokens in the coordinates of Q. Likewise for the right factors.
    if sum(map(len, left)) < min(shape):
        left, right = _token_coordinates(left), _token_coordinates(right)
    return CommonBasis(left, right, shape)


def _looked_up(gradients: Sequence[LayerGradient]) -> list[Factors] | None:
    """Return factors over the rows that at least one gradient has, or ``None`` unless all gradients are indexed."""
    indexed = [gradient for gradient in gradients if isinstance(gradient, IndexedGradient)]
    if len(indexed) < len(gradients):
        return None
    union: Tensor = torch.cat([gradient.indices for gradient in indexed]).unique()  # type: ignore[no-untyped-call]
    return [((gradient.indices[:, None] == union).double(), gradient.rows.double()) for gradient in indexed]


def _factors(gradient: LayerGradient) -> Factors:
    """Return factors in fp64; one of the factors of a dense gradient is the identity."""
    if factors := gradient.factors():
        return factors[0].double(), factors[1].double()
    matrix = gradient.take(slice(None))
    identity = torch.eye(min(matrix.shape), dtype=matrix.dtype, device=matrix.device)
    return (identity, matrix) if matrix.shape[0] <= matrix.shape[1] else (matrix.T, identity)


def _token_coordinates(factors: list[Tensor]) -> list[Tensor]:
    """Return every factor in the coordinates of Q, where all factors together are (QS)ᵀ, from the columns of S."""
    triangle: Tensor = torch.linalg.qr(torch.cat(factors).T, mode="r").R
    return [part.T for part in torch.split(triangle, [len(factor) for factor in factors], 1)]


@dataclass(frozen=True, eq=False)
class CommonBasis:
    """N gradients G_i = left_iᵀ right_i of one parameter, with T_i tokens.

    The gradients are transposed if right singular vectors were asked for, so that all vectors here are left vectors.

    Attributes:
        left: (T_i, p) factors on the side of the singular vectors, fp64.
        right: (T_i, q) factors on the other side.
        shape: Rows and columns of the parameter.
    """

    left: list[Tensor]
    right: list[Tensor]
    shape: tuple[int, int]

    def basis_of_sum(self, places: Sequence[int], rank: int) -> Tensor:
        """Return the leading singular vectors of the sum of the gradients at the given places.

        Args:
            places: Indices of the gradients in the sum.
            rank: Largest number of vectors.

        Returns:
            (p, k) orthonormal columns, fp64; see :meth:`bases_of_sums`.
        """
        return self.bases_of_sums([places], rank)[0]

    def bases_of_sums(self, sums: Sequence[Sequence[int]], rank: int) -> list[Tensor]:
        """Return the leading singular vectors of many sums of gradients.

        Args:
            sums: The places of the gradients in every sum.
            rank: Largest number of vectors; k is also at most the numeric rank of the sum.

        Returns:
            (p, k) orthonormal columns for every sum, fp64.
        """
        # 1. A sum of many tokens is cheaper from formed gradients, if there are several such sums to share them.
        long = [index for index, places in enumerate(sums) if 2 * self._tokens(places) >= self._smaller_dimension]
        if self.formed is None or len(long) < _MIN_SUMS:
            return [self._basis_from_factors(places, rank) for places in sums]
        bases = {
            index: self._basis_from_factors(places, rank) for index, places in enumerate(sums) if index not in set(long)
        }
        # 2. The long sums: 0/1 weights times the formed gradients, a chunk of sums at a time.
        step = max(1, _FORMED // self.formed[0].numel())
        for start in range(0, len(long), step):
            chunk = long[start : start + step]
            weights = self.formed.new_zeros(len(chunk), len(self.left))
            for row, index in zip(weights, chunk, strict=True):
                row[list(sums[index])] = 1.0
            totals = torch.tensordot(weights, self.formed, dims=1)
            bases |= zip(chunk, self._leading(totals, rank), strict=True)
        return [bases[index] for index in range(len(sums))]

    def _basis_from_factors(self, places: Sequence[int], rank: int) -> Tensor:
        left, right = (torch.cat([side[place] for place in places]) for side in (self.left, self.right))
        if len(left) >= self._smaller_dimension:
            return self._leading((left.T @ right)[None], rank)[0]
        return self._leading_of_factors(left[None], right[None], rank)[0]

    def _tokens(self, places: Sequence[int]) -> int:
        return sum(len(self.left[place]) for place in places)

    def bases_of_gradients(self, rank: int) -> list[Tensor]:
        """Return the leading singular vectors of every single gradient, in the form of :meth:`bases_of_sums`."""
        if max(map(len, self.left)) >= self._smaller_dimension:
            return [self.basis_of_sum([place], rank) for place in range(len(self.left))]
        left, right = (pad_sequence(side, batch_first=True) for side in (self.left, self.right))
        return self._leading_of_factors(left, right, rank)

    def leave_one_out_bases(self, count: int, rank: int) -> list[Tensor]:
        """Return the leading singular vectors of the sum of the first ``count`` gradients without one of them.

        Args:
            count: Number of gradients in the sum.
            rank: Largest number of vectors.

        Returns:
            count + 1 bases (p, k): without every gradient in turn, and of the whole sum.
        """
        total = torch.cat(self.left[:count]).T @ torch.cat(self.right[:count])
        if self.formed is not None:
            return self._leading(torch.cat([total - self.formed[:count], total[None]]), rank)
        remainders = (total - self.left[place].T @ self.right[place] for place in range(count))
        return [self._leading(matrix[None], rank)[0] for matrix in (*remainders, total)]

    @cached_property
    def formed(self) -> Tensor | None:
        """(N, p, q) all gradients as matrices, or ``None`` if they are too large to keep."""
        numbers = len(self.left) * self.left[0].shape[1] * self.right[0].shape[1]
        if numbers > _FORMED:
            return None
        return torch.stack([left.T @ right for left, right in zip(self.left, self.right, strict=True)])

    def gram(self) -> Tensor | None:
        """Return the (N, N) inner products of all gradients, fp64, or ``None`` if they are too large to be formed."""
        if self.formed is None:
            return None
        flat = self.formed.flatten(1)
        return row_products(flat, flat)

    @property
    def _smaller_dimension(self) -> int:
        """min(p, q): with fewer tokens, factors are smaller than the matrix."""
        return min(self.left[0].shape[1], self.right[0].shape[1])

    def _leading_of_factors(self, left: Tensor, right: Tensor, rank: int) -> list[Tensor]:
        """Return the leading left singular vectors of every leftᵀ right, for fewer tokens T than p and q.

        Args:
            left: (B, T, p); padding with rows of zeros changes nothing.
            right: (B, T, q).
            rank: Largest number of vectors.
        """
        # leftᵀ = QS: the vectors are Q times the left singular vectors of the (T, q) matrix S right.
        bases, triangles = torch.linalg.qr(left.mT)
        coordinates = self._leading(triangles @ right, rank)
        # In the memory layout that QR returns, products of many rows with few columns are many times slower.
        return [basis.contiguous() @ vectors for basis, vectors in zip(bases, coordinates, strict=True)]

    def _leading(self, matrices: Tensor, rank: int) -> list[Tensor]:
        """Return the leading left singular vectors of every matrix of (B, p, q), from the square of its smaller side.

        Squaring costs half of fp64's digits, which does not matter above the tolerance for fp32 factors.
        """
        # 1. Eigenvectors of MMᵀ are the left vectors U; if p > q, eigenvectors of MᵀM are the right vectors V.
        tall = matrices.shape[1] > matrices.shape[2]
        squared, vectors = largest_eigenpairs(matrices.mT @ matrices if tall else matrices @ matrices.mT, rank)
        values = squared.clamp(min=0).sqrt()
        # 2. Vectors beyond the numeric rank are rounding noise.
        counts = [int((row > rank_tolerance(row, self.shape)).sum()) for row in values.cpu().numpy()]
        if not tall:
            return [basis[:, :count] for basis, count in zip(vectors, counts, strict=True)]
        # 3. U = M V Σ⁻¹.
        images = zip(matrices @ vectors, values, counts, strict=True)
        return [image[:, :count] / lengths[:count] for image, lengths, count in images]


def overlaps_between(a: Sequence[Tensor], b: Sequence[Tensor], rank: int) -> Tensor:
    """Return the overlap ‖U_iᵀV_j‖_F²/k between every two bases, cut to k columns.

    Args:
        a: N bases (p, ≥ k) with orthonormal columns.
        b: M bases of the same space.
        rank: k.

    Returns:
        (N, M) overlaps between 0 and 1, fp64 on the CPU.
    """
    left, right = (torch.cat([basis[:, :rank] for basis in side], 1) for side in (a, b))
    squared = (left.T @ right).square().reshape(len(a), rank, len(b), rank)
    overlaps: Tensor = squared.sum((1, 3)).cpu() / rank
    return overlaps
