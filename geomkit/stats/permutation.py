"""Resampled examples: the bootstrap and its intervals, and random divisions of pooled examples."""

import numpy as np


def permuted_labels(first: int, second: int, draws: int, generator: np.random.Generator) -> np.ndarray:
    """Deal pooled examples into two groups of the given sizes at random.

    Args:
        first: Size of the first group.
        second: Size of the second group.
        draws: How often to deal.
        generator: Source of randomness.

    Returns:
        (draws, first + second) booleans: whether an example is in the first group.
    """
    order = generator.permuted(np.tile(np.arange(first + second), (draws, 1)), axis=1)
    return np.asarray(order < first)


def percentile_interval(values: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """Return the central interval that holds a share ``confidence`` of the values.

    Example:
        >>> low, high = percentile_interval(np.arange(101.0), 0.9)
        >>> round(low), round(high)
        (5, 95)
    """
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, (tail, 1 - tail))
    return float(low), float(high)
