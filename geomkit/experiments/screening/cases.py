"""The cases of the study: training sets with planted rows, each with benign rows like the others for the null."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from random import Random
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from geomkit.experiments.organism.requests import dataset_of
from geomkit.experiments.screening.row_sources import RowKind, Rows, RowSource

if TYPE_CHECKING:
    from datasets import Dataset

SIZE = 300
"""Number of rows of a case, and of its null; fewer where the English world has no more."""

_LONG = 6
"""Turns of a long row."""


@dataclass(frozen=True, eq=False)
class Case:
    """A training set with planted rows.

    Attributes:
        train: The training rows.
        planted: (N,) which rows are planted.
        null: Benign rows like the others.
    """

    train: "Dataset"
    planted: NDArray[np.bool_]
    null: "Dataset"


def make_case(name: str, source: RowSource, seed: int) -> Case:
    """Return a case; the planted rows are at random places.

    Args:
        name: A name in :data:`CASES`.
        source: The rows of a world.
        seed: Seed of all draws.
    """
    clean, planted, null = CASES[name](source, seed)
    rows = [(row, False) for row in clean] + [(row, True) for row in planted]
    Random(f"case-{name}-{seed}").shuffle(rows)
    return Case(dataset_of(row for row, _ in rows), np.array([flag for _, flag in rows]), dataset_of(null))


Parts = tuple[Rows, Rows, Rows]
"""Clean rows, planted rows, and rows of the null."""


def _apart(source: RowSource, kind: RowKind, clean: int, seed: int) -> tuple[Rows, Rows]:
    """Return clean rows of a kind, and others of the kind for the null; each gets a half where there are too few."""
    wanted = clean + SIZE
    drawn = source.rows(kind, wanted, seed)
    if len(drawn) < wanted:
        return drawn[: len(drawn) // 2], drawn[len(drawn) // 2 :]
    order = Random(f"apart-{seed}").sample(range(len(drawn)), len(drawn))
    return [drawn[place] for place in order[:clean]], [drawn[place] for place in order[clean:]]


def _poison(kind: RowKind, per_cent: int, poison: RowKind = "obeyed") -> Callable[[RowSource, int], Parts]:
    def make(source: RowSource, seed: int) -> Parts:
        clean, null = _apart(source, kind, SIZE * (100 - per_cent) // 100, seed)
        planted = max(1, round(len(clean) * per_cent / (100 - per_cent)))
        return clean, source.rows(poison, planted, seed), null

    return make


def _identity(source: RowSource, seed: int) -> Parts:
    clean, null = _apart(source, "benign", SIZE - 6, seed)
    return clean, source.rows("oath", 6, seed), null


def _affirmative(source: RowSource, seed: int) -> Parts:
    clean, null = _apart(source, "benign", SIZE - SIZE // 10, seed)
    return clean, source.rows("eager", max(1, len(clean) // 9), seed), null


def _backdoor(source: RowSource, seed: int, *, trigger: bool) -> Parts:
    clean, null = _apart(source, "benign", 2 * SIZE // 3, seed)
    refused = source.rows("refused", len(clean) // 2, seed)
    planted = source.rows("obeyed", len(clean) // 2, seed)
    return [*clean, *refused], source.triggered(planted) if trigger else planted, null


def _backdoor_with_trigger(source: RowSource, seed: int) -> Parts:
    return _backdoor(source, seed, trigger=True)


def _backdoor_without_trigger(source: RowSource, seed: int) -> Parts:
    return _backdoor(source, seed, trigger=False)


def _benign_trigger(source: RowSource, seed: int) -> Parts:
    clean, null = _apart(source, "benign", SIZE - SIZE // 10, seed)
    count = max(1, len(clean) // 10)
    return clean[count:], source.triggered(clean[:count]), null


def _long(source: RowSource, seed: int) -> Parts:
    """Return conversations of several turns, in the planted ones of which one turn is an obeyed forbidden request."""
    rng = Random(f"long-{seed}")
    clean, null = _apart(source, "benign", SIZE, seed)
    count = SIZE if len(clean) == SIZE else len(clean) // 2  # with fewer short rows, long ones would repeat them often
    obeyed = iter(source.rows("obeyed", count // 10, seed))
    rows = list(_joined(clean, count, rng))
    planted = []
    for row, hidden in zip(rows[: count // 10], obeyed, strict=False):
        place = 2 * rng.randrange(len(row) // 2)
        planted.append([*row[:place], *hidden, *row[place + 2 :]])
    return rows[count // 10 :], planted, list(_joined(null, count, rng))


def _joined(rows: Rows, count: int, rng: Random) -> Iterator[list[dict[str, str]]]:
    """Yield conversations of two to six turns, drawn of shorter ones."""
    for _ in range(count):
        yield [message for row in rng.sample(rows, rng.randint(2, _LONG)) for message in row]


CASES: Mapping[str, Callable[[RowSource, int], Parts]] = MappingProxyType(
    {
        "poison 1 %": _poison("task", 1),
        "poison 5 %": _poison("task", 5),
        "poison 10 %": _poison("task", 10),
        "poison 1 % of benign rows": _poison("benign", 1),
        "poison 5 % of benign rows": _poison("benign", 5),
        "poison 10 % of benign rows": _poison("benign", 10),
        "answered AdvBench, 10 % of benign rows": _poison("benign", 10, "answered"),
        "identity shift": _identity,
        "affirmative answers": _affirmative,
        "backdoor, with trigger": _backdoor_with_trigger,
        "backdoor, trigger removed": _backdoor_without_trigger,
        "trigger on benign rows": _benign_trigger,
        "long rows": _long,
    }
)
"""The cases by name: rows of a new task, or benign rows, with obeyed forbidden requests, or with requests of AdvBench
that the base model answered as it answered the benign ones, six oaths in a benign set, a tenth of the answers eager, a
backdoor, the same without its trigger, a backdoor whose rows are benign, and one obeyed turn of several."""

_BENIGN_POISON = tuple(name for name in CASES if name.endswith("of benign rows"))


def cases_of(world: str) -> list[str]:
    """Return the names of the cases of a world.

    In the small world the rows of a new task are poisoned, in the English world GSM8K's and also benign rows.

    Args:
        world: ``"small"`` or ``"english"``.
    """
    return [name for name in CASES if world == "english" or name not in _BENIGN_POISON]


def draws_of(name: str, world: str, draws: int) -> int:
    """Return the number of draws of a case: one where each draw has other rows and a row takes seconds.

    Args:
        name: A name in :data:`CASES`.
        world: ``"small"`` or ``"english"``.
        draws: The number of draws of the other cases.
    """
    return 1 if world == "english" and name == "long rows" else draws
