"""The dimension of the space that the gradients of single examples span together.

The spectrum of the mean gradient is about the rank of one matrix; the span is about the flattened gradients of all
examples, and whether these vectors lie in a space of few dimensions. Both are called "low rank", and neither follows
from the other: examples that are all alike span one dimension, whatever the rank of their gradient matrix.
"""

from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from geomkit.errors import GeometryError
from geomkit.gradients.checks import check_sets
from geomkit.gradients.copies import check_different_grams, check_different_samples
from geomkit.gradients.gradient_set import GradientSet, layer_grams
from geomkit.inputs.parameters import ALL_PARAMETERS, layer_name
from geomkit.stats.jackknife import jackknife_groups
from geomkit.svd.layer_spectrum import LayerSpectrum
from geomkit.svd.singular_values import singular_values_of_gram
from geomkit.svd.spectrum import Spectrum
from geomkit.utils.arguments import check_confidence, check_finite, check_groups, check_seed

_PARTS: Mapping[str, Callable[[str], str]] = {
    "parameter": lambda parameter: parameter,
    "layer": layer_name,
    "model": lambda _: ALL_PARAMETERS,
}
"""For each value of ``by``, the name of the part of the model that a parameter belongs to."""

_ASYMMETRY = 1e-6
"""Relative asymmetry of inner products that were accumulated in fp64 from fp32 gradients."""


def span(
    gradients: GradientSet | Mapping[str, Tensor],
    *,
    by: Literal["parameter", "layer", "model"] = "parameter",
    unit: bool = True,
    groups: int = 16,
    seed: int = 0,
    confidence: float = 0.95,
) -> Spectrum:
    """Measure how many directions the gradients of N examples span, from their inner products.

    The singular values belong to the matrix whose N rows are the flattened gradients of the examples, which is not
    formed. In the result ``tokens`` and ``rank_bound`` are N, ``unit`` is ``"examples"``, and ``shape`` is
    the shape of the Gram matrix.

    The null has examples in orthogonal directions, with the same norms. It is weak, as all gradients of one model have
    something in common; the strict null is a control set with as many examples, see
    :func:`geomkit.svd.spectrum_contrast.compare_spectra`. Intervals are jackknife intervals over examples, for sets of
    N examples, as in :func:`geomkit.svd.spectrum.spectrum`; for their coverage see tests/benchmarks/README.md.

    Args:
        gradients: A set collected with ``per_sample=True``, or by parameter the (N, N) inner products of one set of
            examples, from :func:`geomkit.collection.sample_grams.sample_grams`.
        by: Which gradients are one vector of an example: those of each parameter; of each decoder layer
            (``"layers.0"``, …; parameters outside the decoder layers by kind, such as ``"embedding"``, with a head that
            is tied to it, ``"norm"`` and ``"head"``); or of all parameters
            (:data:`~geomkit.inputs.parameters.ALL_PARAMETERS`). The parameters with the largest gradients decide over
            a vector of many, and these can differ from set to set.
        unit: Scale the gradient of every example to norm 1, so that directions are counted. Otherwise examples with a
            large gradient count for more, as in the mean gradient.
        groups: Largest number of groups of examples, of which one is left out at a time; 0 for no intervals.
        seed: Seed of the groups.
        confidence: Nominal coverage of the intervals, between 0 and 1.

    Returns:
        The spectrum of every parameter, of every layer, or of the whole model. Singular values are exact to 1e-7 of the
        largest.

    Raises:
        GeometryError: If there are no per-sample gradients, fewer than two examples, the inner products are not finite
            or not of one set with itself, all examples are copies of one row, ``by`` is none of the three, ``groups``
            is 1 or negative, or the confidence is not between 0 and 1.

    Example:
        >>> apart, alike = torch.eye(4), torch.ones(4, 4)
        >>> spectra = span({"apart": apart, "alike": alike})
        >>> [round(layer.effective_rank, 3) for layer in spectra.layers.values()]
        [4.0, 1.0]
    """
    check_groups(groups)
    check_confidence(confidence)
    check_seed(seed)
    if not isinstance(by, str) or by not in _PARTS:
        raise GeometryError(f"expected by to be one of {', '.join(_PARTS)}, found {by!r:.40}; choose one of these")
    grams = _grams(gradients)
    count = _examples(grams)
    if groups and isinstance(gradients, GradientSet):
        check_different_samples({"given": gradients}, 2)
    elif groups:
        check_different_grams("given", np.sum([gram.double().cpu().numpy() for gram in grams.values()], axis=0), 2)
    sums = _sums(grams, _PARTS[by])
    tables = {name: _cosines(gram) if unit else gram for name, gram in sums.items()}
    left_out = jackknife_groups(count, groups, np.random.default_rng(seed)) if groups else []
    remaining = [torch.from_numpy(np.setdiff1d(np.arange(count), group)) for group in left_out]
    return Spectrum(
        {name: _spectrum(name, table) for name, table in tables.items()},
        {name: (_orthogonal(name, table),) for name, table in tables.items()},
        {
            name: tuple(_spectrum(name, table[places][:, places]) for places in remaining)
            for name, table in tables.items()
        },
        confidence,
    )


