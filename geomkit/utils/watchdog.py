"""A time limit for Python code of others, such as a chat template that loops."""

import ctypes
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

_PERIOD = 0.1
"""Seconds between two looks at the clock."""

_AGAIN = 1.0
"""Seconds after which a block that goes on after an interruption, because it caught the error, is interrupted again."""

_IDLE = 20
"""Looks without a block to watch after which the watching thread ends."""


class _TimeUp(BaseException):
    """Raised in a block that takes too long; no ``Exception``, which the code of others catches (jinja2 does)."""


@dataclass
class _Watched:
    """The block that is watched: its thread, the time at which it is interrupted next, and whether it has been."""

    thread: int
    deadline: float
    interrupted: bool = False


class Watchdog:
    """Interrupts a block of Python code that takes too long; one block at a time.

    A signal would reach the main thread only. One thread watches all blocks, since a thread for each would cost more
    than most blocks. Code that is not Python's is interrupted when it returns.
    """

    def __init__(self) -> None:
        """Watch nothing yet."""
        self._lock = threading.RLock()
        self._watched: _Watched | None = None
        self._watcher: threading.Thread | None = None
        os.register_at_fork(after_in_child=self._renew)

    @contextmanager
    def limit(self, seconds: float) -> Iterator[None]:
        """Raise a TimeoutError in the block, in the thread that runs it, when it takes longer.

        Raises:
            TimeoutError: If it does.
        """
        watched = _Watched(threading.get_ident(), time.monotonic() + seconds)
        try:
            with self._lock:
                self._watched = watched
                if self._watcher is None or not self._watcher.is_alive():
                    watcher = threading.Thread(target=self._watch, daemon=True)
                    watcher.start()
                    self._watcher = watcher
            yield
        except _TimeUp:
            raise TimeoutError(f"the block takes longer than {seconds} seconds") from None
        finally:
            with self._lock:
                if self._watched is watched:
                    self._watched = None
            if watched.interrupted:
                _await_interruption()

    def _watch(self) -> None:
        idle = 0
        while True:
            time.sleep(_PERIOD)
            with self._lock:
                watched = self._watched
                idle = 0 if watched else idle + 1
                if idle > _IDLE:
                    self._watcher = None
                    return
                if watched and time.monotonic() > watched.deadline:
                    watched.interrupted, watched.deadline = True, time.monotonic() + _AGAIN
                    _raise_in(watched.thread, _TimeUp)

    def _renew(self) -> None:
        # A forked child has neither the watching thread nor, perhaps, the thread that holds the lock.
        self._lock, self._watched, self._watcher = threading.RLock(), None, None


def _raise_in(thread: int, error: type[BaseException]) -> None:
    """Raise an error in a thread at its next step in Python."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(error))


def _await_interruption() -> None:
    """Let an interruption arrive here that may not have arrived in the block.

    Python can take an error back, but goes on looking for it: from then on the thread is slower, and under a debugger
    or with coverage it hangs (CPython 3.11). So the same error is raised once more, and caught.
    """
    try:
        _raise_in(threading.get_ident(), _TimeUp)
        while True:
            pass
    except _TimeUp:
        return
