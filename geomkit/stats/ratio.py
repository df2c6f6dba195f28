"""The interval of a ratio of two estimates, such as a cosine, from what both are with single examples left out."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True, eq=False)
class Ratio:
    """An estimate a of a numerator and q > 0 of a denominator, from one or more independent samples of examples.

    Attributes:
        numerator: a, from all examples.
        denominator: q, from all examples.
        numerator_without: For each sample, a with each of its examples left out in turn.
        denominator_without: For each sample, q with each of its examples left out in turn.
        counted_twice: The part of Var(a) that belongs to pairs of examples of two samples. Leaving examples out of
            either sample finds it, so that their sum has it twice (Efron and Stein 1981).
    """

    numerator: float
    denominator: float
    numerator_without: tuple[np.ndarray, ...]
    denominator_without: tuple[np.ndarray, ...]
    counted_twice: float = 0.0

    @property
    def estimate(self) -> float:
        """θ = a/q."""
        return self.numerator / self.denominator

    def interval(self, confidence: float, bound: float) -> tuple[float, float]:
        """Return Fieller's (1954) interval: all θ for which a − θq is within Student's t of zero.

        Its variance is the jackknife's, its degrees of freedom those of Welch and Satterthwaite.

        Args:
            confidence: Share of experiments whose interval should hold the truth.
            bound: Largest magnitude that the ratio can have; the interval is cut there, and is all of [−bound, bound]
                where the denominator cannot be told from zero.
        """
        from scipy.stats import t as student

        squared = float(student.ppf((1 + confidence) / 2, self._freedom)) ** 2
        # The roots of (a − θq)² = t² (var_a − 2θ cov + θ² var_q).
        second = self.denominator**2 - squared * self._denominator_parts.sum()
        if second <= 0:
            return -bound, bound
        first = self.numerator * self.denominator - squared * self._shared_parts.sum()
        constant = self.numerator**2 - squared * self._numerator_variance
        spread = max(first**2 - second * constant, 0.0) ** 0.5
        low, high = np.clip([(first - spread) / second, (first + spread) / second], -bound, bound)
        return float(low), float(high)

    @property
    def p_value(self) -> float:
        """Two-sided p-value of a numerator of zero; 1 − confidence of the interval that ends there."""
        from scipy.stats import t as student

        if self._numerator_variance <= 0:
            return 1.0
        return float(2 * student.sf(abs(self.numerator) / self._numerator_variance**0.5, self._freedom))

    @cached_property
    def _numerator_parts(self) -> np.ndarray:
        return _covariances(self.numerator_without, self.numerator_without)

    @cached_property
    def _denominator_parts(self) -> np.ndarray:
        return _covariances(self.denominator_without, self.denominator_without)

    @cached_property
    def _shared_parts(self) -> np.ndarray:
        return _covariances(self.numerator_without, self.denominator_without)

    @property
    def _numerator_variance(self) -> float:
        # The whole variance is no less than any sample's part, which has its share of the pairs.
        return float(max(self._numerator_parts.sum() - self.counted_twice, self._numerator_parts.max()))

    @cached_property
    def _freedom(self) -> float:
        theta = self.estimate
        parts = (self._numerator_parts - 2 * theta * self._shared_parts + theta**2 * self._denominator_parts).clip(0)
        examples = np.array([len(found) for found in self.numerator_without])
        spread = (parts**2 / (examples - 1)).sum()
        return max(float(parts.sum() ** 2 / spread), 1.0) if spread > 0 else 1.0


def _covariances(a: tuple[np.ndarray, ...], b: tuple[np.ndarray, ...]) -> np.ndarray:
    """Return the jackknife covariance of two statistics, the part of each sample."""
    return np.array([(len(x) - 1) * float(np.mean((x - x.mean()) * (y - y.mean()))) for x, y in zip(a, b, strict=True)])
