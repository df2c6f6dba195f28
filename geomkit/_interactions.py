"""The part of a jackknife variance that is counted twice: what two examples do together, more than their sum.

A statistic of pairs varies by its examples and by what is special to each pair. Leaving one example out takes all its
pairs along, so that the jackknife counts the second part twice (Efron and Stein 1981); where subspaces are mostly
noise it is the larger part. The pairs themselves show how much it is, and it is taken off once.
"""

import numpy as np

from geomkit.jackknife import jackknife_interval

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
        without: As for :func:`geomkit.jackknife.jackknife_interval`.
        counted_twice: Variance of the interactions.
        confidence: Of the interval.
    """
    variance = np.asarray(sum((len(part) - 1) * part.var(axis=0) for part in without))
    share = np.divide(counted_twice, variance, out=np.zeros_like(variance), where=variance > 0)
    _, high = jackknife_interval(value, *without, confidence=confidence)
    half = (high - value) * np.sqrt(1 - share.clip(0, 0.5))
    return np.asarray(value - half), np.asarray(value + half)
