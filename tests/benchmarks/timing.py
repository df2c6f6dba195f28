"""Times as ratios: every run of a contender stands between two plain steps, and is divided by their mean.

Absolute times on a shared machine drift by half within minutes; a ratio to what ran just before and just after does
not. On a CPU with one thread the clock is the process's CPU time, which does not run while others have the core.
"""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from tests.benchmarks.contender import Piece


@dataclass(frozen=True)
class Ratios:
    """A contender's times over the plain step's, one for each round."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.values)

    def __str__(self) -> str:
        return f"{self.median:.2f} ({min(self.values):.2f} to {max(self.values):.2f})"


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Time one call; what it returns is freed after the clock has stopped."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        start = time.perf_counter()
        result = run()
        torch.cuda.synchronize()
        elapsed = time.perf_counter() - start
    else:
        start = time.process_time()
        result = run()
        elapsed = time.process_time() - start
    del result
    return elapsed


def interleaved(
    plain: Callable[[], Any], contenders: dict[str, Sequence[Piece]], *, rounds: int, device: torch.device
) -> tuple[list[float], dict[str, Ratios]]:
    """Time the contenders in turn, round after round, with a run of the unit between any two.

    Args:
        plain: What is the unit, most often a plain step.
        contenders: What to time, by name.
        rounds: How often.
        device: Where the work is done.

    Returns:
        The unit's seconds, and each contender's ratios.
    """
    units = [seconds(plain, device)]
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, pieces in contenders.items():
            own = sum(piece.times * seconds(piece.run, device) for piece in pieces)
            units.append(seconds(plain, device))
            found[name].append(2 * own / (units[-2] + units[-1]))
    return units, {name: Ratios(tuple(values)) for name, values in found.items()}
