"""The cosine between two mean gradients from Gram matrices alone: its interval and its permutation null."""

from dataclasses import dataclass

import numpy as np

from geomkit.resampling import percentile_interval


@dataclass(frozen=True, eq=False)
class Grams:
    """Inner products within and between N safety and M utility examples.

    Attributes:
        safety: (N, N) fp64.
        across: (N, M) fp64.
        utility: (M, M) fp64.
    """

    safety: np.ndarray
    across: np.ndarray
    utility: np.ndarray

    def __add__(self, other: "Grams") -> "Grams":
        """Add the inner products of other parameters."""
        return Grams(self.safety + other.safety, self.across + other.across, self.utility + other.utility)

    def balanced(self) -> "Grams":
        """Scale both sides to a root mean square norm of one, which no cosine between them notices.

        A division of the pooled examples at random would otherwise compare parts of the side with the larger
        gradients with each other, whatever the other side is.
        """
        a, b = (_unit(float(side.diagonal().mean())) for side in (self.safety, self.utility))
        return Grams(a * a * self.safety, a * b * self.across, b * b * self.utility)

    @property
    def pooled(self) -> np.ndarray:
        """(N + M, N + M) of all examples, safety first."""
        return np.block([[self.safety, self.across], [self.across.T, self.utility]])

    @property
    def cosine(self) -> float:
        """Cosine of the two mean gradients; NaN if one is zero."""
        return _ratio(self.across.mean(), self.safety.mean() * self.utility.mean())


def _unit(squared_norm: float) -> float:
    return squared_norm**-0.5 if squared_norm > 0 else 1.0


def _ratio(inner: float, squared_norms: float) -> float:
    return float(inner / squared_norms**0.5) if squared_norms > 0 else float("nan")


def _pair_means(gram: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the mean over pairs of *different* examples, and the same with each example left out.

    The first is the unbiased estimate of ‖E g‖²; the mean over all pairs is too large by tr Cov(g) / N.
    """
    n = len(gram)
    others = gram.sum(1) - gram.diagonal()
    return float(others.sum() / (n * (n - 1))), (others.sum() - 2 * others) / ((n - 1) * (n - 2))


@dataclass(frozen=True, eq=False)
class _Jackknife:
    """An estimate of ⟨E g_s, E g_u⟩ and of ‖E g_s‖·‖E g_u‖, and both with each example left out in turn."""

    inner: float
    norms: float
    inner_without: tuple[np.ndarray, np.ndarray]
    norms_without: tuple[np.ndarray, np.ndarray]

    def covariance(self, a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """Jackknife covariance of two statistics, the part of each sample."""
        return np.array(
            [(len(x) - 1) * float(np.mean((x - x.mean()) * (y - y.mean()))) for x, y in zip(a, b, strict=True)]
        )


def _jackknife(grams: Grams) -> _Jackknife | None:
    """Return the estimates, or nothing if a mean gradient is no larger than its sampling noise."""
    n, m = grams.across.shape
    safety, safety_without = _pair_means(grams.safety)
    utility, utility_without = _pair_means(grams.utility)
    if safety <= 0 or utility <= 0:
        return None
    total = grams.across.sum()
    return _Jackknife(
        inner=float(total / (n * m)),
        norms=(safety * utility) ** 0.5,
        inner_without=((total - grams.across.sum(1)) / ((n - 1) * m), (total - grams.across.sum(0)) / (n * (m - 1))),
        norms_without=(
            np.sqrt(safety_without.clip(0) * utility),
            np.sqrt(utility_without.clip(0) * safety),
        ),
    )


def expected_cosine(grams: Grams, confidence: float) -> tuple[float, tuple[float, float]]:
    """Estimate the cosine of the *expected* gradients, with a confidence interval.

    The estimate is ⟨ḡ_s, ḡ_u⟩ / √(u_s u_u) with u the unbiased estimates of the squared norms. The interval is
    Fieller's (1954): all θ for which ⟨ḡ_s, ḡ_u⟩ − θ √(u_s u_u) is within Student's t of zero, its variance by the
    two-sample jackknife and its degrees of freedom after Welch and Satterthwaite. It is cut at ±1 and widens to
    [−1, 1] where a mean gradient cannot be told from zero.

    In simulations with planted expected gradients (4 to 64 examples a side, Gaussian, heavy-tailed and of uneven
    size) a nominal 95 % covered 94.8 to 98.0 %, and more only where it hardly can do otherwise: at a cosine of one,
    and where it widens to [−1, 1].

    Args:
        grams: Inner products of at least three examples on each side.
        confidence: Share of experiments whose interval should hold the truth.

    Returns:
        The estimate, cut at ±1 and NaN if a mean gradient is no larger than its noise, and the interval.
    """
    from scipy.stats import t as student

    found = _jackknife(grams)
    if found is None:
        return float("nan"), (-1.0, 1.0)
    theta = found.inner / found.norms
    var_inner = found.covariance(found.inner_without, found.inner_without)
    var_norms = found.covariance(found.norms_without, found.norms_without)
    between = found.covariance(found.inner_without, found.norms_without)
    parts = (var_inner - 2 * theta * between + theta**2 * var_norms).clip(0)
    freedom = parts.sum() ** 2 / max((parts**2 / (np.array(grams.across.shape) - 1)).sum(), np.finfo(float).tiny)
    squared = float(student.ppf((1 + confidence) / 2, max(freedom, 1.0))) ** 2
    # The roots of (a − θq)² = t² (var_a − 2θ cov + θ² var_q), a the inner product and q the norms.
    second = found.norms**2 - squared * var_norms.sum()
    first = found.inner * found.norms - squared * between.sum()
    constant = found.inner**2 - squared * var_inner.sum()
    estimate = float(np.clip(theta, -1, 1))
    if second <= 0:
        return estimate, (-1.0, 1.0)
    spread = max(first**2 - second * constant, 0.0) ** 0.5
    low, high = np.clip([(first - spread) / second, (first + spread) / second], -1, 1)
    return estimate, (float(low), float(high))


def permuted_cosines(grams: Grams, in_first: np.ndarray) -> np.ndarray:
    """Return the cosine of the two groups' mean gradients under other assignments of the pooled examples.

    Args:
        grams: Inner products.
        in_first: (draws, N + M) booleans, whether an example is counted as safety.

    Returns:
        (draws,) cosines, NaN where a mean is zero.
    """
    pooled = grams.pooled
    first = in_first / in_first.sum(1, keepdims=True)
    second = ~in_first / (~in_first).sum(1, keepdims=True)
    toward_first, toward_second = first @ pooled, second @ pooled
    squared = (toward_first * first).sum(1) * (toward_second * second).sum(1)
    inner = (toward_first * second).sum(1)
    cosines: np.ndarray = np.full(len(inner), np.nan)
    np.divide(inner, np.sqrt(squared.clip(0)), out=cosines, where=squared > 0)
    return cosines


def permutation_test(cosine: float, permuted: np.ndarray, confidence: float) -> tuple[float, tuple[float, float]]:
    """Return the one-sided p-value of a cosine as low as this, and the interval of the permuted ones.

    p = (1 + #{permuted ≤ observed}) / (1 + draws), valid for any number of draws (Phipson and Smyth 2010).
    """
    if np.isnan(cosine) or np.isnan(permuted).any():
        return 1.0, (-1.0, 1.0)
    # Assignments that repeat the observed one differ from it in the last bits.
    as_low = int((permuted <= cosine + 1e-12).sum())
    return (1 + as_low) / (1 + len(permuted)), percentile_interval(permuted, confidence)
