"""Singular values of many weighted sums of the same gradients, without forming a gradient for every sum."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from geomkit.gradients.dense import DenseGradient
from geomkit.gradients.factored import FactoredGradient
from geomkit.gradients.indexed import IndexedGradient
from geomkit.gradients.layer_gradient import LayerGradient, row_products, strips, thin_factors
from geomkit.svd.singular_values import singular_values_of_gram

_NUMBERS = 2**24
"""Largest number of entries of formed examples, sums or Gram matrices that are in memory at a time."""


def weighted_spectra(gradients: Sequence[LayerGradient], weights: Tensor) -> Tensor:
    """Return the singular values of the sums Σ_i w_i G_i for many vectors w of weights.

    While all tokens together are fewer than rows and columns, one QR of each side serves all sums, which differ only in
    the weights of a T × T middle. Otherwise strips of rows of all examples are formed, and all sums are one product.

    Args:
        gradients: N gradients of one parameter.
        weights: (D, N) fp64, on the CPU.

    Returns:
        (D, K) fp64, every row descending, exact to 1e-7 of the largest value
        (:func:`geomkit.svd.singular_values.singular_values_of_gram`); K is the number of tokens or the smaller
        dimension.
    """
    weights = weights.to(gradients[0].device)
    gradients = without_unused_rows(gradients)
    indexed = [gradient for gradient in gradients if isinstance(gradient, IndexedGradient)]
    thin = [factors for gradient in gradients if (factors := thin_factors(gradient)) is not None]
    # Not with indexed gradients: their left factors are one-hot, and larger than the formed rows.
    tokens = sum(len(left) for left, _ in thin)
    if not indexed and len(thin) == len(gradients) and tokens < min(gradients[0].matrix_shape):
        return _from_common_triangles(thin, weights)
    tall = [_tall(gradient) for gradient in gradients]
    step = max(1, _NUMBERS // tall[0].matrix_shape[1] ** 2)
    return torch.cat([_from_strips(tall, weights[start : start + step]) for start in range(0, len(weights), step)])


def without_unused_rows(gradients: Sequence[LayerGradient]) -> Sequence[LayerGradient]:
    """Return indexed gradients without the rows that no gradient looked up; gradients of other forms as they are."""
    indexed = [gradient for gradient in gradients if isinstance(gradient, IndexedGradient)]
    if len(indexed) < len(gradients):
        return gradients
    used = torch.cat([gradient.indices for gradient in indexed]).unique()  # type: ignore[no-untyped-call]
    return [
        IndexedGradient(torch.searchsorted(used, gradient.indices), gradient.rows, len(used), gradient.tokens)
        for gradient in indexed
    ]


def _from_common_triangles(thin: Sequence[tuple[Tensor, Tensor]], weights: Tensor) -> Tensor:
    """Return the spectra of the sums LᵀWR, with all tokens in L and R and the weights of the tokens in diagonal W."""
    # 1. Lᵀ = Q_L S_L and Rᵀ = Q_R S_R: a sum has the singular values of S_L W S_Rᵀ.
    left, right = (
        torch.linalg.qr(torch.cat(side).double().T, mode="r").R.contiguous() for side in zip(*thin, strict=True)
    )
    # 2. All tokens of an example have the weight of the example.
    lengths = torch.tensor([len(factor) for factor, _ in thin], device=weights.device)
    by_token = weights.repeat_interleave(lengths, dim=1)
    middles = ((left * token_weights) @ right.T for token_weights in by_token)
    return torch.stack([singular_values_of_gram(middle @ middle.T) for middle in middles])


def _from_strips(gradients: Sequence[LayerGradient], weights: Tensor) -> Tensor:
    """Return the spectra of the sums from their Gram matrices GᵀG, added up over strips of rows."""
    rows, columns = gradients[0].matrix_shape
    grams = weights.new_zeros(len(weights), columns, columns)
    for strip in _short_strips(rows, (len(gradients) + len(weights)) * columns):
        formed = torch.stack([gradient.take(strip).flatten() for gradient in gradients])
        sums = row_products(weights, formed.T).reshape(len(weights), -1, columns)
        grams += sums.mT @ sums
    return singular_values_of_gram(grams)


def _short_strips(rows: int, numbers_per_row: int) -> Iterator[slice]:
    step = max(1, _NUMBERS // numbers_per_row)
    for strip in strips(rows):
        for start in range(strip.start, strip.stop, step):
            yield slice(start, min(start + step, strip.stop))


def _tall(gradient: LayerGradient) -> LayerGradient:
    """Return the gradient, or its transpose if it has fewer rows than columns: the singular values are the same."""
    rows, columns = gradient.matrix_shape
    if isinstance(gradient, FactoredGradient):
        return FactoredGradient(gradient.right, gradient.left) if rows < columns else gradient
    if rows < columns:
        return DenseGradient(gradient.take(slice(None)).T, gradient.tokens)
    return gradient
