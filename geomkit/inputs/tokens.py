"""Examples as tokens, with a loss mask.

Only the tokens of assistant turns count in a loss; everything else is context.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args, overload

from geomkit.errors import DataError
from geomkit.inputs.examples import Message, check_examples

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

AssistantMask = Literal["template", "prefix"]

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Tokens:
    """One example as tokens.

    Attributes:
        input_ids: Token ids, length T.
        loss_mask: Whether each token is the assistant's, length T.
    """

    input_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.input_ids)

    @property
    def loss_tokens(self) -> int:
        """The number of tokens a causal model is scored on: assistant tokens, never the first position."""
        return sum(self.loss_mask[1:])


def encode(
    tokenizer: "PreTrainedTokenizerBase",
    examples: "Dataset",
    *,
    assistant_mask: AssistantMask = "template",
    max_length: int | None = None,
) -> list[Tokens]:
    """Render conversations with the chat template and mark the assistant's tokens.

    Args:
        tokenizer: A tokenizer with a chat template.
        examples: Rows with a column ``messages``.
        assistant_mask: ``"template"`` reads the template's ``{% generation %}`` markers. ``"prefix"`` serves
            templates without them: a turn's tokens are those that the rendering gains by it. It is exact when the
            rendering of a conversation starts with the rendering of its beginning, which is checked.
        max_length: Cut longer examples to this many tokens, from the right.

    Returns:
        One :class:`Tokens` per example.

    Raises:
        DataError: If there is no example, no chat template, no marker in it, or an example without a single
            assistant token to take a loss on.
    """
    encode_one = _encoder(tokenizer, examples, assistant_mask, max_length)
    return [encode_one(index, messages) for index, messages in enumerate(examples["messages"])]


@dataclass(frozen=True, eq=False)
class EncodedExamples(Sequence[Tokens]):
    """A set as tokens, of which only the lengths are kept: an example is encoded again when it is asked for.

    Attributes:
        examples: The rows.
        lengths: Number of tokens of each.
        encode_one: Encodes a row, given its index and its messages.
    """

    examples: "Dataset"
    lengths: tuple[int, ...]
    encode_one: Callable[[int, list[Message]], Tokens]

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> Tokens: ...

    @overload
    def __getitem__(self, index: slice) -> list[Tokens]: ...

    def __getitem__(self, index: int | slice) -> Tokens | list[Tokens]:
        """Encode one example, or several."""
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        return self.encode_one(index, self.examples[index]["messages"])


def encode_lazily(
    tokenizer: "PreTrainedTokenizerBase",
    examples: "Dataset",
    *,
    assistant_mask: AssistantMask = "template",
    max_length: int | None = None,
    seen: Callable[[Tokens], None] = lambda _: None,
) -> EncodedExamples:
    """Encode every example once to check it, and keep no more than its length.

    Encoding twice costs little beside a backward pass, and a bad example is found before hours of work.

    Args:
        tokenizer: See :func:`encode`, as for the errors.
        examples: See :func:`encode`.
        assistant_mask: See :func:`encode`.
        max_length: See :func:`encode`.
        seen: Called with each example's tokens, in order.
    """
    encode_one = _encoder(tokenizer, examples, assistant_mask, max_length)
    lengths = []
    for index, messages in enumerate(examples["messages"]):
        tokens = encode_one(index, messages)
        seen(tokens)
        lengths.append(len(tokens))
    return EncodedExamples(examples, tuple(lengths), encode_one)


def lengths_of(rows: Sequence[Tokens]) -> Sequence[int]:
    """Return each example's number of tokens, without encoding it again."""
    return rows.lengths if isinstance(rows, EncodedExamples) else [len(row) for row in rows]


