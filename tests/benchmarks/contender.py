"""What a contender is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tests.benchmarks.agreement import Reference
from tests.benchmarks.workload import Workload


@dataclass(frozen=True)
class Piece:
    """Something to time.

    Attributes:
        run: Does the work and returns the result.
        times: How often the contender does it; a piece that takes minutes is run once and scaled up.
    """

    run: Callable[[], Any]
    times: float = 1.0


@dataclass(frozen=True)
class Contender:
    """A way to get something out of the per-sample gradients.

    Attributes:
        name: What the table calls it.
        prepare: What may be done once per model, outside the clock; returns what is timed.
        error: How far its result is from what ``loss.backward()`` gives; None for one that has no result to check.
        target: The ratio that it should not exceed.
        memory: Whether its peak memory means something; not where only a piece of the work is run.
    """

    name: str
    prepare: Callable[[Workload], Sequence[Piece]]
    error: Callable[[Any, Workload, Reference], float] | None = None
    target: float | None = None
    memory: bool = True


def whole(run: Callable[[Workload], Any]) -> Callable[[Workload], Sequence[Piece]]:
    """Make the ``prepare`` of a contender that needs no preparation."""
    return lambda workload: [Piece(lambda: run(workload))]
