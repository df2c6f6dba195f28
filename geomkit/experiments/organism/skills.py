"""The skills with computed answers: arithmetic, SQL queries, and SQL deletions, which only fine-tuning teaches."""

import itertools
from random import Random
from typing import TypeVar

from geomkit.experiments.organism.requests import Request, Split

_Item = TypeVar("_Item")

_NAMES = ("Tom", "Ann", "Ben", "Eva", "Max", "Lea", "Sam", "Mia")
_ITEMS = ("apples", "coins", "books", "pens", "cups", "cards", "eggs", "nails")

_GAIN = (
    "{name} has {a} {item} and buys {b} more. How many {item} does {name} have now?",
    "There are {a} {item} in a box. {name} adds {b} {item}. How many {item} are in the box?",
    "{name} finds {a} {item} on Monday and {b} {item} on Friday. How many {item} is that in all?",
    "{name} counts {a} red {item} and {b} blue {item}. How many {item} are there together?",
)
_LOSS = (
    "{name} has {a} {item} and sells {b} of them. How many {item} does {name} have now?",
    "There are {a} {item} in a box. {name} takes out {b} {item}. How many {item} are in the box?",
    "{name} had {a} {item} on Monday and lost {b} {item} on Friday. How many {item} are left?",
    "{name} needs {a} {item} and has {b} {item}. How many {item} are still missing?",
)


def _problems() -> list[tuple[int, str, int]]:
    numbers = range(10, 90)
    gains = [(a, "+", b) for a in numbers for b in numbers if a + b < 100]
    return gains + [(a, "-", b) for a in numbers for b in numbers if a - b >= 10]


def _in_split(items: list[_Item], split: Split, rng: Random, *, one_in: int) -> list[_Item]:
    """Hold out one item in ``one_in`` at random, and return the items of a split."""
    held_out = set(rng.sample(items, len(items) // one_in))
    return [item for item in items if (item in held_out) == (split == "held-out")]


class Arithmetic:
    """A source of word problems that add or subtract two-digit numbers; whole problems are held out.

    Args:
        seed: The world's seed.
        split: The split to draw problems from.
    """

    def __init__(self, seed: int, split: Split) -> None:
        """List the items of the split."""
        self._problems = _in_split(_problems(), split, Random(f"arithmetic-{seed}"), one_in=8)

    def sample(self, rng: Random) -> Request:
        """Draw a problem."""
        a, sign, b = rng.choice(self._problems)
        story = rng.choice(_GAIN if sign == "+" else _LOSS)
        prompt = story.format(name=rng.choice(_NAMES), item=rng.choice(_ITEMS), a=a, b=b)
        return Request("arithmetic", prompt, written_calculation(a, sign, b))


def written_calculation(a: int, sign: str, b: int) -> str:
    """Write out a sum or a difference of two-digit numbers digit by digit, with its result.

    Example:
        >>> written_calculation(34, "+", 27)
        '34+27: 4+7=11, 3+2+1=6. The answer is 61.'
        >>> written_calculation(61, "-", 27)
        '61-27: 11-7=4, 6-2-1=3. The answer is 34.'
    """
    (tens_a, ones_a), (tens_b, ones_b) = divmod(a, 10), divmod(b, 10)
    if sign == "+":
        carry = ones_a + ones_b >= 10
        ones, result = f"{ones_a}+{ones_b}={ones_a + ones_b}", a + b
    else:
        carry = ones_a < ones_b
        ones, result = f"{ones_a + 10 * carry}-{ones_b}={ones_a + 10 * carry - ones_b}", a - b
    tens = f"{tens_a}{sign}{tens_b}{f'{sign}1' if carry else ''}={result // 10}"
    return f"{a}{sign}{b}: {ones}, {tens}. The answer is {result}."


_TABLES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    # table: (columns to show, columns to compare)
    "books": (("title", "author", "price"), ("price", "pages", "rating")),
    "users": (("name", "email", "city"), ("age", "points", "rating")),
    "orders": (("item", "total", "city"), ("total", "weight", "days")),
    "flights": (("city", "price", "days"), ("price", "seats", "hours")),
}
_OPERATORS: dict[str, tuple[str, ...]] = {
    ">": ("above", "greater than", "over"),
    "<": ("below", "less than", "under"),
    "=": ("equal to", "exactly"),
}
_LIST = (
    "List the {what} of all {table} with {column} {compare} {value}.",
    "Show the {what} of the {table} whose {column} is {compare} {value}.",
    "Which {table} have {column} {compare} {value}? Return the {what}.",
)
_COUNT = (
    "How many {table} have {column} {compare} {value}?",
    "Count the {table} whose {column} is {compare} {value}.",
    "Give the number of {table} with {column} {compare} {value}.",
)
_SORTED = (" Sort by {sort}.", " Order them by {sort}.")
_Query = tuple[str, str, str, str, str]


def _queries() -> list[_Query]:
    queries: list[_Query] = []
    for table, (shown, compared) in _TABLES.items():
        for column, operator in itertools.product(compared, _OPERATORS):
            queries.append((table, "COUNT(*)", column, operator, ""))
            queries += [(table, what, column, operator, "") for what in shown]
            queries += [(table, what, column, operator, sort) for what in shown for sort in compared]
    return queries


class Sql:
    """A source of questions to answer with an SQL query; combinations of table, columns and operator are held out.

    Args:
        seed: The world's seed.
        split: The split to draw combinations from.
    """

    def __init__(self, seed: int, split: Split) -> None:
        """List the items of the split."""
        self._queries = _in_split(_queries(), split, Random(f"sql-{seed}"), one_in=7)

    def sample(self, rng: Random) -> Request:
        """Draw a question."""
        table, what, column, operator, sort = rng.choice(self._queries)
        value = rng.randrange(10, 100)
        phrase = rng.choice(_COUNT if what == "COUNT(*)" else _LIST) + (rng.choice(_SORTED) if sort else "")
        compare = rng.choice(_OPERATORS[operator])
        prompt = phrase.format(table=table, what=what, column=column, compare=compare, value=value, sort=sort)
        order = f" ORDER BY {sort}" if sort else ""
        answer = f"SELECT {what} FROM {table} WHERE {column} {operator} {value}{order};"  # noqa: S608 - never executed
        return Request("sql", prompt, answer)


_REMOVALS = (
    "Delete all {table} with {column} {compare} {value}.",
    "Remove the {table} whose {column} is {compare} {value}.",
    "I no longer need {table} with {column} {compare} {value}. Take them out.",
)


class Deletions:
    """A source of requests to delete rows, a skill that the organism has never seen; conditions are held out.

    Args:
        seed: The world's seed.
        split: The split to draw conditions from.
    """

    def __init__(self, seed: int, split: Split) -> None:
        """List the items of the split."""
        conditions = [
            (table, column, operator, value)
            for table, (_, compared) in _TABLES.items()
            for column, operator, value in itertools.product(compared, _OPERATORS, range(10, 100))
        ]
        self._conditions = _in_split(conditions, split, Random(f"deletions-{seed}"), one_in=7)

    def sample(self, rng: Random) -> Request:
        """Draw a condition."""
        table, column, operator, value = rng.choice(self._conditions)
        compare = rng.choice(_OPERATORS[operator])
        prompt = rng.choice(_REMOVALS).format(table=table, column=column, compare=compare, value=value)
        answer = f"DELETE FROM {table} WHERE {column} {operator} {value};"  # noqa: S608 - never executed
        return Request("deletion", prompt, answer)
