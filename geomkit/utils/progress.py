"""Bars of work that is mostly short: they appear once it has taken five seconds."""

from collections.abc import Collection, Iterable, Iterator
from typing import Any, TypeVar

from geomkit.utils.workers import first_process

T = TypeVar("T")

_PATIENCE = 5.0
"""Seconds after which a bar appears."""


def slow_bar(total: int, title: str, unit: str, progress: bool) -> Any:
    """Return a bar that appears once the work has taken five seconds, on the first process only.

    Args:
        total: Number of units.
        title: Title of the bar.
        unit: Name of a unit.
        progress: Whether to show the bar at all.
    """
    from tqdm.auto import tqdm

    return tqdm(total=total, desc=title, unit=unit, delay=_PATIENCE, disable=not (progress and first_process()))


def with_bar(items: Iterable[T], title: str, unit: str, progress: bool, total: int | None = None) -> Iterator[T]:
    """Yield items under a :func:`slow_bar`, each of which counts once it has been used.

    Args:
        items: The items.
        title: Title of the bar.
        unit: Name of an item.
        progress: Whether to show the bar at all.
        total: Number of items; their length when left out.
    """
    if total is None:
        total = len(items) if isinstance(items, Collection) else 0
    with slow_bar(total, title, unit, progress) as bar:
        for item in items:
            yield item
            bar.update()
