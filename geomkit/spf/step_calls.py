"""The calls of ``step()`` that make up one guarded step, seen by hooks on the optimizers."""

import inspect
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any
from weakref import WeakSet

import torch

from geomkit.errors import SPFError
from geomkit.utils.precision import full_precision

_GUARDED: WeakSet[torch.optim.Optimizer] = WeakSet()
"""The optimizers with a guard: two guards of one optimizer would change the updates that the other has certified."""

Begin = Callable[[bool], None]
"""What runs before a step; the argument says whether ``step()`` was called with a closure."""


class StepCalls:
    """Hooks that run ``begin`` before and ``end`` after each guarded step.

    A guarded step is one call of ``step()``; with several optimizers, one call for each of them: it begins before the
    first of these calls and ends after the last one, or before an optimizer steps for the second time.

    Args:
        optimizers: The optimizers, without wrappers.
        begin: What runs before the first call.
        end: What runs after the last call.

    Raises:
        SPFError: If an optimizer has a guard already.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], begin: Begin, end: Callable[[], None]) -> None:
        """Register the hooks."""
        if any(optimizer in _GUARDED for optimizer in optimizers):
            raise SPFError("expected an optimizer without a guard, found a guarded one; detach() its guard first")
        self._optimizers, self._begin, self._end = tuple(optimizers), begin, end
        self._depth = dict.fromkeys(map(id, optimizers), 0)  # number of calls of step() that have not returned
        self._frames: dict[int, FrameType | None] = {}  # frame of the outermost of these calls
        self._running: set[int] = set()  # optimizers that are stepping
        self._stepped: set[int] = set()  # optimizers whose part of the guarded step is done
        self._handles = [
            handle
            for optimizer in optimizers
            for handle in (
                optimizer.register_step_pre_hook(_as_hook(self._before)),
                optimizer.register_step_post_hook(_as_hook(self._after)),
            )
        ]
        _GUARDED.update(optimizers)

    @property
    def attached(self) -> bool:
        """Whether the hooks are registered."""
        return bool(self._handles)

    def release(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        for optimizer in self._optimizers:
            _GUARDED.discard(optimizer)
        self._handles = []

    def finish(self) -> None:
        """End the guarded step of which only some of the optimizers' calls have been made, if there is one."""
        if self._stepped and not self._running:
            self._stepped.clear()
            self._end()

    def _before(self, optimizer: torch.optim.Optimizer, closure: bool) -> None:
        key = id(optimizer)
        # 1. A call inside another one, such as super().step(), belongs to it. After a step that failed, the hook after
        #    it did not run: the frame of that call is not on the stack any more.
        if self._depth[key] and _is_on_stack(self._frames[key]):
            self._depth[key] += 1
            return
        self._depth[key], self._frames[key] = 1, _frame_of_step()
        # 2. A fused optimizer skips a step that overflowed.
        if bool(getattr(optimizer, "found_inf", None) or False):
            return
        # 3. An optimizer that steps again: its last guarded step is over, or has failed, which its weights tell.
        if key in self._running:
            self._running.clear()
            self._stepped.clear()
        if key in self._stepped:
            self.finish()
        # 4. The first call of a guarded step.
        if not (self._running or self._stepped):
            self._begin(closure)
        self._running.add(key)

    def _after(self, optimizer: torch.optim.Optimizer, closure: bool) -> None:  # noqa: ARG002 - a hook's signature
        key = id(optimizer)
        self._depth[key] = max(self._depth[key] - 1, 0)
        if self._depth[key]:
            return
        self._frames[key] = None
        if key in self._running:
            self._running.discard(key)
            self._stepped.add(key)
        if len(self._stepped) == len(self._optimizers):
            self.finish()


def _frame_of_step() -> FrameType | None:
    """Return the frame of torch's wrapper of ``step()`` in which a hook runs."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_qualname != "Optimizer.profile_hook_step.<locals>.wrapper":
        frame = frame.f_back
    return frame


def _is_on_stack(wanted: FrameType | None) -> bool:
    frame = inspect.currentframe()
    while frame is not None and frame is not wanted:
        frame = frame.f_back
    return frame is not None


def _as_hook(action: Callable[[torch.optim.Optimizer, bool], None]) -> Callable[..., None]:
    """Return an optimizer hook that runs the action without autograd, in full precision and outside torch.compile."""

    def hook(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        with torch.no_grad(), full_precision():
            action(optimizer, closure is not None)

    uncompiled: Callable[..., None] = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
    return uncompiled