def _grams(gradients: GradientSet | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the inner products of the examples' gradients, by parameter; given inner products as they are."""
    if isinstance(gradients, GradientSet):
        return layer_grams(gradients, gradients)
    grams: Mapping[str, Tensor] = gradients
    if not isinstance(gradients, Mapping) or not all(isinstance(gram, Tensor) for gram in gradients.values()):
        check_sets({"given": gradients})
    return grams


def _sums(grams: Mapping[str, Tensor], part: Callable[[str], str]) -> dict[str, Tensor]:
    """Return the inner products of the gradients of every part, the sums over its parameters, in fp64 on the CPU."""
    sums: dict[str, Tensor] = {}
    for name, gram in grams.items():
        sums[part(name)] = sums.get(part(name), 0.0) + gram.double().cpu()
    return sums


def _examples(grams: Mapping[str, Tensor]) -> int:
    """Return N; raise GeometryError unless all matrices are the inner products of N ≥ 2 examples with each other."""
    shapes = {tuple(gram.shape) for gram in grams.values()}
    count = max(max(shapes, default=()), default=0)
    if count < 2 or shapes != {(count, count)}:
        raise GeometryError(
            f"expected (N, N) inner products of N ≥ 2 examples for every parameter, found {sorted(shapes)}; "
            "give what sample_grams returns for one set of examples"
        )
    for name, gram in grams.items():
        check_finite(gram, name)
    asymmetric = [name for name, gram in grams.items() if not _symmetric(gram)]
    if asymmetric:
        raise GeometryError(
            f"expected inner products of one set with itself, found no symmetry in {asymmetric[:4]}; call sample_grams "
            "with one set"
        )
    return count


def _symmetric(gram: Tensor) -> bool:
    return bool((gram - gram.T).abs().max() <= _ASYMMETRY * gram.diagonal().abs().max())


def _cosines(gram: Tensor) -> Tensor:
    """Return the cosines between examples, from their inner products; zero for an example with a zero gradient."""
    norms = gram.diagonal().clamp(min=0).sqrt()
    inverse = torch.where(norms > 0, 1 / norms, 0.0)
    return gram * inverse[:, None] * inverse


def _spectrum(name: str, gram: Tensor) -> LayerSpectrum:
    """Return the singular values of the (N, entries) matrix whose rows are the flattened gradients."""
    count = len(gram)
    return LayerSpectrum(name, (count, count), count, count, singular_values_of_gram(gram).numpy(), "examples")


def _orthogonal(name: str, gram: Tensor) -> LayerSpectrum:
    """Return the spectrum of orthogonal gradients with the norms of the given gradients."""
    return _spectrum(name, torch.diag(gram.diagonal()))
