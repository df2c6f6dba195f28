"""SPF at work: the hooks that sit around ``optimizer.step`` and project what it does."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from geomkit.collect import gradients_of
from geomkit.errors import SPFError
from geomkit.gradients import GradientSet
from geomkit.loss import losses_of
from geomkit.spf.anchors import AnchorPool
from geomkit.spf.certificate import Certificate, StepRecord
from geomkit.spf.parameters import guarded_parameters, unwrapped, warn_of_rounding
from geomkit.spf.rules import Protection, Reading, Rule, protect, read, remove


@dataclass
class _Pending:
    """What is known between the two hooks of one step."""

    gradients: GradientSet
    protections: dict[str, Protection]
    before: dict[str, Reading]
    excess: float
    fired: set[str] = field(default_factory=set)
    removed: float = 0.0
    leak: float = 0.0


class Guard:
    """SPF attached to one optimizer: it projects, measures and checks every step.

    Before a step it collects the safety gradient of some anchors at the current weights and reads the protected
    coordinates of the weights; after the step it reads them again, corrects the weights where the update conflicts,
    reads them once more and checks.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, rule: Rule, pool: AnchorPool, pad: int
    ) -> None:
        """Attach to an optimizer; :meth:`SPF.attach` is the door."""
        self.rule = rule
        self._model = model
        self._pool = pool
        self._pad = pad
        self._parameters = guarded_parameters(model, optimizer)
        warn_of_rounding(self._parameters)
        self._reference = losses_of(model, pool.rows, pad) if rule.drift_correction else None
        self._records: list[StepRecord] = []
        self._pending: _Pending | None = None
        inner = unwrapped(optimizer)
        self._handles = [
            inner.register_step_pre_hook(_as_hook(self._before_step)),
            inner.register_step_post_hook(_as_hook(self._after_step)),
        ]

    @property
    def certificate(self) -> Certificate:
        """What the steps so far did to the safety loss."""
        return Certificate(self.rule.name, self.rule.guarantees, tuple(self._records))

    def detach(self) -> None:
        """End the projection; the certificate stays."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> Self:
        """Return the guard."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the projection."""
        self.detach()

    # ------------------------------------------------------------------------------------------ the two hooks

    def _before_step(self) -> None:
        chosen = self._pool.draw(len(self._records))
        rows = [self._pool.rows[index] for index in chosen]
        gradients = gradients_of(self._model, rows, self._pad, batch_size=len(rows))
        protections = {
            name: protect(self.rule, gradient)
            for name, gradient in gradients.items()
            if name in self._parameters and gradient.norm > 0
        }
        if not protections:
            raise SPFError(
                f"expected a safety gradient on the anchors, found zero everywhere (anchor loss {gradients.loss:.2g}); "
                "use other anchors, or check that the parameters they reach are trained"
            )
        before = {name: read(item, self._parameters[name].detach()) for name, item in protections.items()}
        excess = 0.0
        if self._reference is not None:
            excess = max(0.0, gradients.loss - sum(self._reference[index] for index in chosen) / len(chosen))
        self._pending = _Pending(gradients, protections, before, excess)
        if self.rule.level == "gradient":
            _project_gradients(self.rule, self._parameters, self._pending)

    def _after_step(self) -> None:
        pending, self._pending = self._pending, None
        if pending is None:
            return
        raw = applied = self._changes(pending)
        if self.rule.level == "update":
            applied = self._project(pending, raw)
        self._records.append(self._record(pending, raw, applied))
        Certificate(self.rule.name, self.rule.guarantees, self._records[-1:]).raise_on_violation()

    def _project(self, pending: _Pending, raw: dict[str, Reading]) -> dict[str, Reading]:
        """Correct the weights where the update conflicts, and return the changes that are left."""
        pending.fired = {name for name, change in raw.items() if change.dot > 0}
        for name in pending.fired:
            weight = self._parameters[name].detach()
            pending.removed += remove(pending.protections[name], raw[name], weight) ** 2
        applied = self._changes(pending)
        before, after = (sum(side[name].size ** 2 for name in pending.fired) for side in (raw, applied))
        pending.leak = (after / before) ** 0.5 if before else 0.0
        missing = pending.excess + sum(change.dot for change in applied.values())
        if pending.excess == 0 or missing <= 0:
            return applied
        self._step_back(pending, missing)
        return self._changes(pending)

    def _step_back(self, pending: _Pending, change: float) -> None:
        """Step along −g_s until Σ ⟨Δθ, g_s⟩ is lower by ``change``: a Polyak step on the safety loss."""
        squared = sum(item.gradient.norm**2 for item in pending.protections.values())
        for name, item in pending.protections.items():
            item.gradient.add_to(self._parameters[name].detach(), -change / squared)

    def _changes(self, pending: _Pending) -> dict[str, Reading]:
        return {
            name: read(pending.protections[name], self._parameters[name].detach()) - before
            for name, before in pending.before.items()
        }

    def _record(self, pending: _Pending, raw: dict[str, Reading], applied: dict[str, Reading]) -> StepRecord:
        first_order = sum(change.dot for change in applied.values())
        if not math.isfinite(first_order):
            raise SPFError("expected finite weights after the step, found NaN or inf; lower the learning rate")
        rounding = {
            name: _rounding(self._parameters[name].detach(), item) for name, item in pending.protections.items()
        }
        worst = max(applied, key=lambda name: applied[name].dot - rounding[name])
        bound, tolerance = -pending.excess, sum(rounding.values())
        return StepRecord(
            step=len(self._records) + 1,
            anchor_loss=pending.gradients.loss,
            first_order_raw=sum(change.dot for change in raw.values()),
            first_order=first_order,
            bound=bound,
            worst=applied[worst].dot,
            tolerance=tolerance,
            fired=len(pending.fired) / len(applied),
            removed=pending.removed**0.5,
            leak=pending.leak,
            violated=applied[worst].dot > rounding[worst] or first_order > bound + tolerance,
        )


def _project_gradients(rule: Rule, parameters: dict[str, nn.Parameter], pending: _Pending) -> None:
    """Project the utility gradients in place: the step is −g_u."""
    held = {name: parameters[name].grad for name in pending.protections}
    steps = {
        name: read(pending.protections[name], gradient).scaled(-1.0)
        for name, gradient in held.items()
        if gradient is not None
    }
    conflicts = {name: step.dot > 0 for name, step in steps.items()}
    if rule.scope == "global":
        conflicts = dict.fromkeys(steps, sum(step.dot for step in steps.values()) > 0)
    for name, step in steps.items():
        gradient, protection = held[name], pending.protections[name]
        assert gradient is not None  # noqa: S101 - steps holds only parameters with a gradient
        if conflicts[name] and rule.removal != "nothing":
            pending.removed += remove(protection, step, gradient, scale=-1.0) ** 2
            pending.fired.add(name)
        if rule.adds:
            protection.gradient.add_to(gradient, rule.adds)


def _rounding(weight: Tensor, protection: Protection) -> float:
    """Bound what rounding the weights can add to ⟨Δθ, g_s⟩: each entry moves by at most eps/2 of itself."""
    eps = torch.finfo(weight.dtype).eps
    return float(eps * torch.linalg.vector_norm(weight, dtype=torch.float64)) * protection.gradient.norm


def _as_hook(action: Callable[[], None]) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        with torch.no_grad():
            action()

    return hook
