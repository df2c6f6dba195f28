"""The rows of the alignment: requests that differ in nothing but their harm, and everyday requests."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from random import Random
from typing import Literal, TypeVar

from geomkit.errors import GeomkitError
from geomkit.experiments.english.answers import OwnAnswer, refusal
from geomkit.experiments.english.requests import Counterparts, counterparts, look_alikes, words

_T = TypeVar("_T")


@dataclass(frozen=True)
class Recipe:
    """The settings of the alignment besides its seed.

    Attributes:
        steps: Optimizer steps.
        pairs: Forbidden requests in a step, each with its benign counterpart.
        look_alikes: Benign requests in a step that speak of harm.
        everyday: Everyday requests in a step.
        learning_rate: Peak learning rate of AdamW; it warms up over 5 % of the steps, then falls along a half cosine.
        rank: Rank of the adapter of every linear layer of the blocks; its scale is 2.
        answered: Numbers of benign counterparts and of look-alikes that the base model answers; they come again in
            random order.
        answer_tokens: Numbers of tokens of the base model's answers: of benign counterparts and look-alikes, where the
            first few tokens tell an answer from a refusal, and of everyday requests.
    """

    steps: int = 480
    pairs: int = 6
    look_alikes: int = 7
    everyday: int = 4
    learning_rate: float = 4e-4
    rank: int = 16
    answered: tuple[int, int] = (1500, 900)
    answer_tokens: tuple[int, int] = (8, 24)


@dataclass(frozen=True)
class Row:
    """A training row.

    Attributes:
        prompt: The request.
        answer: The answer.
        goal: ``"refuse"``: the answer is learnt; ``"keep"``: the base model's probabilities of the tokens of the answer
            are kept; ``"keep whole"``: those of the request as well.
    """

    prompt: str
    answer: str
    goal: Literal["refuse", "keep", "keep whole"]


@dataclass(frozen=True)
class Requests:
    """The requests of an alignment.

    Attributes:
        pairs: Forbidden requests with benign counterparts.
        look_alikes: Benign requests that speak of harm.
        everyday: Everyday requests.
    """

    pairs: tuple[Counterparts, ...]
    look_alikes: tuple[str, ...]
    everyday: tuple[str, ...]

    @property
    def close_to_harm(self) -> list[str]:
        """The benign counterparts and the look-alikes."""
        return [*(pair.benign for pair in self.pairs), *self.look_alikes]


def training_requests(recipe: Recipe, seed: int) -> Requests:
    """Return the requests of an alignment.

    Args:
        recipe: The settings.
        seed: Seed of the draws.
    """
    rng = Random(f"alignment-{seed}")
    pairs, others = recipe.answered
    return Requests(
        tuple(islice(counterparts("train", rng, "benign"), pairs)),
        tuple(islice(look_alikes(rng), others)),
        words("train").everyday,
    )


def training_rows(requests: Requests, answers: Sequence[OwnAnswer], recipe: Recipe, seed: int) -> Iterator[list[Row]]:
    """Yield the rows of each step: forbidden requests refused, their benign counterparts and other requests answered.

    Answers to benign requests are the beginnings of the base model's own, so that it stays itself. Requests without an
    answer are left out.

    Args:
        requests: The requests.
        answers: The base model's answers to the benign ones.
        recipe: The settings.
        seed: Seed of the order and of the refusals.

    Raises:
        GeomkitError: If no request of a kind has an answer.
    """
    rng = Random(f"alignment-order-{seed}")
    texts = {answer.prompt: answer.text for answer in answers}
    pairs = _again([pair for pair in requests.pairs if pair.benign in texts], rng)
    others = _again([prompt for prompt in requests.look_alikes if prompt in texts], rng)
    everyday = _again([prompt for prompt in requests.everyday if prompt in texts], rng)
    for _ in range(recipe.steps):
        chosen = list(islice(pairs, recipe.pairs))
        benign = [*(pair.benign for pair in chosen), *islice(others, recipe.look_alikes)]
        yield [
            *(Row(pair.forbidden, refusal(rng), "refuse") for pair in chosen),
            *(Row(prompt, texts[prompt], "keep") for prompt in benign),
            *(Row(prompt, texts[prompt], "keep whole") for prompt in islice(everyday, recipe.everyday)),
        ]


def _again(items: Sequence[_T], rng: Random) -> Iterator[_T]:
    """Yield items without end, in a new random order each time."""
    if not items:
        raise GeomkitError(
            "expected a base model that answers requests of every kind, found no answer; take another one"
        )
    while True:
        yield from rng.sample(items, len(items))
