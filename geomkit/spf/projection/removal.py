"""The part that a rule removes from one block's step, and the directions along which the step may be moved further."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from geomkit.gradients.arithmetic import gram
from geomkit.gradients.dense import DenseGradient
from geomkit.gradients.factored import FactoredGradient
from geomkit.gradients.layer_gradient import LayerGradient
from geomkit.gradients.summed import inner_of_parts
from geomkit.spf.projection.protection import Protection
from geomkit.spf.projection.reading import Reading
from geomkit.spf.rule import Rule
from geomkit.spf.weights.blocks import Block, Move
from geomkit.utils.seeding import parameter_generator

_NO_TAIL = 1e-5
"""A part of g_s outside the subspaces below this fraction of ‖g_s‖ is rounding."""


@dataclass(frozen=True, eq=False)
class Removal:
    """The removal from one block's step d, and the directions of further moves.

    Attributes:
        block: The block.
        parts: The parts of d that are removed whatever the constraints: d inside the subspaces, or a random part.
        gradients: The gradient g_i of each of the m constraints.
        directions: The n directions along which d may be moved. The first m are the gradients, or for a closed subspace
            their parts outside it; where a subspace was removed, the last is the part of g_s outside it.
        own_direction: Index of the direction along which the block's own constraint ⟨d, g_s⟩ ≤ 0 moves d.
    """

    block: Block
    parts: Sequence[LayerGradient]
    gradients: Sequence[LayerGradient]
    directions: Sequence[LayerGradient]
    own_direction: int = 0

    @cached_property
    def effect(self) -> np.ndarray:
        """(m,) −Σ ⟨part, g_i⟩: the change of ⟨d, g_i⟩ by the removal of the parts."""
        total = np.zeros(len(self.gradients))
        for part in self.parts:
            reached = self.block.reachable(part)
            total -= [inner_of_parts(reached, gradient) for gradient in self.gradients]
        return total

    @cached_property
    def gram(self) -> np.ndarray:
        """(n, n) ⟨reachable part of direction i, direction j⟩: the change of ⟨d, j⟩ by a move along i."""
        first, *others = self.directions
        if self.block.free and not others:
            return np.array([[first.norm**2]])
        if self.own_direction == 1:  # g_s and its part outside the subspaces, an orthogonal projection of g_s
            inside = others[0].norm ** 2
            return np.array([[first.norm**2, inside], [inside, inside]])
        reached = [self.block.reachable(direction) for direction in self.directions]
        products = gram(self.directions, reached).cpu().numpy()
        return np.asarray((products + products.T) / 2)

    def moves(self, amounts: np.ndarray | None) -> list[Move]:
        """Return the moves of these lengths along the directions, without moves of length zero."""
        if amounts is None:
            return []
        pairs = zip(self.directions, amounts, strict=True)
        return [(direction, float(amount)) for direction, amount in pairs if amount]

    def norm(self, amounts: np.ndarray | None) -> float:
        """Return the norm of the whole removal: of the parts, and of moves along the directions, orthogonal to them."""
        squared = sum(part.norm**2 for part in self.parts)
        if amounts is not None:
            squared += max(float(amounts @ self.gram @ amounts), 0.0)
        return float(squared**0.5)


def removal(
    rule: Rule, block: Block, protection: Protection, change: Reading, name: str, *, fired: bool, seed: int
) -> Removal:
    """Return the removal of a rule from a block's step, and the directions of further moves.

    Args:
        rule: The rule.
        block: The block.
        protection: The protection of the block.
        change: The reading of the block's step.
        name: The block's name, from which a control's random direction is seeded.
        fired: Whether the step conflicts.
        seed: Seed of random directions.
    """
    gradients = protection.gradients
    # 1. Directions of moves: g_i, or (I − UUᵀ) g_i where no correction may enter the subspace.
    closed = rule.closed_subspace and protection.left is not None
    directions = [protection.outside(gradient) for gradient in gradients] if closed else list(gradients)
    # 2. The control: E ⟨d, g_s⟩ / ‖g_s‖ with a random E of norm one, as long as the part that rank1 removes.
    if fired and rule.removal == "norm-matched":
        size = float(change.dots[0]) / protection.gradient.norm
        part = _random_direction(protection.gradient, name, seed).scaled(size)
        return Removal(block, [part], gradients, directions)
    if not fired or protection.left is None or change.left is None:
        return Removal(block, [], gradients, directions)
    # 3. The step inside the subspaces.
    parts = _inside(protection, change)
    # 4. Where the rest of the step still conflicts it is moved along the rest of g_s, (I − UUᵀ) g_s (I − VVᵀ), which
    #    leaves the removed subspace alone. An adapter may reach next to nothing of that rest: there the shorter way is
    #    along g_s itself.
    if not rule.constrains or not block.free or protection.tail.norm <= _NO_TAIL * protection.gradient.norm:
        return Removal(block, parts, gradients, directions)
    return Removal(block, parts, gradients, [*directions, protection.tail], own_direction=len(directions))


def _inside(protection: Protection, change: Reading) -> list[LayerGradient]:
    """Return the parts of a step Δ inside the subspaces: UUᵀΔ, and (I − UUᵀ)ΔVVᵀ if there is a V."""
    left, right = protection.left, protection.right
    assert left is not None and change.left is not None  # noqa: PT018, S101
    basis = left.to(change.left.dtype)
    parts = [_factored(protection, basis.T, change.left)]  # U (UᵀΔ)
    if right is not None and change.right is not None:
        rest = change.right - basis @ (basis.T @ change.right)  # (I − UUᵀ)(ΔV)
        parts.append(_factored(protection, rest.T, right.T.to(rest.dtype)))
    return parts


def _random_direction(gradient: LayerGradient, name: str, seed: int) -> LayerGradient:
    """Return a random matrix of rank one and norm one."""
    generator = parameter_generator(seed, name)
    left, right = (torch.randn(1, size, generator=generator) for size in gradient.matrix_shape)
    left, right = (side.to(gradient.device) / side.norm() for side in (left, right))
    return _factored(Protection((gradient,)), left, right)


def _factored(protection: Protection, left: Tensor, right: Tensor) -> LayerGradient:
    """Return LᵀR in the shape of the parameter."""
    shape = protection.gradient.shape
    if len(shape) == 2:
        return FactoredGradient(left, right)
    return DenseGradient((left.T @ right).reshape(shape), len(left))
