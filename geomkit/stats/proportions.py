"""Shares of prompts, never without their interval."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from geomkit.errors import DataError


@dataclass(frozen=True)
class Rate:
    """A share of prompts with its interval.

    Attributes:
        successes: How many prompts counted.
        n: How many prompts there were.
    """

    successes: int
    n: int

    @property
    def value(self) -> float:
        """The share itself, between 0 and 1."""
        return self.successes / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson score interval (Wilson 1927): honest also at 0 and n."""
        from scipy.stats import binomtest

        low, high = binomtest(self.successes, self.n).proportion_ci(confidence_level=0.95, method="wilson")
        return float(low), float(high)

    def percent(self) -> str:
        """Show the share and its interval in per cent, short enough for a table.

        Example:
            >>> Rate(190, 200).percent()
            '95.0 [91.0, 97.3]'
        """
        low, high = self.interval
        return f"{100 * self.value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"

    def __str__(self) -> str:
        """Show the share and its interval in per cent."""
        low, high = self.interval
        return f"{self.value:.1%} [{low:.1%}, {high:.1%}]"


def rate(flags: Sequence[bool]) -> Rate:
    """Count a list of outcomes.

    Raises:
        DataError: If it is empty.

    Example:
        >>> print(rate([True, True, False, True]))
        75.0% [30.1%, 95.4%]
    """
    if not len(flags):
        raise DataError("expected at least one outcome to take a share of, found none")
    return Rate(sum(flags), len(flags))


def wilson(share: float, n: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a share that need not be a whole number of n prompts.

    Example:
        >>> [round(bound, 3) for bound in wilson(0.75, 4)]
        [0.301, 0.954]
    """
    from scipy.stats import norm

    z = float(norm.ppf(0.975))
    centre = share + z * z / (2 * n)
    half = z * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return float((centre - half) / (1 + z * z / n)), float((centre + half) / (1 + z * z / n))


def spread(runs: Sequence[np.ndarray]) -> dict[str, float | int]:
    """Return what runs over the same prompts say of their mean: its interval over prompts, and the spread over runs.

    Args:
        runs: One outcome per prompt and run.

    Returns:
        ``value``, ``low``, ``high``, ``prompts``; ``runs``, ``seed_sd``, ``least``, ``most``; NaN without a run.
    """
    if not runs:
        return {"value": np.nan, "low": np.nan, "high": np.nan, "prompts": 0, "runs": 0, "seed_sd": np.nan,
                "least": np.nan, "most": np.nan}  # fmt: skip
    means = np.array([run.mean() for run in runs])
    prompts = len(runs[0])
    low, high = wilson(float(means.mean()), prompts)
    return {
        "value": float(means.mean()), "low": low, "high": high, "prompts": prompts, "runs": len(runs),
        "seed_sd": float(means.std(ddof=1)) if len(runs) > 1 else np.nan,
        "least": float(means.min()), "most": float(means.max()),
    }  # fmt: skip


def sign_flip_p(differences: np.ndarray) -> float:
    """Return the two-sided p value that paired differences are symmetric about zero, by flipping their signs.

    Args:
        differences: (prompts,) mean difference of each prompt.

    Returns:
        p; 1 where nothing differs. All 2ⁿ flips of n non-zero differences where those are at most 9,999, else as many
        at random from a fixed seed.

    Example:
        >>> sign_flip_p(np.array([1.0, 1.0, 1.0, 1.0, 0.0]))
        0.125
    """
    from scipy.stats import permutation_test

    different = differences[differences != 0]
    if len(different) == 0:
        return 1.0
    if len(different) == 1:
        return 1.0  # either sign is as far from zero
    found = permutation_test(
        (different,), np.mean, permutation_type="samples", n_resamples=9_999, rng=np.random.default_rng(0)
    )
    return float(found.pvalue)
