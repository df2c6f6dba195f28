"""Equal token counts: no gradient has a higher rank than it has tokens, so spectra compare at the same number only."""

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


def subsample_tokens(
    gradients: Mapping[str, LayerGradient], tokens: Mapping[str, int] | int, generator: torch.Generator
) -> dict[str, LayerGradient]:
    """Keep a random subset of the tokens of each gradient, so that spectra are compared at equal T.

    The kept tokens are not reweighted: spectra, subspaces and cosines do not depend on the scale.

    Args:
        gradients: Factored gradients by parameter; see ``keep_factors`` of :func:`geomkit.gradients.arithmetic.add`.
        tokens: How many tokens to keep: one number, or one for each parameter.
        generator: Source of randomness, on the CPU.

    Returns:
        Factored gradients with that many tokens, by parameter.

    Raises:
        GeometryError: If a gradient is not factored, has fewer tokens, or has no count given.
    """
    counts = dict.fromkeys(gradients, tokens) if isinstance(tokens, int) else tokens
    if missing := [name for name in gradients if name not in counts]:
        raise GeometryError(f"expected a token count for every parameter, found none for {missing[:4]}; add them")
    return {name: _subsampled(name, gradient, counts[name], generator) for name, gradient in gradients.items()}


def _subsampled(name: str, gradient: LayerGradient, tokens: int, generator: torch.Generator) -> FactoredGradient:
    if not isinstance(gradient, FactoredGradient):
        found = type(gradient).__name__
        raise GeometryError(f"expected a factored gradient of {name}, found {found}; leave it out or keep its factors")
    if not 0 < tokens <= gradient.tokens:
        raise GeometryError(
            f"expected 1 to {gradient.tokens} tokens of {name}, found {tokens}; subsample the side with more tokens"
        )
    (kept,) = _some_tokens([gradient], tokens, generator)
    return kept


def _some_tokens(
    parts: Sequence[FactoredGradient], tokens: int, generator: torch.Generator
) -> tuple[FactoredGradient, ...]:
    """Draw tokens from those of all parts together, and return each part with the ones drawn from it."""
    ends = np.cumsum([part.tokens for part in parts])
    drawn = torch.randperm(int(ends[-1]), generator=generator)[:tokens].sort().values.numpy()
    if tokens == ends[-1]:
        return tuple(parts)
    places = np.split(drawn, np.searchsorted(drawn, ends[:-1]))
    return tuple(
        _rows(part, torch.from_numpy(own - end + part.tokens))
        for part, own, end in zip(parts, places, ends, strict=True)
    )


def _rows(gradient: FactoredGradient, places: Tensor) -> FactoredGradient:
    places = places.to(gradient.left.device)
    return FactoredGradient(gradient.left[places], gradient.right[places])


