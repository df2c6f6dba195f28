"""Fieller's interval of a ratio of two estimates, such as a cosine, from their leave-one-out values."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True, eq=False)
class Ratio:
    """The ratio of an estimate a and an estimate q > 0, from one or more independent samples of examples.

    Attributes:
        numerator: a, from all examples.
        denominator: q, from all examples.
        numerator_without: For every sample, (N,) values of a with one example left out in turn.
        denominator_without: For every sample, (N,) values of q with one example left out in turn.
        counted_twice: The part of Var(a) that belongs to pairs of examples of two samples. Leaving examples out of
            either sample finds that part, so that the sum over samples has it twice (Efron and Stein 1981).
    """

    numerator: float
    denominator: float
    numerator_without: tuple[np.ndarray, ...]
    denominator_without: tuple[np.ndarray, ...]
    counted_twice: float = 0.0

    @property
    def estimate(self) -> float:
        """The ratio θ = a/q."""
        return self.numerator / self.denominator

    def interval(self, confidence: float, bound: float) -> tuple[float, float]:
        """Return Fieller's (1954) interval: all θ for which a − θq is within Student's t of zero.

        Variances and covariances come from the jackknife, the degrees of freedom from Welch and Satterthwaite.

        Args:
            confidence: Nominal coverage of the interval, between 0 and 1.
            bound: Largest possible magnitude of the ratio, at which the interval is cut. Where the denominator cannot
                be told from zero, the interval is [−bound, bound].
        """
        from scipy.stats import t as student

        squared = float(student.ppf((1 + confidence) / 2, self._freedom)) ** 2
        # The ends are the roots of (a − θq)² = t² (var_a − 2θ cov + θ² var_q), that is of
        # (q² − t² var_q) θ² − 2 (aq − t² cov) θ + (a² − t² var_a) = 0.
        quadratic = self.denominator**2 - squared * self._denominator_parts.sum()
        if quadratic <= 0:
            return -bound, bound
        linear = self.numerator * self.denominator - squared * self._covariance_parts.sum()
        constant = self.numerator**2 - squared * self._numerator_variance
        root = max(linear**2 - quadratic * constant, 0.0) ** 0.5
        low, high = np.clip([(linear - root) / quadratic, (linear + root) / quadratic], -bound, bound)
        return float(low), float(high)

    @property
    def p_value(self) -> float:
        """Two-sided p-value of the hypothesis that a is zero: 1 − confidence of the interval that ends at zero."""
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
    def _covariance_parts(self) -> np.ndarray:
        return _covariances(self.numerator_without, self.denominator_without)

    @property
    def _numerator_variance(self) -> float:
        # The whole variance is no less than the part of any sample, which includes the pairs' variance once.
        return float(max(self._numerator_parts.sum() - self.counted_twice, self._numerator_parts.max()))

    @cached_property
    def _freedom(self) -> float:
        """Degrees of freedom of a − θq (Welch and Satterthwaite), at least 1."""
        theta = self.estimate
        parts = self._numerator_parts - 2 * theta * self._covariance_parts + theta**2 * self._denominator_parts
        parts = parts.clip(0)
        examples = np.array([len(replicates) for replicates in self.numerator_without])
        spread = (parts**2 / (examples - 1)).sum()
        return max(float(parts.sum() ** 2 / spread), 1.0) if spread > 0 else 1.0


def _covariances(a: tuple[np.ndarray, ...], b: tuple[np.ndarray, ...]) -> np.ndarray:
    """Return the jackknife covariance (N − 1)/N · Σ (a_i − ā)(b_i − b̄) of two statistics in every sample."""
    return np.array([(len(x) - 1) * float(np.mean((x - x.mean()) * (y - y.mean()))) for x, y in zip(a, b, strict=True)])
