"""The guard: the hooks around ``optimizer.step`` that project an update and check it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from geomkit.errors import SPFError
from geomkit.spf.assess import Step, assess
from geomkit.spf.certificate import Certificate
from geomkit.spf.checkpoint_state import save_state
from geomkit.spf.constraints import ConstraintMeter
from geomkit.spf.demands import Measured
from geomkit.spf.projection.corrections import Plan, plan
from geomkit.spf.projection.reading import Reading
from geomkit.spf.protected import ProtectedBlocks
from geomkit.spf.rule import Rule
from geomkit.spf.rules import RULES
from geomkit.spf.step_calls import StepCalls
from geomkit.spf.step_record import Log, StepRecord
from geomkit.spf.utility_gradients import (
    add_safety_gradient,
    project_gradients,
    refuse_closure,
    refuse_missing_gradients,
)
from geomkit.spf.watch import Versions, Watch, refuse_moves_of_frozen_weights, unseen_move, versions
from geomkit.spf.weights.guarded import Guarded
from geomkit.spf.weights.trained import refuse_broken_gradients
from geomkit.utils.precision import full_precision
from geomkit.utils.workers import first_process


@dataclass(frozen=True)
class Options:
    """Settings of a guard that do not belong to its rule.

    Attributes:
        refresh_every: Number of steps from one measurement of the safety gradient to the next.
        refresh_energy: Recompute a subspace only when the fraction of ‖g_s‖² inside it is less than this multiple of
            the fraction when the subspace was computed; ``None`` recomputes it at every measurement.
        measure_curvature: Whether to run the anchors once more after each step.
        log: File to which each step appends a line.
        seed: Seed of random directions.
    """

    refresh_every: int = 1
    refresh_energy: float | None = None
    measure_curvature: bool = False
    log: Path | None = None
    seed: int = 0


@dataclass
class _Pending:
    """The measurements before a step, which the hook before the step hands to the hook after it."""

    measured: Measured
    fresh: bool
    before: Mapping[str, Reading]
    frozen: Versions
    plan: Plan | None = None


class Guard:
    """SPF attached to one optimizer: it projects, measures and checks every step.

    Before a step the guard collects the safety gradient of a few anchors at the present weights and reads the protected
    coordinates of the weights. After the step it reads them again, corrects the weights where the update conflicts,
    reads them once more and checks the rule's promise.
    """

    def __init__(
        self,
        guarded: Guarded,
        rule: Rule,
        constraint_meter: ConstraintMeter,
        options: Options,
        state: Mapping[str, Tensor] | None = None,
        description: Mapping[str, object] | None = None,
    ) -> None:
        """Attach to the optimizer of the weights, from the beginning or in a saved state; see :meth:`SPF.attach`."""
        self.rule = rule
        self._description = description or {}
        self.guarded, self._constraint_meter, self._options = guarded, constraint_meter, options
        self._protected = ProtectedBlocks(
            guarded,
            constraint_meter,
            rule,
            refresh_every=options.refresh_every,
            refresh_energy=options.refresh_energy,
            seed=options.seed,
        )
        self._records: list[StepRecord] = []
        self._earlier_steps = 0  # steps without records, of the run that this run resumes
        self._is_mixed = False  # whether the safety gradient has been added for the next step
        self._origin: dict[str, Tensor] = {}  # UᵀW₀ of each block under a rule with a closed subspace
        self._pending: _Pending | None = None
        self._watch = Watch(guarded)
        self._share = guarded.share  # smallest so far
        self._moved: str | None = None  # after detaching, the weight that was moved while no guarded step was seen
        self._calls = StepCalls(guarded.optimizer, self._before_step, self._after_step)
        try:
            self._log = self._begin_log() if state is None else self._resume(state)
        except BaseException:
            self._calls.release()
            raise

    @property
    def certificate(self) -> Certificate:
        """The certificate of the steps so far.

        Raises:
            SPFError: If weights were moved while no guarded step was seen.
        """
        self._refuse_unseen_moves()
        return Certificate(self.rule.name, self.rule.promise, self.records, self.guarded.by_factor, self._share)

    @property
    def records(self) -> tuple[StepRecord, ...]:
        """The records of the steps so far, without the check of :attr:`certificate`."""
        return tuple(self._records)

    @property
    def steps(self) -> int:
        """Number of steps so far."""
        return self._earlier_steps + len(self._records)

    def detach(self) -> None:
        """End the projection; the certificate stays available, and weights may be moved from then on.

        Raises:
            SPFError: If weights were moved while no guarded step was seen, such as by another optimizer, by hand, or by
                an optimizer that does not step in ``step()``.
        """
        self.release()
        self._refuse_unseen_moves()

    def release(self) -> None:
        """End the projection as :meth:`detach` does, but raise nothing: for the clearing up after another error."""
        if self._calls.attached:
            self._moved = self._watch.moved()
            self._calls.release()

    def accept_weights(self) -> None:
        """Take the present weights for those that the last guarded step left, such as those of a loaded checkpoint."""
        self._watch.accept()

    def _refuse_unseen_moves(self) -> None:
        """Check that no weight was moved while no guarded step was seen.

        Raises:
            SPFError: If one was: the certificate would be silent about that move.
        """
        name = self._watch.moved() if self._calls.attached else self._moved
        if name is not None:
            raise unseen_move(name, self.steps)

    @torch.no_grad()
    def mix(self) -> None:
        """Add the safety gradient to ``.grad`` now, if the rule adds it, so that both gradients are clipped together.

        Call it before the backward pass of the task. Without this call the safety gradient is added just before the
        optimizer's step, to a task gradient that is already clipped. Do not call it if a ``GradScaler`` still has to
        divide the gradients.
        """
        if self.rule.safety_gradient_weight and not self.rule.projects_gradient and self._calls.attached:
            if self.guarded.refresh():
                self._protected.discard()
            with full_precision():
                add_safety_gradient(self.rule, self.guarded, self._measure())
            self._is_mixed = True

    def __enter__(self) -> Self:
        """Return the guard."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the projection.

        Raises:
            SPFError: If weights were moved while no guarded step was seen, unless another error ends the block.
        """
        if kind is None:
            self.detach()
        else:
            self.release()

    def _measure(self) -> Measured:
        return self._protected.measure(self.steps, is_mixed=self._is_mixed)

    def _changes(self, before: Mapping[str, Reading], now: Mapping[str, Reading]) -> dict[str, Reading]:
        """Return the changes since the reading ``before``; inside a closed subspace, since the first reading."""
        changes = {name: reading - before[name] for name, reading in now.items()}
        for name, origin in self._origin.items():
            if name in changes and (left := now[name].left) is not None:
                changes[name] = replace(changes[name], left=left - origin)
        return changes

    # ------------------------------------------------------------------------------------------- before the step

    def _before_step(self, closure: bool) -> None:
        """Measure, read and, under a rule on the gradient, project the gradients."""
        self._pending = None
        optimizer = self.guarded.optimizer
        if bool(getattr(optimizer, "found_inf", None) or False):  # a fused optimizer skips a step that overflowed
            return
        if closure:
            refuse_closure(self.rule)
        # 1. Divide the weights anew if other weights are trained than at the last step; check their gradients.
        if self.guarded.refresh():
            self._protected.discard()
        self._share = min(self._share, self.guarded.share)
        refuse_broken_gradients(self.guarded.parameters)
        self._refuse_unseen_moves()
        # 2. The constraints at θ. With fixed anchors their loss at θ is the loss after the last step.
        measured, fresh = self._measure(), self._protected.measured_at == self.steps
        if self._records and fresh and self._constraint_meter.fixed:
            self._records[-1] = replace(self._records[-1], loss_after=measured.loss)
        # 3. The reading of θ; ⟨W, g⟩ is taken from the pass over the anchors where that pass used these weights.
        self.guarded.pull_updates_into_masters()
        known_dots = self.guarded.as_used(measured.products) if fresh else {}
        before = self._protected.read(self._protected.protections, known_dots=known_dots)
        if self.rule.closed_subspace:
            origin = {name: reading.left for name, reading in before.items() if reading.left is not None}
            self._origin = origin | self._origin
        self._pending = _Pending(measured, fresh, before, versions(self.guarded.unmoved))
        # 4. The utility gradients: project g_u, then add g_s, unless it has been added before the backward pass.
        if self.rule.level == "gradient":
            self._pending.plan = project_gradients(self.rule, self.guarded, self._protected, measured, self._seed())
        if self.rule.safety_gradient_weight and not self._is_mixed:
            refuse_missing_gradients(self.rule, self.guarded)
            add_safety_gradient(self.rule, self.guarded, measured)
        self._is_mixed = False

    # -------------------------------------------------------------------------------------------- after the step

    def _after_step(self) -> None:
        """Correct, record and check a step that the hook before it has prepared, and note where it left the weights."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        records = len(self._records)
        try:
            self._correct_and_record(pending)
        finally:  # a step with a record was seen, also where the record says that it broke the promise
            if len(self._records) > records:
                self._watch.accept()

    def _correct_and_record(self, pending: _Pending) -> None:
        """Read the update, correct it, read it again, and record and check it."""
        # Where this step fails, its measurement and its readings must not serve the next step.
        measured, self._protected.measured = self._protected.measured, None
        # 1. The optimizer's update Δ: the difference of two readings.
        self.guarded.follow_storage()
        refuse_moves_of_frozen_weights(pending.frozen, versions(self.guarded.unmoved))
        self.guarded.pull_updates_into_masters()
        raw = self._changes(pending.before, self._protected.read(pending.before))
        _refuse_broken_update(raw)
        # 2. The corrections of Δ, applied to the weights; the applied update is read from the corrected weights.
        corrections = self._plan_corrections(pending, raw)
        corrected = self._protected.read(corrections.moves, moves=corrections.moves)
        applied = raw | self._changes(pending.before, corrected)
        self.guarded.round_masters_into_weights()
        # 3. The record, which is written before a broken promise ends the run.
        step = Step(
            self.steps + 1, pending.fresh, pending.measured, pending.before, raw, applied, pending.plan,
            corrections.corrected, corrections.bounds,
        )  # fmt: skip
        self._records.append(assess(step, self.rule, self.guarded.blocks, self._protected.protections))
        try:
            self._records[-1] = replace(self._records[-1], loss_after=self._loss_after(pending))
        finally:
            if self._log:
                self._log.write(self._records[-1])
        Certificate(self.rule.name, self.rule.promise, self._records[-1:]).raise_on_violation()
        # 4. Keep the measurement if the next step needs it.
        self._protected.keep(measured)

    def _plan_corrections(self, pending: _Pending, raw: dict[str, Reading]) -> Plan:
        """Return the corrections of this update.

        Update-level rules apply in full; gradient-level rules get only the corrections for drift and benign answers.
        """
        blocks, protections = self.guarded.blocks, self._protected.protections
        # Drift is known only at a measurement: corrected again at later steps, it would be overcorrected.
        # It would also move weights that are frozen, and are guarded only as they have a gradient.
        corrects = pending.fresh and self.guarded.all_trainable
        demands = pending.measured.demands if corrects else pending.measured.demands.only_hard()
        if self.rule.level == "update":
            pending.plan = plan(self.rule, blocks, protections, raw, demands, self._seed())
            return pending.plan
        return plan(RULES["monitor"], blocks, protections, raw, demands.only_soft(), self._seed())

    def _loss_after(self, pending: _Pending) -> float:
        if not (self._options.measure_curvature and pending.fresh):
            return math.nan
        with self.guarded.collecting():
            return float(self._constraint_meter.losses(pending.measured.anchor_indices).mean())

    def _seed(self) -> int:
        return self._options.seed + self.steps

    # -------------------------------------------------------------------------------------------------- resuming

    def save(self, folder: str | Path) -> None:
        """Write into a checkpoint the state that a resumed run needs, see ``resume`` of :meth:`SPF.attach`.

        The measurement is discarded, so that the next step measures anew, in this run as in a resumed run. If there are
        several processes, only the first process writes.

        Args:
            folder: The checkpoint, which exists.
        """
        self._refuse_unseen_moves()
        bases = self._protected.bases()
        state = {
            "steps": torch.tensor(self.steps),
            "share": torch.tensor(self._share, dtype=torch.float64),
            **self._constraint_meter.state(),
            **_with_prefix("origin", self._origin),
            **_with_prefix("left", bases["left"]),
            **_with_prefix("shortfall", bases["shortfall"]),
            **_with_prefix("master", self.guarded.fp32_masters()),
        }
        if first_process():
            save_state(state, self._description, Path(folder))

    def _begin_log(self) -> Log | None:
        return Log.begun(self._options.log) if self._options.log and first_process() else None

    def _resume(self, state: Mapping[str, Tensor]) -> Log | None:
        """Load a saved state, and return the continued log, if there is one."""
        self._constraint_meter.load(state)
        self.guarded.load_fp32_masters(_without_prefix("master", state))
        self._protected.load(_without_prefix("left", state), _without_prefix("shortfall", state))
        self._origin = _without_prefix("origin", state)
        self._earlier_steps = int(state["steps"])
        self._share = min(self._share, float(state["share"]))
        if not (self._options.log and first_process()):
            return None
        log, self._records = Log.resumed(self._options.log, self._earlier_steps)
        self._earlier_steps = 0
        return log


def _with_prefix(kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{kind}.{name}": tensor for name, tensor in tensors.items()}


def _without_prefix(kind: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix = f"{kind}."
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _refuse_broken_update(raw: Mapping[str, Reading]) -> None:
    broken = [name for name, change in raw.items() if not math.isfinite(change.norm)]
    if broken:
        raise SPFError(f"{broken[0]}: expected a finite update, found NaN or inf; lower the learning rate")
