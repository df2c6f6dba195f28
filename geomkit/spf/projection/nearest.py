"""The nearest step that satisfies every constraint: of single blocks, and over all blocks."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import nnls

from geomkit.spf.demands import Demands
from geomkit.spf.projection.removal import Removal

Amounts = dict[str, np.ndarray]
"""How far each block moves along each of its directions."""


@dataclass(frozen=True, eq=False)
class Constraints:
    """What a step must satisfy.

    Attributes:
        dots: (m,) ⟨d, g_i⟩ of each block's step and each constraint.
        removals: The directions that each block may be moved along.
        own: Whether ⟨d, g_s⟩ ≤ 0 is asked of each block.
        demands: What is asked of the sums over all blocks.
    """

    dots: Mapping[str, np.ndarray]
    removals: Mapping[str, Removal]
    own: bool
    demands: Demands


@dataclass(frozen=True, eq=False)
class Nearest:
    """The nearest step.

    Attributes:
        amounts: The moves for what is firm, and those for what is wanted beyond it.
        added: Norm of the latter.
        bounds: (m,) what the sums may be.
        dots: (m,) ⟨d, g_i⟩ of each block after the moves.
    """

    amounts: tuple[Amounts, Amounts]
    added: float
    bounds: np.ndarray
    dots: Mapping[str, np.ndarray]


def nearest(constraints: Constraints, limit: float = np.inf) -> Nearest:
    """Find the nearest step that satisfies constraints.

    If every block's own constraint is all that is violated, each block is moved alone; one whose subspace was removed,
    along what that left of its gradient. Otherwise one quadratic programme has all constraints: solved for the firm
    bounds and for the wanted ones, the step goes from the first solution towards the second, as far as the limit on
    that move says. Between two steps that satisfy constraints each, any step satisfies those in between.

    Args:
        constraints: What to satisfy.
        limit: Norm of the longest move beyond what is firm.
    """
    alone = _each_alone(constraints) if constraints.own else {}
    demands = constraints.demands
    dots = _after(constraints, alone)
    if not (sum(dots.values(), np.zeros(len(demands.wanted))) > demands.wanted).any():
        return Nearest((alone, {}), 0.0, demands.wanted, dots)
    # A block without its subspace has been moved along the rest; of the others the programme decides anew.
    kept = {name: amount for name, amount in alone.items() if constraints.removals[name].own}
    system = _System(replace(constraints, dots=_after(constraints, kept)))
    firm = system.solve(demands.firm)
    wanted = system.solve(demands.wanted)
    if firm is None:  # gradients that are one another's negatives
        firm = np.zeros(system.size)
    extra = np.zeros(system.size) if wanted is None else wanted - firm
    length = float(np.sqrt(max(extra @ system.gram @ extra, 0.0)))
    share = min(1.0, limit / length) if length else 1.0
    amounts = _together(kept, system.amounts(firm)), system.amounts(share * extra)
    start = np.where(np.isfinite(demands.firm), demands.firm, system.totals(firm))
    on_the_way = np.where(np.isfinite(demands.wanted), (1 - share) * start + share * demands.wanted, np.inf)
    bounds = demands.firm if wanted is None else on_the_way
    return Nearest(amounts, share * length, bounds, _after(constraints, *amounts))


def _each_alone(constraints: Constraints) -> Amounts:
    """Move every block that conflicts back along its own direction."""
    found: Amounts = {}
    for name, one in constraints.removals.items():
        excess = constraints.dots[name][0]
        if excess > 0 and (effect := one.gram[0, one.own]) > 0:
            found[name] = np.zeros(len(one.directions))
            found[name][one.own] = -excess / effect
    return found


def _together(a: Amounts, b: Amounts) -> Amounts:
    return {name: a[name] + b[name] if name in a and name in b else {**a, **b}[name] for name in {**a, **b}}


def _after(constraints: Constraints, *moves: Amounts) -> dict[str, np.ndarray]:
    """Return ⟨d, g_i⟩ of each block after some moves."""
    dots = dict(constraints.dots)
    for amounts in moves:
        for name, amount in amounts.items():
            dots[name] = dots[name] + (constraints.removals[name].gram @ amount)[: len(dots[name])]
    return dots


class _System:
    """The constraints as one matrix: first those of single blocks, then those over all blocks that have a bound."""

    def __init__(self, constraints: Constraints) -> None:
        self._constraints = constraints
        self._blocks = list(constraints.removals)
        self._bounded = np.flatnonzero(np.isfinite(constraints.demands.wanted))
        self._own = len(self._blocks) if constraints.own else 0
        self.size = self._own + len(self._bounded)
        self.gram = np.zeros((self.size, self.size))
        for index, name in enumerate(self._blocks):
            places, directions = self._places(index)
            self.gram[np.ix_(places, places)] += constraints.removals[name].gram[np.ix_(directions, directions)]

    def _places(self, index: int) -> tuple[list[int], list[int]]:
        """Return the places of a block's constraints in the system, and the directions that belong to them."""
        over_all = list(range(self._own, self.size))
        if not self._own:
            return over_all, self._bounded.tolist()
        return [index, *over_all], [0, *self._bounded.tolist()]

    def solve(self, bounds: np.ndarray) -> np.ndarray | None:
        """Return the multipliers, (size,); ``None`` where no step satisfies the bounds."""
        dots = self._constraints.dots
        alone = [dots[name][0] for name in self._blocks] if self._own else []
        total = sum(dots.values(), np.zeros(len(bounds)))
        excess = np.array([*alone, *(total - bounds)[self._bounded]])
        used = np.isfinite(excess)
        solution = multipliers(self.gram[np.ix_(used, used)], excess[used])
        if solution is None:
            return None
        found = np.zeros(self.size)
        found[used] = solution
        return found

    def totals(self, found: np.ndarray) -> np.ndarray:
        """Return Σ ⟨d, g_i⟩ over all blocks after moving by some multipliers, (m,)."""
        after = _after(self._constraints, self.amounts(found))
        return sum(after.values(), np.zeros(len(self._constraints.demands.firm)))

    def amounts(self, found: np.ndarray) -> Amounts:
        """Return how far each block moves along its directions."""
        amounts: Amounts = {}
        for index, name in enumerate(self._blocks):
            places, directions = self._places(index)
            if found[places].any():
                amounts[name] = np.zeros(len(self._constraints.removals[name].directions))
                np.add.at(amounts[name], directions, -found[places])
        return amounts


