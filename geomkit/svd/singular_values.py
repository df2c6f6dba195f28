"""Singular values of gradients, from their small Gram matrices where that is exact, and what counts as rounding.

A gradient of T tokens has T × T squares, whose eigenvalues are many times cheaper than an SVD of its factors. An error
bound tells for each gradient whether squaring lost too much; only then are the factors themselves decomposed.
"""

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from geomkit.errors import GeometryError
from geomkit.gradients.factored import FactoredGradient
from geomkit.gradients.indexed import IndexedGradient
from geomkit.gradients.layer_gradient import LayerGradient, row_products, strips, thin_factors
from geomkit.utils.arguments import check_finite

_EPS_FP32 = float(np.finfo(np.float32).eps)
_PRECISION = 5e-7  # largest bound on the error of a singular value, relative to σ₁, that is taken from squares
_ROUNDING = 1e-12  # ten equal values reach 90 % with the ninth, whatever the last bit of their sum says


def singular_values(gradient: LayerGradient) -> np.ndarray:
    """Return the singular values of a gradient, descending, as many as its rank bound.

    They are exact to 1e-7 of the largest, see :func:`singular_values_of`.

    Example:
        >>> from geomkit.gradients.factored import FactoredGradient
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
        >>> from geomkit.gradients.dense import DenseGradient
        >>> from geomkit.gradients.factored import FactoredGradient
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
            kept = torch.linalg.svdvals(small_equivalent(gradients[place])) if redo else found
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


def small_equivalent(gradient: LayerGradient) -> Tensor:
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


_EPS_FP64 = torch.finfo(torch.float64).eps
_STACKED = 2**20  # numbers of the small matrices that are decomposed in one call

_Stack = tuple[list[int], Tensor, Tensor]
"""Places of n gradients, matrices (n, k, k) with their squared singular values, and rounding errors (n,) of these."""


def squares_of(gradients: Sequence[LayerGradient]) -> Iterator[_Stack]:
    """Square every gradient and stack those of one size, a few at a time."""
    grams = _Grams(gradients)
    held: dict[tuple[int, int], list[tuple[int, tuple[Tensor, ...]]]] = {}
    for place, gradient in enumerate(gradients):
        found = grams.of(gradient)
        size = found[0].numel()
        waiting = held.setdefault((len(found), size), [])
        if size:
            waiting.append((place, found))
        if len(waiting) * size >= _STACKED:
            yield _stacked(held.pop((len(found), size)))
    yield from (_stacked(waiting) for waiting in held.values() if waiting)


def _stacked(held: list[tuple[int, tuple[Tensor, ...]]]) -> _Stack:
    places, found = zip(*held, strict=True)
    stacks = [torch.stack(matrices) for matrices in zip(*found, strict=True)]
    if len(stacks) == 1:
        return list(places), stacks[0], _EPS_FP64 * _size(stacks[0])
    return list(places), *_product(*stacks)


def _product(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return symmetric matrices (n, T, T) with the eigenvalues of left @ right, and their rounding errors (n,)."""
    noise = _EPS_FP64 * _size(left) * _size(right)
    left, right, stand_in = _without_dead(left, right)
    lower, failed = torch.linalg.cholesky_ex(left + stand_in)
    if failed.any():  # tokens that repeat one another make one of the two singular
        swap = (failed > 0)[:, None, None]
        left, right = torch.where(swap, right, left), torch.where(swap, left, right)
        lower, failed = torch.linalg.cholesky_ex(left + stand_in)
        noise = noise.masked_fill(failed > 0, float("inf"))
        lower = lower.masked_fill((failed > 0)[:, None, None], 0.0)
    return lower.mT @ right @ lower, noise


def _without_dead(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Take out the tokens whose factor is zero on a side: they add nothing, but stop a Cholesky decomposition.

    The first token of a text is one for the queries: it has itself only to attend to. The third matrix has ones in
    their places, to be added to the side that is decomposed; the other side's zeros keep them out of the product.
    """
    dead = (left.diagonal(dim1=1, dim2=2) == 0) | (right.diagonal(dim1=1, dim2=2) == 0)
    stand_in = torch.diag_embed(dead.double())
    if not dead.any():
        return left, right, stand_in
    crossed = dead[:, :, None] | dead[:, None, :]
    return left.masked_fill(crossed, 0.0), right.masked_fill(crossed, 0.0), stand_in


def _size(matrices: Tensor) -> Tensor:
    """Return the largest column sum of magnitudes of each matrix, at least its spectral norm."""
    sizes: Tensor = matrices.abs().sum(1).amax(1)
    return sizes


class _Grams:
    """The small Gram matrices of gradients; that of a factor which several have in common is made once."""

    def __init__(self, gradients: Sequence[LayerGradient]) -> None:
        factored = [gradient for gradient in gradients if isinstance(gradient, FactoredGradient)]
        self._uses = Counter(_memory(factor) for gradient in factored for factor in gradient.factors())
        self._kept: dict[_Memory, Tensor] = {}

    def of(self, gradient: LayerGradient) -> tuple[Tensor, ...]:
        """Return LLᵀ and RRᵀ where factors are thin, otherwise the Gram matrix of the smaller side."""
        if isinstance(gradient, IndexedGradient):
            rows = gradient.rows
            return (_gram(rows if len(rows) < rows.shape[1] else rows.T),)
        if factors := thin_factors(gradient):
            return self._shared(factors[0]), self._shared(factors[1])
        return (_gram_of_smaller_side(gradient),)

    def _shared(self, factor: Tensor) -> Tensor:
        key = _memory(factor)
        found = self._kept.get(key)
        if found is None:
            found = _gram(factor)
            if self._uses[key] > 1:
                self._kept[key] = found
        return found


_Memory = tuple[int, torch.Size, tuple[int, ...]]


def _memory(tensor: Tensor) -> _Memory:
    """Return what two tensors, both alive, agree in only if they are the same numbers."""
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def _gram(rows: Tensor) -> Tensor:
    return row_products(rows, rows)


def _gram_of_smaller_side(gradient: LayerGradient) -> Tensor:
    rows, columns = gradient.matrix_shape
    if rows < columns:
        return _gram(gradient.take(slice(None)))
    squares = (_gram(gradient.take(strip).T) for strip in strips(rows))
    return sum(squares, torch.zeros(columns, columns, dtype=torch.float64, device=gradient.device))
