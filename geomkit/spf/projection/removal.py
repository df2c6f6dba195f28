"""What a rule takes out of one block's step, and the directions in which the step may be moved further."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from geomkit.gradients.arithmetic import gram, inner
from geomkit.gradients.dense import DenseGradient
from geomkit.gradients.factored import FactoredGradient
from geomkit.gradients.layer_gradient import LayerGradient
from geomkit.spf.projection.protection import Protection
from geomkit.spf.projection.reading import Reading
from geomkit.spf.rules import Rule
from geomkit.spf.weights.blocks import Block, Move
from geomkit.utils.seeding import parameter_generator

_NO_TAIL = 1e-5
"""A subspace that leaves less than this share of g_s, by norm, leaves rounding."""


@dataclass(frozen=True, eq=False)
class Removal:
    """One block on the way from its step to a better one.

    Attributes:
        block: The block.
        parts: What is removed whatever the constraints say: the step inside the subspaces, or a random part.
        gradients: The gradient of each constraint.
        directions: What the step may be moved along: these gradients, or what a subspace that is closed for good leaves
            of them; and last, where a subspace is removed, what that leaves of g_s.
        own: Which of them the block's own constraint, by itself, moves the step along.
    """

    block: Block
    parts: Sequence[LayerGradient]
    gradients: Sequence[LayerGradient]
    directions: Sequence[LayerGradient]
    own: int = 0

    @cached_property
    def effect(self) -> np.ndarray:
        """(m,) what removing the parts adds to ⟨d, g_i⟩ of each constraint."""
        total = np.zeros(len(self.gradients))
        for part in self.parts:
            reached = self.block.reachable(part)
            total -= [inner(reached, one) for one in self.gradients]
        return total

    @cached_property
    def gram(self) -> np.ndarray:
        """(n, n) what a move along one direction adds to ⟨d, ·⟩ of another."""
        if len(self.directions) == 1 and self.block.reachable(self.directions[0]) is self.directions[0]:
            return np.array([[self.directions[0].norm ** 2]])
        reached = [self.block.reachable(one) for one in self.directions]
        found = gram(self.directions, reached).cpu().numpy()
        return np.asarray((found + found.T) / 2)

    def moves(self, amounts: np.ndarray | None) -> list[Move]:
        """Return moves along the directions, without those of no length."""
        if amounts is None:
            return []
        return [(one, float(amount)) for one, amount in zip(self.directions, amounts, strict=True) if amount]

    def norm(self, amounts: np.ndarray | None) -> float:
        """Return the norm of what is removed: the parts, and moves along the directions, orthogonal to them."""
        squared = sum(part.norm**2 for part in self.parts)
        if amounts is not None:
            squared += max(float(amounts @ self.gram @ amounts), 0.0)
        return float(squared**0.5)


def removal(
    rule: Rule, block: Block, protection: Protection, change: Reading, name: str, *, fired: bool, seed: int
) -> Removal:
    """Say what a rule takes out of a block's step.

    Args:
        rule: The rule.
        block: The block.
        protection: What it is protected by.
        change: The reading of the step.
        name: The block's name, which a control's random direction depends on.
        fired: Whether the step conflicts.
        seed: Seed of random directions.
    """
    gradients = protection.gradients
    closed = rule.always and protection.left is not None  # to what is added for drift and the fence, too
    directions = [protection.outside(one) for one in gradients] if closed else list(gradients)
    if fired and rule.removal == "norm-matched":
        size = float(change.dots[0]) / protection.gradient.norm
        part = _random_direction(protection.gradient, name, seed).scaled(size)
        return Removal(block, [part], gradients, directions)
    if not fired or protection.left is None or change.left is None:
        return Removal(block, [], gradients, directions)
    parts = _inside(protection, change)
    # What an adapter cannot reach of the tail may be nearly all of it: there the shorter way is along g_s itself.
    if not rule.constrains or not block.free or protection.tail.norm <= _NO_TAIL * protection.gradient.norm:
        return Removal(block, parts, gradients, directions)
    return Removal(block, parts, gradients, [*directions, protection.tail], own=len(directions))


def _inside(protection: Protection, change: Reading) -> list[LayerGradient]:
    """Return UUᵀΔ, and (I − UUᵀ)ΔVVᵀ where there is a V: together what both subspaces hold of a step Δ."""
    left, right = protection.left, protection.right
    assert left is not None and change.left is not None  # noqa: PT018, S101
    own = left.to(change.left.dtype)
    parts = [_thin(protection, own.T, change.left)]
    if right is not None and change.right is not None:
        rest = change.right - own @ (own.T @ change.right)
        parts.append(_thin(protection, rest.T, right.T.to(rest.dtype)))
    return parts


def _random_direction(gradient: LayerGradient, name: str, seed: int) -> LayerGradient:
    """Return a matrix of rank one and norm one, in a random direction."""
    generator = parameter_generator(seed, name)
    left, right = (torch.randn(1, size, generator=generator) for size in gradient.matrix_shape)
    left, right = (side.to(gradient.device) / side.norm() for side in (left, right))
    return _thin(Protection((gradient,)), left, right)


def _thin(protection: Protection, left: Tensor, right: Tensor) -> LayerGradient:
    """Return LᵀR in the shape of the parameter."""
    shape = protection.gradient.shape
    if len(shape) == 2:
        return FactoredGradient(left, right)
    return DenseGradient((left.T @ right).reshape(shape), len(left))
