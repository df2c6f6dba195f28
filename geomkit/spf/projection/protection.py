"""The protection of one block of weights: gradients of its constraints, and subspaces of the safety gradient."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from geomkit.gradients.factored import FactoredGradient
from geomkit.gradients.layer_gradient import LayerGradient
from geomkit.gradients.summed import SumGradient
from geomkit.spf.projection.outside import outside
from geomkit.spf.rule import Rule
from geomkit.svd.subspace_iteration import leading_vectors
from geomkit.utils.seeding import parameter_generator

_PROBES = 4
"""Random columns from which the norm of an update is estimated, without a copy of the weights."""


class _FactoredPart(NamedTuple):
    """A part LᵀR of a constraint's gradient: the constraint's place, L, and the columns of the operand that hold Rᵀ."""

    constraint: int
    left: Tensor
    columns: slice


@dataclass(frozen=True, eq=False)
class Protection:
    """The protection of one block of weights W, (rows, columns).

    Attributes:
        gradients: One gradient per constraint; for a rule with subspaces the first one is g_s.
        left: U, (rows, k), orthonormal, fp32; ``None`` without a left subspace.
        right: V, (columns, k), orthonormal, fp32; ``None`` without a right subspace.
        probe: Ω, (columns, q): standard normal numbers over √q, so that E ‖WΩ‖² = ‖W‖², or the identity for a matrix of
            at most q columns, such as a vector.
        energy: Fraction of ‖g_s‖² that the subspaces held when they were computed.
        shortfall: Estimated share of the energy of the exact singular vectors that U missed when it was computed, see
            :class:`~geomkit.svd.subspace_iteration.LeadingVectors`; 0 for no or a random subspace.
    """

    gradients: tuple[LayerGradient, ...]
    left: Tensor | None = None
    right: Tensor | None = None
    probe: Tensor | None = None
    energy: float = 0.0
    shortfall: float = 0.0

    @property
    def gradient(self) -> LayerGradient:
        """g_s, or the first anchor's gradient."""
        return self.gradients[0]

    @cached_property
    def tail(self) -> LayerGradient:
        """(I − UUᵀ) g_s (I − VVᵀ): the part of g_s outside the subspaces; g_s itself without subspaces."""
        return self.outside(self.gradient)

    def outside(self, gradient: LayerGradient) -> LayerGradient:
        """Return the part of a gradient outside the subspaces."""
        return gradient if self.left is None else outside(gradient, self.left, self.right)

    @property
    def captured(self) -> float:
        """Fraction of the present ‖g_s‖² inside the subspaces."""
        return 1 - (self.tail.norm / self.gradient.norm) ** 2 if self.gradient.norm else 0.0

    # One product W [R₁ᵀ R₂ᵀ … V Ω] has all that is read of a block from the right: ⟨W, LᵀR⟩ = Σ (W Rᵀ) ∘ Lᵀ for every
    # factored part LᵀR of a gradient, WV and WΩ. The operand is that matrix, its last columns are V and Ω.

    @cached_property
    def factored_parts(self) -> list[_FactoredPart]:
        """The factored parts of all gradients, with their columns of :attr:`operand`."""
        parts, start = [], 0
        for place, part in _parts(self.gradients):
            if isinstance(part, FactoredGradient):
                parts.append(_FactoredPart(place, part.left, slice(start, start + part.tokens)))
                start += part.tokens
        return parts

    @cached_property
    def other_parts(self) -> list[tuple[int, LayerGradient]]:
        """The parts of all gradients without token factors, with the place of their constraint."""
        return [(place, part) for place, part in _parts(self.gradients) if not isinstance(part, FactoredGradient)]

    @property
    def subspace_columns(self) -> int:
        """Number of columns of V and Ω, which are the last columns of :attr:`operand`."""
        return sum(matrix.shape[1] for matrix in (self.right, self.probe) if matrix is not None)

    @cached_property
    def operand(self) -> Tensor:
        """(columns, K) [R₁ᵀ R₂ᵀ … V Ω]: every matrix by which the weights are multiplied from the right."""
        factors = [part.right for _, part in _parts(self.gradients) if isinstance(part, FactoredGradient)]
        bases = [matrix.T for matrix in (self.right, self.probe) if matrix is not None]
        rows = [matrix.to(torch.promote_types(self.gradient.dtype, matrix.dtype)) for matrix in (*factors, *bases)]
        # Factors lie in memory row by row: they are concatenated as rows, and only the result is transposed.
        return torch.cat(rows).T if rows else self.gradient.tensors[0].new_zeros(1, 0)


def _parts(gradients: Sequence[LayerGradient]) -> list[tuple[int, LayerGradient]]:
    """Return the summands of all gradients, with the place of their constraint."""
    return [
        (place, part)
        for place, gradient in enumerate(gradients)
        for part in (gradient.parts if isinstance(gradient, SumGradient) else (gradient,))
    ]


def protect(
    rule: Rule, gradients: Sequence[LayerGradient], name: str = "", seed: int = 0, probe: Tensor | None = None
) -> Protection:
    """Return the protection of one block under a rule.

    A parameter that is a vector gets no subspace: its only left singular vector is the vector itself, so the subspace
    would be the whole gradient. It is protected by ⟨d, g_s⟩ alone.

    Args:
        rule: The rule.
        gradients: The block's gradient of each constraint.
        name: The block's name, from which random numbers are seeded.
        seed: Seed of the random numbers.
        probe: The block's probe Ω, if it has been drawn before.
    """
    bare = without_subspaces(gradients, name, seed, probe)
    if not rule.has_subspace or min(bare.gradient.matrix_shape) == 1 or not bare.gradient.norm:
        return bare
    return with_subspaces(bare, rule, name, seed)


def without_subspaces(
    gradients: Sequence[LayerGradient], name: str = "", seed: int = 0, probe: Tensor | None = None
) -> Protection:
    """Return the protection of a block without subspaces; see :func:`protect`."""
    return Protection(tuple(gradients), probe=_probe(gradients[0], name, seed) if probe is None else probe)


def with_subspaces(protection: Protection, rule: Rule, name: str, seed: int) -> Protection:
    """Return the protection with subspaces computed from its safety gradient."""
    gradient = protection.gradient
    if rule.removal == "random":
        rows, k = gradient.matrix_shape[0], min(rule.rank, gradient.rank_bound)
        gaussian = torch.randn(rows, k, generator=parameter_generator(seed, name), dtype=torch.float64)
        random = replace(protection, left=torch.linalg.qr(gaussian)[0].float().to(gradient.device))
        return replace(random, energy=random.captured)
    vectors = leading_vectors(gradient, rule.rank, parameter_generator(seed, name))
    right = vectors.right.float() if rule.removal == "two-sided" else None
    subspaces = replace(protection, left=vectors.left.float(), right=right, shortfall=vectors.shortfall)
    return replace(subspaces, energy=vectors.energy if right is None else subspaces.captured)


def with_subspaces_of(protection: Protection, earlier: Protection) -> Protection:
    """Return the protection with the subspaces of an earlier protection."""
    return replace(
        protection, left=earlier.left, right=earlier.right, energy=earlier.energy, shortfall=earlier.shortfall
    )


def _probe(gradient: LayerGradient, name: str, seed: int) -> Tensor:
    columns = gradient.matrix_shape[1]
    if columns <= _PROBES:
        return torch.eye(columns, device=gradient.device)
    generator = parameter_generator(seed + 1, name)
    gaussian: Tensor = torch.randn(columns, _PROBES, generator=generator) / _PROBES**0.5
    return gaussian.to(gradient.device)
