"""Leading singular vectors of gradients: exact from the smallest matrix that has them, or from random projections."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from geomkit.gradients.indexed import IndexedGradient
from geomkit.gradients.layer_gradient import LayerGradient, thin_factors

_Leading = Callable[[int], Tensor]

_STRIP = 4096
"""Rows of a tall matrix that are decomposed at a time."""

_OVERSAMPLING = 10
_ITERATIONS = 4


@dataclass(frozen=True, eq=False)
class SingularVectors:
    """Singular values, and from k the first k vectors of a side, columns in fp64.

    Attributes:
        values: Descending, fp64.
        left: Returns (rows, k).
        right: Returns (columns, k).
    """

    values: np.ndarray
    left: _Leading
    right: _Leading


def exact_vectors(gradient: LayerGradient, sides: "Sides") -> SingularVectors:
    """Decompose a gradient; the vectors of a side that is not asked for may not be had."""
    if isinstance(gradient, IndexedGradient):
        return _from_rows(gradient)
    if factors := thin_factors(gradient):
        return _from_factors(*factors, sides)
    rows, columns = gradient.matrix_shape
    return _from_strips(gradient) if rows > 2 * columns else _from_matrix(gradient.take(slice(None)))


def randomized_vectors(gradient: LayerGradient, rank: int, generator: torch.Generator) -> SingularVectors:
    """Find leading vectors in the range of a few random projections (Halko, Martinsson and Tropp 2011).

    With ten directions more than asked for and four power iterations, orthogonalised in between, it takes eleven thin
    products with the gradient, which is not formed. The values and ‖UᵀG‖ that come out never exceed the exact ones.

    Args:
        gradient: The gradient.
        rank: How many vectors are wanted.
        generator: Source of randomness, on the CPU.
    """
    rows, columns = gradient.matrix_shape
    size = min(rank + _OVERSAMPLING, rows, columns)
    frame = torch.randn(columns, size, generator=generator, dtype=torch.float64).to(gradient.device)
    for _ in range(_ITERATIONS):
        frame = _orthonormal(gradient.rmatmul(_orthonormal(gradient.matmul(frame)).T).T)
    frame = _orthonormal(gradient.matmul(frame))
    small = _from_matrix(gradient.rmatmul(frame.T))
    return SingularVectors(small.values, lambda k: frame @ small.left(k), small.right)


def _orthonormal(columns: Tensor) -> Tensor:
    frame: Tensor = torch.linalg.qr(columns).Q
    return frame


def _from_rows(gradient: IndexedGradient) -> SingularVectors:
    found = _from_matrix(gradient.rows.double())

    def left(k: int) -> Tensor:
        vectors = found.left(k)
        return vectors.new_zeros(gradient.size, k).index_copy_(0, gradient.indices, vectors)

    return SingularVectors(found.values, left, found.right)


def _from_factors(left: Tensor, right: Tensor, sides: "Sides") -> SingularVectors:
    """Decompose LᵀR = Q_L (S_L S_Rᵀ) Q_Rᵀ from the T × T middle; a frame that is not asked for is not made."""
    own, own_triangle = torch.linalg.qr(left.double().T, mode="r" if sides == "right" else "reduced")
    other, other_triangle = torch.linalg.qr(right.double().T, mode="r" if sides == "left" else "reduced")
    middle = _from_matrix(own_triangle @ other_triangle.T)
    return SingularVectors(middle.values, lambda k: own @ middle.left(k), lambda k: other @ middle.right(k))


def _from_strips(gradient: LayerGradient) -> SingularVectors:
    """Decompose a tall matrix from the triangle of its QR, which needs some of its rows at a time only."""
    rows, columns = gradient.matrix_shape
    triangle = torch.zeros(0, columns, dtype=torch.float64, device=gradient.device)
    step = max(_STRIP, columns)
    for start in range(0, rows, step):
        strip = torch.cat([triangle, gradient.take(slice(start, start + step))])
        triangle = torch.linalg.qr(strip, mode="r").R
    found = _from_matrix(triangle)

    def left(k: int) -> Tensor:
        return gradient.matmul(found.right(k)) / torch.from_numpy(found.values[:k]).to(gradient.device)

    return SingularVectors(found.values, left, found.right)


def _from_matrix(matrix: Tensor) -> SingularVectors:
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return SingularVectors(values.cpu().numpy(), lambda k: left[:, :k], lambda k: right[:k].T)


Side = Literal["left", "right"]
"""Left vectors live in the layer's output space, right vectors in its input space."""

Sides = Literal["left", "right", "both"]
"""One side, or both with the vectors of one belonging to those of the other."""
