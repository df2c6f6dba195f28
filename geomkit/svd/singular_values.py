"""Singular values of gradients, from small Gram matrices where their error bound allows it, and their rounding error.

A gradient of T tokens has T × T Gram matrices, whose eigenvalues are many times cheaper than an SVD of the factors. An
error bound tells for every gradient whether squaring loses too many digits; if so, the factors are decomposed instead.
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
from geomkit.svd.eigenpairs import eigenvalues
from geomkit.utils.arguments import check_finite

_EPS_FP32 = float(np.finfo(np.float32).eps)
_EPS_FP64 = torch.finfo(torch.float64).eps
_PRECISION = 5e-7
"""Largest error bound relative to σ₁ at which singular values are taken from a Gram matrix."""
_ROUNDING = 1e-12
"""Slack of a share of the energy: nine of ten equal values hold 90 %, whatever the last bit of their sum is."""
_BATCH_NUMBERS = 2**20
"""Number of entries of all small matrices that are decomposed in one call, about."""


def singular_values(gradient: LayerGradient) -> np.ndarray:
    """Return the singular values of a gradient, descending.

    The values are exact to 1e-7 of the largest value, see :func:`singular_values_of`.

    Returns:
        (rank bound,) fp64.

    Example:
        >>> from geomkit.gradients.factored import FactoredGradient
        >>> singular_values(FactoredGradient(torch.eye(2, 5), 3 * torch.eye(2, 4)))
        array([3., 3.])
    """
    return np.asarray(singular_values_of([gradient])[0].cpu().numpy())


def singular_values_of(gradients: Sequence[LayerGradient]) -> Tensor:
    """Return the singular values of many gradients of any shapes and forms, exact to 1e-7 of the largest value.

    The squared singular values of a gradient LᵀR are the eigenvalues of CᵀBC, with the Cholesky decomposition
    LLᵀ = CCᵀ and B = RRᵀ in fp64, at a fraction of the cost of two QRs and an SVD. A factor that gradients share (the
    input of queries, keys and values) is squared once. Squaring costs half of fp64's digits: errors are below
    √(ε ‖LLᵀ‖₁ ‖RRᵀ‖₁). If that bound is more than 5e-7 of the largest value (tokens that nearly cancel), or neither
    factor has a Cholesky decomposition, the factors are decomposed by two QRs and an SVD.

    Args:
        gradients: N gradients on one device.

    Returns:
        (N, K) fp64, every row descending; K is the largest rank bound, and values beyond a gradient's rank bound are
        zero.

    Raises:
        GeometryError: If a gradient is not finite.

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
    # 1. A batch: matrices of one size whose eigenvalues are the squared singular values, and bounds of their errors.
    for places, squares, squared_error in _squared_batches(gradients):
        check_finite(squares, f"a gradient of shape {gradients[places[0]].matrix_shape}")
        # 2. One call finds the eigenvalues of the whole batch.
        batch_values = singular_values_of_gram(squares)
        # 3. An error δ of σ² is an error of up to √δ of σ: where √δ is too large relative to σ₁, decompose the factors.
        inexact = (squared_error > (_PRECISION * batch_values[:, 0]) ** 2).tolist()
        for place, from_squares, decompose in zip(places, batch_values, inexact, strict=True):
            spectrum = torch.linalg.svdvals(small_equivalent(gradients[place])) if decompose else from_squares
            values[place, : bounds[place]] = spectrum[: bounds[place]]
    return values


def singular_values_of_gram(gram: Tensor) -> Tensor:
    """Return the singular values of a matrix from its Gram matrix GᵀG or GGᵀ, as the roots of the eigenvalues.

    Squaring costs half of fp64's digits: errors are of the order of √ε σ₁ = 1.5e-8 σ₁, however exact the Gram matrix
    is, and smaller values are rounding. A larger value σ loses a factor of σ₁/σ of its precision.

    Args:
        gram: (…, n, n) symmetric, positive semi-definite but for rounding.

    Returns:
        (…, n) fp64, descending.

    Example:
        >>> singular_values_of_gram(torch.diag(torch.tensor([0.0, 9.0, 4.0])))
        tensor([3., 2., 0.], dtype=torch.float64)
    """
    return eigenvalues(gram.double()).clamp(min=0).sqrt().flip(-1)


