"""Means over pairs of examples within a set and between two sets, and their difference with interval and p-value.

Two sets of the same size are paired by place, whether their rows belong together or not: pairs of examples at the same
place do not count, the two examples at a place leave the jackknife together, and a permutation swaps them. The rule is
necessary for rows that belong together, and valid for independent rows.
"""

from dataclasses import dataclass

import numpy as np

from geomkit.stats.jackknife import Interval, interactions, narrowed_interval
from geomkit.stats.permutation import permuted_places
from geomkit.utils.display import signed

_UNKNOWN = (float("nan"), float("nan"))


@dataclass(frozen=True)
class WithinBetween:
    """The mean over pairs within a set minus the mean over pairs between this set and another one.

    Attributes:
        value: The difference.
        interval: Jackknife interval of the difference, over the examples of both sets.
        p_value: One-sided p-value under random labels of the examples.
    """

    value: float = float("nan")
    interval: Interval = _UNKNOWN
    p_value: float = float("nan")

    def __str__(self) -> str:
        """Return the difference with its interval and p-value."""
        return f"{self.value:+.3f} {signed(self.interval)}, p = {self.p_value:.2g}"


def mean_between(block: np.ndarray, same: bool, confidence: float) -> tuple[float, Interval]:
    """Return the mean over pairs of examples at different places, and its jackknife interval over examples.

    Args:
        block: (N, M) value of every pair.
        same: Whether rows and columns are the same set.
        confidence: Nominal coverage of the interval, between 0 and 1.
    """
    value, left_out = _mean(block), _leave_one_out(block, same)
    low, high = narrowed_interval(value, left_out, _interaction_variance(block, same), confidence)
    return value, (float(low), float(high))


def within_between(
    first: np.ndarray,
    across: np.ndarray,
    second: np.ndarray,
    generator: np.random.Generator,
    draws: int,
    confidence: float,
) -> WithinBetween:
    """Return the mean over pairs within the first set minus the mean over pairs between the two sets.

    Args:
        first: (N, N) values of pairs within the first set, symmetric.
        across: (N, M) values of pairs between the two sets.
        second: (M, M) values of pairs within the second set, symmetric; only the permutation test reads them.
        generator: Source of randomness of the permutations.
        draws: Number of permutations.
        confidence: Nominal coverage of the interval, between 0 and 1.
    """
    value = _mean(first) - _mean(across)
    # 1. The difference without an example of the first set changes both means, without one of the second set only the
    #    mean between. Paired by place, `between` has a single part: both examples at a place leave together.
    (within,), between = _leave_one_out(first, True), _leave_one_out(across, False)
    left_out = (within - between[0], *(-part for part in between[1:]))
    # 2. Variance of the pairs' interactions, which the jackknife counts twice. Paired by place, the values (i, j)
    #    within and between change together, so the interactions are taken of the difference.
    counted_twice = (
        _interaction_variance(first - (across + across.T) / 2, True)
        if _is_paired(across)
        else _interaction_variance(first, True) + _interaction_variance(across, False)
    )
    low, high = narrowed_interval(value, left_out, counted_twice, confidence)
    pooled = np.block([[first, across], [across.T, second]])
    return WithinBetween(value, (float(low), float(high)), _p_value(pooled, len(first), generator, draws))


def _is_paired(block: np.ndarray) -> bool:
    """Return whether both sides have as many examples, so that they are paired by place."""
    return len(block) == len(block[0])


def _without_diagonal(block: np.ndarray) -> np.ndarray:
    """Return the block with zeros for pairs of examples at the same place, if the sides are paired."""
    return np.where(np.eye(len(block), dtype=bool), 0.0, block) if _is_paired(block) else block


def _mean(block: np.ndarray) -> float:
    pairs = block.size - (len(block) if _is_paired(block) else 0)
    return float(_without_diagonal(block).sum() / pairs)


def _leave_one_out(block: np.ndarray, same: bool) -> tuple[np.ndarray, ...]:
    """Return the means without one example: of both sides together if they are paired, otherwise of each side."""
    values, (n, m) = _without_diagonal(block), block.shape
    rows, columns, total = values.sum(1), values.sum(0), values.sum()
    if same or _is_paired(block):
        return ((total - rows - columns) / ((n - 1) * (n - 2)),)
    return (total - rows) / ((n - 1) * m), (total - columns) / (n * (m - 1))


