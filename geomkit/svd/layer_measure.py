"""The spectrum of one parameter's mean gradient, with its null and its changes when examples are left out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from geomkit.gradients.factored import FactoredGradient
from geomkit.gradients.layer_gradient import LayerGradient
from geomkit.svd.layer_spectrum import LayerSpectrum, layer_spectrum
from geomkit.svd.left_out import EXACT_BOUND, exact_spectra, first_order_spectra, group_parts
from geomkit.svd.nulls import NullDraws
from geomkit.svd.token_decomposition import TokenDecomposition, input_gram, token_decomposition


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
    null: NullDraws,
    *,
    vectors: bool = False,
) -> LayerMeasure:
    """Return the spectrum of a gradient with its null, and without one group of examples in turn.

    Args:
        parameter: Name of the parameter.
        gradient: The mean gradient.
        parts: Gradients of the examples, whose sum is a multiple of the mean; empty without samples.
        groups: Indices of the examples in every group.
        null: Draws from the null of the parameter's gradients.
        vectors: Whether to return the left singular vectors of a factored gradient, too.
    """
    leave_out = bool(parts) and len(groups) > 1
    first_order = leave_out and gradient.rank_bound > EXACT_BOUND
    # 1. The null. Its draws and the decomposition share the inner products of the inputs of few tokens.
    inputs = input_gram(gradient) if null.draws else None
    drawn = null.singular_values(gradient, inputs)
    nulls = tuple(LayerSpectrum(parameter, gradient.matrix_shape, gradient.tokens, len(row), row) for row in drawn)
    # 2. One decomposition with vectors, if vectors are needed or examples are left out to first order.
    decomposition: TokenDecomposition | None = None
    if isinstance(gradient, FactoredGradient) and gradient.tokens and (vectors or first_order):
        decomposition = token_decomposition(gradient, inputs)
        values = decomposition.values.cpu().numpy()[: gradient.rank_bound]
        spectrum = LayerSpectrum(parameter, gradient.matrix_shape, gradient.tokens, gradient.rank_bound, values)
    else:
        spectrum = layer_spectrum(parameter, gradient)
    left = None if decomposition is None else decomposition.left
    if not leave_out:
        return LayerMeasure(spectrum, nulls, (), left)
    # 3. Spectra without each group: exact ones of small gradients, and to first order of large ones.
    if not first_order:
        return LayerMeasure(spectrum, nulls, tuple(exact_spectra(parameter, parts, groups)), left)
    tokens = [sum(parts[place].tokens for place in group) for group in groups]
    if decomposition is not None:
        shares = decomposition.parts_of_groups([part.tokens for part in parts], [group.tolist() for group in groups])
        by_group = shares[:, : gradient.rank_bound].cpu().numpy()
    else:
        by_group = group_parts(parts, groups, gradient.rank_bound)
        # The parts add up to the spectrum of the sum of the parts, a multiple of the mean's.
        by_group *= spectrum.singular_values.sum() / max(by_group.sum(), np.finfo(float).tiny)
    return LayerMeasure(spectrum, nulls, tuple(first_order_spectra(spectrum, by_group, tokens)), left)
