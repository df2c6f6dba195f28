"""Control sets: examples that share with a safety set what its gradient should not be about.

Each takes one explanation of a safety gradient on: the words of the refusal (:func:`with_responses` under benign
prompts), the forbidden prompts (:func:`with_responses` with answers that obey), words that are in place though the
exchange makes no sense (:func:`shuffled_pairs`), the mere number of tokens (:func:`random_tokens`), and a loss that is
small because the model would say just that (:func:`own_responses`).
"""

from collections import defaultdict
from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING

from geomkit.errors import DataError
from geomkit.inputs.examples import check_examples, prompt_of, response_of
from geomkit.inputs.tokens import EncodedExamples, as_encoded

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_ATTEMPTS = 50


def with_responses(prompts: "Dataset", responses: "Dataset") -> "Dataset":
    """Put the responses of one set under the prompts of another.

    Benign requests with the safety set's refusals have its wording and its loss tokens, but nothing forbidden: what a
    safety gradient shows beyond theirs is not due to the refusal's text.

    Args:
        prompts: The conversations whose beginnings are kept, N of them.
        responses: The conversations whose last assistant messages are taken, in turn.

    Returns:
        N conversations in one column, ``messages``.

    Raises:
        DataError: If a set is empty or no ``Dataset`` of conversations.

    Example:
        >>> import geomkit as gk
        >>> control = with_responses(gk.load_examples("scenarios/affirmative"), gk.load_examples("safety"))
        >>> [message["content"] for message in control[0]["messages"]]
        ['Could you explain how to cover this mirror?', "I'm sorry, but I can't help with that."]
    """
    check_examples(prompts)
    check_examples(responses)
    return replace_answers(prompts, [response_of(messages) for messages in responses["messages"]])


def shuffled_pairs(examples: "Dataset", seed: int = 0) -> "Dataset":
    """Deal the responses anew, so that every prompt is answered with words that belong to another.

    Prompts and responses stay what they are; what a gradient owes to their belonging together is gone.

    Args:
        examples: N conversations, no response in more than half of them: where all answers are one refusal, dealing
            them anew changes nothing.
        seed: Seed of the deal.

    Returns:
        N conversations in one column, ``messages``, in the order of the prompts.

    Raises:
        DataError: If one response stands in more than half of the conversations, or there are none.

    Example:
        >>> import geomkit as gk
        >>> rows = gk.load_examples("utility").select(range(3))
        >>> [messages[-1]["content"][:6] for messages in rows["messages"]]
        ['19+51:', 'SELECT', 'Sure! ']
        >>> [messages[-1]["content"][:6] for messages in shuffled_pairs(rows)["messages"]]
        ['Sure! ', '19+51:', 'SELECT']
    """
    check_examples(examples)
    responses = [response_of(messages) for messages in examples["messages"]]
    return replace_answers(examples, derangement(responses, Random(seed)))


def random_tokens(
    examples: "Dataset | EncodedExamples", tokenizer: "PreTrainedTokenizerBase", seed: int = 0
) -> "Dataset":
    """Replace the text of every message by words drawn at random that take just as many tokens.

    Every example keeps its length, its turns and the places of its loss: what a gradient owes to these alone remains.
    The words are tokens of letters, all equally likely, as the tokenizer has them in the middle of a text.

    Args:
        examples: N conversations.
        tokenizer: A tokenizer with a chat template.
        seed: Seed of the draws.

    Returns:
        N conversations in one column, ``messages``.

    Raises:
        DataError: If the tokenizer has no such words, or no draw had the tokens of an example.

    Example:
        >>> import geomkit as gk
        >>> _, tokenizer = gk.load_organism()
        >>> rows = gk.load_examples("safety").select(range(1))
        >>> drawn = random_tokens(rows, tokenizer)
        >>> [gk.encode(tokenizer, examples).lengths for examples in (rows, drawn)]
        [(23,), (23,)]
    """
    from datasets import Dataset

    wanted = as_encoded(tokenizer, examples)
    words, generator = _Words(tokenizer), Random(seed)
    rows = []
    for place, (messages, tokens) in enumerate(zip(wanted.examples["messages"], wanted, strict=True)):
        lengths = [len(words.ids(message["content"])) for message in messages]
        for _ in range(_ATTEMPTS):
            drawn = [
                {"role": message["role"], "content": words.draw(length, generator)}
                for message, length in zip(messages, lengths, strict=True)
            ]
            found = wanted.like(Dataset.from_list([{"messages": drawn}]))
            if found[0].loss_mask == tokens.loss_mask:
                break
        else:
            raise DataError(
                f"example {place}: expected random words with its {len(tokens)} tokens, found none in {_ATTEMPTS} "
                "draws; drop the example, or its turns may be rendered in a way that depends on their text"
            )
        rows.append({"messages": drawn})
    return Dataset.from_list(rows)


def derangement(responses: Sequence[str], generator: Random) -> list[str]:
    """Deal responses so that no place keeps the text it had.

    Places with one text are put side by side in random order, then all texts move on by as many places as the most
    frequent one has: whatever stands there is another.

    Args:
        responses: N texts, none more than N/2 times.
        generator: Source of randomness.

    Raises:
        DataError: If one text is more frequent than that.
    """
    places = defaultdict(list)
    for place, response in enumerate(responses):
        places[response].append(place)
    most = max(map(len, places.values()))
    if 2 * most > len(responses):
        raise DataError(
            f"expected responses that differ, found one text in {most} of {len(responses)} examples; put others under "
            "these prompts with geomkit.with_responses first"
        )
    groups = sorted(places.values())
    generator.shuffle(groups)
    order = [place for group in groups for place in generator.sample(group, len(group))]
    dealt = [""] * len(responses)
    for here, other in zip(order, [*order[most:], *order[:most]], strict=True):
        dealt[here] = responses[other]
    return dealt


def replace_answers(prompts: "Dataset", answers: Sequence[str]) -> "Dataset":
    """Return the conversations with their last assistant message replaced by the answers, taken in turn."""
    from datasets import Dataset

    return Dataset.from_list(
        [
            {"messages": [*prompt_of(messages), {"role": "assistant", "content": answers[index % len(answers)]}]}
            for index, messages in enumerate(prompts["messages"])
        ]
    )


class _Words:
    """The tokens of letters that a text can be made of: those that may open it, and those that may go on with it."""

    _OPENING = "a"

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        texts = {tokenizer.decode([token]).strip() for token in range(len(tokenizer))}
        letters = sorted(text for text in texts if text.isalpha())
        before = len(self.ids(self._OPENING))
        self._first = [word for word in letters if len(self.ids(word)) == 1]
        self._next = [word for word in letters if len(self.ids(f"{self._OPENING} {word}")) == before + 1]
        if not self._first or not self._next:
            raise DataError(
                f"expected a tokenizer with tokens that are words, found none on '{tokenizer.name_or_path}'; "
                "take another control"
            )

    def ids(self, text: str) -> list[int]:
        """Encode a text without anything around it."""
        found: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    def draw(self, length: int, generator: Random) -> str:
        """Draw a text of so many tokens."""
        if not length:
            return ""
        return " ".join([generator.choice(self._first), *generator.choices(self._next, k=length - 1)])
