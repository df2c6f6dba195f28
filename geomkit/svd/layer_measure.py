"""The spectrum of one parameter's mean gradient, with its null and its changes when examples are left out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from geomkit.gradients.factored import FactoredGradient
from geomkit.gradients.layer_gradient import LayerGradient
from geomkit.svd.layer_spectrum import LayerSpectrum, layer_spectrum
from geomkit.svd.left_out import EXACT_BOUND, exact_spectra, first_order_spectra, group_parts
from geomkit.svd.nulls import null_singular_values, random_factor_null
from geomkit.svd.token_decomposition import TokenDecomposition, token_decomposition


@dataclass(frozen=True, eq=False)
class LayerMeasure:
    """The spectrum of one gradient.

    Attributes:
        spectrum: Singular values of the gradient.
        null: Spectra of random gradients.
        without: Spectra without one group of examples in turn; empty without samples.
        left: Function from k to the k leading left singular vectors, if the gradient was decomposed with vectors.
    """

    spectrum: LayerSpectrum
    null: tuple[LayerSpectrum, ...]
    without: tuple[LayerSpectrum, ...] = ()
    left: Callable[[int], Tensor] | None = None

    def kept(self) -> "LayerMeasure":
        """Return the spectra without the vectors, whose function holds the gradient in memory."""
        return replace(self, left=None)


def measure_layer(
    parameter: str,
    gradient: LayerGradient,
    parts: Sequence[LayerGradient],
    groups: Sequence[np.ndarray],
    null_draws: int,
    generator: torch.Generator,
    *,
    vectors: bool = False,
) -> LayerMeasure:
    """Return the spectrum of a gradient with its null, and without one group of examples in turn.

    Args:
        parameter: Name of the parameter.
        gradient: The mean gradient.
        parts: Gradients of the examples, whose sum is a multiple of the mean; empty without samples.
        groups: Indices of the examples in every group.
        null_draws: Number of random gradients.
        generator: Source of randomness of the null.
        vectors: Whether to return the left singular vectors of a factored gradient, too.
    """
    null = tuple(_null(parameter, gradient, null_draws, generator))
    leave_out = bool(parts) and len(groups) > 1
    first_order = leave_out and gradient.rank_bound > EXACT_BOUND
    # 1. One decomposition with vectors, if vectors are needed or examples are left out to first order.
    decomposition: TokenDecomposition | None = None
    if isinstance(gradient, FactoredGradient) and gradient.tokens and (vectors or first_order):
        decomposition = token_decomposition(gradient)
        values = decomposition.values.cpu().numpy()[: gradient.rank_bound]
        spectrum = LayerSpectrum(parameter, gradient.matrix_shape, gradient.tokens, gradient.rank_bound, values)
    else:
        spectrum = layer_spectrum(parameter, gradient)
    left = None if decomposition is None else decomposition.left
    if not leave_out:
        return LayerMeasure(spectrum, null, (), left)
    # 2. Spectra without each group: exact ones of small gradients, and to first order of large ones.
    if not first_order:
        return LayerMeasure(spectrum, null, tuple(exact_spectra(parameter, parts, groups)), left)
    tokens = [sum(parts[place].tokens for place in group) for group in groups]
    if decomposition is not None:
        shares = decomposition.parts_of_groups([part.tokens for part in parts], [group.tolist() for group in groups])
        by_group = shares[:, : gradient.rank_bound].cpu().numpy()
    else:
        by_group = group_parts(parts, groups, gradient.rank_bound)
        # The parts add up to the spectrum of the sum of the parts, a multiple of the mean's.
        by_group *= spectrum.singular_values.sum() / max(by_group.sum(), np.finfo(float).tiny)
    return LayerMeasure(spectrum, null, tuple(first_order_spectra(spectrum, by_group, tokens)), left)


def _null(parameter: str, gradient: LayerGradient, draws: int, generator: torch.Generator) -> Sequence[LayerSpectrum]:
    if isinstance(gradient, FactoredGradient) and gradient.tokens:
        shape, tokens, bound = gradient.matrix_shape, gradient.tokens, gradient.rank_bound
        values = null_singular_values(gradient, draws, generator)
        return [LayerSpectrum(parameter, shape, tokens, bound, row) for row in values]
    return [layer_spectrum(parameter, random_factor_null(gradient, generator)) for _ in range(draws)]
