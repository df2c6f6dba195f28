"""The run-time proof of an SPF run: what each applied update did to the safety loss, to first order."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from geomkit._display import html_table
from geomkit.errors import SPFError

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step.

    Attributes:
        step: Number of the step, from 1.
        anchor_loss: Safety loss on the step's anchors before the step, nats per token.
        first_order_raw: Σ ⟨Δθ, g_s⟩ of the optimizer's own update, nats per token.
        first_order: Σ ⟨Δθ, g_s⟩ of the update that was applied.
        bound: What Σ ⟨Δθ, g_s⟩ may be: 0, or L_ref − L_s where drift is corrected.
        worst: The largest ⟨Δθ, g_s⟩ of a single parameter in the applied update.
        tolerance: What rounding the weights alone can add to Σ ⟨Δθ, g_s⟩.
        fired: Share of the parameters whose step was projected.
        removed: Norm of what was removed from the step.
        corrected: Norm of the drift correction that was added.
        leak: Norm of what is left of the removed coordinates, relative to what they were.
        violated: Whether Σ ⟨Δθ, g_s⟩ exceeds its bound by more than the tolerance; or, under a rule that promises it
            for each, one parameter's exceeds 0.
    """

    step: int
    anchor_loss: float
    first_order_raw: float
    first_order: float
    bound: float
    worst: float
    tolerance: float
    fired: float
    removed: float
    corrected: float
    leak: float
    violated: bool


@dataclass(frozen=True)
class Certificate:
    """What a run's updates did to the safety loss.

    Attributes:
        rule: Name of the rule.
        guaranteed: Whether the rule promises ⟨Δθ, g_s⟩ ≤ 0 for every parameter and step.
        records: One record per step.
    """

    rule: str
    guaranteed: bool
    records: Sequence[StepRecord]

    @property
    def steps(self) -> int:
        """Number of steps."""
        return len(self.records)

    @property
    def violations(self) -> int:
        """Number of steps whose update broke the constraint beyond rounding."""
        return sum(record.violated for record in self.records)

    @property
    def undecided(self) -> int:
        """Number of steps whose own change of the safety loss is smaller than what rounding can do."""
        return sum(abs(record.first_order_raw) < record.tolerance for record in self.records)

    @property
    def max_first_order_change(self) -> float:
        """The largest first-order change of the safety loss by one applied update, nats per token."""
        return max((record.first_order for record in self.records), default=0.0)

    def raise_on_violation(self) -> None:
        """Raise where the rule's promise was not kept.

        Raises:
            SPFError: If the rule promises a constraint and a step violates it.
        """
        if not self.guaranteed:
            return
        broken = next((record for record in self.records if record.violated), None)
        if broken is not None:
            raise SPFError(
                f"step {broken.step}: expected Σ⟨Δθ, g_s⟩ ≤ {broken.bound:.2g} and ≤ 0 for every parameter, found "
                f"{broken.first_order:.2g} and {broken.worst:.2g} (rounding allows {broken.tolerance:.2g}); another "
                "hook may change the weights after the guard's: attach SPF last"
            )

    def to_frame(self) -> "pd.DataFrame":
        """Return one row per step with the fields of :class:`StepRecord`."""
        import pandas as pd

        return pd.DataFrame([asdict(record) for record in self.records])

    def to_dict(self) -> dict[str, float | int]:
        """Return the summary: ``steps``, ``violations``, ``max_first_order_change``."""
        return {
            "steps": self.steps,
            "violations": self.violations,
            "max_first_order_change": self.max_first_order_change,
        }

    def plot(self) -> "Figure":
        """Draw the first-order change of the safety loss before and after the projection, step by step."""
        from geomkit.plots import plot_certificate

        return plot_certificate(self)

    def __str__(self) -> str:
        """Say in one line whether the constraint held, and whether rounding lets that be known."""
        promise = "promised" if self.guaranteed else "not promised by this rule"
        unknown = f"; {self.undecided} steps cannot be told from rounding" if self.undecided else ""
        return (
            f"rule '{self.rule}': {self.violations} of {self.steps} steps raised the safety loss to first order "
            f"(⟨Δθ, g_s⟩ ≤ 0 {promise}); largest change {self.max_first_order_change:.2g} nats per token{unknown}"
        )

    def _repr_html_(self) -> str:
        return html_table(str(self), self.to_frame(), rows=6)