def gram_error_is_small(left: Tensor, right: Tensor, values: Tensor) -> bool:
    """Return whether singular values of LᵀR from Gram matrices are exact to :data:`_PRECISION` of the largest value.

    Args:
        left: (T, T) Gram matrix LLᵀ, fp64.
        right: (T, T) Gram matrix RRᵀ, fp64.
        values: (T,) singular values, descending.
    """
    squared_error = _EPS_FP64 * _column_sums(left[None]) * _column_sums(right[None])
    return bool(squared_error <= (_PRECISION * values[0]) ** 2)


def small_equivalent(gradient: LayerGradient) -> Tensor:
    """Return a small fp64 matrix with the same singular values as the gradient.

    With fewer tokens T than rows and columns, LᵀR = Q_L (S_L S_Rᵀ) Q_Rᵀ from the QRs of both factors, and the T × T
    middle S_L S_Rᵀ is returned. Otherwise the gradient itself is returned, or its non-zero rows.
    """
    if isinstance(gradient, IndexedGradient):
        return gradient.rows.double()
    if factors := thin_factors(gradient):
        left, right = factors
        return _triangle(left.double()) @ _triangle(right.double()).T
    return gradient.take(slice(None))


def rank_tolerance(values: np.ndarray, shape: tuple[int, int]) -> float:
    """Return σ₁ · max(rows, columns) · ε of fp32: smaller singular values of fp32 factors are rounding.

    Args:
        values: Singular values, descending.
        shape: Rows and columns of the matrix.
    """
    return float(values[0]) * max(shape) * _EPS_FP32 if len(values) else 0.0


def energy_rank(values: np.ndarray, energy: float) -> int:
    """Return the smallest k such that the k leading singular values hold a share ``energy`` of the squared norm.

    Args:
        values: Singular values, descending.
        energy: Share of the squared norm, above 0 and at most 1.

    Returns:
        k; 0 if all singular values are zero.

    Raises:
        GeometryError: If the share is out of range.
    """
    if not 0 < energy <= 1:
        raise GeometryError(f"expected a share of the energy above 0 and at most 1, found {energy}; give e.g. 0.9")
    squared = values**2
    if not squared.sum():
        return 0
    return int(np.argmax(np.cumsum(squared) / squared.sum() >= energy - _ROUNDING)) + 1


def _triangle(factor: Tensor) -> Tensor:
    """Return the (T, T) triangle S of factorᵀ = QS."""
    triangle: Tensor = torch.linalg.qr(factor.T, mode="r").R
    return triangle


_Batch = tuple[list[int], Tensor, Tensor]
"""Indices of n gradients, matrices (n, k, k) with the gradients' squared singular values as eigenvalues, and the
rounding errors (n,) of these eigenvalues."""

_Grams = tuple[Tensor, ...]
"""Gram matrices of one gradient: LLᵀ and RRᵀ of thin factors, or the Gram matrix of the smaller side."""


def _squared_batches(gradients: Sequence[LayerGradient]) -> Iterator[_Batch]:
    """Yield the squares of all gradients in batches of one size, as soon as a batch is large enough for one call."""
    gram_cache = _GramCache(gradients)
    waiting: dict[tuple[int, int], list[tuple[int, _Grams]]] = {}
    for place, gradient in enumerate(gradients):
        grams = gram_cache.grams(gradient)
        size = grams[0].numel()
        batch = waiting.setdefault((len(grams), size), [])
        if size:
            batch.append((place, grams))
        if len(batch) * size >= _BATCH_NUMBERS:
            yield _squared(waiting.pop((len(grams), size)))
    yield from (_squared(batch) for batch in waiting.values() if batch)


def _squared(batch: list[tuple[int, _Grams]]) -> _Batch:
    """Stack the Gram matrices of gradients of one size, and multiply those of two thin factors."""
    places, grams = zip(*batch, strict=True)
    stacks = [torch.stack(matrices) for matrices in zip(*grams, strict=True)]
    if len(stacks) == 1:
        return list(places), stacks[0], _EPS_FP64 * _column_sums(stacks[0])
    return list(places), *_product(*stacks)


