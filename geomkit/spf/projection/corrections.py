"""From the reading of a step to the corrections with which it keeps a rule: arithmetic only, no weight is changed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from geomkit.spf.demands import Demands
from geomkit.spf.projection.nearest import Constraints, nearest
from geomkit.spf.projection.protection import Protection
from geomkit.spf.projection.reading import Reading
from geomkit.spf.projection.removal import removal
from geomkit.spf.rule import Rule
from geomkit.spf.weights.blocks import Block, Move


@dataclass(frozen=True, eq=False)
class Plan:
    """The corrections of one step.

    Attributes:
        moves: The gradients to add to each block, for the blocks that are corrected.
        fired: The blocks whose step conflicts; for a constraint on the sum over the blocks, the blocks that it moves.
        removed: For each block the norm of the part that is removed from its step.
        corrected: Norm of the correction for drift and the benign fence.
        bounds: (m,) upper bounds of Σ ⟨d, g_i⟩ after the corrections.
        dots: For each block (m,) ⟨d, g_i⟩ after the corrections.
        added: The part of ``moves`` that is added for drift and the benign fence.
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
    """Return the corrections with which a step keeps a rule.

    Args:
        rule: The rule.
        blocks: The blocks, which hold the step.
        protections: The protection of each block.
        changes: The reading of each block's step d.
        demands: The bounds on sums over all blocks.
        seed: Seed of the random directions of a control.

    Returns:
        The corrections, which :meth:`Block.apply` can add to the blocks.
    """
    # 1. Which blocks conflict: ⟨d, g_s⟩ > 0.
    dots = {name: change.dots.cpu().numpy() for name, change in changes.items()}
    fired = _fired(rule, dots, demands.safety_weights)
    # 2. Remove the subspaces of these blocks: d ← d − parts, and ⟨d, g_i⟩ changes by the parts' effect.
    removals = {
        name: removal(rule, blocks[name], protections[name], change, name, fired=name in fired, seed=seed)
        for name, change in changes.items()
    }
    dots = {name: dots[name] + block_removal.effect for name, block_removal in removals.items()}
    # 3. Find the nearest step that satisfies ⟨d, g_s⟩ ≤ 0 in each block, if the rule asks for it, and the demands.
    per_block = rule.constrains and rule.scope == "block"
    solution = nearest(Constraints(dots, removals, per_block, demands), limit=demands.budget * _norm(changes))
    # 4. Moves of the weights: −1 × each removed part, and the moves along the directions.
    hard, soft = (
        {name: block_removal.moves(amounts.get(name)) for name, block_removal in removals.items()}
        for amounts in solution.amounts
    )
    moves = {
        name: [*((part, -1.0) for part in block_removal.parts), *hard[name], *soft[name]]
        for name, block_removal in removals.items()
    }
    if rule.scope == "global" and rule.constrains:
        fired = frozenset(name for name, block_moves in hard.items() if block_moves)
    return Plan(
        moves={name: block_moves for name, block_moves in moves.items() if block_moves},
        fired=fired,
        removed={name: block_removal.norm(solution.amounts[0].get(name)) for name, block_removal in removals.items()},
        corrected=solution.added,
        bounds=solution.bounds,
        dots=solution.dots,
        added={name: block_moves for name, block_moves in soft.items() if block_moves},
    )


def _fired(rule: Rule, dots: Mapping[str, np.ndarray], weights: np.ndarray) -> frozenset[str]:
    """Return the blocks from which the rule removes a part."""
    if rule.removal == "none":
        return frozenset()
    conflicts = {name: float(products @ weights) for name, products in dots.items()}
    if rule.scope == "global":
        conflicts = dict.fromkeys(conflicts, sum(conflicts.values()))
    return frozenset(name for name, conflict in conflicts.items() if rule.closed_subspace or conflict > 0)


def _norm(changes: Mapping[str, Reading]) -> float:
    return float(sum(change.norm**2 for change in changes.values()) ** 0.5)


def remaining_coordinate_norm(corrections: Plan, name: str, protection: Protection, applied: Reading) -> float:
    """Return the norm of the coordinates that remain in a block's step although the corrections remove them.

    Args:
        corrections: The corrections.
        name: Name of the block.
        protection: The protection of the block.
        applied: The reading of the block's step after the corrections.

    Returns:
        A norm in the units of the weights, comparable with the :func:`coordinate_norm` before the corrections.
    """
    if protection.left is None or applied.left is None:
        error = float(applied.dots[0]) - float(corrections.dots[name][0])
        return abs(error) / protection.gradient.norm
    left, right = applied.left, applied.right
    # Corrections for drift and the fence may enter the subspace: subtract their coordinates, UᵀG and GV.
    for gradient, amount in corrections.added.get(name, ()):
        left = left - amount * gradient.rmatmul(protection.left.T)
        if right is not None and protection.right is not None:
            right = right - amount * gradient.matmul(protection.right)
    return float(sum(float(part.square().sum()) for part in (left, right) if part is not None) ** 0.5)


def coordinate_norm(protection: Protection, change: Reading) -> float:
    """Return the norm of the coordinates of a block's step that a removal sets to zero, in units of the weights."""
    if protection.left is None or change.left is None:
        return abs(float(change.dots[0])) / protection.gradient.norm
    parts = (change.left, change.right)
    return float(sum(float(part.square().sum()) for part in parts if part is not None) ** 0.5)
