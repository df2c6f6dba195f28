"""A certificate on disk: one line per step, written as the steps are taken."""

import json
from pathlib import Path

from geomkit._files import write_atomically
from geomkit.errors import SPFError
from geomkit.spf.records import StepRecord


class Log:
    """A JSON-lines file that grows by a line per step.

    Args:
        path: The file, which exists.
    """

    def __init__(self, path: Path) -> None:
        """Go on with a file."""
        self._path = path

    @classmethod
    def begun(cls, path: Path) -> "Log":
        """Start an empty file.

        Raises:
            SPFError: If there is something at the path.
        """
        if path.exists() and path.stat().st_size:
            raise SPFError(f"expected a new file at {path}, found one with something in it; move it, or resume its run")
        write_atomically(path, "")
        return cls(path)

    @classmethod
    def resumed(cls, path: Path, steps: int) -> "tuple[Log, list[StepRecord]]":
        """Go on with a file: what was written after the step that a run is resumed from is dropped.

        Args:
            path: The file.
            steps: How many steps had been taken.

        Returns:
            The log, and the records of these steps.

        Raises:
            SPFError: If steps are missing, or a line cannot be read.
        """
        kept = path.read_text(encoding="utf-8").splitlines()[:steps] if path.is_file() else []
        try:
            records = [StepRecord.from_json(line) for line in kept]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise SPFError(f"expected a certificate at {path}, found {type(error).__name__}: {error}") from None
        if [record.step for record in records] != list(range(1, steps + 1)):
            raise SPFError(f"expected the certificate of {steps} steps at {path}, found {len(records)}; start anew")
        write_atomically(path, "".join(f"{line}\n" for line in kept))
        return cls(path), records

    def write(self, record: StepRecord) -> None:
        """Append a step."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(record.to_json() + "\n")
