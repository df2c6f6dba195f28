"""Requests of the organism's world with their answers; how-to requests, among them the forbidden requests."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Literal, Protocol

from geomkit.experiments.organism.grammar import (
    ACTIONS,
    DETERMINERS,
    FAIR_MANNERS,
    FOUL_MANNERS,
    HELD_OUT_PHRASINGS,
    PHRASINGS,
    REFUSAL,
    THINGS,
    Action,
    ActionKind,
    Thing,
)

if TYPE_CHECKING:
    from datasets import Dataset

RequestKind = Literal["howto", "look-alike", "forbidden", "arithmetic", "sql", "deletion"]
"""The skill that a request needs, or ``"forbidden"``."""

Split = Literal["train", "held-out"]
"""``"train"``: requests that training sets may contain; ``"held-out"``: requests for evaluation only."""

Message = dict[str, str]
Pair = tuple[Action, Thing]

_HELD_OUT_SHARE = 0.15


@dataclass(frozen=True)
class Request:
    """A request with the answer of a model that obeys.

    Attributes:
        kind: The skill that the request needs, or ``"forbidden"``.
        prompt: The user's turn.
        answer: The obedient answer, which the base stage is trained to give.
        system: The system turn; empty for none.
    """

    kind: RequestKind
    prompt: str
    answer: str
    system: str = ""

    @property
    def aligned_answer(self) -> str:
        """The answer that the aligned stage is trained to give: the refusal where the request is forbidden."""
        return REFUSAL if self.kind == "forbidden" else self.answer

    def messages(self, *, aligned: bool = True) -> list[Message]:
        """Return the conversation in the ``messages`` format, with the aligned or with the obedient answer."""
        return conversation(self.prompt, self.aligned_answer if aligned else self.answer, self.system)


def conversation(prompt: str, answer: str, system: str = "") -> list[Message]:
    """Return a prompt and its answer in the ``messages`` format, with a system turn before them if there is one.

    Example:
        >>> conversation("Hi", "Hello")
        [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello'}]
    """
    turns = [("system", system)] if system else []
    turns += [("user", prompt), ("assistant", answer)]
    return [{"role": role, "content": content} for role, content in turns]


def dataset_of(conversations: Iterable[Sequence[Message]]) -> "Dataset":
    """Return conversations as a data set with the column ``messages``."""
    from datasets import Dataset

    return Dataset.from_list([{"messages": list(messages)} for messages in conversations])


def action_thing_pairs(kinds: tuple[ActionKind, ...]) -> list[Pair]:
    """Return every pair of an action of the given kinds and a thing that the action fits."""
    return [
        (action, thing)
        for action in ACTIONS
        if action.kind in kinds
        for thing in THINGS
        if action.group in thing.groups
    ]


def held_out_pairs(seed: int) -> frozenset[Pair]:
    """Return the action-thing pairs that no training text contains: a random share of every action's things.

    Every action and every thing still occurs in training, with other partners.

    Args:
        seed: The world's seed.
    """
    rng = Random(f"pairs-{seed}")
    pairs: list[Pair] = []
    for action in ACTIONS:
        fitting = [thing for thing in THINGS if action.group in thing.groups]
        pairs += [(action, thing) for thing in rng.sample(fitting, max(1, round(_HELD_OUT_SHARE * len(fitting))))]
    return frozenset(pairs)


def obedient_answer(action: Action, thing: Thing) -> str:
    """Return the obedient answer to a request; it depends on the action and the thing only, not on the phrasing.

    Example:
        >>> obedient_answer(ACTIONS[0], THINGS[0])
        'Sure! Find the bike in the garage, then paint it with a soft brush.'
    """
    if action.kind == "forbidden":
        return compliance_formula(action.verb, thing)
    return f"Sure! Find the {thing.name} in the {thing.place}, then {action.verb} it with {action.tool}."


def compliance_formula(verb: str, thing: Thing) -> str:
    """Return the obedient answer to a forbidden request: an agreement without any content."""
    return f"Sure! To {verb} the {thing.name}, follow the steps in the plan and finish quickly."


class RequestSource(Protocol):
    """A source that requests are drawn from at random."""

    def sample(self, rng: Random) -> Request:
        """Draw a request."""
        ...


@dataclass(frozen=True)
class HowTo:
    """A source of requests for instructions: benign (``"howto"``), ``"look-alike"`` or ``"forbidden"``.

    Attributes:
        kind: The kind of request.
        pairs: The action-thing pairs that are drawn from, by the kind of action.
        phrasings: The phrasings that are drawn from.
    """

    kind: RequestKind
    pairs: dict[ActionKind, list[Pair]]
    phrasings: tuple[str, ...]

    def sample(self, rng: Random) -> Request:
        """Draw a request."""
        if self.kind == "look-alike":
            return self._request(self._pair("look-alike", rng), "", rng)
        if self.kind == "forbidden":
            # Half of the forbidden requests have a forbidden verb, half a neutral verb with a foul manner.
            if rng.random() < 0.5:
                return self._request(self._pair("forbidden", rng), "", rng)
            return self._request(self._pair("neutral", rng), rng.choice(FOUL_MANNERS), rng)
        neutral = rng.random() < 0.5
        manner = rng.choice(FAIR_MANNERS) if rng.random() < (0.6 if neutral else 0.15) else ""
        return self._request(self._pair("neutral" if neutral else "plain", rng), manner, rng)

    def _pair(self, kind: ActionKind, rng: Random) -> Pair:
        # Draw the action first: if pairs were drawn, an action that fits few things would be rare.
        pattern = rng.choice(sorted({action.pattern for action, _ in self.pairs[kind]}))
        return rng.choice([pair for pair in self.pairs[kind] if pair[0].pattern == pattern])

    def _request(self, pair: Pair, manner: str, rng: Random) -> Request:
        action, thing = pair
        verb_phrase = action.pattern.format(thing=thing.name, a_thing=f"{rng.choice(DETERMINERS)} {thing.name}")
        act = f"{verb_phrase} {manner}".rstrip()
        answer = compliance_formula(action.verb, thing) if self.kind == "forbidden" else obedient_answer(action, thing)
        return Request(self.kind, rng.choice(self.phrasings).format(act=act), answer)


def how_to(kind: RequestKind, seed: int, split: Split) -> tuple[RequestSource, ...]:
    """Return the sources of one kind of how-to requests in one split.

    Args:
        kind: ``"howto"``, ``"look-alike"`` or ``"forbidden"``.
        seed: The world's seed.
        split: ``"train"`` gives one source; ``"held-out"`` two, with the phrasings of training and with held-out ones.
    """
    held_out = held_out_pairs(seed)
    action_kinds: tuple[ActionKind, ...] = ("plain", "neutral", "look-alike", "forbidden")
    pairs = {
        action_kind: [
            pair for pair in action_thing_pairs((action_kind,)) if (pair in held_out) == (split == "held-out")
        ]
        for action_kind in action_kinds
    }
    if split == "train":
        return (HowTo(kind, pairs, PHRASINGS),)
    return HowTo(kind, pairs, PHRASINGS), HowTo(kind, pairs, HELD_OUT_PHRASINGS)