@overload
def match_tokens(*sides: GradientSet, seed: int = 0) -> tuple[GradientSet, ...]: ...
@overload
def match_tokens(*sides: Mapping[str, LayerGradient], seed: int = 0) -> tuple[Mapping[str, LayerGradient], ...]: ...
def match_tokens(*sides: Mapping[str, LayerGradient], seed: int = 0) -> tuple[Mapping[str, LayerGradient], ...]:
    """Bring gradients to the same number of tokens, parameter by parameter, so that their spectra compare.

    Where a side has more tokens than the least, a random subset of them is kept. Only factored gradients can be
    thinned out: the linear layers of sets collected with ``form="factored"`` or ``per_sample=True``; all others are
    left out. So is, with a logged warning, a layer whose gradient is zero on a side, as that of LoRA's ``lora_A`` is
    before the first step.

    A set collected per sample stays one: the subset is drawn from the tokens of all its examples, each example keeps
    its own, and the mean is that of the thinned examples, with the weights the examples had. Its losses and counts of
    examples and scored tokens stay those of the whole.

    Args:
        sides: Two or more gradients by parameter, of the same model.
        seed: Seed of the subsets; one parameter's does not depend on which others there are.

    Returns:
        The sides, in order, with the parameters that are factored on all: sets for sets, dicts for other mappings.

    Raises:
        GeometryError: If there are fewer than two sides, one is no gradients, a parameter has two shapes, or there is
            no such parameter.

    Example:
        >>> short, long = (FactoredGradient(torch.ones(t, 3), torch.ones(t, 4)) for t in (2, 5))
        >>> [side["w"].tokens for side in match_tokens({"w": long}, {"w": short}, {"w": long})]
        [2, 2, 2]
    """
    if len(sides) < 2:
        raise GeometryError(f"expected two sides to match or more, found {len(sides)}; give e.g. safety and control")
    for side in sides:
        check_gradients("given", side)
    first, *others = sides
    shared = [name for name in first if all(name in side for side in others)]
    parts = [{name: _parts(side, name) for name in shared} for side in sides]
    factored = [name for name in shared if all(own[name] for own in parts)]
    tokens = {name: min(sum(part.tokens for part in own[name]) for own in parts) for name in factored}
    names = [name for name in factored if tokens[name] > 0]
    if not names:
        raise GeometryError(_nothing_to_match([each for side in sides for each in side.values()], shared, factored))
    for name in names:
        check_one_shape(name, *(side[name] for side in sides))
    if zero := [name for name in factored if tokens[name] == 0]:
        _LOGGER.warning("left %d of %d layers out, whose gradient is zero: %s", len(zero), len(factored), zero[:4])

    def thinned(own: Mapping[str, Sequence[FactoredGradient]], place: int) -> _Thinned:
        generators = {name: parameter_generator(len(sides) * seed + place, name) for name in names}
        return {name: _some_tokens(own[name], tokens[name], generators[name]) for name in names}

    return tuple(
        _rebuilt(side, thinned(own, place)) for place, (side, own) in enumerate(zip(sides, parts, strict=True))
    )


_Thinned = dict[str, tuple[FactoredGradient, ...]]
"""By parameter: the gradient of each example, or the mean alone."""


def _parts(side: Mapping[str, LayerGradient], name: str) -> tuple[FactoredGradient, ...]:
    """Return a parameter's gradient by example where there are some, otherwise the mean; none if not factored."""
    samples = side.samples if isinstance(side, GradientSet) else ()
    gradients = [sample[name] for sample in samples] or [side[name]]
    factored = tuple(gradient for gradient in gradients if isinstance(gradient, FactoredGradient))
    return factored if len(factored) == len(gradients) else ()


def _rebuilt(side: Mapping[str, LayerGradient], thinned: _Thinned) -> Mapping[str, LayerGradient]:
    """Put thinned gradients in the place of a side's own."""
    if not isinstance(side, GradientSet):
        return {name: mean for name, (mean,) in thinned.items()}
    coverage = _only(side.coverage, thinned)
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


def _only(coverage: Coverage, names: Mapping[str, object]) -> Coverage:
    seen = {name: size for name, size in coverage.seen.items() if name in names}
    dropped = {name: size for name, size in coverage.seen.items() if name not in names}
    reasons = {**coverage.reasons, **dict.fromkeys(dropped, "left out by match_tokens")}
    return replace(coverage, seen=seen, missing={**coverage.missing, **dropped}, reasons=reasons)


def _nothing_to_match(gradients: Sequence[LayerGradient], both: Sequence[str], factored: Sequence[str]) -> str:
    if factored:
        return f"expected a gradient other than zero on every side, found none in {factored[:4]}; train these first"
    if not both:
        return "expected gradients of the same parameters, found none in common; collect all with the same layers="
    if any(
        isinstance(gradient, FactoredGradient) or len(gradient.shape) == 2
        for gradient in gradients
        if not isinstance(gradient, IndexedGradient)
    ):
        return 'expected factored gradients on all sides, found none; collect all with form="factored"'
    return f"expected the weight of a linear layer, found none among {both[:4]}; choose others with layers="
