"""Random relabelling of examples, for permutation tests and the intervals of their null distributions."""

import numpy as np


def permuted_places(examples: int, draws: int, generator: np.random.Generator) -> np.ndarray:
    """Return random orders of the examples.

    Args:
        examples: N, the number of examples.
        draws: Number of orders.
        generator: Source of randomness.

    Returns:
        (draws, N) permutations of 0 to N − 1.
    """
    return generator.permuted(np.tile(np.arange(examples), (draws, 1)), axis=1)


def permuted_labels(first: int, second: int, draws: int, generator: np.random.Generator) -> np.ndarray:
    """Return random divisions of pooled examples into two groups of the given sizes.

    Args:
        first: Size of the first group.
        second: Size of the second group.
        draws: Number of divisions.
        generator: Source of randomness.

    Returns:
        (draws, first + second) booleans: whether an example is in the first group.
    """
    return np.asarray(permuted_places(first + second, draws, generator) < first)


def percentile_interval(values: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """Return the central interval that holds a share ``confidence`` of the values.

    Args:
        values: (n,) values.
        confidence: The share, between 0 and 1.

    Example:
        >>> low, high = percentile_interval(np.arange(101.0), 0.9)
        >>> round(low), round(high)
        (5, 95)
    """
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, (tail, 1 - tail))
    return float(low), float(high)


def sign_flip_p_value(differences: np.ndarray) -> float:
    """Return the two-sided p-value of the hypothesis that paired differences are symmetric about zero, by sign flips.

    Args:
        differences: (prompts,) mean difference of every prompt.

    Returns:
        The p-value; 1 where no prompt differs. All 2ⁿ flips of the n non-zero differences are taken if there are at
        most 9,999, otherwise as many random flips from a fixed seed.

    Example:
        >>> sign_flip_p_value(np.array([1.0, 1.0, 1.0, 1.0, 0.0]))
        0.125
    """
    from scipy.stats import permutation_test

    nonzero = differences[differences != 0]
    if len(nonzero) < 2:
        return 1.0  # with one difference, either sign is as far from zero
    result = permutation_test(
        (nonzero,), np.mean, permutation_type="samples", n_resamples=9_999, rng=np.random.default_rng(0)
    )
    return float(result.pvalue)


def mcnemar_p_value(gained: int, lost: int) -> float:
    """Return the two-sided p-value of McNemar's (1947) exact test of two proportions over the same prompts.

    Of the prompts whose outcome differs, half should differ either way if both models were alike.

    Args:
        gained: Number of prompts with the outcome under the second model only.
        lost: Number of prompts with the outcome under the first model only.

    Returns:
        The binomial p-value; 1 where no prompt differs.

    Example:
        >>> mcnemar_p_value(6, 0)
        0.03125
    """
    from scipy.stats import binomtest

    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