_INFEASIBLE = 1e-10
"""Where constraints contradict one another the residual of the least squares is zero but for rounding."""

_RANK = 1e-12
"""Eigenvalues below this share of the largest are rounding: gradients that depend on one another linearly."""


def multipliers(gram: np.ndarray, excess: np.ndarray) -> np.ndarray | None:
    """Return the multipliers of the nearest step that satisfies every constraint.

    Of all steps d with ⟨d, g_i⟩ ≤ b_i the one nearest to Δ is Δ − Σ λ_i g_i with λ ≥ 0. With K_ij = ⟨g_i, g_j⟩ and
    r_i = ⟨Δ, g_i⟩ − b_i this is least distance programming (Lawson and Hanson 1974, chapter 23): for FᵀF = K and u the
    non-negative least squares solution of [−F; rᵀ] u = [0; 1], λ = u / (1 − rᵀu). It asks for no inverse of K:
    gradients may depend on one another, as that of a whole model does on those of its blocks. A gradient that is zero
    constrains nothing.

    Args:
        gram: K, (n, n), positive semi-definite.
        excess: r, (n,), what each constraint is exceeded by.

    Returns:
        λ, (n,); ``None`` where no step satisfies all.

    Example:
        >>> multipliers(np.diag([4.0, 1.0]), np.array([2.0, -1.0]))
        array([0.5, 0. ])
    """
    # Gradients of very different norms are brought to one, or the small ones would count as rounding.
    norms = np.sqrt(np.clip(np.diag(gram), 0, None))
    used = norms > 0
    found = np.zeros(len(excess))
    if not (used & (excess > 0)).any():
        return found
    asked = excess[used] / norms[used]
    scale = np.abs(asked).max()
    root = _root(gram[np.ix_(used, used)] / np.outer(norms[used], norms[used]))
    solution, _ = nnls(np.vstack([-root, asked / scale]), np.append(np.zeros(len(root)), 1.0))
    slack = 1 - float(asked @ solution) / scale
    if slack < _INFEASIBLE:
        return None
    found[used] = solution * scale / slack / norms[used]
    return found


def _root(gram: np.ndarray) -> np.ndarray:
    """Return F with FᵀF = K, without rows that are rounding."""
    values, vectors = np.linalg.eigh(gram)
    kept = values > _RANK * values[-1]
    return np.asarray(np.sqrt(values[kept])[:, None] * vectors[:, kept].T)
