"""The watch over weights between guarded steps: what moves them there is not in the certificate."""

import math
from collections.abc import Iterable

import torch

from geomkit.errors import SPFError
from geomkit.spf.weights.guarded import Guarded

_UNSEEN = 1e-6
"""Largest difference of two readings of weights that nobody moved, relative to their norm: a swap and its undoing."""


class Watch:
    """The readings of the weights that the last guarded step left.

    Args:
        guarded: The weights.
    """

    def __init__(self, guarded: Guarded) -> None:
        """Read the present weights."""
        self._guarded = guarded
        self._left_at = guarded.reading()

    def accept(self) -> None:
        """Take the present weights for those that the last guarded step left, such as those of a loaded checkpoint."""
        self._left_at = self._guarded.reading()

    @torch.no_grad()
    def moved(self, names: Iterable[str] | None = None) -> str | None:
        """Return the name of a weight that is not where the last guarded step left it; ``None`` if all are.

        Args:
            names: The weights to look at; all by default.
        """
        now = self._guarded.reading()
        for name in now if names is None else names:
            before, present = self._left_at.get(name), now.get(name)
            if before is None or present is None or (before.shape, before.device) != (present.shape, present.device):
                continue  # another weight is trained since
            norm, distance = (float(torch.linalg.vector_norm(part)) for part in (before, present - before))
            if math.isfinite(norm) and not distance <= _UNSEEN * norm:
                return name
        return None

    def refuse_moves_of_frozen_weights(self) -> None:
        """Check that a step has not moved weights that are frozen and without gradient.

        Raises:
            SPFError: If one was moved.
        """
        frozen = self._guarded.still
        name = self.moved(frozen) if frozen else None
        if name is not None:
            raise SPFError(
                f"expected '{name}' where it was, as it is frozen and without gradient, found it moved by "
                "optimizer.step(): that move is not measured; take it out of the optimizer"
            )


def unseen_move(name: str, steps: int) -> SPFError:
    """Return the error for a weight that was moved while no guarded step was seen.

    Args:
        name: Name of the weight.
        steps: Number of guarded steps so far.
    """
    return SPFError(
        f"expected '{name}' where {f'step {steps}' if steps else 'attaching SPF'} left it, found it moved while no "
        f"guarded step was seen ({steps} were seen): the certificate knows nothing of that move; call step() of the "
        "optimizer that SPF is attached to (SAM: with a closure), or detach first"
    )
