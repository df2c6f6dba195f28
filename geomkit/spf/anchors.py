"""The examples an SPF run measures its constraints on: a pool of them, and a draw for each step."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from geomkit.errors import DataError
from geomkit.inputs.tokens import Tokens


@dataclass(frozen=True)
class AnchorPool:
    """A pool of anchors and a seeded draw of some of them for each step.

    Attributes:
        rows: The pool.
        per_step: How many are drawn for a step, without replacement; the whole pool when it is no larger.
        seed: Seed of the draws.
    """

    rows: tuple[Tokens, ...]
    per_step: int
    seed: int = 0

    def __post_init__(self) -> None:
        """Check that something can be drawn.

        Raises:
            DataError: If the pool is empty or nothing is to be drawn.
        """
        if not self.rows or self.per_step < 1:
            raise DataError(
                f"expected at least one anchor and one per step, found {len(self.rows)} and {self.per_step}"
            )

    @property
    def fixed(self) -> bool:
        """Whether every step has the same anchors."""
        return self.per_step >= len(self.rows)

    def draw(self, step: int) -> Sequence[int]:
        """Choose the anchors of one step; the same for the same seed and step, so that a run can be resumed."""
        if self.fixed:
            return range(len(self.rows))
        generator = np.random.default_rng((self.seed, step))
        return sorted(generator.choice(len(self.rows), self.per_step, replace=False).tolist())
