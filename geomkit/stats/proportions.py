"""Proportions with their Wilson intervals: of one count, and of the mean of several runs over the same prompts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np

from geomkit.errors import DataError


@dataclass(frozen=True)
class Rate:
    """A proportion of prompts (or of layers) with its interval.

    Attributes:
        successes: Number of prompts with the outcome that is counted.
        n: Number of all prompts.
    """

    successes: int
    n: int

    @property
    def value(self) -> float:
        """The proportion, between 0 and 1; NaN of no prompts."""
        return self.successes / self.n if self.n else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval, see :func:`wilson_interval`; NaN of no prompts."""
        return wilson_interval(self.value, self.n) if self.n else (math.nan, math.nan)

    def percent(self) -> str:
        """Return the proportion and its interval in per cent, short enough for a table.

        Example:
            >>> Rate(190, 200).percent()
            '95.0 [91.0, 97.3]'
        """
        low, high = self.interval
        if not self.n:
            return "–"
        return f"{100 * self.value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"

    def __str__(self) -> str:
        """Return the proportion and its interval in per cent, with per-cent signs."""
        low, high = self.interval
        return f"{self.value:.1%} [{low:.1%}, {high:.1%}]"


def rate(flags: Sequence[bool]) -> Rate:
    """Return the proportion of true flags.

    Raises:
        DataError: If there are no flags.

    Example:
        >>> print(rate([True, True, False, True]))
        75.0% [30.1%, 95.4%]
    """
    if not len(flags):
        raise DataError("expected at least one outcome to take a share of, found none; evaluate some prompts")
    return Rate(sum(flags), len(flags))


def wilson_interval(proportion: float, n: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval (Wilson 1927) of a proportion of n prompts.

    The interval keeps its coverage at 0 and at 1. The proportion need not be a whole number of prompts, so that the
    mean over several runs has an interval too.

    Args:
        proportion: Between 0 and 1.
        n: Number of prompts.

    Example:
        >>> [round(bound, 3) for bound in wilson_interval(0.75, 4)]
        [0.301, 0.954]
    """
    from scipy.special import ndtri

    z = float(ndtri(0.5 + 0.5 * 0.95))
    # The ends are the roots p of (proportion − p)² = z² p (1 − p) / n.
    denominator = 2 * (n + z**2)
    centre = (2 * n * proportion + z**2) / denominator
    half = z / denominator * sqrt(4 * n * proportion * (1 - proportion) + z**2)
    # At 0 and 1 an end is exact, whatever rounding says.
    return 0.0 if proportion == 0 else centre - half, 1.0 if proportion == 1 else centre + half


def summarize_runs(runs: Sequence[np.ndarray]) -> dict[str, float | int]:
    """Return the mean outcome of runs over the same prompts, its interval over prompts, and its range over runs.

    Args:
        runs: For every run, (prompts,) outcomes between 0 and 1.

    Returns:
        ``value``, the mean over all runs, with its 95 % interval ``low`` to ``high`` over ``prompts`` prompts; the
        number of ``runs``, the standard deviation ``seed_sd`` of the runs' means, and the smallest and the largest of
        these means, ``least`` and ``most``. NaN without a run.
    """
    if not runs:
        return {"value": np.nan, "low": np.nan, "high": np.nan, "prompts": 0, "runs": 0, "seed_sd": np.nan,
                "least": np.nan, "most": np.nan}  # fmt: skip
    means = np.array([run.mean() for run in runs])
    prompts = len(runs[0])
    low, high = wilson_interval(float(means.mean()), prompts)
    return {
        "value": float(means.mean()), "low": low, "high": high, "prompts": prompts, "runs": len(runs),
        "seed_sd": float(means.std(ddof=1)) if len(runs) > 1 else np.nan,
        "least": float(means.min()), "most": float(means.max()),
    }  # fmt: skip
