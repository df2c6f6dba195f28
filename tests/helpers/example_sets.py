"""Sets of examples with factored gradients, drawn from populations whose spectra are known to differ."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from geomkit.gradients.factored import FactoredGradient
from geomkit.gradients.gradient_set import Coverage, GradientSet
from geomkit.svd.token_matching import match_tokens

ROWS, COLUMNS = 48, 40
_INPUTS = np.arange(1, COLUMNS + 1) ** -0.5
_FRAME = np.linalg.qr(np.random.default_rng(0).standard_normal((ROWS, ROWS)))[0]

Drawing = Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray]]
"""From a generator and a number of tokens to the two factors of one example."""


def low_rank(directions: int = 8) -> Drawing:
    """Examples share some output directions, each with strengths of its own, beside some noise."""

    def draw(generator, tokens):
        strengths = generator.gamma(3.0, size=directions) / 3 / directions**0.5
        shared = (generator.standard_normal((tokens, directions)) * strengths) @ _FRAME[:directions]
        left = shared + 0.05 * generator.standard_normal((tokens, ROWS))
        return left, generator.standard_normal((tokens, COLUMNS)) * _INPUTS

    return draw


def power_law(generator, tokens):
    """Independent tokens whose covariances fall like a power on both sides."""
    left = generator.standard_normal((tokens, ROWS)) * np.arange(1, ROWS + 1) ** -0.75
    return left, generator.standard_normal((tokens, COLUMNS)) * _INPUTS


def heavy(generator, tokens):
    """Each example has a direction of its own and a size with a heavy tail."""
    size = np.exp(0.7 * generator.standard_normal())
    own = generator.standard_normal(ROWS) * np.arange(1, ROWS + 1) ** -0.5
    left = size * (power_law(generator, tokens)[0] + own)
    right = generator.standard_normal((tokens, COLUMNS)) + 0.7 * generator.standard_normal(COLUMNS)
    return left, right * _INPUTS


def drawn_set(
    draw: Drawing, generator: np.random.Generator, lengths: Sequence[int], parameters: Sequence[str] = ("w",)
) -> GradientSet:
    """Examples with so many tokens each, collected as ``collect_gradients(per_sample=True)`` would."""
    coverage = Coverage(dict.fromkeys(parameters, ROWS * COLUMNS), {}, {})
    samples = tuple(
        GradientSet({name: _factored(*draw(generator, tokens)) for name in parameters}, 1.0, 1, tokens, coverage)
        for tokens in lengths
    )
    means = {name: _mean([sample[name] for sample in samples]) for name in parameters}
    return GradientSet(means, 1.0, len(samples), sum(lengths), coverage, samples)


def matched_to(found: GradientSet, tokens: int) -> GradientSet:
    """The set at so many tokens."""
    other = FactoredGradient(torch.ones(tokens, ROWS), torch.ones(tokens, COLUMNS))
    return match_tokens(found, dict.fromkeys(found, other))[0]


def _factored(left: np.ndarray, right: np.ndarray) -> FactoredGradient:
    return FactoredGradient(torch.from_numpy(left).float(), torch.from_numpy(right).float())


def _mean(parts: Sequence[FactoredGradient]) -> FactoredGradient:
    left, right = (torch.cat([getattr(part, side) for part in parts]) for side in ("left", "right"))
    return FactoredGradient(left / len(parts), right)
