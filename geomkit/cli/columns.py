"""The option ``--columns``: which column of a set is what, for the sets that have these columns."""

from collections.abc import Callable
from typing import TypeVar

from geomkit.errors import DataError

Read = TypeVar("Read")


class ColumnReader:
    """Reads sets with the columns named by the user where a set has them, and with its own columns elsewhere."""

    def __init__(self, columns: str | None) -> None:
        """Store which column is what, by the value of ``--columns``."""
        self._named = columns_by_text(columns)
        self._used = False
        self._missing: DataError | None = None

    def __call__(self, load: Callable[..., Read]) -> Read:
        """Return what ``load(columns=…)`` reads."""
        from geomkit.inputs.adapters import MissingColumnsError

        try:
            read = load(columns=self._named)
        except MissingColumnsError as error:
            self._missing = self._missing or error
            return load(columns=None)
        self._used = True
        return read

    def check(self) -> None:
        """Refuse named columns that no set has.

        Raises:
            DataError: If there are such columns.
        """
        if self._missing is not None and not self._used:
            raise self._missing


def columns_by_text(text: str | None) -> dict[str, str | int] | None:
    """Return which column is what: ``prompt=goal,response=1`` gives ``{"prompt": "goal", "response": 1}``.

    Raises:
        DataError: If the text has another form.
    """
    if text is None:
        return None
    pairs = [part.split("=", 1) for part in text.split(",")]
    if any(len(pair) != 2 for pair in pairs):
        raise DataError(f"expected --columns as prompt=NAME,response=NAME, found '{text}'")
    return {role.strip(): int(name) if name.strip().isdecimal() else name.strip() for role, name in pairs}
