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


def negative_share(layers: Sequence[PairGrams], generator: np.random.Generator, confidence: float = 0.95) -> Share:
    """Return the share of parameters whose mean gradients have a negative cosine.

    A Wilson interval over parameters would treat parameters as independent draws. They are not: all are measured on
    the same examples, and one unusual example turns many signs at once. The interval comes from a jackknife that
    leaves a fifth of the examples of either side out in turn (:func:`geomkit.stats.jackknife.jackknife_interval`). A
    share counts signs and is not smooth, so the interval is a guide only, and wider than necessary (measured
    coverage and width: tests/benchmarks/README.md).

    Args:
        layers: Inner products of at least two examples on each side, one item for each parameter.
        generator: Source of randomness, which deals the examples into groups.
        confidence: Nominal coverage of the interval, between 0 and 1.

    Returns:
        The share, with its interval clipped to [0, 1].
    """
    # 1. Deal the examples of each side into five groups at random.
    sides = [np.arange(size) for size in layers[0].across.shape]
    groups_by_side = [jackknife_groups(len(side), _GROUPS, generator) for side in sides]
    # 2. The share without each group of safety examples, and without each group of utility examples.
    without = [
        np.array([_share(layers, *(np.delete(a, group) if a is side else a for a in sides)) for group in groups])
        for side, groups in zip(sides, groups_by_side, strict=True)
    ]
    # 3. Jackknife interval; the variances of the two independent sides add up.
    value = _share(layers, *sides)
    low, high = jackknife_interval(value, *without, confidence=confidence)
    return Share(value, (max(float(low), 0.0), min(float(high), 1.0)))


def _share(layers: Sequence[PairGrams], safety: np.ndarray, utility: np.ndarray) -> float:
    """Return the share from the safety and utility examples at the given places."""
    return float(np.mean([layer.subset(safety, utility).across.mean() < 0 for layer in layers]))