def _encoder(
    tokenizer: "PreTrainedTokenizerBase", examples: "Dataset", assistant_mask: AssistantMask, max_length: int | None
) -> Callable[[int, list[Message]], Tokens]:
    check_examples(examples)
    if assistant_mask not in get_args(AssistantMask):
        raise DataError(f"expected the mask {' or '.join(get_args(AssistantMask))}, found {assistant_mask!r}")
    render = _renderer(tokenizer, assistant_mask)

    def encode_one(index: int, messages: list[Message]) -> Tokens:
        try:
            ids, mask = render(messages)
        except DataError as error:
            raise DataError(f"example {index}: {error}") from None
        tokens = Tokens(tuple(ids[:max_length]), tuple(mask[:max_length]))
        if tokens.loss_tokens == 0:
            cut = f" within the first {max_length} tokens" if max_length else ""
            raise DataError(
                f"example {index}: expected assistant tokens to take the loss on, found none{cut} "
                f"({len(ids)} tokens, all masked); raise max_length or drop the example"
            )
        return tokens

    return encode_one


def _renderer(tokenizer: "PreTrainedTokenizerBase", assistant_mask: AssistantMask) -> Any:
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        raise DataError(
            f"expected a tokenizer with a chat template, found none on '{tokenizer.name_or_path}'; "
            "use an instruction-tuned model or set tokenizer.chat_template"
        )
    if assistant_mask == "prefix":
        return lambda messages: _render_by_prefix(tokenizer, messages)
    if not _GENERATION_MARK.search(tokenizer.get_chat_template()):
        raise DataError(
            "expected a chat template that marks the assistant's tokens with {% generation %}, found no marker; "
            'add them, or derive the mask from prefixes with assistant_mask="prefix" (--assistant-mask prefix)'
        )
    if not tokenizer.is_fast:
        raise DataError(
            f"expected a fast tokenizer, which knows where its tokens stand, found {type(tokenizer).__name__}; "
            'derive the mask from prefixes with assistant_mask="prefix" (--assistant-mask prefix)'
        )
    return lambda messages: _render_by_template(tokenizer, messages)


def _render_by_template(tokenizer: "PreTrainedTokenizerBase", messages: list[Message]) -> tuple[list[int], list[bool]]:
    """Mark the tokens between the template's markers.

    The tokenizer's own mask runs on to the conversation's end, over later users' words, where the last character
    between two markers is one that the tokenizer drops, such as a space.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, spans = render_jinja_template(
        conversations=[messages],
        chat_template=tokenizer.get_chat_template(),
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    rendered = tokenizer(texts[0], add_special_tokens=False, return_offsets_mapping=True)
    mask = [False] * len(rendered["input_ids"])
    for first, end in spans[0]:
        inside = [place for place, (low, high) in enumerate(rendered["offset_mapping"]) if low < end and high > first]
        if inside:
            mask[inside[0] : inside[-1] + 1] = [True] * (inside[-1] + 1 - inside[0])
    return list(rendered["input_ids"]), mask


def _render_by_prefix(tokenizer: "PreTrainedTokenizerBase", messages: list[Message]) -> tuple[list[int], list[bool]]:
    whole: list[int] = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    mask = [False] * len(whole)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if turn == 0:
            raise DataError("expected a message before the assistant's first, which prefixes start from, found none")
        before = tokenizer.apply_chat_template(
            messages[:turn], tokenize=True, return_dict=True, add_generation_prompt=True
        )["input_ids"]
        after = tokenizer.apply_chat_template(messages[: turn + 1], tokenize=True, return_dict=True)["input_ids"]
        if whole[: len(before)] != before or whole[: len(after)] != after:
            raise DataError(
                "the chat template renders the beginning of a conversation differently from the whole, so prefixes "
                "cannot tell the assistant's tokens; add {% generation %} markers to the template"
            )
        mask[len(before) : len(after)] = [True] * (len(after) - len(before))
    return whole, mask


def pad_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return the id that fills short rows.

    Raises:
        DataError: If the tokenizer names no pad token.
    """
    if tokenizer.pad_token_id is None:
        raise DataError(
            f"expected a tokenizer with a pad token, found none on '{tokenizer.name_or_path}'; set "
            "tokenizer.pad_token = tokenizer.eos_token (--pad-token TOKEN on the command line)"
        )
    return int(tokenizer.pad_token_id)
