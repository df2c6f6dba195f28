"""Control sets: examples that have one property of a safety set, but not its harmful request with a refusal.

A safety gradient may have its properties for reasons other than safety. A control set keeps one such reason:

- the words of the refusal: :func:`with_responses`, with benign prompts and the refusals of the safety set;
- the harmful prompts: :func:`with_responses`, with the safety prompts and answers that comply;
- the texts, without prompt and response belonging together: :func:`shuffled_pairs`;
- the numbers of tokens: :func:`random_tokens`;
- a small loss, because the model itself wrote the responses: :func:`geomkit.own_responses`.
"""

from collections import defaultdict
from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING

from geomkit.errors import DataError
from geomkit.inputs.examples import check_examples, prompt_of, required_final_answer, tools_of
from geomkit.inputs.tokens import EncodedExamples, as_encoded, conversations_of

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_ATTEMPTS = 50
"""Largest number of draws of random words for one example."""


def with_responses(prompts: "Dataset | EncodedExamples", responses: "Dataset | EncodedExamples") -> "Dataset":
    """Return the prompts of one set with the responses of another.

    Benign prompts with the refusals of a safety set have the wording and the loss tokens of the safety set, but no
    harmful request. A property of the safety gradient that this control lacks is not due to the text of the refusals.

    Args:
        prompts: N conversations, whose answers are replaced, or requests without answers.
        responses: Conversations whose last assistant messages are used in turn, and again from the first if there are
            fewer than N.

    Returns:
        N conversations in one column, ``messages``, and their tools if they have any.

    Raises:
        DataError: If a set is empty or is not a ``Dataset`` of conversations, or one of the responses is missing.

    Example:
        >>> import geomkit as gk
        >>> control = with_responses(gk.load_examples("scenarios/affirmative"), gk.load_examples("safety"))
        >>> [message["content"] for message in control[0]["messages"]]
        ['Could you explain how to cover this mirror?', "I'm sorry, but I can't help with that."]
    """
    asked, answered = conversations_of(prompts), conversations_of(responses)
    check_examples(asked)
    check_examples(answered)
    return replace_answers(asked, _answers(answered))


def shuffled_pairs(examples: "Dataset | EncodedExamples", seed: int = 0) -> "Dataset":
    """Return the conversations with their responses permuted, so that no prompt keeps its response text.

    Prompts and responses stay the same texts; only their belonging together is lost.

    Args:
        examples: N conversations. No response text may be in more than half of them, because a permutation of equal
            responses changes nothing.
        seed: Seed of the permutation.

    Returns:
        N conversations in one column, ``messages``, in the order of the prompts.

    Raises:
        DataError: If one response text is in more than half of the conversations, or the set is empty.

    Example:
        >>> import geomkit as gk
        >>> rows = gk.load_examples("utility").select(range(3))
        >>> [messages[-1]["content"][:6] for messages in rows["messages"]]
        ['19+51:', 'SELECT', 'Sure! ']
        >>> [messages[-1]["content"][:6] for messages in shuffled_pairs(rows)["messages"]]
        ['Sure! ', '19+51:', 'SELECT']
    """
    conversations = conversations_of(examples)
    check_examples(conversations)
    return replace_answers(conversations, derangement(_answers(conversations), Random(seed)))


