"""Means of numbers per prompt, and perplexity, each with its 95 % interval over prompts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from geomkit.errors import DataError
from geomkit.stats.ratio import Ratio


@dataclass(frozen=True)
class Estimate:
    """A number that was estimated from prompts, with its 95 % interval.

    Attributes:
        value: The number.
        low: Lower end of the interval; NaN where there are too few prompts for an interval.
        high: Upper end of the interval.
        n: Number of prompts.
    """

    value: float
    low: float
    high: float
    n: int

    @property
    def interval(self) -> tuple[float, float]:
        """Both ends of the interval."""
        return self.low, self.high

    def __str__(self) -> str:
        """Return the number and its interval, to three significant digits."""
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


def mean_estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of numbers of independent prompts, with Student's 95 % interval.

    Args:
        values: One number per prompt.

    Raises:
        DataError: If there are no numbers.

    Example:
        >>> print(mean_estimate([0.2, 0.4, 0.6]))
        0.4 [-0.0968, 0.897]
    """
    from scipy.stats import t as student

    numbers = _numbers(values)
    mean, n = float(numbers.mean()), len(numbers)
    if n < 2:
        return Estimate(mean, math.nan, math.nan, n)
    half = float(student.ppf(0.975, n - 1)) * float(numbers.std(ddof=1)) / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half, n)


def perplexity(losses: Sequence[float], tokens: Sequence[int]) -> Estimate:
    """Return the perplexity of texts: the exponential of the mean loss over all tokens of all texts.

    Args:
        losses: Mean loss of each text, in nats per token.
        tokens: Number of scored tokens of each text, which weighs its loss.

    Returns:
        The perplexity; its interval is Fieller's of the ratio of losses to tokens, by leaving texts out.

    Raises:
        DataError: If there are no texts.

    Example:
        >>> print(round(perplexity([1.0, 1.0], [3, 5]).value, 3))
        2.718
    """
    means, weights = _numbers(losses), np.asarray(tokens, dtype=np.float64)
    sums, n = means * weights, len(means)
    mean = float(sums.sum() / weights.sum())
    if n < 2:
        return Estimate(_exp(mean), math.nan, math.nan, n)
    sums_without, weights_without = ((part.sum() - part) / (n - 1) for part in (sums, weights))
    ratio = Ratio(float(sums.mean()), float(weights.mean()), (sums_without,), (weights_without,))
    low, high = ratio.interval(0.95, bound=math.inf)
    return Estimate(_exp(mean), _exp(low), _exp(high), n)


def _numbers(values: Sequence[float]) -> np.ndarray:
    if not len(values):
        raise DataError("expected at least one number to take the mean of, found none; evaluate some examples")
    return np.asarray(values, dtype=np.float64)


def _exp(value: float) -> float:
    """Return e to the power of a number, infinity where it is too large for a float."""
    return math.exp(value) if value < 700 else math.inf
