"""Claims about a number, with the verdict that follows from the number's interval."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import pandas as pd

Verdict = Literal["holds", "reversed", "not shown"]


@dataclass(frozen=True)
class Claim:
    """The claim that a number lies on one side of a bound, with the measured number.

    Attributes:
        question: The question that the claim answers.
        claim: The claim in words.
        value: The measured number.
        interval: Interval of the number over examples.
        bound: The bound.
        above: Whether the number is claimed to be above the bound, rather than below.
        caveat: What the verdict is not, in words, if the model rules that out; else empty.
    """

    question: str
    claim: str
    value: float
    interval: tuple[float, float]
    bound: float = 0.0
    above: bool = False
    caveat: str = ""

    @property
    def verdict(self) -> Verdict:
        """``"holds"`` if the whole interval is on the claimed side of the bound, ``"reversed"`` if on the other side.

        Example:
            >>> Claim("rank", "lower", -3.0, (-4.0, -2.0)).verdict
            'holds'
            >>> Claim("rank", "lower", -3.0, (-9.0, 3.0)).verdict, Claim("rank", "lower", 2.0, (1.0, 3.0)).verdict
            ('not shown', 'reversed')
        """
        low, high = self.interval
        if self.above:
            return "holds" if low > self.bound else "reversed" if high < self.bound else "not shown"
        return "holds" if high < self.bound else "reversed" if low > self.bound else "not shown"

    @property
    def marked_verdict(self) -> str:
        """The verdict with its caveat, for tables.

        Example:
            >>> Claim("rank", "lower", -3.0, (-4.0, -2.0), caveat="not about alignment").marked_verdict
            'holds, not about alignment'
        """
        return f"{self.verdict}, {self.caveat}" if self.caveat else self.verdict


def claims_frame(claims: Sequence[Claim]) -> "pd.DataFrame":
    """Return one row per claim: the claim, the number with its interval, the bound and the verdict."""
    import pandas as pd

    return pd.DataFrame(
        [
            {
                "question": claim.question,
                "claim": claim.claim,
                "value": claim.value,
                "low": claim.interval[0],
                "high": claim.interval[1],
                "bound": claim.bound,
                "verdict": claim.marked_verdict,
            }
            for claim in claims
        ]
    )


def claims_table(claims: Sequence[Claim]) -> "pd.DataFrame":
    """Return one row per claim for display, with the number and its interval as text in one cell."""
    import pandas as pd

    return pd.DataFrame(
        [
            {
                "claim": claim.claim,
                "measured": f"{claim.value:.3g} [{claim.interval[0]:.3g}, {claim.interval[1]:.3g}]",
                "verdict": claim.marked_verdict,
            }
            for claim in claims
        ]
    )
