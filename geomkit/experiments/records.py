"""The form in which a cell's findings are kept."""

from collections.abc import Sequence
from typing import Any

import numpy as np

Record = dict[str, Any]
"""What is kept of a cell, as JSON: ``cell``, and ``error``, or ``numbers``, ``flags``, ``attacks`` and ``along``.

Of an arm under SPF there are ``certificate``, its summary, and ``curve``, sums along training, too.
"""


def pack(flags: Sequence[bool]) -> str:
    """Write outcomes as one digit each.

    Example:
        >>> pack([True, False, True])
        '101'
    """
    return "".join("01"[bool(flag)] for flag in flags)


def unpack(digits: str) -> np.ndarray:
    """Read what :func:`pack` wrote, as an array of bool.

    Example:
        >>> unpack("101").sum()
        np.int64(2)
    """
    return np.array([digit == "1" for digit in digits])