def _product(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return symmetric matrices with the eigenvalues of left @ right, and the rounding errors of the eigenvalues.

    Args:
        left: (n, T, T) Gram matrices LLᵀ.
        right: (n, T, T) Gram matrices RRᵀ.

    Returns:
        (n, T, T) matrices CᵀBC, and (n,) errors ε ‖LLᵀ‖₁ ‖RRᵀ‖₁, infinite where neither side has a Cholesky
        decomposition.
    """
    squared_error = _EPS_FP64 * _column_sums(left) * _column_sums(right)
    # 1. Tokens with a zero factor add nothing to the gradient, but make a Gram matrix singular: take these tokens out.
    left, right, replacement = _without_zero_tokens(left, right)
    # 2. left = CCᵀ: left @ right has the eigenvalues of the symmetric CᵀBC with B = right.
    lower, failed = torch.linalg.cholesky_ex(left + replacement)
    if failed.any():
        # 3. Tokens that repeat one another make one side singular: decompose the other side instead.
        swap = (failed > 0)[:, None, None]
        left, right = torch.where(swap, right, left), torch.where(swap, left, right)
        lower, failed = torch.linalg.cholesky_ex(left + replacement)
        # 4. Both sides singular: an infinite error sends the gradient to the decomposition of its factors.
        squared_error = squared_error.masked_fill(failed > 0, float("inf"))
        lower = lower.masked_fill((failed > 0)[:, None, None], 0.0)
    return lower.mT @ right @ lower, squared_error


def _without_zero_tokens(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return both Gram matrices without the tokens whose factor is zero on either side, and ones for their diagonal.

    Such a token adds nothing to the gradient, but stops a Cholesky decomposition. The first token of a text is an
    example: that token can attend only to itself, so its query has no gradient. The ones replace the token's diagonal
    entry on the side that is decomposed; the zeros of the other side keep the token out of the product.
    """
    zero = (left.diagonal(dim1=1, dim2=2) == 0) | (right.diagonal(dim1=1, dim2=2) == 0)
    replacement = torch.diag_embed(zero.double())
    if not zero.any():
        return left, right, replacement
    crossed = zero[:, :, None] | zero[:, None, :]
    return left.masked_fill(crossed, 0.0), right.masked_fill(crossed, 0.0), replacement


def _column_sums(matrices: Tensor) -> Tensor:
    """Return the 1-norm of every matrix, its largest column sum of magnitudes: a bound on the spectral norm."""
    norms: Tensor = matrices.abs().sum(1).amax(1)
    return norms


class _GramCache:
    """The small Gram matrices of gradients; the Gram matrix of a factor that gradients share is computed once."""

    def __init__(self, gradients: Sequence[LayerGradient]) -> None:
        factored = [gradient for gradient in gradients if isinstance(gradient, FactoredGradient)]
        self._uses = Counter(_memory_key(factor) for gradient in factored for factor in gradient.factors())
        self._cached: dict[_MemoryKey, Tensor] = {}

    def grams(self, gradient: LayerGradient) -> _Grams:
        """Return LLᵀ and RRᵀ of thin factors, otherwise the Gram matrix of the smaller side."""
        if isinstance(gradient, IndexedGradient):
            rows = gradient.rows
            return (_gram(rows if len(rows) < rows.shape[1] else rows.T),)
        if factors := thin_factors(gradient):
            return self._factor_gram(factors[0]), self._factor_gram(factors[1])
        return (gram_of_smaller_side(gradient),)

    def _factor_gram(self, factor: Tensor) -> Tensor:
        key = _memory_key(factor)
        gram = self._cached.get(key)
        if gram is None:
            gram = _gram(factor)
            if self._uses[key] > 1:
                self._cached[key] = gram
        return gram


_MemoryKey = tuple[int, torch.Size, tuple[int, ...]]


def _memory_key(tensor: Tensor) -> _MemoryKey:
    """Return a key that two living tensors share only if they are the same numbers in memory."""
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def _gram(rows: Tensor) -> Tensor:
    return row_products(rows, rows)


def gram_of_smaller_side(gradient: LayerGradient) -> Tensor:
    """Return GGᵀ of a wide gradient, or GᵀG of a tall one as a sum over strips of rows."""
    rows, columns = gradient.matrix_shape
    if rows < columns:
        return _gram(gradient.take(slice(None)))
    squares = (_gram(gradient.take(strip).T) for strip in strips(rows))
    return sum(squares, torch.zeros(columns, columns, dtype=torch.float64, device=gradient.device))
