"""Writing files so that nobody sees half of one, whatever interrupts the writing."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from geomkit.errors import DataError


class Draft:
    """A file that is written beside its place and moved there when it is complete.

    Used in a ``with`` block; a draft that was not moved when the block ends is removed. Where the process is killed
    it stays, as ``.name.<process id>``.
    """

    def __init__(self, folder: Path, name: str) -> None:
        """Start one in a folder that exists."""
        self._path = folder / f".{name}.{os.getpid()}"
        self._file = self._path.open("wb")

    def write(self, content: bytes | memoryview) -> None:
        """Append bytes."""
        self._file.write(content)

    def move_to(self, path: Path) -> None:
        """Give the draft its place, in the same folder, replacing a file there; it survives a power cut from now on."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._path.replace(path)
        sync_folder(path.parent)

    def __enter__(self) -> Self:
        """Return the draft itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave no trace of a draft that was not moved."""
        self._file.close()
        self._path.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Write UTF-8 text, replacing the file if it exists; missing folders are made, and a failure leaves no trace."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with Draft(path.parent, path.name) as draft:
        draft.write(text.encode())
        draft.move_to(path)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut, where the system and the file system can."""
    if sys.platform == "win32":
        return
    with suppress(OSError):  # some network file systems cannot
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let one writer at a time into the block, by a lock that ends with the process and leaves no file.

    Where the system or the file system has no such lock, everybody is let in.
    """
    if sys.platform == "win32":
        yield
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


_PACKAGE = Path(__file__).parents[1]


def data_dir() -> Path:
    """Return the folder that holds the organism, its evaluation sets and its scenarios.

    Raises:
        DataError: If the installation carries no data.
    """
    for folder in (_PACKAGE / "_data", _PACKAGE.parent / "data"):
        if folder.is_dir():
            return folder
    raise DataError(
        f"expected the shipped data in {_PACKAGE / '_data'} or {_PACKAGE.parent / 'data'}, found neither; "
        "reinstall geomkit"
    )
