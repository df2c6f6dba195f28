"""The certificate of an SPF run: the first-order effect of each applied update on the safety loss."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from geomkit.errors import SPFError
from geomkit.spf.rule import Promise
from geomkit.spf.step_record import BLOCK_COLUMNS, StepRecord
from geomkit.utils.figures import DrawnResult, draw

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

_IN_WORDS: Mapping[Promise, str] = {
    "every block": "⟨Δθ, g_s⟩ ≤ 0 in every block",
    "every anchor": "⟨Δθ, g_s⟩ ≤ 0 for every anchor",
    "subspace": "no movement in the protected subspace",
}


@dataclass(frozen=True)
class Certificate(DrawnResult):
    """The first-order effect of each update of a run on the safety loss, and whether the rule's promise held.

    Attributes:
        rule: Name of the rule.
        promise: The rule's promise, see :attr:`geomkit.spf.rule.Rule.promise`.
        records: One record per step.
        by_factor: For each adapted layer that is protected factor by factor, the reason. There the promise is about the
            adapter's own parameters, to first order, and leaves out products of their changes, such as ΔB ΔA.
        share: Share of the model's trainable parameters that was under guard, the smallest of all steps.
    """

    rule: str
    promise: Promise
    records: Sequence[StepRecord] = field(repr=False)
    by_factor: Mapping[str, str] = field(default_factory=dict, repr=False)
    share: float = 1.0

    @property
    def guaranteed(self) -> bool:
        """Whether the rule promises a property of the applied updates."""
        return self.promise != "nothing"

    @property
    def steps(self) -> int:
        """Number of steps."""
        return len(self.records)

    @property
    def violations(self) -> int:
        """Number of steps that broke the rule's promise, or, under a rule without a promise, raised the safety loss."""
        return sum(record.violated for record in self.records)

    @property
    def raising(self) -> int:
        """Number of steps that raised the safety loss to first order, beyond rounding, whatever the rule promises."""
        return sum(record.first_order > record.tolerance for record in self.records)

    @property
    def undecided(self) -> int:
        """Number of steps whose first-order change, before the corrections, is below the tolerance for rounding."""
        return sum(abs(record.first_order_raw) < record.tolerance for record in self.records)

    @property
    def max_first_order_change(self) -> float:
        """The largest first-order change of the safety loss by one applied update, nats per token."""
        return max((record.first_order for record in self.records), default=0.0)

    @property
    def is_idle(self) -> bool:
        """Whether no update was projected or corrected."""
        return bool(self.records) and not any(record.fired or record.corrected for record in self.records)

    @property
    def max_shortfall(self) -> float:
        """The largest :attr:`~geomkit.spf.step_record.StepRecord.shortfall` of a step: 0 for exact subspaces."""
        return max((record.shortfall for record in self.records), default=0.0)

    def raise_on_violation(self) -> None:
        """Raise an error if a step broke the rule's promise.

        Raises:
            SPFError: If the rule makes a promise and a step breaks it.
        """
        broken = next((record for record in self.records if record.violated), None)
        if not self.guaranteed or broken is None:
            return
        if self.promise == "subspace":
            expected, actual = "no movement inside the protected subspace", f"{broken.leak:.2g} of it"
        else:
            unit = self.promise.removeprefix("every ")
            expected = f"Σ⟨Δθ, g_s⟩ ≤ {broken.bound:.2g}, and no {unit}'s beyond its bound"
            actual = f"{broken.first_order:.2g} and {broken.worst:.2g} (rounding allows {broken.tolerance:.2g})"
        raise SPFError(
            f"step {broken.step}: expected {expected}, found {actual}; another hook may change the weights after the "
            "guard's: attach SPF last"
        )

    def drift_bound(self, smoothness: float) -> np.ndarray:
        """Return a bound on the drift of the safety loss after each step: Σ ⟨Δθ, g_s⟩ + β/2 Σ ‖Δθ‖².

        For a β-smooth loss and any optimizer, L(θ + Δ) ≤ L(θ) + ⟨Δ, g⟩ + β‖Δ‖²/2; a rule that keeps its promise makes
        the first sum negative. The norms are estimates, see :attr:`StepRecord.update_norm`.

        Args:
            smoothness: β, the largest eigenvalue of the safety loss's Hessian along the training path.

        Returns:
            (steps,) upper bounds of L_s after each step minus L_s before training, nats per token; valid where every
            step has the same anchors.
        """
        first = np.array([record.first_order for record in self.records])
        squared = np.array([record.update_norm for record in self.records]) ** 2
        return np.asarray(np.cumsum(first + smoothness / 2 * squared))

    def to_frame(self, by: Literal["step", "block"] = "step") -> "pd.DataFrame":
        """Return the records as a data frame, one row per step, or one row per step and block.

        Args:
            by: ``"step"`` for the fields of :class:`StepRecord` and its ``curvature``; ``"block"`` for ``step``,
                ``block`` and :data:`~geomkit.spf.step_record.BLOCK_COLUMNS`.
        """
        import pandas as pd

        if by == "step":
            return pd.DataFrame([record.numbers() for record in self.records])
        rows = [
            (record.step, name, *values.tolist()) for record in self.records for name, values in record.blocks.items()
        ]
        return pd.DataFrame(rows, columns=["step", "block", *BLOCK_COLUMNS])

    def shown_frame(self) -> "pd.DataFrame":
        """Return the six steps that come nearest to raising the safety loss, those that broke a promise first."""
        columns = ["step", "anchor_loss", "first_order_raw", "first_order", "bound", "tolerance", "fired", "violated"]
        frame = self.to_frame()
        return (
            frame if frame.empty else frame.sort_values(["violated", "first_order"], ascending=False)[columns].head(6)
        )

    def to_dict(self) -> dict[str, float | int]:
        """Return the summary as a dictionary: ``steps``, ``violations`` and ``max_first_order_change``."""
        return {
            "steps": self.steps,
            "violations": self.violations,
            "max_first_order_change": self.max_first_order_change,
        }

    def plot(self, by: Literal["step", "block"] = "step") -> "Figure":
        """Draw the effect of the updates on the safety loss, for each step, or for each step and block.

        See :func:`geomkit.plots.certificates.plot_certificate` and
        :func:`geomkit.plots.certificate_blocks.plot_certificate_blocks`.
        """
        return draw("plot_certificate", self) if by == "step" else draw("plot_certificate_blocks", self)

    def __str__(self) -> str:
        """Return one sentence: whether the promise held, the largest change, and what is not covered."""
        raised = f"{self.raising} raised the safety loss to first order"
        if self.guaranteed:
            broken = f"{self.violations} of {self.steps} steps broke the promise ({_IN_WORDS[self.promise]})"
            verdict = f"rule '{self.rule}': {broken}, {raised}"
        else:
            verdict = f"rule '{self.rule}', which promises nothing: of {self.steps} steps {raised}"
        largest = f"largest change {self.max_first_order_change:.2g} nats per token"
        return "; ".join([verdict, largest, *self._limits()])

    def _limits(self) -> Iterator[str]:
        """Yield what limits the certificate, what counts most first."""
        if self.share < 1:
            percent = math.floor(1000 * self.share) / 10
            yield f"only {percent} % of the trainable parameters are under guard, moves of the others are not seen"
        if self.is_idle:
            yield "no step was projected or corrected"
        if any(not record.fresh for record in self.records):
            yield "g_s is that of the anchors as last measured, not of every step"
        if self.undecided:
            yield f"{self.undecided} steps cannot be told from rounding"
        if self.by_factor and self.guaranteed:
            yield f"{len(self.by_factor)} adapted layers factor by factor, without products of their changes"
        if self.max_shortfall:
            yield f"subspaces hold an estimated {1 - self.max_shortfall:.2%} of the energy of exact ones"
