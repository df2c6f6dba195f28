"""Result of :func:`geomkit.check_collection`: the checks, with advice for those that fail."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from geomkit.errors import CollectionError
from geomkit.gradients.gradient_set import Coverage
from geomkit.utils.display import Result, html_table
from geomkit.utils.readable import text_table

if TYPE_CHECKING:
    import pandas as pd

CheckVerdict = Literal["ok", "fails", "skipped"]


@dataclass(frozen=True)
class Check:
    """A comparison of gradients that should be equal.

    Attributes:
        name: Name of the check, such as ``"padding right"``.
        compared: The two sides of the comparison, in words.
        verdict: ``"ok"``, ``"fails"``, or ``"skipped"`` if there was no comparison.
        difference: Largest relative difference ‖a − b‖ / ‖b‖ of any parameter; NaN if skipped.
        cosine: Smallest cosine of the gradients over all parameters; NaN if skipped.
        tolerance: Difference that rounding in the model's dtype explains; NaN if skipped.
        parameter: Parameter with the largest difference; empty without a difference.
        example: Example with the largest difference; ``None`` for the sum over examples.
        note: Reason for skipping, or a remark.
        advice: What to change if the check fails; empty otherwise.
    """

    name: str
    compared: str
    verdict: CheckVerdict
    difference: float
    cosine: float
    tolerance: float
    parameter: str = ""
    example: int | None = None
    note: str = ""
    advice: str = ""

    def __str__(self) -> str:
        """Return the largest difference and the advice as text."""
        if self.verdict == "skipped":
            return f"{self.name}: skipped, {self.note}"
        where = f" ({self._place()})" if self.parameter else ""
        cosine = "" if math.isnan(self.cosine) else f", cosine {self.cosine:.7f}"
        finding = f"{self.name}: differs by {self.difference:.1e}{where}, tolerance {self.tolerance:.0e}{cosine}"
        return "; ".join(filter(None, (finding, self.note, self.advice)))

    def _place(self) -> str:
        return self.parameter if self.example is None else f"{self.parameter}, example {self.example}"


@dataclass(frozen=True)
class CollectionCheck(Result):
    """The checks of :func:`geomkit.check_collection`.

    Attributes:
        checks: Checks by name, in order.
        coverage: The parameters with and without a gradient.
        setting: Model, dtype, attention, device and examples, as text.
    """

    checks: Mapping[str, Check]
    coverage: Coverage
    setting: str

    def __getitem__(self, name: str) -> Check:
        """Return the check with this name."""
        return self.checks[name]

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks.values() if check.verdict == "fails")

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return not self.failures

    def raise_on_failure(self) -> None:
        """Raise an error if a check failed.

        Raises:
            CollectionError: If a check failed; the message has the differences and the advice.
        """
        if not self.ok:
            raise CollectionError("; ".join(["gradients cannot be trusted as they are", *map(str, self.failures)]))

    def to_frame(self) -> "pd.DataFrame":
        """Return a data frame with a row per check.

        The columns are ``check``, ``verdict``, ``difference``, ``cosine``, ``tolerance``, ``parameter``, ``example``,
        ``compared``, ``note`` and ``advice``.
        """
        import pandas as pd

        return pd.DataFrame(
            [
                {
                    "check": check.name,
                    "verdict": check.verdict,
                    "difference": check.difference,
                    "cosine": check.cosine,
                    "tolerance": check.tolerance,
                    "parameter": check.parameter,
                    "example": check.example,
                    "compared": check.compared,
                    "note": check.note,
                    "advice": check.advice,
                }
                for check in self.checks.values()
            ]
        )

    def __str__(self) -> str:
        """Return a table with a line per check, and then the failed checks with advice."""
        rows = [("check", "verdict", "difference", "cosine", "tolerance", "compared")]
        for check in self.checks.values():
            skipped = check.verdict == "skipped"
            numbers = (f"{check.difference:.1e}", f"{check.cosine:.7f}", f"{check.tolerance:.0e}")
            remark = check.note if skipped else check.compared
            rows.append((check.name, check.verdict, *(("", "", "") if skipped else numbers), remark))
        return "\n".join([f"{self.setting}; {self.coverage}", "", *text_table(rows), "", *self._verdict()])

    def _verdict(self) -> list[str]:
        if not self.ok:
            return [str(check) for check in self.failures]
        measured = [check for check in self.checks.values() if check.verdict == "ok"]
        worst = max(measured, key=lambda check: check.difference / check.tolerance)
        notes = [f"{check.name}: {check.note}" for check in measured if check.note and check is not worst]
        return [f"all measured checks are ok; the worst is {worst}", *notes]

    def _repr_html_(self) -> str:
        # Not str(self), which is a table itself.
        return html_table("; ".join([self.setting, *map(str, self.failures)]), self.to_frame())
