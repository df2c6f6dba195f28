"""What :func:`geomkit.check_collection` finds: one answer per question, and what to change."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from geomkit.errors import CollectionError
from geomkit.gradients.gradient_set import Coverage
from geomkit.utils.display import html_table, text_table

if TYPE_CHECKING:
    import pandas as pd

Verdict = Literal["ok", "fails", "skipped"]


@dataclass(frozen=True)
class Check:
    """One question about the gradients.

    Attributes:
        name: What is asked, such as ``"padding right"``.
        compared: What was compared with what.
        verdict: ``"ok"``, ``"fails"``, or ``"skipped"`` where it was not measured.
        difference: Worst relative difference ‖a − b‖ / ‖b‖ of any parameter; NaN if skipped.
        cosine: Smallest cosine of the whole gradients; NaN if skipped.
        tolerance: The difference that rounding in the model's type may leave.
        parameter: Where the difference is worst; empty if there is none.
        example: Of which example; ``None`` for their sum.
        note: Why it was skipped, or what else there is to know.
        advice: What to change where it fails; empty otherwise.
    """

    name: str
    compared: str
    verdict: Verdict
    difference: float
    cosine: float
    tolerance: float
    parameter: str = ""
    example: int | None = None
    note: str = ""
    advice: str = ""

    def __str__(self) -> str:
        """Say where it is worst, and what to change."""
        if self.verdict == "skipped":
            return f"{self.name}: skipped, {self.note}"
        where = f" ({self._place()})" if self.parameter else ""
        cosine = "" if math.isnan(self.cosine) else f", cosine {self.cosine:.7f}"
        said = [f"{self.name}: differs by {self.difference:.1e}{where}, tolerance {self.tolerance:.0e}{cosine}"]
        return "; ".join([*said, *(part for part in (self.note, self.advice) if part)])

    def _place(self) -> str:
        return self.parameter if self.example is None else f"{self.parameter}, example {self.example}"


@dataclass(frozen=True)
class CollectionCheck:
    """What :func:`check_collection` found.

    Attributes:
        checks: By name, in the order they were made.
        coverage: Which of the chosen parameters have a part in the loss.
        setting: Model, type, attention, device and examples.
    """

    checks: Mapping[str, Check]
    coverage: Coverage
    setting: str

    def __getitem__(self, name: str) -> Check:
        """Return one check."""
        return self.checks[name]

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks.values() if check.verdict == "fails")

    @property
    def ok(self) -> bool:
        """Whether nothing that was measured failed."""
        return not self.failures

    def raise_on_failure(self) -> None:
        """Raise if a check failed.

        Raises:
            CollectionError: Naming each check that failed, where it is worst and what to change.
        """
        if not self.ok:
            raise CollectionError("; ".join(["gradients cannot be trusted as they are", *map(str, self.failures)]))

    def to_frame(self) -> "pd.DataFrame":
        """Return a row per check.

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
        """Show a line per check, then what failed and what to change."""
        rows = [("check", "verdict", "difference", "cosine", "tolerance", "compared")]
        for check in self.checks.values():
            said = check.note if check.verdict == "skipped" else check.compared
            numbers = (f"{check.difference:.1e}", f"{check.cosine:.7f}", f"{check.tolerance:.0e}")
            rows.append((check.name, check.verdict, *(("", "", "") if check.verdict == "skipped" else numbers), said))
        return "\n".join([f"{self.setting}; {self.coverage}", "", *text_table(rows), "", *self._verdict()])

    def _verdict(self) -> list[str]:
        if not self.ok:
            return [str(check) for check in self.failures]
        measured = [check for check in self.checks.values() if check.verdict == "ok"]
        worst = max(measured, key=lambda check: check.difference / check.tolerance)
        notes = [f"{check.name}: {check.note}" for check in measured if check.note and check is not worst]
        return [f"all measured checks are ok; the worst is {worst}", *notes]

    def _repr_html_(self) -> str:
        return html_table("; ".join([self.setting, *map(str, self.failures)]), self.to_frame())
