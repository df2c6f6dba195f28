"""The record of a cell: its JSON form, the keys that identify a cell, and outcomes as strings of digits."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from geomkit.utils.field_types import fits

Record = dict[str, Any]
"""The record of a cell, as JSON.

``cell`` has the cell's fields, ``digest`` is :attr:`geomkit.experiments.grid.Cell.digest`. A cell that broke off has
``error``; every other cell has ``numbers``, ``flags`` (outcomes per prompt, by measure), ``attacks`` (outcomes per
prompt, by jailbreak) and ``along`` (pairs of a step and the refusal rate during training). An arm under SPF also has
``certificate``, a summary, and ``curve``, sums along training.
"""

KEYS = ("organism", "scenario", "arm", "rate", "length", "seed")
"""The fields that identify a cell."""

SETTING = ("organism", "scenario", "rate", "length")
"""The fields of a setting in which arms are compared; it includes the organism, since prompts differ by organism."""


_PARTS: Mapping[str, Any] = {
    "cell": Mapping[str, object], "digest": str, "error": str, "numbers": Mapping[str, float | bool | None],
    "flags": Mapping[str, str], "attacks": Mapping[str, str], "along": list[list[float]],
    "certificate": Mapping[str, float | bool | None], "curve": Mapping[str, list[float | None]],
}  # fmt: skip
"""The parts of a record and their types."""

_DIGITS = re.compile("[01]+").fullmatch

_CELL: Mapping[str, Any] = {
    "organism": int | str, "scenario": str, "arm": str, "rate": float, "length": float, "seed": int,
}  # fmt: skip
"""The types of the fields that identify a cell."""


def check_record(record: object) -> None:
    """Check that a value that was read from a file is a record.

    Raises:
        ValueError: If it is not; the message says what it is instead.
    """
    if not isinstance(record, dict) or "cell" not in record:
        raise ValueError(f"a {type(record).__name__} that is no record of a cell")
    for name, value in record.items():
        if name not in _PARTS or not fits(value, _PARTS[name]):
            raise ValueError(f"a record whose {name!r:.40} is {value!r:.40}")
    for name, kind in _CELL.items():
        if not fits(record["cell"].get(name), kind):
            raise ValueError(f"a record of a cell whose {name} is {record['cell'].get(name)!r:.40}")
    if bad := [text for part in ("flags", "attacks") for text in record.get(part, {}).values() if not _DIGITS(text)]:
        raise ValueError(f"outcomes {bad[0]!r:.40}")
    if any(len(pair) != 2 for pair in record.get("along", [])):
        raise ValueError("a record whose 'along' has no pairs of a step and a rate")
    if len({len(values) for values in record.get("curve", {}).values()}) > 1:
        raise ValueError("a record whose curves differ in length")


def flags_to_text(flags: Sequence[bool]) -> str:
    """Return outcomes as a string with a digit per prompt.

    Example:
        >>> flags_to_text([True, False, True])
        '101'
    """
    return "".join("01"[bool(flag)] for flag in flags)


def text_to_flags(digits: str) -> np.ndarray:
    """Return the outcomes in a string of :func:`flags_to_text`, as an array of bool.

    Example:
        >>> text_to_flags("101").sum()
        np.int64(2)
    """
    return np.array([digit == "1" for digit in digits])


def cell_keys(record: Record) -> dict[str, Any]:
    """Return the fields that identify the cell of a record."""
    return {name: record["cell"][name] for name in KEYS}


def group_records(records: Iterable[Record], names: Sequence[str]) -> dict[tuple[Any, ...], list[Record]]:
    """Return the records grouped by the values of some fields, in the order of their first occurrence."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(record["cell"][name] for name in names), []).append(record)
    return groups
