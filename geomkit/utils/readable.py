"""Tables for people: numbers with their intervals in one cell, no empty column, and no label that is repeated.

Data frames keep a number and the ends of its interval in columns of their own, for computing; here they are texts.
"""

import math
import re
from collections.abc import Sequence
from itertools import pairwise, zip_longest
from numbers import Integral, Real
from textwrap import wrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

MISSING = "–"

_NUMBER = re.compile(rf"({MISSING}|[+-]?[\d.]+(e[+-]?\d+)?%?)?( ?\[.*\])?")
_DIFFERENCES = {"difference", "contrast"}
"""Columns whose numbers are shown with their sign, also where it is plus."""


def number_text(value: object) -> str:
    """Return a value as text: floats with four significant digits or up to the decimal point, the rest in full.

    Example:
        >>> number_text(0.123456), number_text(12345.6), number_text(1e-9), number_text(float("nan")), number_text("a")
        ('0.1235', '12346', '1e-09', '–', 'a')
    """
    if is_missing(value):
        return MISSING
    if isinstance(value, Real) and not isinstance(value, Integral):
        number = float(value)
        return f"{number:.0f}" if 1e4 <= abs(number) < 1e9 else f"{number:.4g}"
    return str(value)


def is_missing(value: object) -> bool:
    """Return whether a value says nothing: ``None``, NaN, or a text of nothing but white space.

    Example:
        >>> [is_missing(value) for value in (None, float("nan"), "", 0.0, "no")]
        [True, True, True, False, False]
    """
    if value is None or type(value).__name__ == "NAType":  # of pandas, which compares with nothing
        return True
    return value != value or (isinstance(value, str) and not value.strip())  # NaN is not itself


def with_interval(value: float, interval: tuple[float, float], *, sign: bool = False) -> str:
    """Return a number with its interval as text, rounded to two significant digits of half the interval's length.

    Args:
        value: The number.
        interval: Its ends; NaN where it has none: the number is shown alone.
        sign: Show the sign of numbers above zero too.

    Example:
        >>> with_interval(29.1837, (27.39, 30.96)), with_interval(0.0476, (-0.00038, 0.0954), sign=True)
        ('29.2 [27.4, 31.0]', '+0.048 [-0.000, +0.095]')
        >>> with_interval(0.426, (float("nan"), float("nan"))), with_interval(1.0, (0.98, 1.0))
        ('0.426', '1.000 [0.980, 1.000]')
    """
    low, high = interval
    if is_missing(low) and is_missing(high):
        return MISSING if is_missing(value) else format(value, "+.3g" if sign else ".3g")
    half = (high - low) / 2
    decimals = 1 - math.floor(math.log10(half)) if half > 0 and math.isfinite(half) else 3
    digits = f".{max(decimals, 0)}f"
    if decimals > 6:  # too small for decimals
        largest = max(abs(number) for number in (value, low, high) if number)
        digits = f".{math.floor(math.log10(largest)) + 1 + decimals}g"
    pattern = f"+{digits}" if sign else digits
    shown, *ends = (MISSING if is_missing(number) else format(number, pattern) for number in (value, low, high))
    return f"{shown} [{', '.join(ends)}]"


def readable(frame: "pd.DataFrame") -> "pd.DataFrame":
    """Return a data frame as texts to read.

    1. A number and its interval, as in the columns ``value``, ``low`` and ``high`` or ``null``, ``null_low`` and
       ``null_high``, become one column.
    2. Columns without any value are left out.
    3. A label at the left that is that of the row above is left out.

    Example:
        >>> import pandas as pd
        >>> rows = [("rank", "safety", 29.18, 27.39, 30.96, None), ("rank", "control", 9.4, 7.8, 11.0, None)]
        >>> readable(pd.DataFrame(rows, columns=["question", "of", "value", "low", "high", "note"]))
          question       of              value
        0     rank   safety  29.2 [27.4, 31.0]
        1           control    9.4 [7.8, 11.0]
    """
    import pandas as pd

    names = list(map(str, frame.columns))
    columns = {name: frame.iloc[:, place].tolist() for place, name in enumerate(names)}
    texts = {}
    for place, name in enumerate(names):
        values = columns[name]
        if name.endswith("low") and f"{name[:-3]}high" in columns:
            # The interval belongs to the column before it, unless that has another name: then it stands alone.
            prefix, before = name[:-3].rstrip("_"), names[place - 1]
            number = before if before.startswith(prefix) else prefix
            ends = list(zip(values, columns[f"{name[:-3]}high"], strict=True))
            numbers = columns.get(number, [float("nan")] * len(ends))
            sign = number in _DIFFERENCES
            merged = (with_interval(*row, sign=sign) for row in zip(numbers, ends, strict=True))
            texts[number] = [text.removeprefix(f"{MISSING} ") for text in merged]
        elif not (name.endswith("high") and f"{name[:-4]}low" in columns):
            texts[name] = [
                "" if isinstance(value, str) and is_missing(value) else number_text(value) for value in values
            ]
    told = {name: cells for name, cells in texts.items() if any(cell not in {MISSING, ""} for cell in cells)}
    return pd.DataFrame(_without_repeats(told), index=frame.index)


