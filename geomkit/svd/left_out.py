"""Spectra of a mean gradient without one group of its examples, exactly if small and to first order if large."""

from collections.abc import Iterator, Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor

from geomkit.gradients.accumulator import add
from geomkit.gradients.arithmetic import factored_of
from geomkit.gradients.dense import DenseGradient
from geomkit.gradients.factored import FactoredGradient
from geomkit.gradients.layer_gradient import LayerGradient, plain_matmul, row_products
from geomkit.svd.layer_spectrum import LayerSpectrum
from geomkit.svd.singular_values import singular_values_of, singular_values_of_gram
from geomkit.svd.singular_vectors import exact_vectors
from geomkit.svd.weighted_sums import without_unused_rows
from geomkit.utils.arguments import check_finite

EXACT_BOUND = 128
"""Largest rank bound at which the spectrum without each group is computed; larger spectra are taken to first order."""

_NUMBERS = 2**24
"""Largest number of entries of the sums without a group that are formed at a time."""


def exact_spectra(parameter: str, parts: Sequence[LayerGradient], groups: Sequence[np.ndarray]) -> list[LayerSpectrum]:
    """Return the spectra of the sum of gradients without the gradients of one group, for every group in turn.

    Args:
        parameter: Name of the parameter.
        parts: Gradients of N examples.
        groups: Indices of the examples in every group.
    """
    shape = parts[0].matrix_shape
    if len(factored_of(parts)) == len(parts) and sum(part.floats for part in parts) > prod(shape):
        values = _spectra_of_formed_sums(factored_of(parts), groups)
        tokens = [sum(parts[place].tokens for place in group) for group in groups]
        sizes = [(sum(tokens) - count, min(*shape, sum(tokens) - count)) for count in tokens]
    else:
        sums = list(_sums_without(parts, groups))
        values = singular_values_of(sums)
        sizes = [(gradient.tokens, gradient.rank_bound) for gradient in sums]
    return [
        LayerSpectrum(parameter, shape, count, bound, row[:bound])
        for (count, bound), row in zip(sizes, values.cpu().numpy(), strict=True)
    ]


def _spectra_of_formed_sums(parts: Sequence[FactoredGradient], groups: Sequence[np.ndarray]) -> Tensor:
    """Return the (J, k) singular values of the sum without one group in turn, of which the matrices are formed.

    Args:
        parts: Gradients LᵀR of N examples, which together have more numbers than the matrix.
        groups: J groups of indices of examples.
    """
    height, width = parts[0].shape
    # 1. The sum of every group, and of all, transposed to have at most as many rows as columns.
    sums = torch.stack([_formed_sum([parts[place] for place in group]) for group in groups])
    sums = sums if height <= width else sums.mT.contiguous()
    # In double precision, as the largest group cancels in the difference below.
    total = sums.sum(0, dtype=torch.float64)
    # 2. Without a group: the eigenvalues of GGᵀ, of several groups side by side.
    step = max(1, _NUMBERS // total.numel())
    spectra = []
    for start in range(0, len(groups), step):
        rests = total - sums[start : start + step].double()
        grams = torch.stack([row_products(rest, rest) for rest in rests])
        check_finite(grams, f"a gradient of shape {(height, width)}")
        spectra.append(singular_values_of_gram(grams))
    return torch.cat(spectra)


def _formed_sum(parts: Sequence[FactoredGradient]) -> Tensor:
    left, right = (torch.cat(side) for side in zip(*(part.factors() for part in parts), strict=True))
    return plain_matmul(left.T, right)


def _sums_without(parts: Sequence[LayerGradient], groups: Sequence[np.ndarray]) -> Iterator[LayerGradient]:
    """Yield the sum of all gradients without the gradients of one group, for every group in turn."""
    sums = [add([parts[place] for place in group]) for group in groups]
    total = add(sums)
    for place, part in enumerate(sums):
        if isinstance(total, DenseGradient) and part.floats < total.floats:
            rest = total.tensor.clone()
            part.add_to(rest, -1.0)
            yield DenseGradient(rest, total.tokens - part.tokens)
        else:
            yield add([*sums[:place], *sums[place + 1 :]])


def first_order_spectra(
    total: LayerSpectrum, group_parts: np.ndarray, group_tokens: Sequence[int]
) -> list[LayerSpectrum]:
    """Return the spectra without one group of examples to first order, σ_i − u_iᵀ G_j v_i (infinitesimal jackknife).

    Args:
        total: Spectrum of the sum Σ_j G_j over J groups, or of a multiple of it.
        group_parts: (J, r) parts u_iᵀ G_j v_i of the groups in the singular values; together they are the spectrum.
        group_tokens: Number of tokens of each group.
    """
    remaining = np.sort(np.maximum(total.singular_values - group_parts, 0.0), axis=1)[:, ::-1]
    return [
        LayerSpectrum(total.parameter, total.shape, total.tokens - tokens, total.rank_bound, values)
        for values, tokens in zip(remaining, group_tokens, strict=True)
    ]


def group_parts(parts: Sequence[LayerGradient], groups: Sequence[np.ndarray], bound: int) -> np.ndarray:
    """Return the (J, r) parts u_iᵀ G_j v_i of J groups in the r singular values of the sum, for gradients of any form.

    :func:`geomkit.svd.token_decomposition.token_decomposition` costs less where all gradients are factored.

    Args:
        parts: Gradients of N examples.
        groups: Indices of the examples in every group.
        bound: r, the rank bound of the sum.
    """
    gradients = without_unused_rows(parts)
    vectors = exact_vectors(add(gradients), "both")
    k = min(bound, len(vectors.values))
    left, right = vectors.left(k), vectors.right(k)
    by_group = [_sum((gradients[place].matmul(right) * left).sum(0) for place in group) for group in groups]
    return np.asarray(torch.nan_to_num(torch.stack(by_group)).cpu().numpy())


def _sum(tensors: Iterator[Tensor]) -> Tensor:
    return torch.stack(list(tensors)).sum(0)
