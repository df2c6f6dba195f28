"""The record of a cell: its JSON form, the keys that identify a cell, and outcomes as strings of digits."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

Record = dict[str, Any]
"""The record of a cell, as JSON.

``cell`` has the cell's fields. A cell that broke off has ``error``; every other cell has ``numbers``, ``flags``
(outcomes per prompt, by measure), ``attacks`` (outcomes per prompt, by jailbreak) and ``along`` (pairs of a step and
the refusal rate during training). An arm under SPF also has ``certificate``, a summary, and ``curve``, sums along
training.
"""

KEYS = ("organism", "scenario", "arm", "rate", "length", "seed")
"""The fields that identify a cell."""

SETTING = ("organism", "scenario", "rate", "length")
"""The fields of a setting in which arms are compared; it includes the organism, since prompts differ by organism."""


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
