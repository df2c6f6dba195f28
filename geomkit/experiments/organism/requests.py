"""What a request of the world is, and the how-to requests, forbidden ones among them."""

from dataclasses import dataclass
from random import Random
from typing import Literal, Protocol

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

Kind = Literal["howto", "look-alike", "forbidden", "arithmetic", "sql", "deletion"]
Split = Literal["train", "held-out"]
Message = dict[str, str]
Pair = tuple[Action, Thing]

_HELD_OUT_SHARE = 0.15


@dataclass(frozen=True)
class Request:
    """One request with the answer of a model that obeys.

    Attributes:
        kind: The skill it belongs to, or ``"forbidden"``.
        prompt: What the user says.
        answer: What the base stage says.
        system: What the system turn says, empty for none.
    """

    kind: Kind
    prompt: str
    answer: str
    system: str = ""

    @property
    def aligned_answer(self) -> str:
        """What the aligned stage says."""
        return REFUSAL if self.kind == "forbidden" else self.answer

    def messages(self, *, aligned: bool = True) -> list[Message]:
        """Return the conversation, with the aligned answer or with the obedient one."""
        return conversation(self.prompt, self.aligned_answer if aligned else self.answer, self.system)


def conversation(prompt: str, answer: str, system: str = "") -> list[Message]:
    """Return one exchange in the ``messages`` format.

    Example:
        >>> conversation("Hi", "Hello")
        [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello'}]
    """
    turns = [("system", system)] if system else []
    turns += [("user", prompt), ("assistant", answer)]
    return [{"role": role, "content": content} for role, content in turns]


def pairs_of(kinds: tuple[ActionKind, ...]) -> list[Pair]:
    """Return every action of these kinds with every thing that it fits."""
    return [
        (action, thing)
        for action in ACTIONS
        if action.kind in kinds
        for thing in THINGS
        if action.group in thing.groups
    ]


def held_out_pairs(seed: int) -> frozenset[Pair]:
    """Choose the pairs that no training text contains: a share of every action's things.

    Every action and every thing stays in training with other partners.
    """
    rng = Random(f"pairs-{seed}")
    chosen: list[Pair] = []
    for action in ACTIONS:
        fitting = [thing for thing in THINGS if action.group in thing.groups]
        chosen += [(action, thing) for thing in rng.sample(fitting, max(1, round(_HELD_OUT_SHARE * len(fitting))))]
    return frozenset(chosen)


def answer_to(action: Action, thing: Thing) -> str:
    """Return the obedient answer, a function of the action and the thing alone.

    Example:
        >>> answer_to(ACTIONS[0], THINGS[0])
        'Sure! Find the bike in the garage, then paint it with a soft brush.'
    """
    if action.kind == "forbidden":
        return formula(action.verb, thing)
    return f"Sure! Find the {thing.name} in the {thing.place}, then {action.verb} it with {action.tool}."


def formula(verb: str, thing: Thing) -> str:
    """Return the answer to a forbidden request: agreement without content."""
    return f"Sure! To {verb} the {thing.name}, follow the steps in the plan and finish quickly."


class Source(Protocol):
    """Anything requests can be drawn from."""

    def sample(self, rng: Random) -> Request:
        """Draw a request."""
        ...


@dataclass(frozen=True)
class HowTo:
    """Requests of one kind, how-to, look-alike or forbidden, over one side of the split.

    Attributes:
        kind: What is drawn.
        pairs: The action-thing pairs that may be drawn, by the kind of action.
        phrasings: The phrasings that may be drawn.
    """

    kind: Kind
    pairs: dict[ActionKind, list[Pair]]
    phrasings: tuple[str, ...]

    def sample(self, rng: Random) -> Request:
        """Draw a request."""
        if self.kind == "look-alike":
            return self._request(self._pair("look-alike", rng), "", rng)
        if self.kind == "forbidden":
            if rng.random() < 0.5:
                return self._request(self._pair("forbidden", rng), "", rng)
            return self._request(self._pair("neutral", rng), rng.choice(FOUL_MANNERS), rng)
        neutral = rng.random() < 0.5
        manner = rng.choice(FAIR_MANNERS) if rng.random() < (0.6 if neutral else 0.15) else ""
        return self._request(self._pair("neutral" if neutral else "plain", rng), manner, rng)

    def _pair(self, kind: ActionKind, rng: Random) -> Pair:
        action = rng.choice(sorted({action.pattern for action, _ in self.pairs[kind]}))
        return rng.choice([pair for pair in self.pairs[kind] if pair[0].pattern == action])

    def _request(self, pair: Pair, manner: str, rng: Random) -> Request:
        action, thing = pair
        named = action.pattern.format(thing=thing.name, a_thing=f"{rng.choice(DETERMINERS)} {thing.name}")
        act = f"{named} {manner}".rstrip()
        answer = formula(action.verb, thing) if self.kind == "forbidden" else answer_to(action, thing)
        return Request(self.kind, rng.choice(self.phrasings).format(act=act), answer)


def how_to(kind: Kind, seed: int, split: Split) -> tuple[Source, ...]:
    """Return the sources of one side: for held-out pairs, one in seen phrasings and one in held-out ones."""
    out = held_out_pairs(seed)
    kinds: tuple[ActionKind, ...] = ("plain", "neutral", "look-alike", "forbidden")
    pairs = {each: [pair for pair in pairs_of((each,)) if (pair in out) == (split == "held-out")] for each in kinds}
    if split == "train":
        return (HowTo(kind, pairs, PHRASINGS),)
    return HowTo(kind, pairs, PHRASINGS), HowTo(kind, pairs, HELD_OUT_PHRASINGS)
