"""Where the time of a guarded step goes: functions of :mod:`geomkit.spf` are wrapped, and each one's own time is kept.

What a stage calls that is itself a stage counts there alone, so the stages add up to the two hooks.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch

from geomkit.spf import assess, constraints, guard, protected
from geomkit.spf.projection import nearest, protection, removal
from geomkit.spf.weights import guarded
from geomkit.spf.weights.blocks import TensorBlock

_READINGS = ("reading before", "reading the update", "reading what is applied")
_BEFORE = "_before_step"

_STAGES: dict[str, tuple[tuple[Any, str], ...]] = {
    "looking for the weights": ((guarded.Guarded, "refresh"),),
    "refusing broken gradients": ((guard, "refuse_broken_gradients"),),
    "anchor pass": ((constraints, "collect_from_tokens"),),
    "norms of gradients": ((constraints, "_of_block"),),
    "SVDs": ((protection, "layer_subspace"),),
    "probes, operands, tails": ((protected.ProtectedBlocks, "_protect"), (protection, "_outside")),
    "planning": ((guard, "plan"),),
    "planning: Grams and inner products": ((removal, "gram"), (removal, "inner")),
    "planning: programme": ((nearest, "multipliers"),),
    "applying": ((TensorBlock, "apply"),),
    "assessing": ((guard, "assess"),),
    "assessing: leaks": ((assess, "remaining_coordinate_norm"), (assess, "coordinate_norm")),
    "the rest of the hooks": ((guard.Guard, _BEFORE), (guard.Guard, "_after_step")),
}


class Stages:
    """Seconds of the stages of guarded steps, in hooks of guards attached inside :meth:`watching`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._inner: list[float] = []  # of every stage that is open, the time of the stages inside it
        self._readings = 0
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def watching(self) -> Iterator[None]:
        with ExitStack() as stack:
            for stage, places in _STAGES.items():
                for owner, name in places:
                    stack.enter_context(patch.object(owner, name, self._timed(stage, getattr(owner, name))))
            stack.enter_context(patch.object(protected, "read_all", self._timed("", protected.read_all)))
            yield

    def _timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def wrapped(*given: Any, **named: Any) -> Any:
            self._readings = 0 if function.__name__ == _BEFORE else self._readings + (not stage)
            said = stage or _READINGS[min(self._readings, len(_READINGS)) - 1]
            self._inner.append(0.0)
            start = self._now()
            try:
                return function(*given, **named)
            finally:
                took = self._now() - start
                self.seconds[said] += took - self._inner.pop()
                if self._inner:
                    self._inner[-1] += took

        return wrapped

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()
