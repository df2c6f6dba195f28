"""The squares of gradients: small matrices whose eigenvalues are the squared singular values, and how exact these are.

LᵀR over T tokens has the singular values of the T × T product of LLᵀ and RRᵀ. Those of one size are stacked, so that
one call decomposes many; a factor that several gradients share is squared once.
"""

from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from geomkit.forms import FactoredGradient, IndexedGradient
from geomkit.layer_gradient import LayerGradient, row_products, strips, thin_factors

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
