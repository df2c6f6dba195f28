"""Means over pairs of examples within a set and between two, their contrast, its interval and permutation test.

Sets of one size are taken place by place, whether their rows belong together or not: pairs at the same place are left
out, examples at the same place leave the jackknife together, and a permutation swaps them. For rows that belong
together nothing else would be right; for independent rows it is as right as any other way.
"""

from dataclasses import dataclass

import numpy as np

from geomkit.stats.jackknife import interactions, narrowed_interval
from geomkit.utils.display import signed

Interval = tuple[float, float]
_UNKNOWN = (float("nan"), float("nan"))


@dataclass(frozen=True)
class WithinBetween:
    """By how much the mean within a set is above that between it and another.

    Attributes:
        value: The difference.
        interval: Its jackknife interval over the examples of both.
        p_value: One-sided, of labels that mean nothing.
    """

    value: float = float("nan")
    interval: Interval = _UNKNOWN
    p_value: float = float("nan")

    def __str__(self) -> str:
        """Say the difference with its interval and p-value."""
        return f"{self.value:+.3f} {signed(self.interval)}, p = {self.p_value:.2g}"


def mean_between(block: np.ndarray, same: bool, confidence: float) -> tuple[float, Interval]:
    """Return the mean over pairs of examples at different places, and its interval.

    Args:
        block: (N, M) a value for each pair.
        same: Whether both sides are one set.
        confidence: Of the interval.
    """
    value, without = _mean(block), _without(block, same)
    low, high = narrowed_interval(value, without, _together(block, same), confidence)
    return value, (float(low), float(high))


def within_between(
    own: np.ndarray,
    across: np.ndarray,
    other: np.ndarray,
    generator: np.random.Generator,
    draws: int,
    confidence: float,
) -> WithinBetween:
    """Return the mean within a set less that between it and another.

    Args:
        own: (N, N) values within the set.
        across: (N, M) values between the two.
        other: (M, M) values within the other.
        generator: Source of the permutations.
        draws: How many.
        confidence: Of the interval.
    """
    value = _mean(own) - _mean(across)
    (within,), between = _without(own, True), _without(across, False)
    replicates = (within - between[0], *(-part for part in between[1:]))
    matched = _matched(across)
    together = (
        _together(own - (across + across.T) / 2, True) if matched else _together(own, True) + _together(across, False)
    )
    low, high = narrowed_interval(value, replicates, together, confidence)
    pooled = np.block([[own, across], [across.T, other]])
    return WithinBetween(value, (float(low), float(high)), _p_value(pooled, len(own), generator, draws))


def _matched(block: np.ndarray) -> bool:
    return len(block) == len(block[0])


def _hollow(block: np.ndarray) -> np.ndarray:
    """Return the block with zeros for the pairs at the same place."""
    return np.where(np.eye(len(block), dtype=bool), 0.0, block) if _matched(block) else block


def _mean(block: np.ndarray) -> float:
    pairs = block.size - (len(block) if _matched(block) else 0)
    return float(_hollow(block).sum() / pairs)


def _without(block: np.ndarray, same: bool) -> tuple[np.ndarray, ...]:
    """Return the mean without each example: of either side together where they are as many, else of each side."""
    values, (n, m) = _hollow(block), block.shape
    rows, columns, total = values.sum(1), values.sum(0), values.sum()
    if same or _matched(block):
        return ((total - rows - columns) / ((n - 1) * (n - 2)),)
    return (total - rows) / ((n - 1) * m), (total - columns) / (n * (m - 1))


def _together(block: np.ndarray, same: bool) -> float:
    """Return what that which is special to each pair adds to the variance of the mean over pairs."""
    if not same and not _matched(block):
        return float((interactions(block) ** 2).mean() / block.size)
    pairs = interactions((block + block.T) / 2, np.eye(len(block), dtype=bool))
    return float(2 * (pairs**2).sum() / (len(block) * (len(block) - 1)) ** 2)


def _p_value(pooled: np.ndarray, first: int, generator: np.random.Generator, draws: int) -> float:
    """Return the one-sided p-value of the contrast among those of other assignments of the examples to the two sets.

    Contrasts are compared in units of their own jackknife errors: a tight second set makes contrasts of assignments
    that mix the two vary more than the observed one does (Janssen 1997, Chung and Romano 2013).
    """
    second = len(pooled) - first
    values = np.where(np.eye(len(pooled), dtype=bool), 0.0, pooled)
    if first == second:
        place = np.arange(first)
        values[place, first + place] = values[first + place, place] = 0.0
        swapped = first * (generator.random((draws, first)) < 0.5)
        assigned = np.concatenate([place + swapped, place + first - swapped], axis=1)
    else:
        assigned = generator.permuted(np.tile(np.arange(len(pooled)), (draws, 1)), axis=1)
    assigned = np.concatenate([np.arange(len(pooled))[None], assigned])
    found = _studentised(values, assigned[:, :first], assigned[:, first:])
    # Assignments that repeat the observed one differ from it in the last bits.
    return float((found >= found[0] - 1e-9).mean())


def _studentised(values: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return contrasts divided by their jackknife errors.

    Args:
        values: (N + M, N + M) of all pairs, zero for those that do not count.
        first: (D, N) places of the examples in the first set, for each assignment.
        second: (D, M) of those in the second; as many as in the first belong to it place by place.
    """
    (draws, n), m = first.shape, second.shape[1]
    labels = np.zeros((draws, n + m))
    np.put_along_axis(labels, first, 1.0, axis=1)
    toward = labels @ values  # of every example with the first set
    own, back = np.take_along_axis(toward, first, 1), np.take_along_axis(toward, second, 1)
    away = values.sum(0)[first] - own
    within, between = own.sum(1, keepdims=True), back.sum(1, keepdims=True)
    within_without = (within - 2 * own) / ((n - 1) * (n - 2))
    if n == m:
        contrast = (within - between) / (n * (n - 1))
        variance = (n - 1) * (within_without - (between - away - back) / ((n - 1) * (n - 2))).var(1)
    else:
        contrast = within / (n * (n - 1)) - between / (n * m)
        variance = (n - 1) * (within_without - (between - away) / ((n - 1) * m)).var(1)
        variance += (m - 1) * ((between - back) / (n * (m - 1))).var(1)
    return np.asarray(contrast[:, 0] / np.sqrt(np.maximum(variance, np.finfo(float).tiny)))
