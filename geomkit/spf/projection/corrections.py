"""From what a step would do to the corrections that make it keep a rule: arithmetic, before anything is changed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from geomkit.spf.demands import Demands
from geomkit.spf.projection.nearest import Constraints, nearest
from geomkit.spf.projection.protection import Protection
from geomkit.spf.projection.reading import Reading
from geomkit.spf.projection.removal import removal
from geomkit.spf.rules import Rule
from geomkit.spf.weights.blocks import Block, Move


@dataclass(frozen=True, eq=False)
class Plan:
    """The corrections of one step.

    Attributes:
        moves: What is added to each block that something is added to.
        fired: The blocks whose step conflicts, or all where a rule asks once for all.
        removed: Norm of what is removed, by block.
        corrected: Norm of what is added for drift and the fence.
        bounds: (m,) what Σ ⟨d, g_i⟩ may be after the corrections.
        dots: (m,) ⟨d, g_i⟩ of each block after the corrections.
        added: What is added for drift and the fence, by block.
    """

    moves: Mapping[str, Sequence[Move]]
    fired: frozenset[str]
    removed: Mapping[str, float]
    corrected: float
    bounds: np.ndarray
    dots: Mapping[str, np.ndarray]
    added: Mapping[str, Sequence[Move]]


def plan(
    rule: Rule,
    blocks: Mapping[str, Block],
    protections: Mapping[str, Protection],
    changes: Mapping[str, Reading],
    demands: Demands,
    seed: int = 0,
) -> Plan:
    """Plan the corrections of a step.

    First the subspaces of blocks that conflict are removed; then comes the nearest step that satisfies every
    constraint: one for each block, where the rule asks that of each, and those of ``demands`` over all blocks.

    Args:
        rule: The rule.
        blocks: The blocks, which hold the step.
        protections: What they are protected by.
        changes: The reading of the step.
        demands: The constraints over all blocks.
        seed: Seed of a control's random directions.
    """
    dots = {name: change.dots.cpu().numpy() for name, change in changes.items()}
    fired = _fired(rule, dots, demands.mean)
    removals = {
        name: removal(rule, blocks[name], protections[name], change, name, fired=name in fired, seed=seed)
        for name, change in changes.items()
    }
    bound_once = rule.constrains and rule.scope == "block"
    constraints = Constraints(
        {name: dots[name] + one.effect for name, one in removals.items()}, removals, own=bound_once, demands=demands
    )
    found = nearest(constraints, limit=demands.budget * _norm(changes))
    firm, added = ({name: one.moves(each.get(name)) for name, one in removals.items()} for each in found.amounts)
    moves = {name: [*((part, -1.0) for part in one.parts), *firm[name], *added[name]] for name, one in removals.items()}
    if rule.scope == "global" and rule.constrains:  # what was asked of all together moves those that it moves
        fired = frozenset(name for name, some in firm.items() if some)
    return Plan(
        moves={name: some for name, some in moves.items() if some},
        fired=fired,
        removed={name: one.norm(found.amounts[0].get(name)) for name, one in removals.items()},
        corrected=found.added,
        bounds=found.bounds,
        dots=found.dots,
        added={name: some for name, some in added.items() if some},
    )


def _fired(rule: Rule, dots: Mapping[str, np.ndarray], mean: np.ndarray) -> frozenset[str]:
    """Return the blocks that something is removed from."""
    if rule.removal == "nothing":
        return frozenset()
    conflicts = {name: float(own @ mean) for name, own in dots.items()}
    if rule.scope == "global":
        conflicts = dict.fromkeys(conflicts, sum(conflicts.values()))
    return frozenset(name for name, conflict in conflicts.items() if rule.always or conflict > 0)


def _norm(changes: Mapping[str, Reading]) -> float:
    return float(sum(change.norm**2 for change in changes.values()) ** 0.5)


def left_over(found: Plan, name: str, protection: Protection, applied: Reading) -> float:
    """Return the norm of a block's coordinates that should have been removed and are not.

    Args:
        found: The corrections.
        name: The block.
        protection: What it is protected by.
        applied: The reading of the step after the corrections.

    Returns:
        A norm in the units of the weights; what it is a share of is :func:`coordinates` of the step before.
    """
    if protection.left is None or applied.left is None:
        off = float(applied.dots[0]) - float(found.dots[name][0])
        return abs(off) / protection.gradient.norm
    left, right = applied.left, applied.right
    for gradient, amount in found.added.get(name, ()):
        left = left - amount * gradient.rmatmul(protection.left.T)
        if right is not None and protection.right is not None:
            right = right - amount * gradient.matmul(protection.right)
    return float(sum(float(part.square().sum()) for part in (left, right) if part is not None) ** 0.5)


def coordinates(protection: Protection, change: Reading) -> float:
    """Return the norm of the coordinates that a removal brings to zero."""
    if protection.left is None or change.left is None:
        return abs(float(change.dots[0])) / protection.gradient.norm
    parts = (change.left, change.right)
    return float(sum(float(part.square().sum()) for part in parts if part is not None) ** 0.5)
