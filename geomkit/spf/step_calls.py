"""The calls of an optimizer's ``step()``, seen by hooks: each outermost call is one guarded step."""

import inspect
from collections.abc import Callable
from types import FrameType
from typing import Any
from weakref import WeakSet

import torch

from geomkit.errors import SPFError
from geomkit.utils.precision import full_precision, no_autocast

_GUARDED: WeakSet[torch.optim.Optimizer] = WeakSet()
"""The optimizers with a guard: two guards of one optimizer would change the updates that the other has certified."""

Begin = Callable[[bool], None]
"""What runs before a step; the argument says whether ``step()`` was called with a closure."""


class StepCalls:
    """Hooks that run ``begin`` before and ``end`` after each step of an optimizer.

    A call of ``step()`` inside another one, such as ``super().step()``, belongs to the outer call. Both functions run
    without autograd and autocast, in full precision and outside ``torch.compile``.

    Args:
        optimizer: The optimizer, without wrappers.
        begin: What runs before the step.
        end: What runs after the step.

    Raises:
        SPFError: If the optimizer has a guard already.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, begin: Begin, end: Callable[[], None]) -> None:
        """Register the hooks."""
        if optimizer in _GUARDED:
            raise SPFError("expected an optimizer without a guard, found a guarded one; detach() its guard first")
        self._optimizer, self._begin, self._end = optimizer, begin, end
        self._depth = 0  # number of calls of step() that have not returned
        self._outer: FrameType | None = None  # frame of the outermost of these calls
        self._handles = [
            optimizer.register_step_pre_hook(_as_hook(self._before)),
            optimizer.register_step_post_hook(_as_hook(self._after)),
        ]
        _GUARDED.add(optimizer)

    @property
    def attached(self) -> bool:
        """Whether the hooks are registered."""
        return bool(self._handles)

    def release(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        _GUARDED.discard(self._optimizer)
        self._handles, self._depth, self._outer = [], 0, None

    def _before(self, closure: bool) -> None:
        # After a step that failed, the hook after it did not run: the frame of that call is not on the stack any more.
        if self._depth and _is_on_stack(self._outer):
            self._depth += 1
            return
        self._depth, self._outer = 0, None
        self._begin(closure)
        self._depth, self._outer = 1, _frame_of_step()

    def _after(self, _: bool) -> None:
        # An inner call that failed, and was made again, leaves the depth too large: the outer frame ends the step.
        if self._depth > 1 and _frame_of_step() is not self._outer:
            self._depth -= 1
            return
        self._depth, self._outer = 0, None
        self._end()


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


def _as_hook(action: Callable[[bool], None]) -> Callable[..., None]:
    """Return an optimizer hook that calls an action with whether ``step()`` has a closure."""

    def hook(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        device = optimizer.param_groups[0]["params"][0].device
        with torch.no_grad(), full_precision(), no_autocast(device):
            action(closure is not None)

    uncompiled: Callable[..., None] = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
    return uncompiled
