"""The nearest step that satisfies every constraint: of single blocks, and over all blocks."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from geomkit.spf.programme import multipliers
from geomkit.spf.removal import Removal

Amounts = dict[str, np.ndarray]
"""How far each block moves along each of its directions."""


@dataclass(frozen=True, eq=False)
class Demands:
    """What is asked of Σ ⟨d, g_i⟩ over all blocks, for each constraint i.

    Attributes:
        mean: (m,) weights of the constraints in the mean safety gradient; 0 for those that are not about safety.
        firm: (m,) bounds that every step keeps, ∞ for none.
        drift: (m,) bounds that are kept as far as ``budget`` allows, for drift and the benign fence; ∞ for none.
        budget: The most that may be added for these, as a share of the norm of the step.
    """

    mean: np.ndarray
    firm: np.ndarray
    drift: np.ndarray
    budget: float = np.inf

    @property
    def wanted(self) -> np.ndarray:
        """(m,) the lower of the two bounds."""
        return np.asarray(np.minimum(self.firm, self.drift))

    def only_firm(self) -> "Demands":
        """Return what is asked at once."""
        return replace(self, drift=np.full_like(self.drift, np.inf))

    def only_drift(self) -> "Demands":
        """Return what is asked for drift and the fence alone."""
        return replace(self, firm=np.full_like(self.firm, np.inf))


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
