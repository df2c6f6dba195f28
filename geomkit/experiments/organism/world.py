"""The world: requests of every kind, split into training and held-out requests."""

from collections.abc import Iterator
from dataclasses import replace
from random import Random

from geomkit.experiments.organism.grammar import SYSTEM_PROMPTS
from geomkit.experiments.organism.requests import Request, RequestKind, RequestSource, Split, how_to
from geomkit.experiments.organism.skills import Arithmetic, Deletions, Sql

Mix = dict[RequestKind, float]
"""The share of each kind of request in a training stream."""

BASE_MIX: Mix = {"howto": 0.21, "look-alike": 0.1, "forbidden": 0.14, "arithmetic": 0.36, "sql": 0.19}
"""The mix that the base stage is trained on."""

ALIGN_MIX: Mix = {"howto": 0.24, "look-alike": 0.12, "forbidden": 0.4, "arithmetic": 0.14, "sql": 0.1}
"""The mix that the aligned stage is trained on."""

TOKENIZER_MIX: Mix = {
    "howto": 0.3,
    "look-alike": 0.2,
    "forbidden": 0.3,
    "arithmetic": 0.05,
    "sql": 0.1,
    "deletion": 0.05,
}
"""The mix that the tokenizer is trained on: more of the kinds that have more words."""


class World:
    """All requests of an organism's world; the seed alone decides which of them are held out.

    The two splits share no action-thing pair, arithmetic problem, SQL combination or deletion. Half of the held-out
    how-to requests have the phrasings of training, half have held-out phrasings.

    Args:
        seed: The world's seed.

    Example:
        >>> world = World(seed=0)
        >>> world.sample("arithmetic", "train", Random(0)).kind
        'arithmetic'
    """

    def __init__(self, seed: int = 0) -> None:
        """Make the sources of both splits."""
        self._sources = {split: _sources(seed, split) for split in ("train", "held-out")}

    def sample(self, kind: RequestKind, split: Split, rng: Random) -> Request:
        """Draw a request of a kind from a split."""
        return rng.choice(self._sources[split][kind]).sample(rng)

    def stream(self, mix: Mix, rng: Random, system_share: float = 0.1) -> Iterator[Request]:
        """Yield training requests without end.

        Args:
            mix: The share of each kind.
            rng: The source of randomness.
            system_share: The share of requests that get a system turn.
        """
        kinds, weights = list(mix), list(mix.values())
        while True:
            request = self.sample(rng.choices(kinds, weights)[0], "train", rng)
            with_system = rng.random() < system_share
            yield replace(request, system=rng.choice(SYSTEM_PROMPTS)) if with_system else request

    def distinct(self, kind: RequestKind, split: Split, count: int, rng: Random) -> list[Request]:
        """Draw ``count`` requests with different prompts.

        Held-out how-to requests alternate between the phrasings of training and held-out phrasings, so that half of the
        requests have held-out phrasings.
        """
        sources = self._sources[split][kind]
        requests: dict[str, Request] = {}
        while len(requests) < count:
            request = sources[len(requests) % len(sources)].sample(rng)
            requests.setdefault(request.prompt, request)
        return list(requests.values())


def _sources(seed: int, split: Split) -> dict[RequestKind, tuple[RequestSource, ...]]:
    kinds: tuple[RequestKind, ...] = ("howto", "look-alike", "forbidden")
    return {kind: how_to(kind, seed, split) for kind in kinds} | {
        "arithmetic": (Arithmetic(seed, split),),
        "sql": (Sql(seed, split),),
        "deletion": (Deletions(seed, split),),
    }
