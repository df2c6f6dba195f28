"""The values of an explorer's traces, as plotly has them: points over the layers, and curves over indices and steps."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geomkit.plots.explored import Series

_Values = NDArray[np.float64]

_COMBINED: dict[str, Callable[..., Any]] = {"median": np.nanmedian, "sum": np.nansum, "mean": np.nanmean}
"""What stands for several series, by :attr:`geomkit.plots.explored.Statistic.combined`."""


def has_null(series: Series) -> bool:
    """Return whether a series has a null, or a range of one."""
    return any(len(values) and np.isfinite(values).any() for values in (series.null, series.null_low))


def point_values(members: Sequence[Series], at: str, *, is_null: bool) -> dict[str, Any]:
    """Return the values of points at a checkpoint: ``y``, ``text`` and ``error_y``.

    Args:
        members: Series of one value each, of one statistic and set.
        at: The checkpoint; a parameter without a value there has no point.
        is_null: Return the nulls with their ranges, instead of the values with their intervals.
    """
    here = {series.parameter: series for series in members if series.at in {at, ""}}
    chosen = [here.get(name) for name in dict.fromkeys(series.parameter for series in members)]
    ends = np.array([[np.nan] * 3 if series is None else _with_ends(series, is_null) for series in chosen], dtype=float)
    low, middle, high = ends.T
    return {
        "y": _plain_numbers(middle),
        "text": ["" if series is None or is_null else _point_text(series) for series in chosen],
        "error_y": {"array": _plain_numbers(high - middle), "arrayminus": _plain_numbers(middle - low)},
    }


def _with_ends(series: Series, is_null: bool) -> tuple[float, float, float]:
    """Return the lower end, the value and the upper end of a value or of its null."""
    names = ("null_low", "null", "null_high") if is_null else ("low", "values", "high")
    low, middle, high = (float(values[0]) if len(values := getattr(series, name)) else np.nan for name in names)
    return low, (low + high) / 2 if np.isnan(middle) else middle, high


def _point_text(series: Series) -> str:
    """Return the hover text of a point: parameter, set, value, interval and null."""
    low, value, high = _with_ends(series, is_null=False)
    null_low, null, null_high = (values[0] if len(values) else np.nan for values in (
        series.null_low, series.null, series.null_high
    ))  # fmt: skip
    lines = [series.parameter, f"{series.statistic.name} <b>{value:.4g}</b>{_interval(low, high)}"]
    if np.isfinite([null, null_low]).any():
        lines.append(f"null{f' {null:.4g}' if np.isfinite(null) else ''}{_interval(null_low, null_high)}")
    return "<br>".join(lines)


def _interval(low: float, high: float) -> str:
    return f" [{low:.4g}, {high:.4g}]" if np.isfinite([low, high]).all() else ""


def curve_values(members: Sequence[Series], x: _Values, *, is_null: bool) -> dict[str, Any]:
    """Return the values of one curve for several parameters: ``y`` and ``text``, empty without a parameter.

    Args:
        members: Series of one statistic and set.
        x: (n,) places of the curve.
        is_null: Return the null instead of the values.
    """
    if not members:
        return {"y": [None] * len(x), "text": [""] * len(x)}
    statistic = members[0].statistic
    combine = _COMBINED[statistic.combined]
    values, nulls = (_at(members, x, name) for name in ("values", "null"))
    middle, null = (_where_known(rows, combine) for rows in (values, nulls))
    y = null if is_null else middle
    several = statistic.combined == "median" and len(members) > 1
    low, high = (
        _where_known(values, partial(np.nanquantile, q=end)) if several else np.full(len(x), np.nan)
        for end in (0.05, 0.95)
    )
    what = members[0].parameter if len(members) == 1 else f"{statistic.combined} of {len(members)} parameters"
    texts = [
        f"{what}<br><b>{value:.4g}</b>"
        f"{f', 90 % in{_interval(*ends)}' if several else ''}{f'<br>null {zero:.4g}' if np.isfinite(zero) else ''}"
        for value, zero, ends in zip(middle, null, zip(low, high, strict=True), strict=True)
    ]
    # Nulls have no hover text of their own: that of the values names the null.
    y = np.where(y > 0, y, np.nan) if statistic.is_log else y
    return {"y": _plain_numbers(y), "text": [""] * len(x) if is_null else texts}


def _where_known(rows: _Values, combine: Callable[..., Any]) -> _Values:
    """Return (n,) values that stand for the (series, n) rows, NaN where no row has a value."""
    known = np.isfinite(rows).any(axis=0)
    combined = np.full(rows.shape[1], np.nan)
    combined[known] = combine(rows[:, known], axis=0)
    return combined


def _at(members: Sequence[Series], x: _Values, name: str) -> _Values:
    """Return (series, n) values at the places ``x``, of the series that have them, straight between their places.

    The places of markers, in a map of examples, need not ascend: they are the only ones, and stay as they are.
    """
    statistic = members[0].statistic
    rows = [
        np.interp(x, one.x, values, right=statistic.beyond) if statistic.is_line else values
        for one in members
        if len(values := getattr(one, name))
    ]
    return np.array(rows).reshape(len(rows), len(x))


def _plain_numbers(values: _Values) -> list[float | None]:
    """Return numbers with five digits, and ``None`` for those that are not finite, as JSON has them."""
    return [float(f"{value:.5g}") if np.isfinite(value) else None for value in values]
