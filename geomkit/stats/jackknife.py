"""The interval of any smooth statistic of examples, from what it is with some of them left out in turn.

A bootstrap repeats examples, and a repeated example lowers every measure of rank and raises every overlap: its
percentiles miss the truth. Leaving examples out repeats nothing.
"""

import numpy as np


def jackknife_groups(examples: int, most: int, generator: np.random.Generator) -> list[np.ndarray]:
    """Deal examples into groups of nearly equal size at random: one is left out at a time.

    Args:
        examples: N, how many there are.
        most: Largest number of groups; with N or more, every example is a group of its own.
        generator: Source of randomness.

    Returns:
        Sorted places, by group.

    Example:
        >>> jackknife_groups(3, 5, np.random.default_rng(0))
        [array([0]), array([1]), array([2])]
        >>> [len(group) for group in jackknife_groups(7, 3, np.random.default_rng(0))]
        [3, 2, 2]
    """
    if most >= examples:
        return list(np.arange(examples)[:, None])
    return [np.sort(group) for group in np.array_split(generator.permutation(examples), most)]


def means_without_each(values: np.ndarray) -> np.ndarray:
    """Return the mean over the first axis without each of its entries in turn, that axis first.

    Example:
        >>> means_without_each(np.array([1.0, 2.0, 6.0]))
        array([4. , 3.5, 1.5])
    """
    return np.asarray((values.sum(0) - values) / (len(values) - 1))


def jackknife_interval(
    value: np.ndarray | float, *without: np.ndarray, confidence: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """Return the interval of a statistic of one sample of examples, or of several that were drawn independently.

    With θ_j the statistic without group j of J, a sample adds (J−1)/J · Σ (θ_j − θ̄)² to the variance (Quenouille 1956,
    Tukey 1958); the half width is Student's t times its root, with the degrees of freedom of Welch and Satterthwaite.
    It belongs to what the statistic would be on average over samples of this size, not to its limit for endless ones.

    Args:
        value: The statistic, or an array of statistics, from all examples.
        without: For each sample, (J, …) what it is without each group of that sample's examples, J ≥ 2.
        confidence: Share of experiments whose interval should hold the truth.

    Returns:
        Lower and upper ends, each of the shape of ``value``.

    Example:
        >>> values = np.array([1.0, 2.0, 3.0, 6.0])
        >>> low, high = jackknife_interval(values.mean(), np.array([np.delete(values, i).mean() for i in range(4)]))
        >>> [round(float(end), 3) for end in (low, high)]  # that of Student's t
        [-0.437, 6.437]
    """
    from scipy.stats import t as student

    error, degrees = jackknife_error(*without)
    half = student.ppf((1 + confidence) / 2, degrees) * error
    return np.asarray(value - half), np.asarray(value + half)


def jackknife_p_value(value: np.ndarray | float, *without: np.ndarray) -> np.ndarray:
    """Return the two-sided p-value of a statistic being zero: below .05 where its interval excludes zero.

    Args:
        value: The statistic, or an array of statistics, from all examples.
        without: What it is without each group of examples, as for :func:`jackknife_interval`.

    Returns:
        p-values of the shape of ``value``; 1 for a statistic that is zero and never moves.

    Example:
        >>> values = np.array([1.0, 2.0, 3.0, 6.0])
        >>> without = np.array([np.delete(values, i).mean() for i in range(4)])
        >>> float(jackknife_p_value(values.mean(), without).round(4))  # that of a t-test
        0.0691
    """
    from scipy.stats import t as student

    error, degrees = jackknife_error(*without)
    still = np.where(np.asarray(value) == 0, 0.0, np.inf)
    distance = np.divide(np.abs(value), error, out=np.broadcast_to(still, error.shape).copy(), where=error > 0)
    p_value = 2 * student.sf(distance, degrees)
    return np.where(np.isnan(value) | np.isnan(error), np.nan, p_value)


def jackknife_error(*without: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the standard error behind :func:`jackknife_interval` and its degrees of freedom."""
    parts = np.array([(len(found) - 1) * found.var(axis=0) for found in without])
    freedom = np.array([len(found) - 1 for found in without]).reshape(-1, *[1] * (parts.ndim - 1))
    variance = parts.sum(0)
    spread = (parts**2 / freedom).sum(0)
    # A statistic that never moves has no spread to divide by, and any degrees of freedom will do.
    degrees = np.divide(variance**2, spread, out=np.ones_like(variance), where=spread > 0)
    return np.sqrt(variance), degrees


_ROUNDS = 3


def interactions(values: np.ndarray, absent: np.ndarray | None = None) -> np.ndarray:
    """Return what is left of (N, M, …) values without the means of rows and columns, zero for absent pairs.

    Example:
        >>> interactions(np.array([[1.0, 2.0], [3.0, 4.0]]))
        array([[0., 0.],
               [0., 0.]])
    """
    if absent is None:
        absent = np.zeros((1,) * values.ndim, dtype=bool)
    absent = np.broadcast_to(absent, values.shape)
    left = np.where(absent, 0.0, values)
    for _ in range(_ROUNDS):  # of sweeping means out of the pairs that are there
        for axis in (0, 1):
            present = np.maximum((~absent).sum(axis, keepdims=True), 1)
            left = np.where(absent, 0.0, left - left.sum(axis, keepdims=True) / present)
    return np.asarray(left)


def narrowed_interval(
    value: np.ndarray | float, without: tuple[np.ndarray, ...], counted_twice: np.ndarray | float, confidence: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return a jackknife interval without the variance that was counted twice, which is half of all at most.

    Args:
        value: The statistic, or an array of statistics.
        without: As for :func:`geomkit.stats.jackknife.jackknife_interval`.
        counted_twice: Variance of the interactions.
        confidence: Of the interval.
    """
    variance = np.asarray(sum((len(part) - 1) * part.var(axis=0) for part in without))
    share = np.divide(counted_twice, variance, out=np.zeros_like(variance), where=variance > 0)
    _, high = jackknife_interval(value, *without, confidence=confidence)
    half = (high - value) * np.sqrt(1 - share.clip(0, 0.5))
    return np.asarray(value - half), np.asarray(value + half)
