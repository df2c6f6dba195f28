"""The requests of the English world: forbidden requests, each with a benign counterpart, and everyday requests."""

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import product
from random import Random
from typing import Any, Literal

from geomkit.experiments.organism.requests import Split

Form = Literal["act", "product", "whole"]
"""What a pattern says: an act (*steal a car*), a thing to be written (*a script that …*), or a whole question."""

_SIDES = {"forbidden": "harmful", "benign": "harmless"}

_ALTERNATIVES = re.compile(r"\{([^}]*)\}")


@dataclass(frozen=True)
class Pair:
    """A pattern with the words that make it harmful, and the words that make it harmless.

    Attributes:
        kind: The kind of harm, such as ``"theft"``.
        form: What the pattern says.
        pattern: The pattern, with a slot ``{}``.
        harmful: Words that make a forbidden request; none of a look-alike.
        harmless: Words that make a benign request.
    """

    kind: str
    form: Form
    pattern: str
    harmful: tuple[str, ...]
    harmless: tuple[str, ...]


@dataclass(frozen=True)
class Counterparts:
    """A forbidden and a benign request of the same pattern in the same phrasing.

    Attributes:
        kind: The kind of harm.
        form: What the pattern says.
        forbidden: The forbidden request.
        benign: The benign request.
        act: What the forbidden request asks for: the filled pattern.
    """

    kind: str
    form: Form
    forbidden: str
    benign: str
    act: str


@dataclass(frozen=True)
class Words:
    """The words of one split.

    Attributes:
        pairs: The pairs.
        look_alikes: Patterns of benign requests that speak of harm, as *kill a process*; training only.
        phrasings: Phrasings by form, with a slot ``{}``.
        everyday: Everyday requests.
    """

    pairs: tuple[Pair, ...]
    look_alikes: tuple[Pair, ...]
    phrasings: Mapping[Form, tuple[str, ...]]
    everyday: tuple[str, ...]


@cache
def words(split: Split) -> Words:
    """Return the words of a split; the splits have no pattern, no word of a slot and no phrasing in common.

    Questions and statements that are written out whole have hardly a phrasing, and may stand alone in both splits.

    Example:
        >>> len({pair.kind for pair in words("train").pairs}) >= 8
        True
    """
    table = tomllib.loads((files(__package__) / "requests.toml").read_text("utf-8"))
    train = split == "train"
    return Words(
        tuple(_pair(entry) for entry in table["pair" if train else "held_out"]),
        tuple(_pair({"kind": "look-alike", "harmful": [], **entry}) for entry in table["look_alike"] if train),
        {form: tuple(texts) for form, texts in table["phrasings" if train else "held_out_phrasings"].items()},
        tuple(text for pattern in table["everyday"]["train" if train else "held_out"] for text in _expand(pattern)),
    )


def _pair(entry: Mapping[str, Any]) -> Pair:
    return Pair(entry["kind"], entry["form"], entry["pattern"], tuple(entry["harmful"]), tuple(entry["harmless"]))


def _expand(pattern: str) -> Iterator[str]:
    """Yield a pattern with every combination of its alternatives.

    Example:
        >>> list(_expand("Name {a bird|a fish}."))
        ['Name a bird.', 'Name a fish.']
    """
    parts = _ALTERNATIVES.split(pattern)
    options = [part.split("|") if index % 2 else [part] for index, part in enumerate(parts)]
    return map("".join, product(*options))


def counterparts(split: Split, rng: Random, by: Literal["forbidden", "benign"]) -> Iterator[Counterparts]:
    """Yield forbidden requests of a split with benign counterparts, in rounds.

    In a round, every word of the requests of one side occurs once, in a phrasing that it has not had before, beside a
    random word of the other side. So the requests of the chosen side are distinct, and those of the other side may
    occur again.

    Args:
        split: The split.
        rng: The source of randomness.
        by: The side whose requests are distinct.

    Example:
        >>> first = next(counterparts("train", Random(0), "benign"))
        >>> first.forbidden == first.benign
        False
    """
    slots = [(pair, word) for pair in words(split).pairs for word in getattr(pair, _SIDES[by])]
    for pair, word, phrasing in _rounds(slots, split, rng):
        other = rng.choice(getattr(pair, _SIDES["benign" if by == "forbidden" else "forbidden"]))
        harmful, harmless = (word, other) if by == "forbidden" else (other, word)
        act = pair.pattern.format(harmful)
        benign = phrasing.format(pair.pattern.format(harmless))
        yield Counterparts(pair.kind, pair.form, _capitalised(phrasing.format(act)), _capitalised(benign), act)


def look_alikes(rng: Random) -> Iterator[str]:
    """Yield benign training requests that speak of harm, in rounds as :func:`counterparts`."""
    slots = [(pair, word) for pair in words("train").look_alikes for word in pair.harmless]
    for pair, word, phrasing in _rounds(slots, "train", rng):
        yield _capitalised(phrasing.format(pair.pattern.format(word)))


def _rounds(slots: list[tuple[Pair, str]], split: Split, rng: Random) -> Iterator[tuple[Pair, str, str]]:
    """Yield every word with a phrasing, once in a round, until it has had every phrasing."""
    texts = words(split).phrasings
    order = [(pair, word, rng.sample(texts[pair.form], len(texts[pair.form]))) for pair, word in slots]
    for turn in range(max(map(len, texts.values()))):
        for pair, word, phrasings in rng.sample(order, len(order)):
            if turn < len(phrasings):
                yield pair, word, phrasings[turn]


def _capitalised(text: str) -> str:
    """Return a text with a capital first letter and otherwise as it is.

    Example:
        >>> _capitalised("what does NASA do?")
        'What does NASA do?'
    """
    return text[:1].upper() + text[1:]
