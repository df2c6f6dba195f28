"""P-values against null values whose location and scale depend on a covariate, such as the length of an example."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

FEWEST = 20
"""Smallest number of null values from which a location, a scale and a tail can be told."""

MANY = 4000
"""Number of null values among which a single one does not move the median and the spread of its neighbours."""

_WINDOW_SHARE = 0.15
"""Share of the null values that are neighbours of a value in the covariate."""

_FEWEST_NEIGHBOURS = 15
_TAIL_SHARE = 0.1
_FEWEST_IN_TAIL = 10
_SCALE_FLOOR = 0.1
_HEAVIEST_TAIL = 0.5
_UPPER_LIMIT = 0.84 * float(np.sqrt(4 / 3))
"""Distance of a fitted shape from its one-sided upper 80 % limit, times the root of the number of values in the tail.

A shape of 0, fitted to n values by probability-weighted moments, has the variance 4 / 3n (Hosking and Wallis 1987).
"""

_NORMAL = float(np.sqrt(np.pi / 2))  # σ over the mean absolute deviation of a normal distribution

Values = NDArray[np.float64]


def standardized(
    values: ArrayLike, covariate: ArrayLike, null: ArrayLike, null_covariate: ArrayLike
) -> tuple[Values, Values]:
    """Return values, and null values, as distances from the null values of a like covariate, in units of their spread.

    The location is the median of the nearest 15 % of the null values (in the covariate, with ties), the scale their
    mean absolute deviation from it, times √(π/2). A null value is no neighbour of its own, as a value is none; among
    :data:`MANY` null values this makes no difference and is left out.

    Args:
        values: (N,) values.
        covariate: (N,) covariates, such as logarithms of lengths.
        null: (n,) null values, at least :data:`FEWEST`.
        null_covariate: (n,) covariates of the null values.

    Returns:
        (N,) standardized values and (n,) standardized null values.

    Example:
        >>> lengths = np.repeat([1.0, 2.0], 50)
        >>> spread = np.tile(np.linspace(-1, 1, 50), 2)
        >>> z, null = standardized([3.0, 3.0], [1.0, 2.0], spread * lengths, lengths)
        >>> bool(z[0] == 2 * z[1])
        True
    """
    given, null_values = np.asarray(values, dtype=np.float64), np.asarray(null, dtype=np.float64)
    near, null_near = np.asarray(covariate, dtype=np.float64), np.asarray(null_covariate, dtype=np.float64)
    location, scale = _local(null_values, null_near, near, own=False)
    null_location, null_scale = _local(null_values, null_near, null_near, own=len(null_values) < MANY)
    # Where the neighbours are almost equal, rounding would decide: no scale is far below the usual one.
    largest = max(float(np.abs(values_).max(initial=0.0)) for values_ in (given, null_values))
    floor = max(
        _SCALE_FLOOR * float(np.median(null_scale)), np.finfo(np.float64).eps * largest, np.finfo(np.float64).tiny
    )
    return (
        (given - location) / np.maximum(scale, floor),
        (null_values - null_location) / np.maximum(null_scale, floor),
    )


def _local(null: Values, null_covariate: Values, covariate: Values, *, own: bool) -> tuple[Values, Values]:
    """Return location and scale of the null values around each covariate; with ``own``, without the value itself."""
    neighbours = min(max(_FEWEST_NEIGHBOURS, int(_WINDOW_SHARE * len(null))), len(null) - 1)
    # Examples of one length have the same neighbours: the work is done once for each length.
    places, inverse = np.unique(covariate, return_inverse=True)
    if own:
        locations, scales = np.empty(len(null)), np.empty(len(null))
        for index, place in enumerate(covariate):
            others = np.arange(len(null)) != index
            locations[index], scales[index] = _around(null[others], null_covariate[others], place, neighbours)
        return locations, scales
    pairs = np.array([_around(null, null_covariate, place, neighbours) for place in places]).reshape(-1, 2)
    return pairs[inverse, 0], pairs[inverse, 1]


def _around(null: Values, null_covariate: Values, place: float, neighbours: int) -> tuple[float, float]:
    distance = np.abs(null_covariate - place)
    near = null[distance <= np.partition(distance, neighbours - 1)[neighbours - 1]]
    location = float(np.median(near))
    return location, _NORMAL * float(np.abs(near - location).mean())


def upper_p_values(values: ArrayLike, null: ArrayLike) -> Values:
    """Return the probability that a null value is at least as large as each value.

    Below the largest tenth of the null values, it is the share (1 + number of null values ≥ v) / (n + 1), which is
    exact for exchangeable values. Beyond, where the share would end at 1/(n + 1), the tail is a generalized Pareto
    distribution (Pickands 1975), fitted by probability-weighted moments (Hosking and Wallis 1987), with a shape between
    0 (exponential) and 1/2: a tail that ends is not believed. A few null values do not tell how heavy their tail is, so
    the p-value is the larger of two: with the fitted shape, and with its one-sided upper 80 % limit. So a single row
    far out has a small p-value only against several hundred null values.

    Args:
        values: (N,) values.
        null: (n,) null values, at least :data:`FEWEST`.

    Returns:
        (N,) p-values, above 0.

    Example:
        >>> null = np.arange(100.0)
        >>> upper_p_values([-1.0, 49.5], null).round(2).tolist()
        [1.0, 0.5]
        >>> bool(0 < upper_p_values([1000.0], null)[0] < 1e-3)
        True
    """
    given, ordered = np.asarray(values, dtype=np.float64), np.sort(np.asarray(null, dtype=np.float64))
    n = len(ordered)
    empirical = (1 + n - np.searchsorted(ordered, given, side="left")) / (n + 1)
    tail = max(_FEWEST_IN_TAIL, int(_TAIL_SHARE * n))
    start = ordered[-tail - 1]
    shape, scale = _pareto(ordered[-tail:] - start)
    if scale <= 0:  # the tail is one value
        return empirical
    heavier = min(shape + _UPPER_LIMIT / np.sqrt(tail), _HEAVIEST_TAIL)
    excess = np.maximum(given - start, 0.0)
    # Both tails have the mean of the excesses, scale / (1 − shape).
    survival = np.maximum(
        _survival(excess, shape, scale), _survival(excess, heavier, scale * (1 - heavier) / (1 - shape))
    )
    beyond = np.maximum((tail + 1) / (n + 1) * survival, np.finfo(np.float64).tiny)
    return np.asarray(np.where(given > start, beyond, empirical))


def _survival(excess: Values, shape: float, scale: float) -> Values:
    """Return the probability that a generalized Pareto variable is larger than each excess."""
    scaled = excess / scale
    return np.asarray(np.exp(-scaled) if shape == 0 else (1 + shape * scaled) ** (-1 / shape))


def _pareto(excesses: Values) -> tuple[float, float]:
    """Return shape and scale of a generalized Pareto distribution, from ascending excesses."""
    count = len(excesses)
    mean = float(excesses.mean())
    # a1 estimates E[x (1 − F(x))]; the mean is scale / (1 − shape), and a1 is scale / (2 (2 − shape)).
    a1 = float((np.arange(count - 1, -1, -1) / (count - 1) * excesses).mean())
    denominator = mean - 2 * a1
    shape = 2 - mean / denominator if denominator > 0 else _HEAVIEST_TAIL
    shape = min(max(shape, 0.0), _HEAVIEST_TAIL)
    return shape, mean * (1 - shape)


def outside(covariate: ArrayLike, null_covariate: ArrayLike) -> NDArray[np.bool_]:
    """Return which covariates lie below or above all covariates of the null values: there, no null value is like them.

    Example:
        >>> outside([1.0, 2.5, 9.0], [1.0, 5.0]).tolist()
        [False, False, True]
    """
    near, null_near = np.asarray(covariate, dtype=np.float64), np.asarray(null_covariate, dtype=np.float64)
    return np.asarray((near < null_near.min()) | (near > null_near.max()))
