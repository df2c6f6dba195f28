"""The examples on which SPF measures its constraints: a pool, and a random draw from it for each step."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from geomkit.errors import DataError
from geomkit.inputs.tokens import Tokens


@dataclass(frozen=True)
class AnchorPool:
    """A pool of anchors, of which each step draws a few.

    Attributes:
        rows: The anchors.
        per_step: Number of anchors drawn for a step, without replacement; the whole pool if it is not larger.
        seed: Seed of the draws.
    """

    rows: tuple[Tokens, ...]
    per_step: int
    seed: int = 0

    def __post_init__(self) -> None:
        """Check that each step draws at least one anchor.

        Raises:
            DataError: If the pool is empty or ``per_step`` is below 1.
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
        """Return the indices of the anchors of one step, which depend on the seed and the step's number alone."""
        if self.fixed:
            return range(len(self.rows))
        generator = np.random.default_rng((self.seed, step))
        return sorted(generator.choice(len(self.rows), self.per_step, replace=False).tolist())
