"""Encoding of examples as token ids, with the mask of the tokens that the loss is taken on.

The loss is taken on the tokens of assistant turns; all other tokens are context.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, get_args, overload

import numpy as np

from geomkit.errors import DataError
from geomkit.inputs.examples import Message, check_examples

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

AssistantMask = Literal["template", "prefix"]
"""How the assistant's tokens are recognised, see :func:`encode`."""

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Tokens:
    """An example as tokens.

    Attributes:
        input_ids: (T,) token ids.
        loss_mask: (T,) whether a token belongs to an assistant turn.
    """

    input_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.input_ids)

    @property
    def loss_tokens(self) -> int:
        """Number of scored tokens: the assistant's tokens, without the first position, which no model predicts."""
        return sum(self.loss_mask[1:])


@dataclass(frozen=True, eq=False)
class EncodedExamples(Sequence[Tokens]):
    """Examples that :func:`encode` has checked: a sequence of :class:`Tokens`, encoded again at every access.

    Only the numbers of tokens are kept in memory, so that a large set needs little. Every function of geomkit that
    takes examples as a ``Dataset`` also takes encoded examples.

    Attributes:
        tokenizer: The tokenizer that encoded the examples.
        examples: N rows with a column ``messages``.
        chat_template: The tokenizer's chat template when the examples were encoded.
        assistant_mask: How assistant tokens are recognised, see :func:`encode`.
        max_length: Number of tokens that longer examples are cut to; ``None`` for no cut.
        lengths: (N,) number of tokens of each example.
        fingerprint: SHA-256 digest of all token ids and loss masks, in hexadecimal.
    """

    tokenizer: "PreTrainedTokenizerBase" = field(repr=False)
    examples: "Dataset"
    chat_template: object = field(repr=False)
    assistant_mask: AssistantMask
    max_length: int | None
    lengths: tuple[int, ...] = field(repr=False)
    fingerprint: str

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> Tokens: ...

    @overload
    def __getitem__(self, index: slice) -> "EncodedExamples": ...

    def __getitem__(self, index: int | slice) -> "Tokens | EncodedExamples":
        """Return an example, or the encoded examples of a slice."""
        if isinstance(index, slice):
            return self.select(range(len(self))[index])
        place = range(len(self))[index]
        return self._encode_one(place, self.examples[place]["messages"])

    def __iter__(self) -> Iterator[Tokens]:
        """Yield the examples in order."""
        for index, messages in enumerate(self.examples["messages"]):
            yield self._encode_one(index, messages)

    def select(self, indices: Iterable[int]) -> "EncodedExamples":
        """Return the examples with these indices, which count from the end if they are negative.

        Raises:
            DataError: If there is no index, or no example with an index.
        """
        wanted = list(indices)
        if not wanted or any(not -len(self) <= index < len(self) for index in wanted):
            raise DataError(f"expected indices of {len(self)} examples, found {wanted}; choose among these")
        return self.like(self.examples.select([range(len(self))[index] for index in wanted]))

    def like(self, examples: "Dataset") -> "EncodedExamples":
        """Return other examples, encoded with the tokenizer and the settings of these examples."""
        return encode(self.tokenizer, examples, assistant_mask=self.assistant_mask, max_length=self.max_length)

    def __getstate__(self) -> dict[str, object]:
        """Return the fields, without the renderer that belongs to this process."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @cached_property
    def _encode_one(self) -> Callable[[int, list[Message]], Tokens]:
        return _encoder(self.tokenizer, self.assistant_mask, self.max_length)


def encode(
    tokenizer: "PreTrainedTokenizerBase",
    examples: "Dataset | EncodedExamples",
    *,
    assistant_mask: AssistantMask = "template",
    max_length: int | None = None,
) -> EncodedExamples:
    """Return conversations as tokens: rendered with the chat template, with a mask of the assistant's tokens.

    Every function of geomkit that takes examples encodes them with the defaults of this function. Call it to choose
    other settings, or to encode examples once for several functions. All examples are encoded here once to check them.

    Args:
        tokenizer: Tokenizer with a chat template.
        examples: N rows with a column ``messages``; :func:`geomkit.load_examples` makes them.
        assistant_mask: ``"template"`` reads the ``{% generation %}`` markers of the chat template. ``"prefix"`` is for
            templates without these markers: the tokens of a turn are the tokens by which the rendering with the turn
            is longer than the rendering before the turn. This needs a template whose rendering of a conversation starts
            with the rendering of its first turns, which is checked.
        max_length: Number of tokens that longer examples are cut to, at their end; ``None`` for no cut.

    Returns:
        The N examples as a sequence of :class:`Tokens`.

    Raises:
        DataError: If there is no example, the tokenizer has no chat template, the template has no markers, an example
            has no scored token, or ``max_length`` is no positive number.

    Example:
        >>> import geomkit as gk
        >>> model, tokenizer = gk.load_organism()
        >>> rows = gk.encode(tokenizer, gk.load_examples("safety"), max_length=40).select(range(2))
        >>> rows.lengths, rows[0].loss_tokens
        ((23, 33), 13)
    """
    conversations = conversations_of(examples)
    check_examples(conversations)
    encode_one = _encoder(tokenizer, assistant_mask, max_length)
    lengths = []

    def rows() -> Iterator[Tokens]:
        for index, messages in enumerate(conversations["messages"]):
            row = encode_one(index, messages)
            lengths.append(len(row))
            yield row

    fingerprint = tokens_fingerprint(rows())
    template = tokenizer.chat_template
    return EncodedExamples(tokenizer, conversations, template, assistant_mask, max_length, tuple(lengths), fingerprint)


def tokens_fingerprint(rows: Iterable[Tokens]) -> str:
    """Return the SHA-256 digest of the token ids and loss masks of all examples, in order, in hexadecimal.

    Example:
        >>> tokens_fingerprint([Tokens((5, 6, 7), (False, False, True))])[:8]
        'b5adc5c0'
    """
    digest = hashlib.sha256()
    for row in rows:
        # The length first: otherwise two short examples would have the digest of one long example.
        digest.update(len(row).to_bytes(8, "little"))
        digest.update(np.asarray(row.input_ids, dtype="<i8").tobytes())
        digest.update(np.asarray(row.loss_mask, dtype="u1").tobytes())
    return digest.hexdigest()


def encode_at_once(tokenizer: "PreTrainedTokenizerBase", conversations: Sequence[list[Message]]) -> list[Tokens]:
    """Return conversations as a list of tokens in memory, encoded with the defaults of :func:`encode`."""
    encode_one = _encoder(tokenizer, "template", None)
    return [encode_one(index, messages) for index, messages in enumerate(conversations)]


def as_encoded(tokenizer: "PreTrainedTokenizerBase", examples: "Dataset | EncodedExamples") -> EncodedExamples:
    """Return examples as encoded examples; a ``Dataset`` is encoded with the defaults of :func:`encode`.

    Raises:
        DataError: If the examples cannot be encoded, or were encoded with another vocabulary or chat template.
    """
    if not isinstance(examples, EncodedExamples):
        return encode(tokenizer, examples)
    other = examples.tokenizer
    if examples.chat_template != tokenizer.chat_template:
        difference = "another chat template"
    elif other is not tokenizer and other.get_vocab() != tokenizer.get_vocab():
        difference = f"another vocabulary, of '{other.name_or_path}'"
    else:
        return examples
    raise DataError(
        f"expected examples encoded as the tokenizer of '{tokenizer.name_or_path}' does now, found {difference}; "
        "encode them with this tokenizer again"
    )


def conversations_of(examples: "Dataset | EncodedExamples") -> "Dataset":
    """Return the conversations of examples as a ``Dataset``, whether the examples are encoded or not."""
    return examples.examples if isinstance(examples, EncodedExamples) else examples


def lengths_of(rows: Sequence[Tokens]) -> Sequence[int]:
    """Return the number of tokens of each example, without encoding encoded examples again."""
    return rows.lengths if isinstance(rows, EncodedExamples) else [len(row) for row in rows]


def _encoder(
    tokenizer: "PreTrainedTokenizerBase", assistant_mask: AssistantMask, max_length: int | None
) -> Callable[[int, list[Message]], Tokens]:
    if assistant_mask not in get_args(AssistantMask):
        raise DataError(
            f"expected the mask {' or '.join(get_args(AssistantMask))}, found {assistant_mask!r}; give one of these"
        )
    if max_length is not None and (not isinstance(max_length, int) or max_length < 1):
        raise DataError(f"expected a positive number of tokens, found max_length={max_length!r}; give e.g. 512")
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
    """Return token ids and the mask of the tokens between the markers of the template.

    The mask of ``tokenizer.apply_chat_template`` is wrong if the tokenizer drops the last character between two
    markers, such as a space: the mask then marks all tokens up to the end of the conversation, also the user's.
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
        offsets = enumerate(rendered["offset_mapping"])
        inside = [token for token, (low, high) in offsets if low < end and high > first]
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
            raise DataError(
                "expected a message before the assistant's first, which prefixes start from, found none; drop the row"
            )
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
    """Return the id of the token that fills short rows.

    Raises:
        DataError: If the tokenizer has no pad token.
    """
    if tokenizer.pad_token_id is None:
        raise DataError(
            f"expected a tokenizer with a pad token, found none on '{tokenizer.name_or_path}'; set "
            "tokenizer.pad_token = tokenizer.eos_token (--pad-token TOKEN on the command line)"
        )
    return int(tokenizer.pad_token_id)
