"""Leading singular vectors of gradients, exact from a small matrix or approximate from random projections."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from geomkit.errors import GeometryError
from geomkit.gradients.indexed import IndexedGradient
from geomkit.gradients.layer_gradient import LayerGradient, thin_factors

Side = Literal["left", "right"]
"""Left singular vectors live in the layer's output space, right singular vectors in its input space."""

Sides = Literal["left", "right", "both"]
"""One side, or both sides with the vectors in pairs, G v_i = σ_i u_i."""


def check_side(side: str) -> None:
    """Raise GeometryError unless a side is ``"left"`` or ``"right"``."""
    if side not in get_args(Side):
        raise GeometryError(f"expected the side {' or '.join(get_args(Side))}, found {side!r}; compare one at a time")


_Leading = Callable[[int], Tensor]

_STRIP = 4096
"""Rows of a tall matrix that are decomposed at a time."""

_OVERSAMPLING = 10
"""Number of random directions beyond the wanted rank."""

_ITERATIONS = 4
"""Number of power iterations."""


@dataclass(frozen=True, eq=False)
class SingularVectors:
    """Singular values of a gradient, and functions that return the k leading singular vectors as columns, fp64.

    Attributes:
        values: (K,) singular values, descending, fp64.
        left: Function from k to the (rows, k) left vectors.
        right: Function from k to the (columns, k) right vectors.
    """

    values: np.ndarray
    left: _Leading
    right: _Leading


def exact_vectors(gradient: LayerGradient, sides: Sides) -> SingularVectors:
    """Return the singular value decomposition of a gradient, from a matrix as small as its form allows.

    Args:
        gradient: The gradient.
        sides: Sides whose vectors are needed; the function of the other side may fail.
    """
    if isinstance(gradient, IndexedGradient):
        return _from_rows(gradient)
    if factors := thin_factors(gradient):
        return _from_factors(*factors, sides)
    rows, columns = gradient.matrix_shape
    return _from_strips(gradient) if rows > 2 * columns else _from_matrix(gradient.take(slice(None)))


def randomized_vectors(gradient: LayerGradient, rank: int, generator: torch.Generator) -> SingularVectors:
    """Return approximate leading singular vectors from random projections (Halko, Martinsson and Tropp 2011).

    The method takes ten more directions than vectors and four power iterations with orthogonalisation: eleven thin
    products with the gradient, which is not formed. The values and ‖UᵀG‖ never exceed the exact values.

    Args:
        gradient: The gradient.
        rank: Number of vectors needed.
        generator: Source of randomness, on the CPU.
    """
    rows, columns = gradient.matrix_shape
    size = min(rank + _OVERSAMPLING, rows, columns)
    # 1. Gaussian directions of the input space, turned towards the leading right vectors by power iterations with GᵀG.
    basis = torch.randn(columns, size, generator=generator, dtype=torch.float64).to(gradient.device)
    for _ in range(_ITERATIONS):
        basis = _orthonormal(gradient.rmatmul(_orthonormal(gradient.matmul(basis)).T).T)
    # 2. Orthonormal basis Q of their images, and the SVD of the small QᵀG = U Σ Vᵀ: G ≈ (QU) Σ Vᵀ.
    q = _orthonormal(gradient.matmul(basis))
    projected = _from_matrix(gradient.rmatmul(q.T))
    return SingularVectors(projected.values, lambda k: q @ projected.left(k), projected.right)


def _orthonormal(columns: Tensor) -> Tensor:
    """Return an orthonormal basis of the column space."""
    basis: Tensor = torch.linalg.qr(columns).Q
    return basis


def _from_rows(gradient: IndexedGradient) -> SingularVectors:
    """Decompose the non-zero rows, and put the left vectors back in their places."""
    nonzero = _from_matrix(gradient.rows.double())

    def left(k: int) -> Tensor:
        vectors = nonzero.left(k)
        return vectors.new_zeros(gradient.size, k).index_copy_(0, gradient.indices, vectors)

    return SingularVectors(nonzero.values, left, nonzero.right)


def _from_factors(left: Tensor, right: Tensor, sides: Sides) -> SingularVectors:
    """Decompose LᵀR = Q_L (S_L S_Rᵀ) Q_Rᵀ from its T × T middle; Q of a side that is not needed is not computed."""
    # 1. Lᵀ = Q_L S_L and Rᵀ = Q_R S_R.
    q_left, s_left = torch.linalg.qr(left.double().T, mode="r" if sides == "right" else "reduced")
    q_right, s_right = torch.linalg.qr(right.double().T, mode="r" if sides == "left" else "reduced")
    # 2. S_L S_Rᵀ = U Σ Vᵀ has the singular values of LᵀR, whose vectors are Q_L U and Q_R V.
    middle = _from_matrix(s_left @ s_right.T)
    return SingularVectors(middle.values, lambda k: q_left @ middle.left(k), lambda k: q_right @ middle.right(k))


def _from_strips(gradient: LayerGradient) -> SingularVectors:
    """Decompose a tall matrix from the triangle of its QR, of which only a strip of rows is formed at a time."""
    rows, columns = gradient.matrix_shape
    # 1. G = QS: the triangle S of the rows so far can stand for these rows when the triangle with the next strip is
    #    computed.
    triangle = torch.zeros(0, columns, dtype=torch.float64, device=gradient.device)
    step = max(_STRIP, columns)
    for start in range(0, rows, step):
        strip = torch.cat([triangle, gradient.take(slice(start, start + step))])
        triangle = torch.linalg.qr(strip, mode="r").R
    # 2. S = U Σ Vᵀ has the values and right vectors of G; its left vectors are G V Σ⁻¹, as Q was not kept.
    small = _from_matrix(triangle)

    def left(k: int) -> Tensor:
        return gradient.matmul(small.right(k)) / torch.from_numpy(small.values[:k]).to(gradient.device)

    return SingularVectors(small.values, left, small.right)


def _from_matrix(matrix: Tensor) -> SingularVectors:
    """Decompose a matrix that is formed."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return SingularVectors(values.cpu().numpy(), lambda k: left[:, :k], lambda k: right[:k].T)
