"""SPF at work: the hooks that sit around ``optimizer.step`` and project what it does."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self
from weakref import WeakSet

import torch
from torch import Tensor, nn

from geomkit.collect import gradients_of
from geomkit.errors import SPFError
from geomkit.gradients import GradientSet
from geomkit.layer_gradient import LayerGradient
from geomkit.loss import losses_of
from geomkit.spf.anchors import AnchorPool
from geomkit.spf.certificate import Certificate, StepRecord
from geomkit.spf.parameters import guarded_parameters, unwrapped, warn_of_rounding
from geomkit.spf.rules import Protection, Reading, Rule, protect, read, remove
from geomkit.state import full_precision


@dataclass
class _Pending:
    """What is known between the two hooks of one step."""

    gradients: GradientSet
    protections: dict[str, Protection]
    before: dict[str, Reading]
    excess: float
    fired: set[str] = field(default_factory=set)
    removed: float = 0.0
    corrected: float = 0.0
    leak: float = 0.0


_GUARDED: WeakSet[torch.optim.Optimizer] = WeakSet()
"""The optimizers with a guard: two would each undo what the other certifies."""


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
        self._mixed: tuple[Sequence[int], GradientSet] | None = None
        self._pending: _Pending | None = None
        self._optimizer = unwrapped(optimizer)
        if self._optimizer in _GUARDED:
            raise SPFError("expected an optimizer without a guard, found one that has one; detach() the other first")
        self._handles = [
            self._optimizer.register_step_pre_hook(_as_hook(self._before_step)),
            self._optimizer.register_step_post_hook(_as_hook(self._after_step)),
        ]
        _GUARDED.add(self._optimizer)

    @property
    def certificate(self) -> Certificate:
        """What the steps so far did to the safety loss."""
        return Certificate(self.rule.name, self.rule.guarantees, tuple(self._records))

    def detach(self) -> None:
        """End the projection; the certificate stays."""
        for handle in self._handles:
            handle.remove()
        if self._handles:
            _GUARDED.discard(self._optimizer)
        self._handles = []

    def mix(self) -> None:
        """Add the safety gradient now, before the task's is added and both are clipped, if the rule adds one.

        Without this call it is added just before the optimizer's step, to a task gradient that is already clipped.
        """
        if self.rule.adds and self._handles:
            self._mixed = self._collect()
            with torch.no_grad(), full_precision():
                for name, gradient in self._mixed[1].items():
                    if name in self._parameters:
                        _add_gradient(self._parameters[name], gradient, self.rule.adds)

    def __enter__(self) -> Self:
        """Return the guard."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the projection."""
        self.detach()

    # ------------------------------------------------------------------------------------------ the two hooks

    def _collect(self) -> tuple[Sequence[int], GradientSet]:
        chosen = self._pool.draw(len(self._records))
        rows = [self._pool.rows[index] for index in chosen]
        return chosen, gradients_of(self._model, rows, self._pad)

    def _before_step(self) -> None:
        mixed, self._mixed = self._mixed, None
        chosen, gradients = mixed or self._collect()
        protections = {
            name: protect(self.rule, gradient)
            for name, gradient in gradients.items()
            if name in self._parameters and gradient.norm > 0
        }
        before = {name: read(item, self._parameters[name].detach()) for name, item in protections.items()}
        excess = 0.0
        if self._reference is not None:
            excess = max(0.0, gradients.loss - sum(self._reference[index] for index in chosen) / len(chosen))
        self._pending = _Pending(gradients, protections, before, excess)
        if self.rule.level == "gradient":
            _project_gradients(self.rule, self._parameters, self._pending, add=mixed is None)

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
        if pending.excess == 0 or missing <= 0 or not applied:
            return applied
        self._step_back(pending, missing)
        return self._changes(pending)

    def _step_back(self, pending: _Pending, change: float) -> None:
        """Step along −g_s until Σ ⟨Δθ, g_s⟩ is lower by ``change``: a Polyak step on the safety loss."""
        squared = sum(item.gradient.norm**2 for item in pending.protections.values())
        pending.corrected = change / squared**0.5
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
        # Nothing to protect from where the anchors' gradient is exactly zero.
        worst = max(applied, key=lambda name: applied[name].dot - rounding[name], default=None)
        bound, tolerance = (-pending.excess, sum(rounding.values())) if applied else (0.0, 0.0)
        one_broken = worst is not None and applied[worst].dot > rounding[worst]
        return StepRecord(
            step=len(self._records) + 1,
            anchor_loss=pending.gradients.loss,
            first_order_raw=sum(change.dot for change in raw.values()),
            first_order=first_order,
            bound=bound,
            worst=applied[worst].dot if worst is not None else 0.0,
            tolerance=tolerance,
            fired=len(pending.fired) / max(len(applied), 1),
            removed=pending.removed**0.5,
            corrected=pending.corrected,
            leak=pending.leak,
            violated=first_order > bound + tolerance or (self.rule.guarantees and one_broken),
        )


def _project_gradients(rule: Rule, parameters: dict[str, nn.Parameter], pending: _Pending, *, add: bool) -> None:
    """Project the utility gradients in place, the step being −g_u, and add the safety gradient if the rule does."""
    held = {name: parameters[name].grad for name in pending.protections}
    gradients = {name: gradient for name, gradient in held.items() if gradient is not None}
    if held and not gradients:
        raise SPFError(
            f"expected gradients before optimizer.step() for the rule '{rule.name}', found none; call backward() "
            "first, and give step() no closure"
        )
    steps = {name: read(pending.protections[name], gradient).scaled(-1.0) for name, gradient in gradients.items()}
    conflicts = {name: step.dot > 0 for name, step in steps.items()}
    if rule.scope == "global":
        conflicts = dict.fromkeys(steps, sum(step.dot for step in steps.values()) > 0)
    for name, gradient in gradients.items():
        protection = pending.protections[name]
        if conflicts[name] and rule.removal != "nothing":
            pending.removed += remove(protection, steps[name], gradient, scale=-1.0) ** 2
            pending.fired.add(name)
        if rule.adds and add:
            protection.gradient.add_to(gradient, rule.adds)


def _add_gradient(parameter: nn.Parameter, gradient: LayerGradient, scale: float) -> None:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    gradient.add_to(parameter.grad, scale)


def _rounding(weight: Tensor, protection: Protection) -> float:
    """Bound what rounding the weights can add to ⟨Δθ, g_s⟩: each entry moves by at most eps/2 of itself."""
    eps = torch.finfo(weight.dtype).eps
    return float(eps * torch.linalg.vector_norm(weight, dtype=torch.float64)) * protection.gradient.norm


def _as_hook(action: Callable[[], None]) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        with torch.no_grad(), full_precision():
            action()

    return hook
