"""What is removed from a step that conflicts with safety, as pure functions on one parameter's gradient.

Everything is said of a *step* d: the optimizer's update Δθ, or −g_u where the utility gradient itself is projected.
To first order a step changes the safety loss by ⟨d, g_s⟩, so it *conflicts* when ⟨d, g_s⟩ > 0.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from geomkit.algebra import add, as_matrix
from geomkit.errors import SPFError
from geomkit.forms import DenseGradient, FactoredGradient
from geomkit.layer_gradient import LayerGradient
from geomkit.subspaces import layer_subspace

Level = Literal["gradient", "update"]
Scope = Literal["global", "block"]
Removal = Literal["rank1", "left", "nothing"]


@dataclass(frozen=True)
class Rule:
    """One way to keep a step from conflicting with safety.

    Attributes:
        name: Its name in :data:`RULES`.
        level: ``"gradient"``: the utility gradient is projected and then handed to the optimizer, whose momentum,
            preconditioner and weight decay may put the conflict back. ``"update"``: the optimizer's own update is
            projected, so the constraint holds for what is applied.
        scope: ``"global"`` tests the conflict once over all parameters, ``"block"`` once per parameter.
        removal: ``"rank1"`` removes the component along g_s; ``"left"`` removes everything in the span of the top
            ``rank`` left singular vectors of g_s; ``"nothing"`` removes nothing.
        rank: k of ``"left"``.
        adds: Multiple of g_s that is added to the utility gradient.
        drift_correction: Also undo what earlier steps did beyond first order: where the anchors' loss L_s exceeds its
            value L_ref before training, demand Σ ⟨Δθ, g_s⟩ ≤ L_ref − L_s, by a step of the needed length along −g_s.
        source: Where the rule comes from, and how it differs.
    """

    name: str
    level: Level
    scope: Scope
    removal: Removal
    source: str
    rank: int = 0
    adds: float = 0.0
    drift_correction: bool = False

    @property
    def guarantees(self) -> bool:
        """Whether ⟨Δθ, g_s⟩ ≤ 0 is promised, parameter by parameter, for the update that is applied."""
        return self.level == "update"


RULES: Mapping[str, Rule] = MappingProxyType(
    {
        rule.name: rule
        for rule in (
            Rule(
                "rank1",
                "update",
                "block",
                "rank1",
                "geomkit: the demonstration code's projection, on the update, with drift correction",
                drift_correction=True,
            ),
            Rule(
                "left",
                "update",
                "block",
                "left",
                "geomkit: the paper's subspace, on the update, with a harmless tail and drift correction",
                rank=10,
                drift_correction=True,
            ),
            Rule(
                "paper",
                "gradient",
                "global",
                "left",
                "arXiv 2601.10141, Algorithm 1, as replicated (there with one fixed anchor)",
                rank=20,
            ),
            Rule("demo", "gradient", "block", "rank1", "the paper's public demonstration code"),
            Rule("mixing", "gradient", "block", "nothing", "baseline: the safety loss added to the task's", adds=1.0),
            Rule("measure", "gradient", "block", "nothing", "control: a plain fine-tune, only measured"),
        )
    }
)
"""Every rule by name; :func:`get_rule` looks one up."""


def get_rule(rule: str | Rule, rank: int | None = None, *, drift_correction: bool | None = None) -> Rule:
    """Look a rule up by name, and change its rank or its drift correction where one is given.

    Raises:
        SPFError: If no rule has that name, it has no rank to change, or it cannot correct drift.

    Example:
        >>> get_rule("left", rank=5).rank
        5
    """
    if isinstance(rule, str):
        if rule not in RULES:
            raise SPFError(f"expected one of the rules {', '.join(RULES)}, found '{rule}'")
        rule = RULES[rule]
    if drift_correction is not None:
        if drift_correction and not rule.guarantees:
            raise SPFError(
                f"expected a rule on the update for drift correction, found '{rule.name}'; use rank1 or left"
            )
        rule = replace(rule, drift_correction=drift_correction)
    if rank is None:
        return rule
    if rule.removal != "left" or rank < 1:
        raise SPFError(
            f"expected a positive rank for a rule that removes a subspace, found rank={rank} for '{rule.name}'"
        )
    return replace(rule, rank=rank)


# ------------------------------------------------------------------------------------------------- protection


@dataclass(frozen=True, eq=False)
class Protection:
    """What one parameter is protected by: its safety gradient and, for ``"left"``, a basis.

    Attributes:
        gradient: g_s of the parameter.
        basis: U, (rows, k), orthonormal, fp32; ``None`` for rank-1 rules and vectors.
        tail: (I − UUᵀ) g_s, what the basis leaves of g_s; ``None`` without a basis or where it leaves nothing.
    """

    gradient: LayerGradient
    basis: Tensor | None = None
    tail: LayerGradient | None = None


def protect(rule: Rule, gradient: LayerGradient) -> Protection:
    """Prepare a rule for one parameter.

    A vector has a single left singular vector, itself, so ``"left"`` is ``"rank1"`` there.

    Args:
        rule: The rule.
        gradient: The parameter's safety gradient.
    """
    if rule.removal != "left" or min(gradient.matrix_shape) == 1:
        return Protection(gradient)
    found = layer_subspace(gradient, rank=rule.rank)
    basis = found.basis.to(gradient.device)
    # The published form stops at the subspace; a promise about g_s as a whole needs the rest of it too.
    needs_tail = rule.guarantees and basis.shape[1] < found.numeric_rank
    return Protection(gradient, basis, _outside(gradient, basis) if needs_tail else None)


def _outside(gradient: LayerGradient, basis: Tensor) -> LayerGradient:
    if isinstance(gradient, FactoredGradient):
        return FactoredGradient(gradient.left - (gradient.left @ basis) @ basis.T, gradient.right)
    if isinstance(gradient, DenseGradient):
        matrix = as_matrix(gradient)
        return DenseGradient((matrix - basis @ (basis.T @ matrix)).reshape(gradient.shape), gradient.tokens)
    inside = FactoredGradient(-basis.T, gradient.rmatmul(basis.T))
    return add([gradient, inside], keep_factors=True)


# --------------------------------------------------------------------------------------------------- removing


@dataclass(frozen=True, eq=False)
class Reading:
    """The coordinates of a tensor that a rule cares about; linear in the tensor.

    Attributes:
        dot: ⟨W, g_s⟩.
        inside: UᵀW, (k, columns), fp64; ``None`` without a basis.
        tail: ⟨W, (I − UUᵀ) g_s⟩; 0 without a tail.
    """

    dot: float
    inside: Tensor | None
    tail: float

    def __sub__(self, other: "Reading") -> "Reading":
        """Return the reading of the difference."""
        inside = None if self.inside is None or other.inside is None else self.inside - other.inside
        return Reading(self.dot - other.dot, inside, self.tail - other.tail)

    def scaled(self, scale: float) -> "Reading":
        """Return the reading of the scaled tensor."""
        return Reading(self.dot * scale, None if self.inside is None else self.inside * scale, self.tail * scale)

    @property
    def size(self) -> float:
        """The norm of the coordinates that a removal brings to zero."""
        return abs(self.dot) if self.inside is None else float(self.inside.norm())


def read(protection: Protection, weight: Tensor) -> Reading:
    """Read a tensor's protected coordinates, in fp64.

    The difference of two readings is the reading of an update, so an update can be judged without a copy of the
    weights.

    Args:
        protection: What the parameter is protected by.
        weight: A tensor of the parameter's shape.
    """
    inside = None
    if protection.basis is not None:
        basis = protection.basis.double()
        matrix = weight.reshape(protection.gradient.matrix_shape)
        inside = torch.cat([basis.T @ strip.double() for strip in torch.split(matrix, 4096, dim=1)], dim=1)
    return Reading(
        protection.gradient.dot(weight), inside, protection.tail.dot(weight) if protection.tail is not None else 0.0
    )


def remove(protection: Protection, step: Reading, weight: Tensor, scale: float = 1.0) -> float:
    """Take the conflicting part of a step out of a tensor, in place.

    With a basis the step is left orthogonal to U and not in conflict with the tail; without one, orthogonal to g_s.

    Args:
        protection: What the parameter is protected by.
        step: The reading of the step.
        weight: The tensor that holds the step, or the weights it was added to.
        scale: The step is in ``weight`` times this (−1 for a gradient).

    Returns:
        The norm of what was removed.
    """
    if protection.basis is None or step.inside is None:
        norm = protection.gradient.norm
        if not norm:
            return 0.0
        protection.gradient.add_to(weight, -scale * step.dot / norm**2)
        return abs(step.dot) / norm
    matrix = weight.view(protection.gradient.matrix_shape)
    matrix.sub_((protection.basis.double() @ step.inside).to(weight.dtype), alpha=scale)
    removed = float(step.inside.square().sum())
    if protection.tail is not None and step.tail > 0:
        protection.tail.add_to(weight, -scale * step.tail / protection.tail.norm**2)
        removed += (step.tail / protection.tail.norm) ** 2
    return float(removed**0.5)
