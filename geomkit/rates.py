"""Shares of prompts, never without their interval."""

from collections.abc import Sequence
from dataclasses import dataclass

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
