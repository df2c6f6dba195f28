"""Locks of the threads of one process that a forked child does not inherit."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock


class ThreadLock:
    """A lock that one thread holds at a time, as often as it likes; a forked child begins with a free lock.

    A thread that holds a plain lock when another thread forks does not exist in the child, where the lock would never
    be released.
    """

    def __init__(self) -> None:
        """Make a free lock."""
        self._renew()
        os.register_at_fork(after_in_child=self._renew)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock inside the block, after waiting for the thread that holds it."""
        with self._lock:  # the same object at the end, also where the block forks
            yield

    def _renew(self) -> None:
        self._lock = RLock()
