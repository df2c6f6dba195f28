"""Claims about a number, with the verdict that follows from the number's interval."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from geomkit.utils.readable import with_interval

if TYPE_CHECKING:
    import pandas as pd

ClaimVerdict = Literal["holds", "reversed", "not shown"]

VERDICTS = (
    "A claim holds if the whole 95 % interval of its number over examples lies on the claimed side of the bound, is "
    "reversed if it lies on the other side, and is not shown if it contains the bound"
)
"""What the verdicts mean, for under a table."""


@dataclass(frozen=True)
class Claim:
    """The claim that a number lies on one side of a bound, with the measured number.

    Attributes:
        question: The question that the claim answers.
        claim: The claim as a sentence that needs no other.
        opposite: The opposite of the claim, likewise.
        number: What the number is, with its unit; of a difference, what is subtracted from what.
        value: The measured number.
        interval: Interval of the number over examples.
        bound: The bound.
        above: Whether the number is claimed to be above the bound, rather than below.
        against_control: Whether the number is a difference between the safety set and the control set.
        caveat: What the verdict is not, in words, if the model rules that out; else empty.
    """

    question: str
    claim: str
    opposite: str
    number: str
    value: float
    interval: tuple[float, float]
    bound: float = 0.0
    above: bool = False
    against_control: bool = False
    caveat: str = ""

    @property
    def verdict(self) -> ClaimVerdict:
        """``"holds"`` if the whole interval is on the claimed side of the bound, ``"reversed"`` if on the other side.

        Example:
            >>> rank = ("low rank?", "Safety has the lower rank.", "Safety has the higher rank.", "safety − utility")
            >>> Claim(*rank, -3.0, (-4.0, -2.0)).verdict
            'holds'
            >>> Claim(*rank, -3.0, (-9.0, 3.0)).verdict, Claim(*rank, 2.0, (1.0, 3.0)).verdict
            ('not shown', 'reversed')
        """
        low, high = self.interval
        if self.above:
            return "holds" if low > self.bound else "reversed" if high < self.bound else "not shown"
        return "holds" if high < self.bound else "reversed" if low > self.bound else "not shown"

    @property
    def marked_verdict(self) -> str:
        """The verdict with its caveat, for tables."""
        return f"{self.verdict}, {self.caveat}" if self.caveat else self.verdict

    @property
    def finding(self) -> str:
        """What was found, as a sentence.

        Example:
            >>> Claim("one?", "Few suffice.", "Few do not suffice.", "overlap", 0.2, (0.1, 0.3), 0.2).finding
            'It is not shown that few suffice.'
        """
        not_shown = f"It is not shown that {self.claim[0].lower()}{self.claim[1:]}"
        return {"holds": self.claim, "reversed": self.opposite, "not shown": not_shown}[self.verdict]

    @property
    def measured(self) -> str:
        """The number with its sign and interval, after what it is.

        Example:
            >>> Claim("one?", "Few suffice.", "Few do not suffice.", "overlap", 0.2, (0.1, 0.3), 0.2).measured
            'overlap: +0.20 [+0.10, +0.30]'
        """
        return f"{self.number}: {with_interval(self.value, self.interval, sign=True)}"


def claims_frame(claims: Sequence[Claim]) -> "pd.DataFrame":
    """Return one row per claim: the claim, the number with its interval, the bound and the verdict."""
    import pandas as pd

    return pd.DataFrame(
        [
            {
                "question": claim.question,
                "claim": claim.claim,
                "number": claim.number,
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
    """Return one row per claim for display: the claim, its verdict, and the number that decides it as text."""
    import pandas as pd

    rows = [(claim.claim, claim.marked_verdict, claim.measured) for claim in claims]
    return pd.DataFrame(rows, columns=["claim", "verdict", "measured"])
