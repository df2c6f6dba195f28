"""Cosine between two mean gradients, from inner products between examples: its interval and its permutation null."""

from dataclasses import dataclass

import numpy as np

from geomkit.stats.permutation import percentile_interval
from geomkit.stats.ratio import Ratio


@dataclass(frozen=True, eq=False)
class PairGrams:
    """Inner products within and between N safety and M utility examples.

    Attributes:
        safety: (N, N) inner products between safety examples, fp64.
        across: (N, M) inner products between safety and utility examples, fp64.
        utility: (M, M) inner products between utility examples, fp64.
    """

    safety: np.ndarray
    across: np.ndarray
    utility: np.ndarray

    def __add__(self, other: "PairGrams") -> "PairGrams":
        """Add the inner products of other parameters."""
        return PairGrams(self.safety + other.safety, self.across + other.across, self.utility + other.utility)

    def normalised(self) -> "PairGrams":
        """Return the inner products after scaling every example's gradient to norm one; zero gradients stay zero."""
        a, b = (_inverse_norms(gram.diagonal()) for gram in (self.safety, self.utility))
        return PairGrams(a[:, None] * self.safety * a, a[:, None] * self.across * b, b[:, None] * self.utility * b)

    def subset(self, safety: np.ndarray, utility: np.ndarray) -> "PairGrams":
        """Return the inner products of the safety and utility examples at the given places."""
        return PairGrams(
            self.safety[np.ix_(safety, safety)],
            self.across[np.ix_(safety, utility)],
            self.utility[np.ix_(utility, utility)],
        )

    @property
    def pooled(self) -> np.ndarray:
        """(N + M, N + M) inner products between all examples, safety examples first."""
        return np.block([[self.safety, self.across], [self.across.T, self.utility]])

    @property
    def norms(self) -> float:
        """Product ‖ḡ_s‖·‖ḡ_u‖ of the norms of the two mean gradients."""
        return float((max(self.safety.mean(), 0.0) * max(self.utility.mean(), 0.0)) ** 0.5)

    @property
    def cosine(self) -> float:
        """Cosine of the two mean gradients; NaN if a mean gradient is zero."""
        return float(self.across.mean() / self.norms) if self.norms > 0 else float("nan")


def _inverse_norms(squared_norms: np.ndarray) -> np.ndarray:
    scales: np.ndarray = np.zeros(len(squared_norms))
    np.divide(1, np.sqrt(squared_norms.clip(0)), out=scales, where=squared_norms > 0)
    return scales


