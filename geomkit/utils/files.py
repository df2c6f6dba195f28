"""Atomic writing of files, reading of JSON, a lock on a folder, and the place of the shipped data."""

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from geomkit.errors import DataError

_PACKAGE = Path(__file__).parents[1]

_FULL = {errno.ENOSPC, errno.EDQUOT}
"""Errors of a disk, or of a user's share of it, that is full."""

_NOT_OF_DISK = (TimeoutError, ConnectionError, InterruptedError)
"""Errors of the network, of pipes and of alarms, which are OSErrors too."""


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Raise a DataError of one line where the disk refuses a file or a folder inside the block.

    Args:
        path: What is written, for the message.

    Raises:
        DataError: If it cannot be written.

    Example:
        >>> with writing("results"):
        ...     raise OSError(errno.EACCES, "Permission denied")
        Traceback (most recent call last):
        geomkit.errors.DataError: expected to write results, found Permission denied; choose another place
    """
    try:
        yield
    except (FileExistsError, NotADirectoryError):
        raise DataError(
            f"expected to write {path}, found a file, or a link that leads nowhere, where a folder should be; choose "
            "another place"
        ) from None
    except _NOT_OF_DISK:
        raise
    except OSError as error:
        advice = "free some space, or choose another place" if error.errno in _FULL else "choose another place"
        raise DataError(f"expected to write {path}, found {error.strerror or error}; {advice}") from None


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Raise a DataError of one line where the disk refuses to read a file or a folder inside the block.

    Args:
        path: What is read, for the message.

    Raises:
        DataError: If it cannot be read.

    Example:
        >>> with reading("results"):
        ...     raise OSError(errno.EACCES, "Permission denied")
        Traceback (most recent call last):
        geomkit.errors.DataError: expected to read results, found Permission denied; check the path and its permissions
    """
    try:
        yield
    except _NOT_OF_DISK:
        raise
    except OSError as error:
        if error.errno is None:  # a library's own, such as that of a client of the network
            raise
        raise DataError(
            f"expected to read {path!s:.200}, found {error.strerror or error}; check the path and its permissions"
        ) from None


class Draft:
    """A file under a temporary name, which is moved to its final name when it is complete.

    Used in a ``with`` block: a draft that was not moved when the block ends is removed. If the process is killed, the
    draft stays in the folder as ``.name.<host>.<process id>``.
    """

    def __init__(self, folder: Path, name: str) -> None:
        """Open a draft of the file ``name`` in a folder that exists."""
        # Processes of several hosts or containers that share a folder may have one id.
        self._path = folder / f".{name}.{socket.gethostname()}.{os.getpid()}"
        self._file = self._path.open("wb")

    def write(self, content: bytes | memoryview) -> None:
        """Append bytes."""
        self._file.write(content)

    def move_to(self, path: Path) -> None:
        """Move the draft to a path in the same folder, replacing a file there, so that it survives a power cut."""
        # 1. The content must be on the disk before the name points to it.
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        # 2. A reader sees the old file or the new one, never a part.
        self._path.replace(path)
        # 3. The name itself must be on the disk.
        _sync_folder(path.parent)

    def __enter__(self) -> Self:
        """Return the draft itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove a draft that was not moved."""
        self._file.close()
        self._path.unlink(missing_ok=True)


def write_atomically(path: Path, content: str | bytes | memoryview) -> None:
    """Write text in UTF-8, or bytes, to a file, replacing it if it exists.

    Missing folders are made. If writing fails, an old file stays as it was and no part of the new one remains.

    Raises:
        DataError: If the file cannot be written.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with Draft(path.parent, path.name) as draft:
            draft.write(content.encode() if isinstance(content, str) else content)
            draft.move_to(path)


def parse_json(text: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: If the text is no JSON, has a number of thousands of digits, or is nested too deeply to be read.

    Example:
        >>> parse_json("[" * 100_000)
        Traceback (most recent call last):
        ValueError: JSON that is nested too deeply
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None


def read_json(path: Path, expected: str, advice: str) -> Any:
    """Return the value of a JSON file.

    Args:
        path: The file.
        expected: What the file should be, for the message.
        advice: What to do where it is not, for the message.

    Raises:
        DataError: If there is no file, it cannot be read, or it is not UTF-8 or no JSON.
    """
    with reading(path):
        try:
            return parse_json(path.read_text("utf-8"))
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError) as error:
            found = getattr(error, "strerror", None) or f"no JSON ({error})"
            raise DataError(f"expected {expected} at {path}, found {found}; {advice}") from None


@contextmanager
def locked(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold an exclusive lock on a folder inside the block, so that one process at a time writes to it.

    The lock ends with the process and leaves no file. On a file system without such locks, all processes may enter.

    Args:
        folder: The folder, which exists.
        wait: Whether to wait for another process that holds the lock.

    Raises:
        BlockingIOError: If another process holds the lock, and ``wait`` is false.
    """
    with _opened(folder) as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:  # some network file systems cannot lock
            pass
        yield


def data_dir() -> Path:
    """Return the folder of the shipped data: the organism, its evaluation sets and its scenarios.

    Raises:
        DataError: If the installation has no data.
    """
    for folder in (_PACKAGE / "_data", _PACKAGE.parent / "data"):
        if folder.is_dir():
            return folder
    raise DataError(
        f"expected the shipped data in {_PACKAGE / '_data'} or {_PACKAGE.parent / 'data'}, found neither; "
        "reinstall geomkit"
    )


def _sync_folder(folder: Path) -> None:
    """Write the names in a folder to the disk, so that a renamed file survives a power cut."""
    with suppress(OSError), _opened(folder) as handle:  # some network file systems cannot sync
        os.fsync(handle)


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        yield handle
    finally:
        os.close(handle)
