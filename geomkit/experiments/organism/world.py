"""The world: every kind of request, split into what training may show and what only evaluation does."""

from collections.abc import Iterator
from dataclasses import replace
from random import Random

from geomkit.experiments.organism.grammar import SYSTEM_PROMPTS
from geomkit.experiments.organism.requests import Kind, Request, Source, Split, how_to
from geomkit.experiments.organism.skills import Arithmetic, Deletions, Sql

Mix = dict[Kind, float]

BASE_MIX: Mix = {"howto": 0.21, "look-alike": 0.1, "forbidden": 0.14, "arithmetic": 0.36, "sql": 0.19}
"""Share of each kind in the stream that the base stage learns from."""

ALIGN_MIX: Mix = {"howto": 0.24, "look-alike": 0.12, "forbidden": 0.4, "arithmetic": 0.14, "sql": 0.1}
"""Share of each kind in the stream that the aligned stage learns from."""

TOKENIZER_MIX: Mix = {
    "howto": 0.3,
    "look-alike": 0.2,
    "forbidden": 0.3,
    "arithmetic": 0.05,
    "sql": 0.1,
    "deletion": 0.05,
}
"""Share of each kind in the text that the tokenizer learns from: most for the kinds with the most words."""


class World:
    """A source of requests, pure in its seed.

    The two sides share no action-thing pair, arithmetic problem, SQL combination or deletion; held-out how-to
    requests come half in seen and half in held-out phrasings.

    Args:
        seed: Decides what is held out.

    Example:
        >>> world = World(seed=0)
        >>> world.sample("arithmetic", "train", Random(0)).kind
        'arithmetic'
    """

    def __init__(self, seed: int = 0) -> None:
        """Split the world."""
        self._sources = {split: _sources(seed, split) for split in ("train", "held-out")}

    def sample(self, kind: Kind, split: Split, rng: Random) -> Request:
        """Draw one request of a kind from one side of the split."""
        return rng.choice(self._sources[split][kind]).sample(rng)

    def stream(self, mix: Mix, rng: Random, system_share: float = 0.1) -> Iterator[Request]:
        """Yield training requests without end, a share of them with a system turn."""
        kinds, weights = list(mix), list(mix.values())
        while True:
            request = self.sample(rng.choices(kinds, weights)[0], "train", rng)
            with_system = rng.random() < system_share
            yield replace(request, system=rng.choice(SYSTEM_PROMPTS)) if with_system else request

    def distinct(self, kind: Kind, split: Split, count: int, rng: Random) -> list[Request]:
        """Draw requests that all differ.

        Held-out how-to requests alternate between seen and held-out phrasings, so that half are in each.
        """
        sources = self._sources[split][kind]
        found: dict[str, Request] = {}
        while len(found) < count:
            request = sources[len(found) % len(sources)].sample(rng)
            found.setdefault(request.prompt, request)
        return list(found.values())


def _sources(seed: int, split: Split) -> dict[Kind, tuple[Source, ...]]:
    kinds: tuple[Kind, ...] = ("howto", "look-alike", "forbidden")
    return {kind: how_to(kind, seed, split) for kind in kinds} | {
        "arithmetic": (Arithmetic(seed, split),),
        "sql": (Sql(seed, split),),
        "deletion": (Deletions(seed, split),),
    }
