"""The nearest step that satisfies every constraint: on single blocks, and on sums over all blocks."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import nnls

from geomkit.spf.demands import Demands
from geomkit.spf.projection.removal import Removal

Amounts = dict[str, np.ndarray]
"""For each block that moves, the signed length of its move along each of its directions."""


@dataclass(frozen=True, eq=False)
class Constraints:
    """The constraints on a step d.

    Attributes:
        dots: For each block (m,) ⟨d, g_i⟩ of its step with the gradient of each constraint.
        removals: The directions along which each block may be moved.
        per_block: Whether ⟨d, g_s⟩ ≤ 0 is demanded of each block.
        demands: Bounds on the sums over all blocks.
    """

    dots: Mapping[str, np.ndarray]
    removals: Mapping[str, Removal]
    per_block: bool
    demands: Demands


@dataclass(frozen=True, eq=False)
class Nearest:
    """The moves from a step to the nearest step that satisfies the constraints.

    Attributes:
        amounts: The moves for the hard bounds, and the additional moves for the soft bounds.
        added: Norm of the additional moves.
        bounds: (m,) upper bounds that the sums over the blocks keep.
        dots: For each block (m,) ⟨d, g_i⟩ after the moves.
    """

    amounts: tuple[Amounts, Amounts]
    added: float
    bounds: np.ndarray
    dots: Mapping[str, np.ndarray]


def nearest(constraints: Constraints, limit: float = np.inf) -> Nearest:
    """Return the moves to the nearest step that satisfies the constraints.

    Args:
        constraints: The constraints.
        limit: Largest norm of the additional moves for the soft bounds.
    """
    demands = constraints.demands
    # 1. Blocks alone: d ← d − g ⟨d, g⟩₊ / ‖g‖². If the sums then keep their bounds, this is the nearest step.
    alone = _move_each_block(constraints) if constraints.per_block else {}
    dots = _dots_after(constraints, alone)
    if not (_total(dots, demands) > demands.tightest_bounds).any():
        return Nearest((alone, {}), 0.0, demands.tightest_bounds, dots)
    # 2. Otherwise one quadratic programme has all constraints. A block whose subspace was removed keeps its move along
    #    the rest of its gradient; the moves of the other blocks are found anew.
    along_rest = {name: amounts for name, amounts in alone.items() if constraints.removals[name].own_direction}
    programme = _Programme(replace(constraints, dots=_dots_after(constraints, along_rest)))
    # 3. Solve it twice: λ_hard for the hard bounds, λ_all for the tightest bounds.
    hard = programme.solve(demands.hard_bounds)
    tightest = programme.solve(demands.tightest_bounds)
    if hard is None:  # infeasible: gradients that are negatives of one another
        hard = np.zeros(programme.size)
    # 4. Go from λ_hard towards λ_all, by at most the limit: share = min(1, limit / ‖Σ (λ_all − λ_hard)_i g_i‖).
    #    Constraints are convex, so every step between two steps that satisfy the hard bounds satisfies them too.
    extra = np.zeros(programme.size) if tightest is None else tightest - hard
    length = float(np.sqrt(max(extra @ programme.gram @ extra, 0.0)))
    share = min(1.0, limit / length) if length else 1.0
    amounts = _add(along_rest, programme.amounts(hard)), programme.amounts(share * extra)
    # 5. The bounds that hold there: the same share of the way from the hard bounds, or from the sums that λ_hard
    #    reaches where there is no hard bound, to the tightest ones.
    start = np.where(np.isfinite(demands.hard_bounds), demands.hard_bounds, programme.totals(hard))
    between = np.where(
        np.isfinite(demands.tightest_bounds), (1 - share) * start + share * demands.tightest_bounds, np.inf
    )
    bounds = demands.hard_bounds if tightest is None else between
    return Nearest(amounts, share * length, bounds, _dots_after(constraints, *amounts))


def _move_each_block(constraints: Constraints) -> Amounts:
    """Return, for each block that conflicts, the move along its own direction that ends the conflict."""
    amounts: Amounts = {}
    for name, removal in constraints.removals.items():
        excess = constraints.dots[name][0]
        if excess > 0 and (effect := removal.gram[0, removal.own_direction]) > 0:
            amounts[name] = np.zeros(len(removal.directions))
            amounts[name][removal.own_direction] = -excess / effect
    return amounts


def _add(a: Amounts, b: Amounts) -> Amounts:
    return {name: a[name] + b[name] if name in a and name in b else {**a, **b}[name] for name in {**a, **b}}


def _dots_after(constraints: Constraints, *moves: Amounts) -> dict[str, np.ndarray]:
    """Return for each block (m,) ⟨d, g_i⟩ after moves: the values before plus its Gram matrix times the amounts."""
    dots = dict(constraints.dots)
    for amounts in moves:
        for name, amount in amounts.items():
            dots[name] = dots[name] + (constraints.removals[name].gram @ amount)[: len(dots[name])]
    return dots


def _total(dots: Mapping[str, np.ndarray], demands: Demands) -> np.ndarray:
    """Return (m,) Σ ⟨d, g_i⟩ over all blocks."""
    return sum(dots.values(), np.zeros(len(demands.hard_bounds)))


class _Programme:
    """All constraints in one quadratic programme: first a constraint per block, then the sums that have a bound.

    Attributes:
        size: Number n of constraints.
        gram: (n, n) Gram matrix K of the constraints' gradients, summed over the blocks.
    """

    def __init__(self, constraints: Constraints) -> None:
        self._constraints = constraints
        self._blocks = list(constraints.removals)
        self._bounded = np.flatnonzero(np.isfinite(constraints.demands.tightest_bounds))
        self._single = len(self._blocks) if constraints.per_block else 0
        self.size = self._single + len(self._bounded)
        self.gram = np.zeros((self.size, self.size))
        for index, name in enumerate(self._blocks):
            places, directions = self._places(index)
            self.gram[np.ix_(places, places)] += constraints.removals[name].gram[np.ix_(directions, directions)]

    def _places(self, index: int) -> tuple[list[int], list[int]]:
        """Return the indices in the programme of a block's constraints, and of the block's directions for them."""
        sums = list(range(self._single, self.size))
        if not self._single:
            return sums, self._bounded.tolist()
        return [index, *sums], [0, *self._bounded.tolist()]

    def solve(self, bounds: np.ndarray) -> np.ndarray | None:
        """Return the multipliers for these bounds on the sums, (n,); ``None`` if no step satisfies them."""
        dots = self._constraints.dots
        block_dots = [dots[name][0] for name in self._blocks] if self._single else []
        excess = np.array([*block_dots, *(_total(dots, self._constraints.demands) - bounds)[self._bounded]])
        is_bounded = np.isfinite(excess)
        solution = multipliers(self.gram[np.ix_(is_bounded, is_bounded)], excess[is_bounded])
        if solution is None:
            return None
        lambdas = np.zeros(self.size)
        lambdas[is_bounded] = solution
        return lambdas

    def totals(self, lambdas: np.ndarray) -> np.ndarray:
        """Return (m,) Σ ⟨d, g_i⟩ over all blocks after the moves of these multipliers."""
        return _total(_dots_after(self._constraints, self.amounts(lambdas)), self._constraints.demands)

    def amounts(self, lambdas: np.ndarray) -> Amounts:
        """Return the moves of these multipliers: −λ_i along the gradient of constraint i, in every block."""
        amounts: Amounts = {}
        for index, name in enumerate(self._blocks):
            places, directions = self._places(index)
            if lambdas[places].any():
                amounts[name] = np.zeros(len(self._constraints.removals[name].directions))
                np.add.at(amounts[name], directions, -lambdas[places])
        return amounts


_INFEASIBLE = 1e-10
"""Where constraints contradict one another, the residual of the least squares is zero up to rounding."""

_RANK = 1e-12
"""Eigenvalues below this fraction of the largest are rounding: the gradients depend on one another linearly."""


def multipliers(gram: np.ndarray, excess: np.ndarray) -> np.ndarray | None:
    """Return the Lagrange multipliers of the nearest step that satisfies every constraint.

    Of all steps d with ⟨d, g_i⟩ ≤ b_i the nearest to Δ is Δ − Σ λ_i g_i with λ ≥ 0. With K_ij = ⟨g_i, g_j⟩ and
    r_i = ⟨Δ, g_i⟩ − b_i this is least distance programming (Lawson and Hanson 1974, chapter 23): for FᵀF = K and u the
    non-negative least squares solution of [−F; rᵀ] u = [0; 1], λ = u / (1 − rᵀu). K is not inverted, so gradients may
    depend on one another linearly, as the gradient of a whole model depends on the blocks' gradients. The constraint of
    a zero gradient is ignored.

    Args:
        gram: K, (n, n), positive semi-definite.
        excess: r, (n,), the amount by which Δ exceeds each bound.

    Returns:
        λ, (n,); ``None`` if no step satisfies all constraints.

    Example:
        >>> multipliers(np.diag([4.0, 1.0]), np.array([2.0, -1.0]))
        array([0.5, 0. ])
    """
    # 1. Scale each gradient to norm one, g_i / ‖g_i‖, or small gradients would pass for rounding.
    norms = np.sqrt(np.clip(np.diag(gram), 0, None))
    nonzero = norms > 0
    lambdas = np.zeros(len(excess))
    if not (nonzero & (excess > 0)).any():
        return lambdas
    scaled = excess[nonzero] / norms[nonzero]
    # 2. Scale r by its largest entry s, which keeps the last row of [−F; rᵀ] comparable with F.
    scale = np.abs(scaled).max()
    # 3. F with FᵀF = K, and u = argmin over u ≥ 0 of ‖[−F; rᵀ/s] u − [0; 1]‖.
    root = _root(gram[np.ix_(nonzero, nonzero)] / np.outer(norms[nonzero], norms[nonzero]))
    solution, _ = nnls(np.vstack([-root, scaled / scale]), np.append(np.zeros(len(root)), 1.0))
    # 4. 1 − rᵀu is the squared residual: zero if and only if the constraints contradict one another.
    slack = 1 - float(scaled @ solution) / scale
    if slack < _INFEASIBLE:
        return None
    # 5. λ = s u / (1 − rᵀu), scaled back to the gradients' norms.
    lambdas[nonzero] = solution * scale / slack / norms[nonzero]
    return lambdas


def _root(gram: np.ndarray) -> np.ndarray:
    """Return F with FᵀF = K from the eigendecomposition of K, without rows that are rounding."""
    values, vectors = np.linalg.eigh(gram)
    significant = values > _RANK * values[-1]
    return np.asarray(np.sqrt(values[significant])[:, None] * vectors[:, significant].T)
