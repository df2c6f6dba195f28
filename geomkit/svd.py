"""Singular values of gradients, from their small Gram matrices where that is exact, and what counts as rounding.

A gradient of T tokens has T × T squares, whose eigenvalues are many times cheaper than an SVD of its factors. An error
bound tells for each gradient whether squaring lost too much; only then are the factors themselves decomposed.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from geomkit._checks import check_finite
from geomkit._squares import squares_of
from geomkit.errors import GeometryError
from geomkit.forms import IndexedGradient
from geomkit.layer_gradient import LayerGradient, thin_factors

_EPS_FP32 = float(np.finfo(np.float32).eps)
_PRECISION = 5e-7  # largest bound on the error of a singular value, relative to σ₁, that is taken from squares
_ROUNDING = 1e-12  # ten equal values reach 90 % with the ninth, whatever the last bit of their sum says


def singular_values(gradient: LayerGradient) -> np.ndarray:
    """Return the singular values of a gradient, descending, as many as its rank bound.

    They are exact to 1e-7 of the largest, see :func:`singular_values_of`.

    Example:
        >>> from geomkit.forms import FactoredGradient
        >>> singular_values(FactoredGradient(torch.eye(2, 5), 3 * torch.eye(2, 4)))
        array([3., 3.])
    """
    return np.asarray(singular_values_of([gradient])[0].cpu().numpy())


def singular_values_of(gradients: Sequence[LayerGradient]) -> Tensor:
    """Return the singular values of many gradients, of any shapes and forms, each to 1e-7 of its largest.

    Their squares are the eigenvalues of CᵀBC, with LLᵀ = CCᵀ (Cholesky) and B = RRᵀ in fp64, for a fraction of the
    cost of two QRs and an SVD; a factor that gradients share (the input of queries, keys and values) is squared once.
    Squaring costs half of fp64's digits: errors are below √(ε ‖LLᵀ‖₁ ‖RRᵀ‖₁), and were below a fifth of it wherever
    they were measured. If that bound is more than 5e-7 of the largest value (tokens that nearly cancel), or neither
    factor has a Cholesky decomposition, the two QRs and the SVD are taken.

    Args:
        gradients: N gradients on one device.

    Returns:
        (N, K) fp64, each row descending; K is the largest rank bound, and all beyond a gradient's own is zero.

    Example:
        >>> from geomkit.forms import DenseGradient, FactoredGradient
        >>> singular_values_of([FactoredGradient(torch.eye(2, 5), torch.eye(2, 4)), DenseGradient(torch.eye(3), 9)])
        tensor([[1., 1., 0.],
                [1., 1., 1.]], dtype=torch.float64)
    """
    bounds = [gradient.rank_bound for gradient in gradients]
    device = gradients[0].device if gradients else None
    values = torch.zeros(len(gradients), max(bounds, default=0), dtype=torch.float64, device=device)
    for places, squares, noise in squares_of(gradients):
        check_finite(squares, f"a gradient of shape {gradients[places[0]].matrix_shape}")
        stacked = singular_values_of_gram(squares)
        unsure = (noise > (_PRECISION * stacked[:, 0]) ** 2).tolist()
        for place, found, redo in zip(places, stacked, unsure, strict=True):
            kept = torch.linalg.svdvals(core(gradients[place])) if redo else found
            values[place, : bounds[place]] = kept[: bounds[place]]
    return values


def singular_values_of_gram(gram: Tensor) -> Tensor:
    """Return the singular values of a matrix from its Gram matrix GᵀG or GGᵀ, of which they are the roots.

    Squaring costs half of fp64's digits: errors are of the order of √ε σ₁ = 1.5e-8 σ₁, however exact the Gram is, and
    values below that are rounding. Values above lose as many digits as they are smaller than σ₁.

    Args:
        gram: (…, n, n) symmetric, positive semi-definite but for rounding.

    Returns:
        (…, n) fp64, descending.

    Example:
        >>> singular_values_of_gram(torch.diag(torch.tensor([0.0, 9.0, 4.0])))
        tensor([3., 2., 0.], dtype=torch.float64)
    """
    return _eigenvalues(gram.double()).clamp(min=0).sqrt().flip(-1)


def _eigenvalues(gram: Tensor) -> Tensor:
    """Return eigenvalues, ascending; on a CPU numpy finds those of small matrices in half the time."""
    if gram.device.type == "cpu":
        return torch.from_numpy(np.linalg.eigvalsh(gram.detach().numpy()))
    found: Tensor = torch.linalg.eigvalsh(gram)
    return found


def core(gradient: LayerGradient) -> Tensor:
    """Return a small matrix with the same singular values as the gradient, fp64.

    With fewer rows of factors than of either dimension, LᵀR = Q_L (S_L S_Rᵀ) Q_Rᵀ from a QR of each, so the T × T
    middle is enough. Otherwise it is the gradient itself, or its non-zero rows.
    """
    if isinstance(gradient, IndexedGradient):
        return gradient.rows.double()
    if factors := thin_factors(gradient):
        left, right = factors
        return _triangle(left.double()) @ _triangle(right.double()).T
    return gradient.take(slice(None))


def _triangle(factor: Tensor) -> Tensor:
    """Return the (T, T) triangle S of factorᵀ = QS."""
    triangle: Tensor = torch.linalg.qr(factor.T, mode="r").R
    return triangle


def rank_tolerance(values: np.ndarray, shape: tuple[int, int]) -> float:
    """Return σ₁ · max(rows, columns) · ε of fp32, below which a singular value of fp32 factors is rounding."""
    return float(values[0]) * max(shape) * _EPS_FP32 if len(values) else 0.0


def energy_rank(values: np.ndarray, energy: float) -> int:
    """Return the smallest k whose leading singular values hold a share ``energy`` of the squared norm.

    Raises:
        GeometryError: If the share is not above 0 and at most 1.
    """
    if not 0 < energy <= 1:
        raise GeometryError(f"expected a share of the energy above 0 and at most 1, found {energy}; give e.g. 0.9")
    squared = values**2
    if not squared.sum():
        return 0
    return int(np.argmax(np.cumsum(squared) / squared.sum() >= energy - _ROUNDING)) + 1
