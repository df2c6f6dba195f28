"""The watch over weights between guarded steps: what moves them there is not in the certificate."""

import math
from collections.abc import Mapping

import torch
from torch import nn

from geomkit.errors import SPFError
from geomkit.spf.weights.guarded import Guarded

_UNSEEN = 1e-6
"""Largest difference of two readings of the same weights, relative to their norm: weights that were swapped and put
back may differ by rounding."""


class Watch:
    """The readings of the guarded weights where the last guarded step left them.

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
    def moved(self) -> str | None:
        """Return the name of a weight that is not where the last guarded step left it; ``None`` if all are."""
        for name, now in self._guarded.reading().items():
            before = self._left_at.get(name)
            if before is None or before.shape != now.shape or before.device != now.device:
                continue  # another weight is trained since
            norm, distance = float(torch.linalg.vector_norm(before)), float(torch.linalg.vector_norm(now - before))
            if math.isfinite(norm) and not distance <= _UNSEEN * norm:
                return name
        return None


def unseen_move(name: str, steps: int) -> SPFError:
    """Return the error for a weight that was moved while no guarded step was seen.

    Args:
        name: Name of the weight.
        steps: Number of guarded steps so far.
    """
    return SPFError(
        f"expected '{name}' where {f'step {steps}' if steps else 'attaching SPF'} left it, found it moved while no "
        f"guarded step was seen ({steps} were seen): the certificate knows nothing of that move; call step() of the "
        "optimizer that SPF is attached to (SAM: with a closure), attach SPF after other hooks, or detach first; after "
        "loading weights on purpose call guard.accept_weights()"
    )


Versions = Mapping[str, tuple[int, int]]
"""For each frozen weight how often it was changed in place, and its place in memory."""


def versions(parameters: Mapping[str, nn.Parameter]) -> Versions:
    """Return the versions of weights, from which a change is told without reading the weights."""
    return {
        name: (parameter._version, parameter.data_ptr())  # noqa: SLF001 - torch has no public name for it
        for name, parameter in parameters.items()
        if not (parameter.is_inference() or parameter.is_meta)
    }


def refuse_moves_of_frozen_weights(before: Versions, now: Versions) -> None:
    """Check that a step has not moved weights that are frozen and without gradient.

    Raises:
        SPFError: If a weight was moved.
    """
    for name, version in now.items():
        if before.get(name, version) != version:
            raise SPFError(
                f"expected '{name}' where it was, as it is frozen and without gradient, found it changed by "
                "optimizer.step(): that move is not measured; take it out of the optimizer"
            )
