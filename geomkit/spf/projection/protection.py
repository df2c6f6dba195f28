"""What one block of weights is protected by: gradients, and the subspaces of the first of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from geomkit.gradients.accumulator import add
from geomkit.gradients.dense import DenseGradient
from geomkit.gradients.factored import FactoredGradient
from geomkit.gradients.layer_gradient import LayerGradient, as_matrix
from geomkit.gradients.summed import SumGradient
from geomkit.spf.rules import Rule
from geomkit.svd.subspaces import layer_subspace
from geomkit.utils.seeding import parameter_generator

_PROBES = 4
"""Random columns by which the norm of an update is estimated, without a copy of the weights."""


class _Thin(NamedTuple):
    """A factored part of a constraint's gradient: the constraint's place, and the columns of the operand it has."""

    constraint: int
    left: Tensor
    columns: slice


@dataclass(frozen=True, eq=False)
class Protection:
    """What one block is protected by.

    Attributes:
        gradients: One per constraint; of a rule with subspaces the first is g_s.
        left: U, (rows, k), orthonormal, fp32; ``None`` without one.
        right: V, (columns, k), orthonormal, fp32; ``None`` without one.
        probe: (columns, q) standard normal numbers over √q, or the identity for a vector: ‖WΩ‖ is about ‖W‖.
        energy: Share of ‖g_s‖² that the subspaces held when they were made.
    """

    gradients: tuple[LayerGradient, ...]
    left: Tensor | None = None
    right: Tensor | None = None
    probe: Tensor | None = None
    energy: float = 0.0

    @property
    def gradient(self) -> LayerGradient:
        """g_s, or the first anchor's gradient."""
        return self.gradients[0]

    @cached_property
    def tail(self) -> LayerGradient:
        """(I − UUᵀ) g_s (I − VVᵀ): what the subspaces leave of g_s; all of it without any."""
        return self.outside(self.gradient)

    def outside(self, gradient: LayerGradient) -> LayerGradient:
        """Return what the subspaces leave of a gradient."""
        return gradient if self.left is None else _outside(gradient, self.left, self.right)

    @property
    def captured(self) -> float:
        """Share of ‖g_s‖² that the subspaces hold now."""
        return 1 - (self.tail.norm / self.gradient.norm) ** 2 if self.gradient.norm else 0.0

    @cached_property
    def thin(self) -> list[_Thin]:
        """The factored parts of all gradients, with their columns in :attr:`operand`."""
        parts, start = [], 0
        for place, part in _parts(self.gradients):
            if isinstance(part, FactoredGradient):
                parts.append(_Thin(place, part.left, slice(start, start + part.tokens)))
                start += part.tokens
        return parts

    @cached_property
    def whole(self) -> list[tuple[int, LayerGradient]]:
        """The parts of all gradients that have no token factors, with the constraint that each is of."""
        return [(place, part) for place, part in _parts(self.gradients) if not isinstance(part, FactoredGradient)]

    @property
    def own_columns(self) -> int:
        """How many columns of :attr:`operand`, the last ones, are no token factors."""
        return sum(one.shape[1] for one in (self.right, self.probe) if one is not None)

    @cached_property
    def operand(self) -> Tensor:
        """(columns, K) all that a weight is multiplied by from the right: token factors, V and the probe."""
        factors = [part.right for _, part in _parts(self.gradients) if isinstance(part, FactoredGradient)]
        own = [one.T for one in (self.right, self.probe) if one is not None]
        rows = [one.to(torch.promote_types(self.gradient.dtype, one.dtype)) for one in (*factors, *own)]
        # Factors lie in memory row by row: beside one another they would have to be turned first.
        return torch.cat(rows).T if rows else self.gradient.tensors[0].new_zeros(1, 0)


def _parts(gradients: Sequence[LayerGradient]) -> list[tuple[int, LayerGradient]]:
    return [
        (place, part)
        for place, gradient in enumerate(gradients)
        for part in (gradient.parts if isinstance(gradient, SumGradient) else (gradient,))
    ]


def protect(
    rule: Rule, gradients: Sequence[LayerGradient], name: str = "", seed: int = 0, probe: Tensor | None = None
) -> Protection:
    """Prepare a rule for one block.

    A vector has a single left singular vector, itself, so a subspace of it is all of it: there only ⟨d, g_s⟩ counts.

    Args:
        rule: The rule.
        gradients: The block's gradient of every constraint.
        name: The block's name, which random numbers depend on.
        seed: Their seed.
        probe: The block's probe, where it has been drawn before.
    """
    bare = without_subspaces(gradients, name, seed, probe)
    if not rule.has_subspace or min(bare.gradient.matrix_shape) == 1 or not bare.gradient.norm:
        return bare
    return with_subspaces(bare, rule, name, seed)


def without_subspaces(
    gradients: Sequence[LayerGradient], name: str = "", seed: int = 0, probe: Tensor | None = None
) -> Protection:
    """Prepare a block of which no subspace is protected, or one that is known already."""
    return Protection(tuple(gradients), probe=_probe(gradients[0], name, seed) if probe is None else probe)


def with_subspaces(protection: Protection, rule: Rule, name: str, seed: int) -> Protection:
    """Compute the subspaces anew."""
    gradient = protection.gradient
    if rule.removal == "random":
        rows, k = gradient.matrix_shape[0], min(rule.rank, gradient.rank_bound)
        drawn = torch.randn(rows, k, generator=parameter_generator(seed, name), dtype=torch.float64)
        made = replace(protection, left=torch.linalg.qr(drawn)[0].float().to(gradient.device))
        return replace(made, energy=made.captured)
    if rule.removal == "two-sided":
        found = layer_subspace(gradient, rank=rule.rank, side="both", parameter=name)
        return replace(protection, left=found.basis, right=found.partner, energy=found.energy)
    found = layer_subspace(gradient, rank=rule.rank, parameter=name)
    return replace(protection, left=found.basis, energy=found.energy)


def renewed(protection: Protection, kept: Protection) -> Protection:
    """Return the protection with the subspaces of an earlier one."""
    return replace(protection, left=kept.left, right=kept.right, energy=kept.energy)


def _probe(gradient: LayerGradient, name: str, seed: int) -> Tensor:
    columns = gradient.matrix_shape[1]
    if columns <= _PROBES:
        return torch.eye(columns, device=gradient.device)
    generator = parameter_generator(seed + 1, name)
    drawn: Tensor = torch.randn(columns, _PROBES, generator=generator) / _PROBES**0.5
    return drawn.to(gradient.device)


def _outside(gradient: LayerGradient, left: Tensor, right: Tensor | None) -> LayerGradient:
    if isinstance(gradient, FactoredGradient):
        return FactoredGradient(_without(gradient.left, left), _without(gradient.right, right))
    if isinstance(gradient, DenseGradient):
        matrix = _without(_without(as_matrix(gradient).T, left).T, right)
        return DenseGradient(matrix.reshape(gradient.shape), gradient.tokens)
    rest = gradient  # of a large table of which few rows were looked up
    for _ in range(2):
        rest = add([rest, FactoredGradient(-left.T, rest.rmatmul(left.T))], keep_factors=True)
        if right is not None:
            rest = add([rest, FactoredGradient(-rest.matmul(right).T, right.T)], keep_factors=True)
    return rest


def _without(rows: Tensor, basis: Tensor | None) -> Tensor:
    """Return rows without their part in the span of a basis: twice, as its columns are orthonormal to fp32 only."""
    if basis is None:
        return rows
    for _ in range(2):
        rows = rows - (rows @ basis.to(rows.dtype)) @ basis.to(rows.dtype).T
    return rows
