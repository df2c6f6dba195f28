"""Random subsets of tokens that bring several gradients to the same token count, so that spectra can be compared.

The rank of a gradient is at most its number of tokens. Measures of rank therefore grow with the token count, and can
be compared only at equal counts.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import overload

import numpy as np
import torch
from torch import Tensor

from geomkit.errors import GeometryError
from geomkit.gradients.checks import check_gradients
from geomkit.gradients.factored import FactoredGradient
from geomkit.gradients.gradient_set import Coverage, GradientSet, check_one_shape
from geomkit.gradients.indexed import IndexedGradient
from geomkit.gradients.layer_gradient import LayerGradient
from geomkit.utils.arguments import check_seed
from geomkit.utils.seeding import parameter_generator

_LOGGER = logging.getLogger(__name__)

_Parts = dict[str, tuple[FactoredGradient, ...]]
"""By parameter: the gradients of all examples, or the mean gradient alone."""


@overload
def match_tokens(*sets: GradientSet, seed: int = 0) -> tuple[GradientSet, ...]: ...
@overload
def match_tokens(*sets: Mapping[str, LayerGradient], seed: int = 0) -> tuple[Mapping[str, LayerGradient], ...]: ...
def match_tokens(*sets: Mapping[str, LayerGradient], seed: int = 0) -> tuple[Mapping[str, LayerGradient], ...]:
    """Return the gradients with the same number of tokens in every set, parameter by parameter.

    A set with more tokens than the smallest set keeps a random subset of its tokens. Only factored gradients can be
    thinned: the linear layers of sets collected with ``form="factored"`` or ``per_sample=True``; all other parameters
    are left out. A layer with a zero gradient in a set is left out too, with a logged warning; an example is LoRA's
    ``lora_A`` before the first step.

    A set collected per sample stays a set with samples: the subset is drawn from the tokens of all examples together,
    every example keeps its part of the subset, and the mean is the mean of the thinned examples with unchanged weights.
    The losses and the counts of examples and scored tokens do not change. The tokens are not reweighted:
    spectra, subspaces and cosines do not depend on the scale.

    Args:
        sets: Two or more sets of gradients by parameter, of the same model.
        seed: Seed of the subsets; the subset of a parameter does not depend on the other parameters.

    Returns:
        The sets, in order, with the parameters that are factored in all of them: a ``GradientSet`` for a
        ``GradientSet``, a dict for any other mapping.

    Raises:
        GeometryError: If there are fewer than two sets, a set holds something other than gradients, a parameter has
            two shapes, or no parameter is factored in all sets.

    Example:
        >>> short, long = (FactoredGradient(torch.ones(t, 3), torch.ones(t, 4)) for t in (2, 5))
        >>> [gradients["w"].tokens for gradients in match_tokens({"w": long}, {"w": short}, {"w": long})]
        [2, 2, 2]
    """
    check_seed(seed)
    if len(sets) < 2:
        raise GeometryError(f"expected two sets to match or more, found {len(sets)}; give e.g. safety and control")
    for gradients in sets:
        check_gradients("given", gradients)
    # 1. The parameters that all sets have, are factored in all sets, and have tokens in all sets.
    first, *others = sets
    shared = [name for name in first if all(name in gradients for gradients in others)]
    by_parameter = {name: parts for name in shared if (parts := matched_parts(sets, name, seed)) is not None}
    factored = [name for name in shared if all(_parts(gradients, name) for gradients in sets)]
    if not by_parameter:
        all_gradients = [gradient for gradients in sets for gradient in gradients.values()]
        raise GeometryError(_nothing_to_match(all_gradients, shared, factored))
    if zero := [name for name in factored if name not in by_parameter]:
        _LOGGER.warning("left %d of %d layers out, whose gradient is zero: %s", len(zero), len(factored), zero[:4])
    # 2. The sets with thinned gradients in place of their gradients.
    matched = [
        _rebuilt(gradients, {name: parts[place] for name, parts in by_parameter.items()})
        for place, gradients in enumerate(sets)
    ]
    return tuple(matched)


def matched_parts(
    sets: Sequence[Mapping[str, LayerGradient]], name: str, seed: int
) -> list[tuple[FactoredGradient, ...]] | None:
    """Return the gradients of every set's examples by one parameter, thinned as :func:`match_tokens` thins them.

    Args:
        sets: Two or more sets of gradients by parameter, which all have the parameter.
        name: Name of the parameter.
        seed: Seed of the subsets.

    Returns:
        For each set the gradients of its examples, or of its mean without samples; ``None`` if the parameter is not
        factored in all sets, or has no token in one of them.

    Raises:
        GeometryError: If the parameter has two shapes.
    """
    parts = [_parts(gradients, name) for gradients in sets]
    if not all(parts):
        return None
    tokens = min(sum(part.tokens for part in set_parts) for set_parts in parts)
    if not tokens:
        return None
    check_one_shape(name, *(set_parts[0] for set_parts in parts))
    # Every set and parameter has a generator, so that no subset depends on another.
    generators = (parameter_generator(len(sets) * seed + place, name) for place in range(len(sets)))
    return [_thinned(set_parts, tokens, generator) for set_parts, generator in zip(parts, generators, strict=True)]


def _parts(gradients: Mapping[str, LayerGradient], name: str) -> tuple[FactoredGradient, ...]:
    """Return the gradients of all examples, or the mean gradient without samples; empty if any is not factored."""
    samples = gradients.samples if isinstance(gradients, GradientSet) else ()
    parts = [sample[name] for sample in samples] or [gradients[name]]
    factored = tuple(part for part in parts if isinstance(part, FactoredGradient))
    return factored if len(factored) == len(parts) else ()


def _thinned(
    parts: Sequence[FactoredGradient], tokens: int, generator: torch.Generator
) -> tuple[FactoredGradient, ...]:
    """Return every part with its share of ``tokens`` random tokens, drawn from the tokens of all parts together."""
    ends = np.cumsum([part.tokens for part in parts])
    drawn = torch.randperm(int(ends[-1]), generator=generator)[:tokens].sort().values.numpy()
    if tokens == ends[-1]:
        return tuple(parts)
    places = np.split(drawn, np.searchsorted(drawn, ends[:-1]))
    return tuple(
        _at_tokens(part, torch.from_numpy(part_places - end + part.tokens))
        for part, part_places, end in zip(parts, places, ends, strict=True)
    )


def _at_tokens(gradient: FactoredGradient, places: Tensor) -> FactoredGradient:
    places = places.to(gradient.left.device)
    return FactoredGradient(gradient.left[places], gradient.right[places])


def _rebuilt(gradients: Mapping[str, LayerGradient], thinned: _Parts) -> Mapping[str, LayerGradient]:
    """Return a set with thinned gradients in place of its gradients."""
    if not isinstance(gradients, GradientSet):
        return {name: mean for name, (mean,) in thinned.items()}
    coverage = _restricted(gradients.coverage, thinned)
    if not gradients.samples:
        return replace(gradients, layers={name: mean for name, (mean,) in thinned.items()}, coverage=coverage)
    samples = (
        replace(sample, layers={name: parts[place] for name, parts in thinned.items()}, coverage=coverage)
        for place, sample in enumerate(gradients.samples)
    )
    means = {name: weighted_sum(parts, gradients.weights.tolist()) for name, parts in thinned.items()}
    return replace(gradients, layers=means, samples=tuple(samples), coverage=coverage)


def weighted_sum(parts: Sequence[FactoredGradient], weights: Sequence[float]) -> FactoredGradient:
    """Return the weighted sum of factored gradients as one factored gradient, with the tokens in the same order."""
    left = torch.cat([part.left * weight for part, weight in zip(parts, weights, strict=True)])
    return FactoredGradient(left, torch.cat([part.right for part in parts]))


def _restricted(coverage: Coverage, names: Mapping[str, object]) -> Coverage:
    """Return the coverage with all parameters except the given ones counted as missing."""
    seen = {name: size for name, size in coverage.seen.items() if name in names}
    dropped = {name: size for name, size in coverage.seen.items() if name not in names}
    reasons = {**coverage.reasons, **dict.fromkeys(dropped, "left out by match_tokens")}
    return replace(coverage, seen=seen, missing={**coverage.missing, **dropped}, reasons=reasons)


def _nothing_to_match(gradients: Sequence[LayerGradient], shared: Sequence[str], factored: Sequence[str]) -> str:
    """Return the error message with the reason why no parameter is left."""
    if factored:
        return f"expected a gradient other than zero in every set, found none in {factored[:4]}; train these first"
    if not shared:
        return "expected gradients of the same parameters, found none in common; collect all with the same layers="
    if any(
        isinstance(gradient, FactoredGradient) or len(gradient.shape) == 2
        for gradient in gradients
        if not isinstance(gradient, IndexedGradient)
    ):
        return 'expected factored gradients in all sets, found none; collect all with form="factored"'
    return f"expected the weight of a linear layer, found none among {shared[:4]}; choose others with layers="