def _interaction_variance(block: np.ndarray, same: bool) -> float:
    """Return the variance that the interactions of the pairs add to the mean over pairs."""
    if not same and not _is_paired(block):
        return float((interactions(block) ** 2).mean() / block.size)
    # (i, j) and (j, i) are the same pair, or change together: the mean over N (N − 1) has every interaction twice.
    pairs = interactions((block + block.T) / 2, np.eye(len(block), dtype=bool))
    return float(2 * (pairs**2).sum() / (len(block) * (len(block) - 1)) ** 2)


def _p_value(pooled: np.ndarray, first: int, generator: np.random.Generator, draws: int) -> float:
    """Return the one-sided p-value of the difference under random assignments of the examples to the two sets.

    Differences are compared in units of their jackknife errors: a tight second set makes the differences of assignments
    that mix the two sets vary more than the observed difference does (Janssen 1997, Chung and Romano 2013).

    Args:
        pooled: (N + M, N + M) values of all pairs, first set first.
        first: N, the size of the first set.
        generator: Source of randomness.
        draws: Number of random assignments.
    """
    second = len(pooled) - first
    # 1. Pairs that do not count get the value 0: an example with itself and, if paired, with its partner.
    values = np.where(np.eye(len(pooled), dtype=bool), 0.0, pooled)
    if first == second:
        place = np.arange(first)
        values[place, first + place] = values[first + place, place] = 0.0
        # 2. Assignments: if paired, partners swap sets at random; otherwise all examples are permuted.
        swapped = first * (generator.random((draws, first)) < 0.5)
        assigned = np.concatenate([place + swapped, place + first - swapped], axis=1)
    else:
        assigned = permuted_places(len(pooled), draws, generator)
    # 3. The observed assignment is the first row, and counts among the others: no p-value is zero.
    assigned = np.concatenate([np.arange(len(pooled))[None], assigned])
    studentised = _studentised(values, assigned[:, :first], assigned[:, first:])
    # Assignments that repeat the observed assignment have its difference up to the last bits.
    return float((studentised >= studentised[0] - 1e-9).mean())


def _studentised(values: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the differences of many assignments divided by their jackknife errors.

    Args:
        values: (N + M, N + M) symmetric values of all pairs, zero for pairs that do not count.
        first: (D, N) indices of the examples in the first set, for D assignments.
        second: (D, M) indices of the examples in the second set, paired by place with the first if M = N.

    Returns:
        (D,) studentised differences.
    """
    (draws, n), m = first.shape, second.shape[1]
    # 1. Sum of every example's values with the first set: one matrix product for all assignments.
    labels = np.zeros((draws, n + m))
    np.put_along_axis(labels, first, 1.0, axis=1)
    with_first = labels @ values
    # 2. Sums of example i of the first set within it (w_i) and with the second set (a_i), and of example j of the
    #    second set with the first (b_j). W = Σ w_i has every pair twice, B = Σ b_j = Σ a_i once.
    w, b = np.take_along_axis(with_first, first, 1), np.take_along_axis(with_first, second, 1)
    a = values.sum(0)[first] - w
    within, between = w.sum(1, keepdims=True), b.sum(1, keepdims=True)
    # 3. Mean within without example i: (W − 2 w_i) / (n − 1)(n − 2).
    within_without = (within - 2 * w) / ((n - 1) * (n - 2))
    if n == m:
        # 4a. Paired: n (n − 1) pairs count between the sets, and examples i of both sets leave together:
        #     (B − a_i − b_i) / (n − 1)(n − 2). The variance is (n − 1)/n · Σ (θ_i − θ̄)².
        difference = (within - between) / (n * (n - 1))
        variance = (n - 1) * (within_without - (between - a - b) / ((n - 1) * (n - 2))).var(1)
    else:
        # 4b. Independent: n m pairs count, and the jackknives of the two sets add:
        #     (B − a_i) / (n − 1) m without example i of the first, (B − b_j) / n (m − 1) without j of the second.
        difference = within / (n * (n - 1)) - between / (n * m)
        variance = (n - 1) * (within_without - (between - a) / ((n - 1) * m)).var(1)
        variance += (m - 1) * ((between - b) / (n * (m - 1))).var(1)
    return np.asarray(difference[:, 0] / np.sqrt(np.maximum(variance, np.finfo(float).tiny)))
