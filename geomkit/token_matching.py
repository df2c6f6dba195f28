"""Equal token counts: no gradient has a higher rank than it has tokens, so spectra compare at the same number only."""

import logging
from collections.abc import Mapping, Sequence

import torch

from geomkit.controls import parameter_generator
from geomkit.errors import GeometryError
from geomkit.forms import FactoredGradient, IndexedGradient
from geomkit.layer_gradient import LayerGradient

_LOGGER = logging.getLogger(__name__)


def subsample_tokens(
    gradients: Mapping[str, LayerGradient], tokens: Mapping[str, int] | int, generator: torch.Generator
) -> dict[str, LayerGradient]:
    """Keep a random subset of the tokens of each gradient, so that spectra are compared at equal T.

    The kept tokens are not reweighted: spectra, subspaces and cosines do not depend on the scale.

    Args:
        gradients: Factored gradients by parameter; see ``keep_factors`` of :func:`geomkit.algebra.add`.
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
    kept = torch.randperm(gradient.tokens, generator=generator)[:tokens].sort().values.to(gradient.left.device)
    return FactoredGradient(gradient.left[kept], gradient.right[kept])


def match_tokens(
    first: Mapping[str, LayerGradient], second: Mapping[str, LayerGradient], *, seed: int = 0
) -> tuple[dict[str, LayerGradient], dict[str, LayerGradient]]:
    """Bring two gradients to the same number of tokens, parameter by parameter, so that their spectra compare.

    Where one side has more tokens, a random subset of them is kept. Only factored gradients can be thinned out: the
    linear layers of sets collected with ``form="factored"``; all others are left out. So is, with a logged warning, a
    layer whose gradient is zero on a side, as that of LoRA's ``lora_A`` is before the first step.

    Args:
        first: Gradients by parameter.
        second: Gradients of the same parameters.
        seed: Seed of the subsets; one parameter's does not depend on which others there are.

    Returns:
        Both sides, with the parameters that are factored on both.

    Raises:
        GeometryError: If there is no such parameter.
    """
    both = [name for name in first if name in second]
    factored = [name for name in both if all(isinstance(side[name], FactoredGradient) for side in (first, second))]
    tokens = {name: min(first[name].tokens, second[name].tokens) for name in factored}
    names = [name for name in factored if tokens[name] > 0]
    if not names:
        raise GeometryError(_nothing_to_match([*first.values(), *second.values()], both, factored))
    if zero := [name for name in factored if tokens[name] == 0]:
        _LOGGER.warning("left %d of %d layers out, whose gradient is zero: %s", len(zero), len(factored), zero[:4])

    def thinned(side: Mapping[str, LayerGradient], place: int) -> dict[str, LayerGradient]:
        generators = {name: parameter_generator(2 * seed + place, name) for name in names}
        return {name: _subsampled(name, side[name], tokens[name], generators[name]) for name in names}

    return thinned(first, 0), thinned(second, 1)


def _nothing_to_match(gradients: Sequence[LayerGradient], both: Sequence[str], factored: Sequence[str]) -> str:
    if factored:
        return f"expected a gradient that is not zero on either side, found none in {factored[:4]}; train these first"
    if not both:
        return "expected gradients of the same parameters, found none in common; collect both with the same layers="
    if any(
        isinstance(gradient, FactoredGradient) or len(gradient.shape) == 2
        for gradient in gradients
        if not isinstance(gradient, IndexedGradient)
    ):
        return 'expected factored gradients on both sides, found none; collect both with form="factored"'
    return f"expected the weight of a linear layer, found none among {both[:4]}; choose others with layers="
