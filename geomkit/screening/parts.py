"""The parts of a screen that is under way: files of finished rows, which an interrupted screen goes on from."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from geomkit.errors import DataError
from geomkit.utils.field_types import fits
from geomkit.utils.files import parse_json, write_atomically
from geomkit.utils.workers import Workers, first_process

Columns = Mapping[str, np.ndarray]
"""Values of some rows by the name of the measure."""


@dataclass(frozen=True)
class Parts:
    """The finished rows of one set, in files of a folder; without a folder nothing is kept.

    The first process reads and writes. A file is complete or absent, and belongs to one model, one reference and one
    set of rows, whose fingerprint it has in its name: files of another screen in the same folder are left alone.

    Attributes:
        folder: The folder, or ``None``.
        key: Everything that the values depend on, as text.
        workers: The workers of the screen.
    """

    folder: Path | None
    key: str
    workers: Workers

    @property
    def _name(self) -> str:
        return f"rows-{hashlib.sha256(self.key.encode()).hexdigest()[:16]}"

    def finished(self, rows: int, measures: Sequence[str]) -> dict[int, tuple[float, ...]]:
        """Return the values of the rows that are finished, by row, with a value per measure.

        Args:
            rows: Number of rows of the set.
            measures: The measures.

        Raises:
            DataError: If a file is damaged.
        """
        found: dict[int, tuple[float, ...]] = {}
        with self.workers.failing_together():
            if self.folder is not None and first_process():
                for path in sorted(self.folder.glob(f"{self._name}-*.json")):
                    found |= _read(path, rows, measures)
        return self.workers.gather(found)[0]

    def add(self, examples: Sequence[int], columns: Columns) -> None:
        """Write the values of further rows, which are finished.

        Args:
            examples: Numbers of the rows.
            columns: For each measure, the values of these rows.
        """
        with self.workers.failing_together():
            if self.folder is not None and first_process():
                content = {
                    "rows": list(examples),
                    "values": {name: column.tolist() for name, column in columns.items()},
                }
                path = self.folder / f"{self._name}-{examples[0]}.json"
                write_atomically(path, json.dumps(content) + "\n")


def make_folder(folder: Path | None) -> None:
    """Make the folder of parts, if there is to be one, before minutes of work.

    Raises:
        DataError: If it cannot be made.
    """
    try:
        if folder is not None and first_process():
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"expected a folder for finished rows at {folder}, found {error.strerror}; choose another"
        ) from None


def _read(path: Path, rows: int, measures: Sequence[str]) -> dict[int, tuple[float, ...]]:
    try:
        content = parse_json(path.read_text("utf-8"))
        numbers, values = content["rows"], [content["values"][name] for name in measures]
        if not fits(numbers, list[int]) or not fits(values, list[list[float]]):
            raise ValueError("values of other types")
        if max(numbers) >= rows:
            raise ValueError(f"row {max(numbers)} of {rows}")
        return dict(zip(numbers, zip(*values, strict=True), strict=True))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"expected finished rows of a screen in {path}, found {error!r:.80}; remove the file, and its rows are "
            "screened again"
        ) from None