def _squared_norm(gram: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the unbiased estimate of ‖E g‖², and the same estimate with each example left out, (N,).

    The estimate is the mean inner product of two *different* examples; the mean over all entries of the Gram matrix
    would be too large by tr Cov(g) / N.
    """
    n = len(gram)
    with_others = gram.sum(1) - gram.diagonal()
    total = with_others.sum()
    return float(total / (n * (n - 1))), (total - 2 * with_others) / ((n - 1) * (n - 2))


def _inner_without(across: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the inner product of the two means without each row's example, and without each column's example."""
    n, m = across.shape
    total = across.sum()
    return (total - across.sum(1)) / ((n - 1) * m), (total - across.sum(0)) / (n * (m - 1))


def _pair_variance(across: np.ndarray, cosine: float) -> float:
    """Return the part of the variance of two means' inner product that comes from pairs of examples.

    The variance is the residual of an additive two-way layout of the inner products, divided by N·M. The jackknife
    over each set counts this part twice. A share cos² of this part is left in the jackknife's variance: the norms in
    the denominator have a pair part as well, and near a cosine of ±1 numerator and denominator move together (coverage
    with and without this share: tests/benchmarks/README.md).
    """
    n, m = across.shape
    residual = across - across.mean(0) - across.mean(1)[:, None] + across.mean()
    return float((residual**2).sum() / ((n - 1) * (m - 1) * n * m)) * max(1 - cosine**2, 0.0)


def _root(squared: np.ndarray) -> np.ndarray:
    return np.asarray(np.sqrt(squared.clip(0)))


def cosine_ratio(grams: PairGrams) -> Ratio | None:
    """Return the estimate of ⟨E g_s, E g_u⟩ / (‖E g_s‖·‖E g_u‖) as a ratio with its leave-one-out values.

    Args:
        grams: Inner products of at least three examples on each side.

    Returns:
        The ratio, or ``None`` if a mean gradient is no larger than its sampling noise.
    """
    # 1. Denominator: unbiased squared norms s², u², so that noise in the means does not draw the cosine to zero.
    safety, safety_without = _squared_norm(grams.safety)
    utility, utility_without = _squared_norm(grams.utility)
    if safety <= 0 or utility <= 0:
        return None
    # 2. Numerator: the inner product of the means, unbiased because the two sets are independent.
    inner, norms = float(grams.across.mean()), (safety * utility) ** 0.5
    # 3. Leaving out a safety example changes the numerator and s only, a utility example the numerator and u only.
    return Ratio(
        numerator=inner,
        denominator=norms,
        numerator_without=_inner_without(grams.across),
        denominator_without=(_root(safety_without * utility), _root(utility_without * safety)),
        counted_twice=_pair_variance(grams.across, inner / norms),
    )


def expected_cosine(grams: PairGrams, confidence: float) -> tuple[float, tuple[float, float]]:
    """Estimate the cosine of the *expected* gradients, with a confidence interval.

    The estimate is ⟨ḡ_s, ḡ_u⟩ / √(u_s u_u), where u_s and u_u are the unbiased estimates of the squared norms. The
    interval is Fieller's, see :class:`geomkit.stats.ratio.Ratio`; its measured coverage is in
    tests/benchmarks/README.md.

    Args:
        grams: Inner products of at least three examples on each side.
        confidence: Nominal coverage of the interval, between 0 and 1.

    Returns:
        The estimate, clipped to [−1, 1], and the interval; NaN and (−1, 1) if a mean gradient is no larger than its
        sampling noise.
    """
    ratio = cosine_ratio(grams)
    if ratio is None:
        return float("nan"), (-1.0, 1.0)
    return float(np.clip(ratio.estimate, -1, 1)), ratio.interval(confidence, 1.0)


def contrast_ratio(first: PairGrams, second: PairGrams) -> Ratio | None:
    """Return the estimated difference of two cosines with the same utility gradient, as one ratio.

    cos(s, u) − cos(c, u) = (⟨s, u⟩‖c‖ − ⟨c, u⟩‖s‖) / (‖s‖‖c‖‖u‖), from three independent samples of examples.

    Args:
        first: Inner products of the safety examples s with the utility examples u.
        second: Inner products of the control examples c with the same utility examples u.

    Returns:
        The ratio, or ``None`` if a mean gradient is no larger than its sampling noise.
    """
    # 1. Norms ‖s‖, ‖c‖, ‖u‖ of the expected gradients, from unbiased squares, and each without one example.
    squared, without = zip(*map(_squared_norm, (first.safety, second.safety, first.utility)), strict=True)
    if min(squared) <= 0:
        return None
    s, c, u = np.sqrt(squared)
    s_without, c_without, u_without = map(_root, without)
    # 2. Inner products a = ⟨s, u⟩ and b = ⟨c, u⟩; a_s is a without each safety example, a_u without each utility one.
    a, b = first.across.mean(), second.across.mean()
    (a_s, a_u), (b_c, b_u) = _inner_without(first.across), _inner_without(second.across)
    # 3. Numerator a‖c‖ − b‖s‖ and denominator ‖s‖‖c‖‖u‖, each without one safety, control or utility example. Only a
    #    utility example changes both inner products, so it keeps the two cosines paired.
    return Ratio(
        numerator=float(a * c - b * s),
        denominator=float(s * c * u),
        numerator_without=(a_s * c - b * s_without, a * c_without - b_c * s, a_u * c - b_u * s),
        denominator_without=(s_without * c * u, s * c_without * u, s * c * u_without),
        # 4. Variance of pairs in a‖c‖ and in b‖s‖, which two of the three jackknives count.
        counted_twice=float(
            c**2 * _pair_variance(first.across, a / (s * u)) + s**2 * _pair_variance(second.across, b / (c * u))
        ),
    )


def permuted_cosines(grams: PairGrams, in_first: np.ndarray) -> np.ndarray:
    """Return the cosine of the two groups' mean gradients under other assignments of the pooled examples.

    Args:
        grams: Inner products of N safety and M utility examples.
        in_first: (draws, N + M) booleans, whether an example is counted as a safety example.

    Returns:
        (draws,) cosines, NaN where a mean gradient is zero.
    """
    pooled = grams.pooled
    count = in_first.sum(1, keepdims=True)
    other_count = in_first.shape[1] - count
    # 1. Rows that average the examples of each group: mean gradients are first @ gradients and second @ gradients.
    first, second = in_first / count, ~in_first / other_count
    # 2. Inner products of the two means with every example; the second from the total, which saves a matrix product.
    with_first = first @ pooled
    with_second = (pooled.sum(0) - count * with_first) / other_count
    # 3. ⟨ḡ₁, ḡ₂⟩ / √(‖ḡ₁‖² ‖ḡ₂‖²).
    squared = (with_first * first).sum(1) * (with_second * second).sum(1)
    inner = (with_first * second).sum(1)
    cosines: np.ndarray = np.full(len(inner), np.nan)
    np.divide(inner, np.sqrt(squared.clip(0)), out=cosines, where=squared > 0)
    return cosines


def permutation_test(cosine: float, permuted: np.ndarray, confidence: float) -> tuple[float, tuple[float, float]]:
    """Return the one-sided p-value of a cosine as low as the observed one, and the interval of the permuted cosines.

    p = (1 + #{permuted ≤ observed}) / (1 + draws), valid for any number of draws (Phipson and Smyth 2010). Where a
    cosine is NaN, the p-value is 1 and the interval (−1, 1).

    Args:
        cosine: The observed cosine.
        permuted: (draws,) cosines from :func:`permuted_cosines`.
        confidence: Share of the permuted cosines in the interval, between 0 and 1.
    """
    if np.isnan(cosine) or np.isnan(permuted).any():
        return 1.0, (-1.0, 1.0)
    # Assignments that repeat the observed assignment have its cosine up to the last bits.
    at_least_as_low = int((permuted <= cosine + 1e-12).sum())
    return (1 + at_least_as_low) / (1 + len(permuted)), percentile_interval(permuted, confidence)
