"""From the readings of one step to its record: what was promised, and whether it holds."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from geomkit.errors import SPFError
from geomkit.spf.demands import Measured
from geomkit.spf.projection.corrections import Plan, coordinates, left_over
from geomkit.spf.projection.protection import Protection
from geomkit.spf.projection.reading import Reading
from geomkit.spf.rules import Rule
from geomkit.spf.step_record import StepRecord
from geomkit.spf.weights.blocks import Block


@dataclass(frozen=True, eq=False)
class Step:
    """All that was read of one step.

    Attributes:
        number: Its number, from 1.
        fresh: Whether its constraints were measured at this step.
        measured: The constraints.
        before: The blocks before the step.
        raw: The optimizer's own update.
        applied: The update after the corrections.
        plan: The corrections; of a rule on the gradient those of the gradient.
        corrected: Norm of what was added for drift and the fence.
        bounds: (m,) what the sums over the blocks may be, ∞ where nothing is asked.
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
"""How often a coordinate that should stand still is rounded: read before training, read now, kept in the weights."""


def assess(step: Step, rule: Rule, blocks: Mapping[str, Block], protections: Mapping[str, Protection]) -> StepRecord:
    """Say what a step did, and whether it kept what the rule promises.

    Args:
        step: What was read of it.
        rule: The rule.
        blocks: The blocks.
        protections: What they are protected by.

    Raises:
        SPFError: If a weight is not finite.
    """
    mean = step.measured.demands.mean
    # The weights before and after are rounded; an adapter's are zero before the first step.
    ulps = {name: blocks[name].eps * (step.before[name].norm + step.applied[name].norm) for name in protections}
    rounding = {
        name: ulps[name] * np.array([one.norm for one in protection.gradients])
        for name, protection in protections.items()
    }
    dots = {name: change.dots.cpu().numpy() for name, change in step.applied.items()}
    totals, tolerances = (sum(side.values(), np.zeros(len(mean))) for side in (dots, rounding))
    first_order = float(totals @ mean)
    if not math.isfinite(first_order):
        raise SPFError("expected finite weights after the step, found NaN or inf; lower the learning rate")
    bounds = np.where(np.isfinite(step.bounds), step.bounds, np.where(mean > 0, 0.0, np.inf))
    over = totals > bounds + tolerances
    left, was = _leaks(step, rule, protections)
    worst, broken = _worst(rule, mean, dots, rounding, totals, tolerances)
    if rule.promise == "subspace":
        broken = any(norm > _ROUNDINGS * ulps[name] for name, norm in left.items())
    else:
        broken = bool(over.any()) or (rule.promise == "every block" and broken)
    fired = step.plan.fired if step.plan else frozenset()
    removed = step.plan.removed if step.plan else {}
    raw = {name: float(change.dots.cpu().numpy() @ mean) for name, change in step.raw.items()}
    return StepRecord(
        step=step.number,
        fresh=step.fresh,
        anchor_loss=step.measured.loss,
        loss_after=math.nan,
        first_order_raw=sum(raw.values()),
        first_order=first_order,
        bound=float(bounds[mean > 0] @ mean[mean > 0]),
        worst=worst,
        tolerance=float(tolerances @ mean),
        update_norm=float(sum(change.norm**2 for change in step.applied.values()) ** 0.5),
        fired=len(fired) / max(len(dots), 1),
        removed=float(sum(norm**2 for norm in removed.values()) ** 0.5),
        corrected=step.corrected,
        leak=_ratio(left.values(), was.values()),
        violated=broken and bool(dots),
        blocks={
            name: np.array(
                [
                    raw[name],
                    float(own @ mean),
                    name in fired,
                    removed.get(name, 0.0),
                    _ratio([left.get(name, 0.0)], [was.get(name, 0.0)]),
                ],
                dtype=np.float32,
            )
            for name, own in dots.items()
        },
    )


def _worst(
    rule: Rule,
    mean: np.ndarray,
    dots: Mapping[str, np.ndarray],
    rounding: Mapping[str, np.ndarray],
    totals: np.ndarray,
    tolerances: np.ndarray,
) -> tuple[float, bool]:
    """Return the largest ⟨Δθ, g_s⟩ of a block, or of an anchor, beyond its rounding, and whether it is beyond."""
    safety = mean > 0
    if rule.promise == "every anchor":
        place = int(np.argmax((totals - tolerances)[safety]))
        return float(totals[safety][place]), bool((totals > tolerances)[safety][place])
    own = {name: float(each @ mean) for name, each in dots.items()}
    beyond = {name: own[name] - float(rounding[name] @ mean) for name in own}
    if not own:
        return 0.0, False
    name = max(beyond, key=lambda one: beyond[one])
    return own[name], beyond[name] > 0


def _leaks(
    step: Step, rule: Rule, protections: Mapping[str, Protection]
) -> tuple[Mapping[str, float], Mapping[str, float]]:
    """Return, of each block that fired, the norm of what should be gone and is not, and of what it was."""
    if step.plan is None or rule.level == "gradient" or rule.removal == "norm-matched":
        return {}, {}
    fired = [name for name in step.raw if name in step.plan.fired and protections[name].gradient.norm]
    left = {name: left_over(step.plan, name, protections[name], step.applied[name]) for name in fired}
    return left, {name: coordinates(protections[name], step.raw[name]) for name in fired}


def _ratio(left: Iterable[float], was: Iterable[float]) -> float:
    whole = sum(one**2 for one in was)
    return float((sum(one**2 for one in left) / whole) ** 0.5) if whole else 0.0
