"""Resampled examples: the bootstrap and its intervals, and random divisions of pooled examples."""

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from geomkit.errors import GeometryError
from geomkit.utils.arguments import check_confidence, check_draws

Method = Literal["expanded", "percentile", "BCa"]


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


def bootstrap_interval(
    values: ArrayLike,
    generator: np.random.Generator,
    confidence: float = 0.95,
    *,
    clusters: ArrayLike | None = None,
    method: Method = "expanded",
    draws: int = 2000,
) -> tuple[float, float]:
    """Return the bootstrap interval of a mean over examples, resampled by :func:`scipy.stats.bootstrap`.

    A resampled mean varies less than the mean by √((n−1)/n), and its percentiles ignore that the spread is itself
    estimated; the default stretches deviations by √(n/(n−1)) · t/z for both (Hesterberg 2015). What nominal 95 %
    intervals covered in a thousand simulations each:

    ==========================================  ========  ==========  ====
    values                                      expanded  percentile  BCa
    ==========================================  ========  ==========  ====
    8 of a normal distribution                  95        88          89
    8 of a beta distribution, a little skewed   96        91          91
    8, 16, 64 of an exponential one             90 92 94  85 90 93    86 91 94
    16 clusters of 1 to 6, half of it shared    94        92          91
    the same as if they were single examples    74        72          73
    ==========================================  ========  ==========  ====

    Args:
        values: (n,) a value for each example, at least two.
        generator: Source of randomness.
        confidence: Share of experiments whose interval should hold the expected value.
        clusters: (n,) a label for each example, such as its prompt, where several stem from one source: whole clusters
            are drawn, at least two. Every value keeps the same weight.
        method: ``"expanded"``, ``"percentile"``, or ``"BCa"``: bias-corrected and accelerated (Efron 1987).
        draws: How often to resample.

    Raises:
        GeometryError: If there are fewer than two examples or clusters, not one label for each example, the confidence
            is not between 0 and 1, or there are no draws.

    Example:
        >>> answers, prompts = [0.1, 0.1, 0.2, 0.7, 0.7, 0.8, 0.4, 0.4], ["a", "a", "a", "b", "b", "b", "c", "c"]
        >>> low, high = bootstrap_interval(answers, np.random.default_rng(0), clusters=prompts)
        >>> narrow_low, narrow_high = bootstrap_interval(answers, np.random.default_rng(0))
        >>> low < narrow_low < narrow_high < high
        True
    """
    from scipy.stats import bootstrap, norm, t

    check_confidence(confidence)
    check_draws(draws, 1)
    sums, counts = _by_cluster(np.asarray(values, dtype=np.float64), clusters)
    mean = sums.sum() / counts.sum()
    if np.allclose(sums, mean * counts, rtol=1e-12, atol=0):  # nothing varies, and BCa would divide by that
        return float(mean), float(mean)
    found = bootstrap(
        (sums, counts),
        lambda total, count, axis: total.sum(axis) / count.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=draws,
        confidence_level=confidence,
        method="BCa" if method == "BCa" else "percentile",
        rng=generator,
    )
    if method != "expanded":
        return float(found.confidence_interval.low), float(found.confidence_interval.high)
    n, tail = len(sums), (1 + confidence) / 2
    stretch = (n / (n - 1)) ** 0.5 * float(t.ppf(tail, n - 1) / norm.ppf(tail))
    return percentile_interval(mean + stretch * (found.bootstrap_distribution - mean), confidence)


def _by_cluster(values: np.ndarray, clusters: ArrayLike | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the sum and the number of the values in each cluster, each example being its own without clusters."""
    labels = np.arange(len(values)) if clusters is None else np.asarray(clusters)
    if len(labels) != len(values):
        raise GeometryError(
            f"expected a label for each of {len(values)} values, found {len(labels)}; give clusters= one each"
        )
    distinct, place = np.unique(labels, return_inverse=True)
    if len(distinct) < 2:
        word = "examples" if clusters is None else "clusters"
        raise GeometryError(f"expected at least two {word} to resample, found {len(distinct)}; measure more")
    return np.bincount(place, weights=values), np.bincount(place).astype(np.float64)
