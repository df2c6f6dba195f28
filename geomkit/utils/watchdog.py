"""A time limit for Python code of others, such as a chat template that loops."""

import ctypes
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_PERIOD = 0.1
"""Seconds between two looks at the clock."""

_IDLE = 20
"""Looks without a block to watch after which the watching thread ends."""


class Watchdog:
    """Interrupts a block of Python code that takes too long; one block at a time.

    A signal would reach the main thread only. One thread watches all blocks, since a thread for each would cost more
    than most blocks. Code that is not Python's is interrupted when it returns.
    """

    def __init__(self) -> None:
        """Watch nothing yet."""
        self._lock = threading.Lock()
        self._watched: tuple[int, float] | None = None
        self._watcher: threading.Thread | None = None
        os.register_at_fork(after_in_child=self._renew)

    @contextmanager
    def limit(self, seconds: float) -> Iterator[None]:
        """Raise a TimeoutError in the block, in the thread that runs it, when it takes longer.

        Raises:
            TimeoutError: If it does.
        """
        thread = threading.get_ident()
        with self._lock:
            self._watched = thread, time.monotonic() + seconds
            if self._watcher is None:
                self._watcher = threading.Thread(target=self._watch, daemon=True)
                self._watcher.start()
        try:
            yield
        finally:
            with self._lock:
                self._watched = None
                _raise_in(thread, None)  # an interruption that has not arrived comes too late

    def _watch(self) -> None:
        idle = 0
        while True:
            time.sleep(_PERIOD)
            with self._lock:
                idle = 0 if self._watched else idle + 1
                if idle > _IDLE:
                    self._watcher = None
                    return
                if self._watched and time.monotonic() > self._watched[1]:
                    _raise_in(self._watched[0], TimeoutError)
                    self._watched = None

    def _renew(self) -> None:
        # A forked child has neither the watching thread nor, perhaps, the thread that holds the lock.
        self._lock, self._watched, self._watcher = threading.Lock(), None, None


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    """Raise an error in another thread at its next step in Python; ``None`` takes back what was not raised yet."""
    kind = ctypes.py_object() if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), kind)
