"""Singular values of many weighted sums of the same gradients, without a sum of gradients for each."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from geomkit.gradients.dense import DenseGradient
from geomkit.gradients.factored import FactoredGradient
from geomkit.gradients.indexed import IndexedGradient
from geomkit.gradients.layer_gradient import LayerGradient, row_products, strips, thin_factors
from geomkit.svd.singular_values import singular_values_of_gram

_HELD = 2**24  # numbers of examples, sums or Grams that are held at a time


def weighted_spectra(gradients: Sequence[LayerGradient], weights: Tensor) -> Tensor:
    """Return the singular values of Σ_i w_i G_i for many weights.

    While all tokens together are fewer than either dimension, one QR serves all sums: they differ in the weights of a
    T × T middle only. Otherwise each example is formed, some rows at a time, and all sums are one product.

    Args:
        gradients: N gradients of one parameter.
        weights: (D, N) fp64, on the CPU.

    Returns:
        (D, K) fp64, descending, each to 1e-7 of its largest
        (:func:`geomkit.svd.singular_values.singular_values_of_gram`); K is the
        number of tokens or the smaller dimension.
    """
    weights = weights.to(gradients[0].device)
    indexed = [gradient for gradient in gradients if isinstance(gradient, IndexedGradient)]
    if len(indexed) == len(gradients):
        gradients = _without_other_rows(indexed)
    thin = [factors for gradient in gradients if (factors := thin_factors(gradient)) is not None]
    # Factors of rows that were looked up are one-hot: larger than what is formed.
    tokens = sum(len(left) for left, _ in thin)
    if not indexed and len(thin) == len(gradients) and tokens < min(gradients[0].matrix_shape):
        return _by_one_frame(thin, weights)
    upright = [_upright(gradient) for gradient in gradients]
    step = max(1, _HELD // upright[0].matrix_shape[1] ** 2)
    return torch.cat([_by_strips(upright, weights[start : start + step]) for start in range(0, len(weights), step)])


def _without_other_rows(gradients: Sequence[IndexedGradient]) -> list[IndexedGradient]:
    """Leave out the rows that none of the gradients looked up."""
    used = torch.cat([gradient.indices for gradient in gradients]).unique()  # type: ignore[no-untyped-call]
    return [
        IndexedGradient(torch.searchsorted(used, gradient.indices), gradient.rows, len(used), gradient.tokens)
        for gradient in gradients
    ]


def _by_one_frame(thin: Sequence[tuple[Tensor, Tensor]], weights: Tensor) -> Tensor:
    left, right = (
        torch.linalg.qr(torch.cat(side).double().T, mode="r").R.contiguous() for side in zip(*thin, strict=True)
    )
    lengths = torch.tensor([len(own) for own, _ in thin], device=weights.device)
    by_token = weights.repeat_interleave(lengths, dim=1)
    middles = ((left * some) @ right.T for some in by_token)
    return torch.stack([singular_values_of_gram(middle @ middle.T) for middle in middles])


def _by_strips(gradients: Sequence[LayerGradient], weights: Tensor) -> Tensor:
    rows, columns = gradients[0].matrix_shape
    grams = weights.new_zeros(len(weights), columns, columns)
    for strip in _few_rows(rows, (len(gradients) + len(weights)) * columns):
        formed = torch.stack([gradient.take(strip).flatten() for gradient in gradients])
        sums = row_products(weights, formed.T).reshape(len(weights), -1, columns)
        grams += sums.mT @ sums
    return singular_values_of_gram(grams)


def _few_rows(rows: int, numbers: int) -> Iterator[slice]:
    step = max(1, _HELD // numbers)
    for strip in strips(rows):
        for start in range(strip.start, strip.stop, step):
            yield slice(start, min(start + step, strip.stop))


def _upright(gradient: LayerGradient) -> LayerGradient:
    """Return a gradient with the same singular values and no more columns than rows."""
    rows, columns = gradient.matrix_shape
    if isinstance(gradient, FactoredGradient):
        return FactoredGradient(gradient.right, gradient.left) if rows < columns else gradient
    if rows < columns:
        return DenseGradient(gradient.take(slice(None)).T, gradient.tokens)
    return gradient