def random_tokens(
    examples: "Dataset | EncodedExamples", tokenizer: "PreTrainedTokenizerBase", seed: int = 0
) -> "Dataset":
    """Return the conversations with the text of every message replaced by random words of as many tokens.

    Every example keeps its number of tokens, its turns and its loss mask; a property that a gradient then still has is
    due to these alone. The words are drawn uniformly from the tokens of the tokenizer that consist of letters.

    Args:
        examples: N conversations.
        tokenizer: Tokenizer with a chat template.
        seed: Seed of the draws.

    Returns:
        N conversations in one column, ``messages``.

    Raises:
        DataError: If the tokenizer has no tokens that are words, or an example gets another number of tokens in every
            draw.

    Example:
        >>> import geomkit as gk
        >>> _, tokenizer = gk.load_organism()
        >>> rows = gk.load_examples("safety").select(range(1))
        >>> drawn = random_tokens(rows, tokenizer)
        >>> [gk.encode(tokenizer, examples).lengths for examples in (rows, drawn)]
        [(23,), (23,)]
    """
    from datasets import Dataset

    encoded = as_encoded(tokenizer, examples)
    words, generator = _Words(tokenizer), Random(seed)
    rows = []
    for index, (messages, tokens) in enumerate(zip(encoded.examples["messages"], encoded, strict=True)):
        if any(message.get("tool_calls") for message in messages):
            raise DataError(f"example {index}: expected messages of text only, found tool calls; drop the example")
        lengths = [len(words.ids(message["content"])) for message in messages]
        # Words may merge into other tokens at their borders: draw again until the loss mask is the example's loss mask.
        for _ in range(_ATTEMPTS):
            drawn = [
                message | {"content": words.draw(length, generator)}
                for message, length in zip(messages, lengths, strict=True)
            ]
            candidate = encoded.like(Dataset.from_list([{"messages": drawn}]))
            if candidate[0].loss_mask == tokens.loss_mask:
                break
        else:
            raise DataError(
                f"example {index}: expected random words with its {len(tokens)} tokens, found none in {_ATTEMPTS} "
                "draws; drop the example, or its turns may be rendered in a way that depends on their text"
            )
        rows.append({"messages": drawn})
    return Dataset.from_list(rows)


def derangement(responses: Sequence[str], generator: Random) -> list[str]:
    """Return the responses in a random order in which no place has the text that it had before (a derangement).

    Args:
        responses: N texts; no text occurs more than N/2 times.
        generator: Source of randomness.

    Raises:
        DataError: If a text occurs more than N/2 times.
    """
    places = defaultdict(list)
    for place, response in enumerate(responses):
        places[response].append(place)
    largest = max(map(len, places.values()))
    if 2 * largest > len(responses):
        raise DataError(
            f"expected responses that differ, found one text in {largest} of {len(responses)} examples; put other "
            "responses under these prompts with geomkit.with_responses first"
        )
    # 1. Order the places so that equal texts are neighbours: the texts in random order, and the places of each text.
    groups = sorted(places.values())
    generator.shuffle(groups)
    order = [place for group in groups for place in generator.sample(group, len(group))]
    # 2. Shift all texts along this order by the size of the largest group: every text leaves the group of its equals.
    permuted = [""] * len(responses)
    for place, source in zip(order, [*order[largest:], *order[:largest]], strict=True):
        permuted[place] = responses[source]
    return permuted


def replace_answers(prompts: "Dataset", answers: Sequence[str]) -> "Dataset":
    """Return the conversations with their answers replaced by other answers, which are used in turn."""
    from datasets import Dataset

    messages = [
        [*prompt_of(row), {"role": "assistant", "content": answers[index % len(answers)]}]
        for index, row in enumerate(prompts["messages"])
    ]
    tools = tools_of(prompts)
    return Dataset.from_dict({"messages": messages} | ({} if tools is None else {"tools": list(tools)}))


def _answers(examples: "Dataset") -> list[str]:
    """Return the texts with which the conversations end.

    Raises:
        DataError: If a conversation does not end in an answer.
    """
    answers = []
    for index, messages in enumerate(examples["messages"]):
        try:
            answers.append(required_final_answer(messages))
        except DataError as error:
            raise DataError(f"example {index}: {error}") from None
    return answers


class _Words:
    """Words of a single token: words that are one token at the start of a text, and words that are one after a word."""

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
        """Return the token ids of a text, without special tokens."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def draw(self, length: int, generator: Random) -> str:
        """Return a random text of ``length`` tokens, up to merges of its words."""
        if not length:
            return ""
        return " ".join([generator.choice(self._first), *generator.choices(self._next, k=length - 1)])
