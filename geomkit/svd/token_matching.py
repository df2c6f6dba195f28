"""Random subsets of tokens that bring several gradients to the same token count, so that their spectra compare.

No gradient has a higher rank than it has tokens: measures of rank grow with the token count and compare only at equal
counts.
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
from geomkit.utils.seeding import parameter_generator

_LOGGER = logging.getLogger(__name__)

_Parts = dict[str, tuple[FactoredGradient, ...]]
"""By parameter: the gradients of all examples, or the mean gradient alone."""


@overload
def match_tokens(*sides: GradientSet, seed: int = 0) -> tuple[GradientSet, ...]: ...
@overload
def match_tokens(*sides: Mapping[str, LayerGradient], seed: int = 0) -> tuple[Mapping[str, LayerGradient], ...]: ...
def match_tokens(*sides: Mapping[str, LayerGradient], seed: int = 0) -> tuple[Mapping[str, LayerGradient], ...]:
    """Return the gradients with the same number of tokens on every side, parameter by parameter.

    A side with more tokens than the smallest side keeps a random subset of its tokens. Only factored gradients can be
    thinned: the linear layers of sets collected with ``form="factored"`` or ``per_sample=True``; all other parameters
    are left out. So is, with a logged warning, a layer with a zero gradient on some side, as that of LoRA's ``lora_A``
    before the first step.

    A set collected per sample stays a set with samples: the subset is drawn from the tokens of all examples together,
    every example keeps its part of the subset, and the mean is that of the thinned examples with unchanged weights. The
    losses and the counts of examples and scored tokens stay those of the whole set. The tokens are not reweighted:
    spectra, subspaces and cosines do not depend on the scale.

    Args:
        sides: Two or more gradients by parameter, of the same model.
        seed: Seed of the subsets; the subset of a parameter does not depend on the other parameters.

    Returns:
        The sides, in order, with the parameters that are factored on all of them: sets for sets, dicts for other
        mappings.

    Raises:
        GeometryError: If there are fewer than two sides, a side is no gradients, a parameter has two shapes, or no
            parameter is factored on all sides.

    Example:
        >>> short, long = (FactoredGradient(torch.ones(t, 3), torch.ones(t, 4)) for t in (2, 5))
        >>> [side["w"].tokens for side in match_tokens({"w": long}, {"w": short}, {"w": long})]
        [2, 2, 2]
    """
    if len(sides) < 2:
        raise GeometryError(f"expected two sides to match or more, found {len(sides)}; give e.g. safety and control")
    for side in sides:
        check_gradients("given", side)
    # 1. The parameters that all sides have, are factored on all sides, and have tokens on all sides.
    first, *others = sides
    shared = [name for name in first if all(name in side for side in others)]
    parts = [{name: _parts(side, name) for name in shared} for side in sides]
    factored = [name for name in shared if all(side_parts[name] for side_parts in parts)]
    # 2. The token count of a parameter is that of its smallest side.
    tokens = {name: min(sum(part.tokens for part in side_parts[name]) for side_parts in parts) for name in factored}
    names = [name for name in factored if tokens[name] > 0]
    if not names:
        gradients = [gradient for side in sides for gradient in side.values()]
        raise GeometryError(_nothing_to_match(gradients, shared, factored))
    for name in names:
        check_one_shape(name, *(side[name] for side in sides))
    if zero := [name for name in factored if tokens[name] == 0]:
        _LOGGER.warning("left %d of %d layers out, whose gradient is zero: %s", len(zero), len(factored), zero[:4])
    # 3. Every side and parameter has a generator, so that no subset depends on another.
    matched = []
    for place, (side, side_parts) in enumerate(zip(sides, parts, strict=True)):
        generators = {name: parameter_generator(len(sides) * seed + place, name) for name in names}
        thinned = {name: _thinned(side_parts[name], tokens[name], generators[name]) for name in names}
        matched.append(_rebuilt(side, thinned))
    return tuple(matched)


def _parts(side: Mapping[str, LayerGradient], name: str) -> tuple[FactoredGradient, ...]:
    """Return the gradients of all examples, without samples the mean gradient; nothing if they are not factored."""
    samples = side.samples if isinstance(side, GradientSet) else ()
    gradients = [sample[name] for sample in samples] or [side[name]]
    factored = tuple(gradient for gradient in gradients if isinstance(gradient, FactoredGradient))
    return factored if len(factored) == len(gradients) else ()


def _thinned(
    parts: Sequence[FactoredGradient], tokens: int, generator: torch.Generator
) -> tuple[FactoredGradient, ...]:
    """Draw a number of tokens from those of all parts together, and return every part with its drawn tokens."""
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


def _rebuilt(side: Mapping[str, LayerGradient], thinned: _Parts) -> Mapping[str, LayerGradient]:
    """Return a side with thinned gradients in place of its gradients."""
    if not isinstance(side, GradientSet):
        return {name: mean for name, (mean,) in thinned.items()}
    coverage = _restricted(side.coverage, thinned)
    if not side.samples:
        return replace(side, layers={name: mean for name, (mean,) in thinned.items()}, coverage=coverage)
    samples = (
        replace(sample, layers={name: parts[place] for name, parts in thinned.items()}, coverage=coverage)
        for place, sample in enumerate(side.samples)
    )
    means = {name: _weighted_sum(parts, side.weights.tolist()) for name, parts in thinned.items()}
    return replace(side, layers=means, samples=tuple(samples), coverage=coverage)


def _weighted_sum(parts: Sequence[FactoredGradient], weights: Sequence[float]) -> FactoredGradient:
    left = torch.cat([part.left * weight for part, weight in zip(parts, weights, strict=True)])
    return FactoredGradient(left, torch.cat([part.right for part in parts]))


def _restricted(coverage: Coverage, names: Mapping[str, object]) -> Coverage:
    """Return the coverage with all parameters but the given ones moved to the missing ones."""
    seen = {name: size for name, size in coverage.seen.items() if name in names}
    dropped = {name: size for name, size in coverage.seen.items() if name not in names}
    reasons = {**coverage.reasons, **dict.fromkeys(dropped, "left out by match_tokens")}
    return replace(coverage, seen=seen, missing={**coverage.missing, **dropped}, reasons=reasons)


def _nothing_to_match(gradients: Sequence[LayerGradient], shared: Sequence[str], factored: Sequence[str]) -> str:
    """Return the error message that says why no parameter is left."""
    if factored:
        return f"expected a gradient other than zero on every side, found none in {factored[:4]}; train these first"
    if not shared:
        return "expected gradients of the same parameters, found none in common; collect all with the same layers="
    if any(
        isinstance(gradient, FactoredGradient) or len(gradient.shape) == 2
        for gradient in gradients
        if not isinstance(gradient, IndexedGradient)
    ):
        return 'expected factored gradients on all sides, found none; collect all with form="factored"'
    return f"expected the weight of a linear layer, found none among {shared[:4]}; choose others with layers="