def _without_repeats(columns: dict[str, list[str]]) -> dict[str, list[str]]:
    """Return the columns without a label that is that of the row above, if all labels at its left are too."""
    shown = dict(columns)
    same: list[bool] | None = None
    for name, cells in columns.items():
        if is_numeric(cells):
            break
        repeats = [False, *(cell == above for above, cell in pairwise(cells))]
        same = repeats if same is None else [both and repeat for both, repeat in zip(same, repeats, strict=True)]
        shown[name] = ["" if repeat else cell for repeat, cell in zip(same, cells, strict=True)]
    return shown


def is_numeric(cells: Sequence[str]) -> bool:
    """Return whether every cell of a column is a number, perhaps with an interval, or missing.

    Example:
        >>> is_numeric(["29.2 [27.4, 31.0]", "–", "-1e-05"]), is_numeric(["1 of 4"])
        (True, False)
    """
    return all(not cell or _NUMBER.fullmatch(cell) for cell in cells)


def text_table(rows: Sequence[Sequence[str]], *, width: int = 80) -> list[str]:
    """Return a table as lines of text, with the cells aligned in columns and wrapped between words.

    Args:
        rows: The rows, of which the first may be a heading.
        width: Number of characters that a line has at most, unless the longest words of all columns need more.

    Example:
        >>> text_table([("kind", "chosen"), ("attention", "4 of 4")])
        ['kind       chosen', 'attention  4 of 4']
        >>> text_table([("claim", "verdict"), ("safety is below utility", "not shown")], width=26)
        ['claim            verdict', 'safety is below  not shown', 'utility']
    """
    wrapped = wrapped_cells(rows, width - 2 * (len(rows[0]) - 1))
    widths = [max(len(line) for cell in column for line in cell) for column in zip(*wrapped, strict=True)]
    return [
        "  ".join(part.ljust(size) for part, size in zip(parts, widths, strict=True)).rstrip()
        for row in wrapped
        for parts in zip_longest(*row, fillvalue="")
    ]


def wrapped_cells(rows: Sequence[Sequence[str]], width: int) -> list[list[list[str]]]:
    """Return the lines of every cell of a table, wrapped between words and never inside an interval.

    The widest column is narrowed first, and no column below its longest word.

    Args:
        rows: The rows.
        width: Sum of the widths of all columns at most, where the longest words allow that.

    Example:
        >>> wrapped_cells([("rank", "29.2 [27.4, 31.0]")], 16)
        [[['rank'], ['29.2', '[27.4, 31.0]']]]
    """
    # An interval is one word: its space becomes one that does not break, for as long as lines are broken.
    kept = [[re.sub(r"\[([^],]*), ([^],]*)\]", "[\\1,\u00a0\\2]", cell) for cell in row] for row in rows]
    columns = list(zip(*kept, strict=True))
    widths = [max(map(len, column)) for column in columns]
    least = [max((len(word) for cell in column for word in cell.split(" ")), default=0) for column in columns]
    while sum(widths) > width:
        wide = [(size, place) for place, size in enumerate(widths) if size > least[place]]
        if not wide:
            break
        widths[max(wide)[1]] -= 1
    return [[_lines(cell, max(size, 1)) for cell, size in zip(row, widths, strict=True)] for row in kept]


def _lines(cell: str, width: int) -> list[str]:
    lines = wrap(cell, width, break_long_words=False, break_on_hyphens=False) or [""]
    return [line.replace("\u00a0", " ") for line in lines]
