"""SPF at work: the hooks that sit around ``optimizer.step`` and project what it does."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from weakref import WeakSet

import torch
from torch import Tensor

from geomkit.errors import SPFError
from geomkit.spf.assess import Step, assess
from geomkit.spf.certificate import Certificate
from geomkit.spf.checkpoint_state import save_state
from geomkit.spf.constraints import ConstraintMeter
from geomkit.spf.demands import Measured
from geomkit.spf.projection.corrections import Plan, plan
from geomkit.spf.projection.protection import Protection, protect, renewed, without_subspaces
from geomkit.spf.projection.reading import Reading, read_all
from geomkit.spf.rules import RULES, Rule
from geomkit.spf.step_record import Log, StepRecord
from geomkit.spf.weights.blocks import Block, Move
from geomkit.spf.weights.guarded import Guarded, refuse_broken_gradients, unwrapped
from geomkit.spf.weights.processes import Processes
from geomkit.utils.precision import full_precision


@dataclass(frozen=True)
class Options:
    """How a guard works, beside its rule.

    Attributes:
        refresh_every: Measure the safety gradient every so many steps.
        refresh_energy: Compute subspaces anew only when they hold less than this share of what they held at first.
        measure_curvature: Run the anchors once more after each step.
        log: Where to write a line per step.
        seed: Seed of random directions.
    """

    refresh_every: int = 1
    refresh_energy: float | None = None
    measure_curvature: bool = False
    log: Path | None = None
    seed: int = 0


@dataclass
class _Pending:
    """What is known between the two hooks of one step."""

    measured: Measured
    fresh: bool
    before: Mapping[str, Reading]
    plan: Plan | None = None


_GUARDED: WeakSet[torch.optim.Optimizer] = WeakSet()
"""The optimizers with a guard: two would each undo what the other certifies."""


_READING = 1e-5
"""How far two readings of the same weights may be apart, as a share of their norm: fp32 products of other shapes."""


class Guard:
    """SPF attached to one optimizer: it projects, measures and checks every step.

    Before a step it collects the safety gradient of some anchors at the current weights and reads the protected
    coordinates of the weights; after the step it reads them again, corrects the weights where the update conflicts,
    reads them once more and checks.
    """

    def __init__(
        self,
        guarded: Guarded,
        optimizer: torch.optim.Optimizer,
        rule: Rule,
        meter: ConstraintMeter,
        options: Options,
        state: Mapping[str, Tensor] | None = None,
        description: Mapping[str, object] | None = None,
    ) -> None:
        """Attach to an optimizer, from the beginning or in a saved state; :meth:`SPF.attach` is the door."""
        self.rule = rule
        self._description = description or {}
        self._guarded, self._meter, self._options = guarded, meter, options
        self._optimizer = unwrapped(optimizer)
        self._records: list[StepRecord] = []
        self._before = 0  # steps of the run that this one resumes, of which there are no records
        self._kept: dict[str, Tensor] = {}  # subspaces of that run
        self._measured: Measured | None = None  # forgotten when a run is saved
        self._measured_at = -1  # the step, from 0
        self._mixed = False
        self._protections: dict[str, Protection] = {}
        self._probes: dict[str, Tensor] = {}  # drawn once
        self._origin: dict[str, Tensor] = {}
        self._pending: _Pending | None = None
        self._left_at: dict[str, Tensor] = {}  # WΩ of each block after the last step
        if self._optimizer in _GUARDED:
            raise SPFError("expected an optimizer without a guard, found one that has one; detach() the other first")
        self._log = self._begun() if state is None else self._resumed(state)
        self._handles = [
            self._optimizer.register_step_pre_hook(_as_hook(self._before_step)),
            self._optimizer.register_step_post_hook(_as_hook(self._after_step)),
        ]
        _GUARDED.add(self._optimizer)

    @property
    def certificate(self) -> Certificate:
        """What the steps so far did to the safety loss."""
        return Certificate(self.rule.name, self.rule.promise, tuple(self._records))

    @property
    def steps(self) -> int:
        """Number of steps so far."""
        return self._before + len(self._records)

    def detach(self) -> None:
        """End the projection; the certificate stays."""
        for handle in self._handles:
            handle.remove()
        if self._handles:
            _GUARDED.discard(self._optimizer)
        self._handles = []

    @torch.no_grad()
    def mix(self) -> None:
        """Add the safety gradient now, before the task's is added and both are clipped, if the rule adds one.

        Without this call it is added just before the optimizer's step, to a task gradient that is already clipped. Not
        for gradients that a ``GradScaler`` is still to divide.
        """
        projects_gradient = self.rule.level == "gradient" and self.rule.removal != "nothing"
        if self.rule.adds and not projects_gradient and self._handles:
            with full_precision():
                self._add(self._measure())
            self._mixed = True

    def __enter__(self) -> Self:
        """Return the guard."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the projection."""
        self.detach()

    # ------------------------------------------------------------------------------------------------- measuring

    def _measure(self) -> Measured:
        """Return the constraints of the step, measured now if they are due."""
        known, due = self._measured, self.steps % self._options.refresh_every == 0
        if known is not None and (not due or self._mixed):
            return known
        with self._guarded.collecting():
            found = self._guarded.processes.agreed(self._meter.measure(self.steps, self._guarded.blocks))
        self._measured, self._measured_at = found, self.steps
        self._protections = {name: self._protected(name, found) for name in found.gradients}
        self._probes = {name: one.probe for name, one in self._protections.items() if one.probe is not None}
        return found

    def _protected(self, name: str, measured: Measured) -> Protection:
        """Protect a block by its new gradients, with the subspaces it had where these are to be kept."""
        gradients, kept = measured.gradients[name], self._protections.get(name)
        seed, probe, left = self._options.seed, self._probes.get(name), self._kept.pop(name, None)
        if left is None and (kept is None or kept.left is None):
            return protect(self.rule, gradients, name, seed, probe)
        bare = without_subspaces(gradients, name, seed, probe)
        old = replace(bare, left=left) if kept is None or kept.left is None else renewed(bare, kept)
        share = self._options.refresh_energy
        if self.rule.always or (share is not None and old.captured >= share * old.energy):
            return old
        return protect(self.rule, gradients, name, seed, probe)

    def _read(
        self,
        names: Iterable[str],
        moves: Mapping[str, Sequence[Move]] | None = None,
        known: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Reading]:
        """Read some blocks, see :func:`read_all`."""
        protections = {name: self._protections[name] for name in names}
        return read_all(self._guarded.blocks, protections, self._guarded.processes.group, moves=moves, known=known)

    def _changed(self, before: Mapping[str, Reading], now: Mapping[str, Reading]) -> dict[str, Reading]:
        """Return what has changed since a reading; inside a subspace that is closed for good, since the first."""
        found = {name: one - before[name] for name, one in now.items()}
        for name, origin in self._origin.items():
            if name in found and (left := now[name].left) is not None:
                found[name] = replace(found[name], left=left - origin)
        return found

    # --------------------------------------------------------------------------------------------- the two hooks

    def _before_step(self) -> None:
        if bool(getattr(self._optimizer, "found_inf", None) or False):  # a fused optimizer itself skips an overflow
            return
        if self._guarded.refresh():
            self._measured, self._probes = None, {}
        refuse_broken_gradients(self._guarded.parameters)
        measured, fresh = self._measure(), self._measured_at == self.steps
        if self._records and fresh and self._meter.fixed:
            self._records[-1] = replace(self._records[-1], loss_after=measured.loss)
        self._guarded.settle()
        known = self._guarded.as_used(measured.products) if fresh else {}
        before = self._read(self._protections, known=known)
        self._refuse_other_changes(before)
        if self.rule.always:
            self._origin = {name: one.left for name, one in before.items() if one.left is not None} | self._origin
        self._pending = _Pending(measured, fresh, before)
        if self.rule.level == "gradient":
            self._project_gradients(self._pending)
        if self.rule.adds and not self._mixed:
            if all(parameter.grad is None for parameter in self._guarded.parameters.values()):
                raise self._no_gradients()
            self._add(measured)
        self._mixed = False

    def _project_gradients(self, pending: _Pending) -> None:
        """Project the utility gradients in place, the step being −g_u."""
        steps: dict[str, Block] = {
            name: block for name in self._protections if (block := self._guarded.gradient_block(name)) is not None
        }
        if self._protections and not steps:
            raise self._no_gradients()
        if self.rule.removal == "nothing":
            return
        protections = {name: self._protections[name] for name in steps}
        changes = read_all(steps, protections, self._guarded.processes.group)
        demands = pending.measured.demands.only_firm()
        pending.plan = plan(self.rule, steps, protections, changes, demands, self._seed())
        for name, moves in pending.plan.moves.items():
            steps[name].apply(moves)

    def _no_gradients(self) -> SPFError:
        return SPFError(
            f"expected gradients before optimizer.step() for the rule '{self.rule.name}', found none; call backward() "
            "first, and give step() no closure"
        )

    def _add(self, measured: Measured) -> None:
        """Add the mean safety gradient to the utility gradients."""
        mean, scale = measured.demands.mean, getattr(self._optimizer, "grad_scale", None)
        adds = self.rule.adds * (1.0 if scale is None else float(scale))  # a fused optimizer divides gradients by it
        for name, gradients in measured.gradients.items():
            pairs = zip(gradients, mean, strict=True)
            self._guarded.add_to_gradients(name, [(one, adds * float(weight)) for one, weight in pairs if weight])

    def _after_step(self) -> None:
        pending, self._pending = self._pending, None
        if pending is None:
            return
        measured, self._measured, self._left_at = self._measured, None, {}  # forgotten where the step breaks off
        self._guarded.settle()
        raw = self._changed(pending.before, self._read(pending.before))
        _refuse_broken_update(raw)
        found = self._plan_corrections(pending, raw)
        applied = raw | self._changed(pending.before, self._read(found.moves, moves=found.moves))
        self._guarded.release()
        step = Step(
            self.steps + 1, pending.fresh, pending.measured, pending.before, raw, applied, pending.plan,
            found.corrected, found.bounds,
        )  # fmt: skip
        self._records.append(assess(step, self.rule, self._guarded.blocks, self._protections))
        try:
            self._records[-1] = replace(self._records[-1], loss_after=self._loss_after(pending))
        finally:
            if self._log:
                self._log.write(self._records[-1])
        Certificate(self.rule.name, self.rule.promise, self._records[-1:]).raise_on_violation()
        self._left_at = {name: pending.before[name].probe + change.probe for name, change in applied.items()}
        self._keep(measured)

    def _keep(self, measured: Measured | None) -> None:
        """Keep what the next step needs: gradients hold the anchors' activations."""
        if self._options.refresh_every > 1:
            self._measured = measured
        elif not (self.rule.always or self._options.refresh_energy):
            self._protections = {}

    def _refuse_other_changes(self, before: Mapping[str, Reading]) -> None:
        """Refuse a rule's promise for weights that something else has moved since the last step.

        Raises:
            SPFError: If a block is not where the last step left it.
        """
        for name, one in before.items():
            left = self._left_at.get(name)
            if not self.rule.guarantees or left is None or left.shape != one.probe.shape:
                continue
            rounding = _READING * float(torch.linalg.vector_norm(one.probe))
            if float(torch.linalg.vector_norm(one.probe - left)) > rounding:
                raise SPFError(
                    f"expected '{name}' where step {self.steps} left it, found it changed since: a later hook moves "
                    "weights that were certified; attach SPF last, or after changing weights detach and attach again"
                )

    def _plan_corrections(self, pending: _Pending, raw: dict[str, Reading]) -> Plan:
        """Plan what the update needs: all that the rule says, or beside a rule on the gradient what drift asks."""
        # What has drifted is known when the anchors are measured; asked for again and again it would overshoot.
        known = pending.measured.demands
        demands = known if pending.fresh else known.only_firm()
        if self.rule.level == "update":
            pending.plan = plan(self.rule, self._guarded.blocks, self._protections, raw, demands, self._seed())
            return pending.plan
        only_measured = RULES["measure"]
        return plan(only_measured, self._guarded.blocks, self._protections, raw, demands.only_drift(), self._seed())

    def _loss_after(self, pending: _Pending) -> float:
        if not (self._options.measure_curvature and pending.fresh):
            return math.nan
        with self._guarded.collecting():
            return float(self._meter.losses(pending.measured.chosen).mean())

    def _seed(self) -> int:
        return self._options.seed + self.steps

    # --------------------------------------------------------------------------------------------------- resuming

    def save(self, folder: str | Path) -> None:
        """Write into a checkpoint what a run that goes on from it needs, see ``resume`` of :meth:`SPF.attach`.

        All else the next step measures anew, here as there. Of several processes the first one writes.

        Args:
            folder: The checkpoint, which exists.
        """
        state = self._forgotten()
        if Processes.first():
            save_state(state, self._description, Path(folder))

    def _forgotten(self) -> dict[str, Tensor]:
        """Forget what will be measured anew, and return the rest."""
        self._measured = None
        if not self.rule.always:
            self._protections = {}
        bases = {name: one for name, one in self._protections.items() if one.left is not None}
        return {
            "steps": torch.tensor(self.steps),
            **self._meter.state(),
            **{f"origin.{name}": one for name, one in self._origin.items()},
            **{f"left.{name}": one.left for name, one in bases.items() if one.left is not None},
            **{f"master.{name}": one for name, one in self._guarded.masters().items()},
        }

    def _begun(self) -> Log | None:
        return Log.begun(self._options.log) if self._options.log and Processes.first() else None

    def _resumed(self, state: Mapping[str, Tensor]) -> Log | None:
        self._meter.load(state)
        self._guarded.load_masters(_of("master", state))
        self._kept = _of("left", state)
        self._origin = _of("origin", state)
        self._before = int(state["steps"])
        if not (self._options.log and Processes.first()):
            return None
        log, self._records = Log.resumed(self._options.log, self._before)
        self._before = 0
        return log


def _of(kind: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(f"{kind}."): one for name, one in state.items() if name.startswith(f"{kind}.")}


def _refuse_broken_update(raw: Mapping[str, Reading]) -> None:
    broken = [name for name, change in raw.items() if not math.isfinite(change.norm)]
    if broken:
        raise SPFError(f"{broken[0]}: expected a finite update, found NaN or inf; lower the learning rate")


def _as_hook(action: Callable[[], None]) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        with torch.no_grad(), full_precision():
            action()

    uncompiled: Callable[..., None] = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
    return uncompiled
