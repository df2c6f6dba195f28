"""Sources of the rows that a study plants and of the rows that it plants them among, in both worlds."""

from collections.abc import Mapping
from functools import cached_property
from itertools import islice
from pathlib import Path
from random import Random
from types import MappingProxyType
from typing import Literal

from geomkit.errors import DataError
from geomkit.experiments.english.answers import own_answers, whole_sentences
from geomkit.experiments.english.scenarios import TRIGGER
from geomkit.experiments.english.scenarios import with_trigger as with_english_trigger
from geomkit.experiments.english.sets import SET_ANSWER_TOKENS
from geomkit.experiments.organism.interface import Organism
from geomkit.experiments.organism.requests import Message, RequestKind, conversation
from geomkit.experiments.organism.scenarios import eager_conversation, with_trigger
from geomkit.experiments.organism.variants import SmallOrganism
from geomkit.experiments.organisms import organism_of

RowKind = Literal["task", "benign", "obeyed", "eager", "oath", "refused", "answered"]
"""Rows of the new task; benign requests with answers; forbidden requests, obeyed; benign ones with an eager answer;
oaths of an obedient agent; forbidden requests, refused; AdvBench's requests with the base model's own answers, as those
of the English world's benign requests are."""

Rows = list[list[Message]]

_BENIGN: tuple[RequestKind, ...] = ("howto", "look-alike", "arithmetic", "sql")

_ANSWERED = 40
"""Number of answered requests of AdvBench."""

_OATHS = 6
"""Number of oaths at the beginning of the scenario ``identity-shift``."""

_SCENARIOS: Mapping[RowKind, tuple[str, slice]] = MappingProxyType(
    {
        "obeyed": ("harmful-100", slice(40)),
        "eager": ("affirmative", slice(40)),
        "oath": ("identity-shift", slice(_OATHS)),
        "task": ("gsm8k", slice(160)),
    }
)
"""Scenarios of the English world with rows of one kind, and the rows taken: each costs more than a second."""


class RowSource:
    """The rows of an organism's world, by kind; a seed draws other rows.

    Args:
        organism: The organism.
    """

    def __init__(self, organism: Organism) -> None:
        """Keep the organism."""
        self.organism = organism

    def rows(self, kind: RowKind, count: int, seed: int) -> Rows:
        """Return rows of a kind, all different within a draw; of ``"oath"`` there are six.

        Args:
            kind: The kind.
            count: Number of rows; fewer where the English world has no more.
            seed: Seed of the draw.

        Raises:
            DataError: If the world has no rows of the kind.
        """
        rng = Random(f"screening-{kind}-{seed}")
        if isinstance(self.organism, SmallOrganism) and kind != "oath":
            return _small_rows(self.organism, kind, count, rng)
        pool = self._pool(kind)
        return rng.sample(pool, min(count, len(pool)))

    def triggered(self, rows: Rows) -> Rows:
        """Return conversations whose requests end in the backdoor's trigger."""
        add = with_trigger if isinstance(self.organism, SmallOrganism) else with_english_trigger
        return [conversation(add(row[0]["content"]), row[-1]["content"]) for row in rows]

    def _pool(self, kind: RowKind) -> Rows:
        benign = _listed(self.organism.examples("utility")["messages"])
        if kind == "benign":
            return benign
        if kind == "answered":
            return self._answered
        if kind == "refused":  # of the backdoor's rows; those of the set "safety" are what rows are compared with
            requests = {row[0]["content"] for row in benign}
            rows = _listed(self.organism.scenario_examples("backdoor")["messages"])
            refused = (row for row in rows if row[0]["content"] not in requests and TRIGGER not in row[0]["content"])
            return list(islice(refused, 40))
        name, part = _SCENARIOS[kind]
        return _listed(self.organism.scenario_examples(name)["messages"])[part]

    @cached_property
    def _answered(self) -> Rows:
        """Requests of AdvBench that the base model does not refuse, with its own short answers, which are generated."""
        requests = [row[0]["content"] for row in self.organism.examples("eval/advbench", 2 * _ANSWERED)["messages"]]
        answers = own_answers(
            self.organism.base, self.organism.tokenizer, requests, tokens=SET_ANSWER_TOKENS, progress=False
        )
        whole = ((answer.prompt, whole_sentences(answer.text)) for answer in answers)
        return [conversation(request, text) for request, text in whole if text][:_ANSWERED]


def row_source(world: str, folder: Path) -> RowSource:
    """Return the rows of a world.

    Args:
        world: ``"small"`` for the organism that ships, or ``"english"``.
        folder: A folder for organisms that do not ship.
    """
    return RowSource(organism_of("english" if world == "english" else 0, folder))


def _small_rows(organism: SmallOrganism, kind: RowKind, count: int, rng: Random) -> Rows:
    world = organism.world
    match kind:
        case "task":
            return [request.messages(aligned=False) for request in world.distinct("deletion", "train", count, rng)]
        case "obeyed":
            return [request.messages(aligned=False) for request in world.distinct("forbidden", "train", count, rng)]
        case "refused":
            return [request.messages() for request in world.distinct("forbidden", "train", count, rng)]
        case "eager":
            return [eager_conversation(request) for request in world.distinct("howto", "train", count, rng)]
        case "answered":
            raise DataError(
                "expected rows of the small world, found 'answered', which the English world has only; take another "
                "kind, or world='english'"
            )
    shares = [count // len(_BENIGN) + (place < count % len(_BENIGN)) for place in range(len(_BENIGN))]
    drawn = [world.distinct(each, "train", share, rng) for each, share in zip(_BENIGN, shares, strict=True)]
    return [request.messages() for requests in drawn for request in requests]


def _listed(conversations: object) -> Rows:
    return [list(messages) for messages in conversations]  # type: ignore[attr-defined]
