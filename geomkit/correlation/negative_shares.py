"""Share of a model's parameters with a negative cosine, with an interval over examples."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from geomkit.correlation.cosine import PairGrams
from geomkit.stats.jackknife import jackknife_groups, jackknife_interval

_GROUPS = 5
"""Number of groups of examples: a sign seldom turns when only one example is left out, so a fifth is left out."""


@dataclass(frozen=True)
class Share:
    """A share of parameters measured on the same examples, so that more parameters do not narrow its interval.

    Attributes:
        value: The share, between 0 and 1.
        interval: Confidence interval over examples.
    """

    value: float
    interval: tuple[float, float]

    def __str__(self) -> str:
        """Return the share and its interval in per cent.

        Example:
            >>> print(Share(0.5, (0.25, 0.75)))
            50.0% [25.0%, 75.0%]
        """
        return f"{self.value:.1%} [{self.interval[0]:.1%}, {self.interval[1]:.1%}]"


def negative_shares(
    layers: Sequence[PairGrams], generator: np.random.Generator, confidence: float = 0.95
) -> tuple[Share, Share]:
    """Return the share of parameters whose mean gradients have a negative cosine, unweighted and weighted by norms.

    In the weighted share, a parameter has the weight ‖ḡ_s‖·‖ḡ_u‖.

    A Wilson interval over parameters would treat parameters as independent draws. They are not: all are measured on
    the same examples, and one unusual example turns many signs at once. These intervals come from a jackknife that
    leaves a fifth of the examples of either side out in turn (:func:`geomkit.stats.jackknife.jackknife_interval`). A
    share counts signs and is not smooth, so the intervals are a guide only, and wider than necessary (measured
    coverage and width: tests/benchmarks/README.md).

    Args:
        layers: Inner products of at least two examples on each side, one item for each parameter.
        generator: Source of randomness, which deals the examples into groups.
        confidence: Nominal coverage of the intervals, between 0 and 1.

    Returns:
        The unweighted and the weighted share, with intervals clipped to [0, 1].
    """
    # 1. Deal the examples of each side into five groups at random.
    sides = [np.arange(size) for size in layers[0].across.shape]
    groups_by_side = [jackknife_groups(len(side), _GROUPS, generator) for side in sides]
    # 2. Both shares without each group of safety examples, and without each group of utility examples.
    without = [
        np.array([_shares(layers, *(np.delete(a, group) if a is side else a for a in sides)) for group in groups])
        for side, groups in zip(sides, groups_by_side, strict=True)
    ]
    # 3. Jackknife interval of both shares; the variances of the two independent sides add up.
    values = _shares(layers, *sides)
    low, high = jackknife_interval(values, *without, confidence=confidence)
    unweighted, weighted = (
        Share(float(value), (float(max(a, 0.0)), float(min(b, 1.0))))
        for value, a, b in zip(values, low, high, strict=True)
    )
    return unweighted, weighted


def _shares(layers: Sequence[PairGrams], safety: np.ndarray, utility: np.ndarray) -> np.ndarray:
    """Return the unweighted and the weighted share, from the safety and utility examples at the given places."""
    grams = [layer.subset(safety, utility) for layer in layers]
    negative = np.array([gram.across.mean() < 0 for gram in grams])
    weights = np.array([gram.norms for gram in grams])
    return np.array([negative.mean(), (negative * weights).sum() / weights.sum() if weights.any() else 0.0])
