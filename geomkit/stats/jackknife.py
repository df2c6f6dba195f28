"""Jackknife intervals and p-values of a smooth statistic, from its values with some examples left out in turn.

A bootstrap repeats examples, and a repeated example lowers every measure of rank and raises every overlap, so the
percentiles of a bootstrap miss the truth. The jackknife repeats no example.
"""

import numpy as np

Interval = tuple[float, float]
"""Lower and upper end of an interval."""

_SWEEPS = 3
"""How often row and column means are subtracted; absent pairs make one sweep inexact."""


def jackknife_groups(examples: int, max_groups: int, generator: np.random.Generator) -> list[np.ndarray]:
    """Divide examples at random into groups of nearly equal size, of which the jackknife leaves out one at a time.

    Args:
        examples: N, the number of examples.
        max_groups: Largest number of groups; from N on, every example is a group.
        generator: Source of randomness.

    Returns:
        Sorted indices of the examples in each group.

    Example:
        >>> jackknife_groups(3, 5, np.random.default_rng(0))
        [array([0]), array([1]), array([2])]
        >>> [len(group) for group in jackknife_groups(7, 3, np.random.default_rng(0))]
        [3, 2, 2]
    """
    if max_groups >= examples:
        return list(np.arange(examples)[:, None])
    return [np.sort(group) for group in np.array_split(generator.permutation(examples), max_groups)]


def leave_one_out_means(values: np.ndarray) -> np.ndarray:
    """Return the mean over the first axis without one entry, for every entry in turn.

    Args:
        values: (N, …) one entry per example.

    Returns:
        (N, …) means of the N − 1 other entries.

    Example:
        >>> leave_one_out_means(np.array([1.0, 2.0, 6.0]))
        array([4. , 3.5, 1.5])
    """
    return np.asarray((values.sum(0) - values) / (len(values) - 1))


def jackknife_interval(
    value: np.ndarray | float, *left_out: np.ndarray, confidence: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """Return the jackknife interval of a statistic of one sample of examples, or of several independent samples.

    With θ_j the statistic without group j of J, a sample adds (J−1)/J · Σ (θ_j − θ̄)² to the variance (Quenouille 1956,
    Tukey 1958). The half width is Student's t times the root of the variance, with the degrees of freedom of Welch and
    Satterthwaite. The interval is for the expected statistic of samples of this size, not for its limit in infinite
    samples.

    Args:
        value: The statistic, or an array of statistics, from all examples.
        left_out: For every sample, (J, …) values of the statistic without each group of the sample's examples, J ≥ 2.
        confidence: Nominal coverage of the interval, between 0 and 1.

    Returns:
        Lower and upper ends, each with the shape of ``value``.

    Example:
        >>> values = np.array([1.0, 2.0, 3.0, 6.0])
        >>> low, high = jackknife_interval(values.mean(), leave_one_out_means(values))
        >>> [round(float(end), 3) for end in (low, high)]  # the interval of Student's t
        [-0.437, 6.437]
    """
    from scipy.stats import t as student

    error, degrees = jackknife_error(*left_out)
    half = student.ppf((1 + confidence) / 2, degrees) * error
    return np.asarray(value - half), np.asarray(value + half)


def jackknife_p_value(value: np.ndarray | float, *left_out: np.ndarray) -> np.ndarray:
    """Return the two-sided p-value of the hypothesis that the expected statistic is zero.

    The p-value is below .05 where the 95 % interval of :func:`jackknife_interval` excludes zero.

    Args:
        value: The statistic, or an array of statistics, from all examples.
        left_out: Values without each group of examples, as for :func:`jackknife_interval`.

    Returns:
        p-values with the shape of ``value``; 1 for a statistic that is zero in every sample.

    Example:
        >>> values = np.array([1.0, 2.0, 3.0, 6.0])
        >>> float(jackknife_p_value(values.mean(), leave_one_out_means(values)).round(4))  # the p-value of a t-test
        0.0691
    """
    from scipy.stats import t as student

    error, degrees = jackknife_error(*left_out)
    # Without any variance, zero is at distance 0 from zero and every other value infinitely far.
    constant = np.where(np.asarray(value) == 0, 0.0, np.inf)
    distance = np.divide(np.abs(value), error, out=np.broadcast_to(constant, error.shape).copy(), where=error > 0)
    p_value = 2 * student.sf(distance, degrees)
    return np.where(np.isnan(value) | np.isnan(error), np.nan, p_value)


def jackknife_error(*left_out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the jackknife standard error of a statistic and its degrees of freedom.

    Args:
        left_out: Values without each group of examples, as for :func:`jackknife_interval`.

    Returns:
        Standard errors and degrees of freedom, each with the shape of the statistic.
    """
    # 1. Variance that each independent sample of J groups adds: v = (J − 1)/J · Σ_j (θ_j − θ̄)².
    parts = np.array([(len(replicates) - 1) * replicates.var(axis=0) for replicates in left_out])
    freedom = np.array([len(replicates) - 1 for replicates in left_out]).reshape(-1, *[1] * (parts.ndim - 1))
    variance = parts.sum(0)
    # 2. Degrees of freedom of the sum (Welch and Satterthwaite): (Σ v)² / Σ (v² / (J − 1)).
    spread = (parts**2 / freedom).sum(0)
    # A statistic that never moves has no spread to divide by, and any degrees of freedom will do.
    degrees = np.divide(variance**2, spread, out=np.ones_like(variance), where=spread > 0)
    return np.sqrt(variance), degrees


def interactions(values: np.ndarray, absent: np.ndarray | None = None) -> np.ndarray:
    """Return the residuals of values of pairs after their row and column means are subtracted.

    Args:
        values: (N, M, …) one value per pair.
        absent: Mask, broadcast to ``values``, of the pairs that do not count; ``None`` if all count.

    Returns:
        (N, M, …) residuals, zero for absent pairs.

    Example:
        >>> interactions(np.array([[1.0, 2.0], [3.0, 4.0]]))
        array([[0., 0.],
               [0., 0.]])
    """
    if absent is None:
        absent = np.zeros((1,) * values.ndim, dtype=bool)
    absent = np.broadcast_to(absent, values.shape)
    residuals = np.where(absent, 0.0, values)
    for _ in range(_SWEEPS):
        for axis in (0, 1):
            present = np.maximum((~absent).sum(axis, keepdims=True), 1)
            residuals = np.where(absent, 0.0, residuals - residuals.sum(axis, keepdims=True) / present)
    return np.asarray(residuals)


def narrowed_interval(
    value: np.ndarray | float, left_out: tuple[np.ndarray, ...], counted_twice: np.ndarray | float, confidence: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the jackknife interval of a mean over pairs without the variance that the jackknife counts twice.

    Leaving out either example of a pair finds the variance of the pair's interaction, so that the sum over both samples
    has that variance twice (Efron and Stein 1981). At most half of the variance is subtracted.

    Args:
        value: The statistic, or an array of statistics.
        left_out: Values without each group of examples, as for :func:`jackknife_interval`.
        counted_twice: Variance of the interactions.
        confidence: Nominal coverage of the interval, between 0 and 1.

    Returns:
        Lower and upper ends, with the shape of ``value``.
    """
    variance = np.asarray(sum((len(replicates) - 1) * replicates.var(axis=0) for replicates in left_out))
    share = np.divide(counted_twice, variance, out=np.zeros_like(variance), where=variance > 0)
    _, high = jackknife_interval(value, *left_out, confidence=confidence)
    half = (high - value) * np.sqrt(1 - share.clip(0, 0.5))
    return np.asarray(value - half), np.asarray(value + half)
