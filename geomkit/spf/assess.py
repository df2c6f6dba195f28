"""The record of one step, made from its readings: the constraints' values, and whether the promise holds."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from geomkit.errors import SPFError
from geomkit.spf.demands import Measured
from geomkit.spf.projection.corrections import Plan, coordinate_norm, remaining_coordinate_norm
from geomkit.spf.projection.protection import Protection
from geomkit.spf.projection.reading import Reading
from geomkit.spf.rule import Rule
from geomkit.spf.step_record import StepRecord
from geomkit.spf.weights.blocks import Block


@dataclass(frozen=True, eq=False)
class Step:
    """The readings of one step.

    Attributes:
        number: Number of the step, from 1.
        fresh: Whether the constraints were measured at this step.
        measured: The constraints.
        before: Reading of each block before the step.
        raw: The optimizer's own update of each block.
        applied: The update of each block after the corrections.
        plan: The corrections; for a rule on the gradient the corrections of the gradient.
        corrected: Norm of the correction for drift and the benign fence.
        bounds: (m,) upper bounds of the sums over the blocks; ∞ for no bound.
    """

    number: int
    fresh: bool
    measured: Measured
    before: Mapping[str, Reading]
    raw: Mapping[str, Reading]
    applied: Mapping[str, Reading]
    plan: Plan | None
    corrected: float
    bounds: np.ndarray


_ROUNDINGS = 3
"""Roundings of a coordinate that must not move: in the reading before training, in this one, and in the weights."""


def assess(step: Step, rule: Rule, blocks: Mapping[str, Block], protections: Mapping[str, Protection]) -> StepRecord:
    """Return the record of a step: its first-order effect on the safety loss, and whether the rule's promise holds.

    Args:
        step: The readings of the step.
        rule: The rule.
        blocks: The blocks.
        protections: The protection of each block.

    Raises:
        SPFError: If a weight is not finite.
    """
    weights = step.measured.demands.safety_weights
    # 1. Tolerances. Weights are rounded to eps‖W‖ before and after the step; in ⟨Δθ, g_i⟩ that is eps‖W‖‖g_i‖. The
    #    update's own norm is added, as an adapter's weights are zero before the first step.
    ulps = {name: blocks[name].eps * (step.before[name].norm + step.applied[name].norm) for name in protections}
    rounding = {
        name: ulps[name] * np.array([gradient.norm for gradient in protection.gradients])
        for name, protection in protections.items()
    }
    # 2. ⟨Δθ, g_i⟩ of each block, and sums over the blocks.
    dots = {name: change.dots.cpu().numpy() for name, change in step.applied.items()}
    totals, tolerances = (sum(parts.values(), np.zeros(len(weights))) for parts in (dots, rounding))
    first_order = float(totals @ weights)
    if not math.isfinite(first_order):
        raise SPFError("expected finite weights after the step, found NaN or inf; lower the learning rate")
    # 3. The promise. A rule without bounds is compared with 0, so that the record says where the safety loss rises.
    bounds = np.where(np.isfinite(step.bounds), step.bounds, np.where(weights > 0, 0.0, np.inf))
    over = totals > bounds + tolerances
    left, was = _leaks(step, rule, protections)
    worst, broken = _worst(rule, weights, dots, rounding, totals, tolerances)
    if rule.promise == "subspace":
        broken = any(norm > _ROUNDINGS * ulps[name] for name, norm in left.items())
    else:
        broken = bool(over.any()) or (rule.promise == "every block" and broken)
    # 4. The record.
    fired = step.plan.fired if step.plan else frozenset()
    removed = step.plan.removed if step.plan else {}
    raw = {name: float(change.dots.cpu().numpy() @ weights) for name, change in step.raw.items()}
    return StepRecord(
        step=step.number,
        fresh=step.fresh,
        anchor_loss=step.measured.loss,
        loss_after=math.nan,
        first_order_raw=sum(raw.values()),
        first_order=first_order,
        bound=float(bounds[weights > 0] @ weights[weights > 0]),
        worst=worst,
        tolerance=float(tolerances @ weights),
        update_norm=float(sum(change.norm**2 for change in step.applied.values()) ** 0.5),
        fired=len(fired) / max(len(dots), 1),
        removed=float(sum(norm**2 for norm in removed.values()) ** 0.5),
        corrected=step.corrected,
        leak=_ratio(left.values(), was.values()),
        shortfall=max((protection.shortfall for protection in protections.values()), default=0.0),
        violated=broken and bool(dots),
        blocks={
            name: np.array(
                [
                    raw[name],
                    float(products @ weights),
                    name in fired,
                    removed.get(name, 0.0),
                    _ratio([left.get(name, 0.0)], [was.get(name, 0.0)]),
                ],
                dtype=np.float32,
            )
            for name, products in dots.items()
        },
    )


def _worst(
    rule: Rule,
    weights: np.ndarray,
    dots: Mapping[str, np.ndarray],
    rounding: Mapping[str, np.ndarray],
    totals: np.ndarray,
    tolerances: np.ndarray,
) -> tuple[float, bool]:
    """Return the ⟨Δθ, g_s⟩ that is largest above its rounding, over blocks or anchors, and whether it is above."""
    is_safety = weights > 0
    if rule.promise == "every anchor":
        place = int(np.argmax((totals - tolerances)[is_safety]))
        return float(totals[is_safety][place]), bool((totals > tolerances)[is_safety][place])
    changes = {name: float(products @ weights) for name, products in dots.items()}
    excess = {name: changes[name] - float(rounding[name] @ weights) for name in changes}
    if not changes:
        return 0.0, False
    name = max(excess, key=lambda block: excess[block])
    return changes[name], excess[name] > 0


def _leaks(
    step: Step, rule: Rule, protections: Mapping[str, Protection]
) -> tuple[Mapping[str, float], Mapping[str, float]]:
    """Return, for each projected block, the norm of the conflicting part that remains, and its norm before."""
    if step.plan is None or rule.level == "gradient" or rule.removal == "norm-matched":
        return {}, {}
    fired = [name for name in step.raw if name in step.plan.fired and protections[name].gradient.norm]
    left = {name: remaining_coordinate_norm(step.plan, name, protections[name], step.applied[name]) for name in fired}
    return left, {name: coordinate_norm(protections[name], step.raw[name]) for name in fired}


def _ratio(left: Iterable[float], was: Iterable[float]) -> float:
    squared = sum(norm**2 for norm in was)
    return float((sum(norm**2 for norm in left) / squared) ** 0.5) if squared else 0.0
