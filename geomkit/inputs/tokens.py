"""Encoding of examples as token ids, with the mask of the tokens that the loss is taken on.

The loss is taken on the tokens of assistant turns; all other tokens are context.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal, get_args, overload

import numpy as np

from geomkit.errors import DataError
from geomkit.inputs.answer_spans import TurnMarks, answer_spans, turn_marks
from geomkit.inputs.examples import check_examples, in_python
from geomkit.inputs.marked_spans import check_marked_spans
from geomkit.inputs.messages import Conversation, Message, conversation, conversations
from geomkit.inputs.templates import ChatTemplate
from geomkit.inputs.token_spans import check_spans, mask_of_spans
from geomkit.utils.arguments import as_python, is_whole
from geomkit.utils.options import check_options
from geomkit.utils.progress import with_bar

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

AssistantMask = Literal["auto", "template", "prefix"]
"""How the assistant's tokens are recognised, see :func:`encode`."""


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
        row = self.examples[place]
        return self._encode_one(place, conversation(row["messages"], row.get("tools")))

    def __iter__(self) -> Iterator[Tokens]:
        """Yield the examples in order."""
        for index, row in enumerate(conversations(self.examples)):
            yield self._encode_one(index, row)

    def select(self, indices: Iterable[int]) -> "EncodedExamples":
        """Return the examples with these indices, which count from the end if they are negative.

        Raises:
            DataError: If there is no index, or no example with an index.
        """
        wanted = [as_python(index) for index in indices] if isinstance(indices, Iterable) else []
        if not wanted or not all(is_whole(index, -len(self)) and index < len(self) for index in wanted):
            raise DataError(
                f"expected indices of {len(self)} examples, found {wanted or indices!r:.200}; choose among these (of a "
                "mask, give the places that are true)"
            )
        return self.like(self.examples.select([range(len(self))[index] for index in wanted]))

    def like(self, examples: "Dataset") -> "EncodedExamples":
        """Return other examples, encoded with the tokenizer and the settings of these examples."""
        return encode(
            self.tokenizer, examples, assistant_mask=self.assistant_mask, max_length=self.max_length, progress=False
        )

    def __getstate__(self) -> dict[str, object]:
        """Return the fields, without the renderer that belongs to this process."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @cached_property
    def _encode_one(self) -> "_Encoder":
        return _Encoder(self.tokenizer, self.assistant_mask, self.max_length)


def encode(
    tokenizer: "PreTrainedTokenizerBase",
    examples: "Dataset | EncodedExamples",
    *,
    assistant_mask: AssistantMask = "auto",
    max_length: int | None = None,
    progress: bool = True,
) -> EncodedExamples:
    """Return conversations as tokens: rendered with the chat template, with a mask of the assistant's tokens.

    Every function of geomkit that takes examples encodes them with the defaults of this function. Call it to choose
    other settings, or to encode examples once for several functions. All examples are encoded here once to check them.

    Args:
        tokenizer: Tokenizer with a chat template.
        examples: N rows with a column ``messages`` and, if the assistant calls tools, ``tools``;
            :func:`geomkit.load_examples` makes them.
        assistant_mask: ``"template"`` reads the ``{% generation %}`` markers of the chat template. ``"prefix"`` is for
            templates without these markers: an answer begins where the rendering of its prompt ends, and ends with
            the template's end-of-turn token. Each row is checked: the tokens of the prompt are the first tokens of the
            conversation, and the scored tokens spell the answer and the end of the turn. ``"auto"`` takes the markers
            where the template has them, else prefixes, and the log says so once.
        max_length: Number of tokens that longer examples are cut to, at their end; ``None`` for no cut.
        progress: Show a bar, if it takes longer than five seconds.

    Returns:
        The N examples as a sequence of :class:`Tokens`.

    Raises:
        DataError: If there is no example, the tokenizer has no chat template, the template has no markers, an example
            has no scored token, or ``max_length`` is no positive number. Also if the template refuses an example, or
            does not write one of its messages, tools, tool calls or thoughts.

    Note:
        A message of the assistant with ``"weight": 0`` or ``"train": false`` is context. A template that writes
        today's date is given a fixed date in its place, so that a run can be resumed on another day.

    Example:
        >>> import geomkit as gk
        >>> model, tokenizer = gk.load_organism()
        >>> rows = gk.encode(tokenizer, gk.load_examples("safety"), max_length=40).select(range(2))
        >>> rows.lengths, rows[0].loss_tokens
        ((23, 33), 13)
    """
    unencoded = conversations_of(examples)
    check_examples(unencoded)
    encode_one = _Encoder(tokenizer, assistant_mask, max_length)
    lengths = []

    def rows() -> Iterator[Tokens]:
        every = with_bar(conversations(unencoded), "encode", "example", progress, total=len(unencoded))
        for index, row in enumerate(every):
            tokens = encode_one(index, row, check=True)
            lengths.append(len(tokens))
            yield tokens

    fingerprint = tokens_fingerprint(rows())
    template = tokenizer.chat_template
    return EncodedExamples(tokenizer, unencoded, template, encode_one.mask, max_length, tuple(lengths), fingerprint)


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


def encode_at_once(tokenizer: "PreTrainedTokenizerBase", rows: Sequence[list[Message]]) -> list[Tokens]:
    """Return conversations as a list of tokens in memory, encoded with the defaults of :func:`encode`."""
    encode_one = _Encoder(tokenizer, "auto", None)
    return [encode_one(index, conversation(messages), check=True) for index, messages in enumerate(rows)]


def encode_prompts(
    tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[Sequence[Message]], tools: Sequence[object] | None = None
) -> list[list[int]]:
    """Return the token ids of prompts, which end where the assistant is to begin, as :func:`encode` renders them.

    Args:
        tokenizer: Tokenizer with a chat template.
        prompts: Conversations that end before a message of the assistant.
        tools: Tools of each conversation, as in the column ``tools``; none when left out.

    Raises:
        DataError: If a prompt is empty, or the template refuses or does not write a message or a tool.
    """
    template = ChatTemplate(tokenizer)
    encoded = []
    for index, messages in enumerate(prompts):
        try:
            if not messages:
                raise DataError("expected a message to answer, found none; drop the example")
            row = conversation(list(messages), tools[index] if tools is not None else None)
            text = template.render(row, prompt=True)
            template.check(replace(row, scored=(False,) * len(row.scored)), text, prompt=True)
        except DataError as error:
            raise DataError(f"prompt {index}: {error}") from None
        encoded.append(list(tokenizer(text, add_special_tokens=False)["input_ids"]))
    return encoded


def as_encoded(
    tokenizer: "PreTrainedTokenizerBase", examples: "Dataset | EncodedExamples", progress: bool = False
) -> EncodedExamples:
    """Return examples as encoded examples; a ``Dataset`` is encoded with the defaults of :func:`encode`.

    Raises:
        DataError: If the examples cannot be encoded, or were encoded with another vocabulary or chat template.
    """
    if not isinstance(examples, EncodedExamples):
        return encode(tokenizer, examples, progress=progress)
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
    """Return the conversations of examples as a ``Dataset`` of Python's values, encoded or not, in any format."""
    if isinstance(examples, EncodedExamples):
        return examples.examples
    return in_python(examples)


def lengths_of(rows: Sequence[Tokens]) -> Sequence[int]:
    """Return the number of tokens of each example, without encoding encoded examples again."""
    return rows.lengths if isinstance(rows, EncodedExamples) else [len(row) for row in rows]


def fingerprint_of(rows: Sequence[Tokens]) -> str:
    """Return :func:`tokens_fingerprint` of examples, without encoding encoded examples again."""
    return rows.fingerprint if isinstance(rows, EncodedExamples) else tokens_fingerprint(rows)


class _Encoder:
    """Encodes conversations with the chat template of a tokenizer."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", mask: AssistantMask, max_length: int | None) -> None:
        if mask not in get_args(AssistantMask):
            raise DataError(
                f"expected the mask {', '.join(get_args(AssistantMask))}, found {mask!r}; give one of these"
            )
        check_options({"max_length": max_length})
        self._template = ChatTemplate(tokenizer)
        self._tokenizer, self._max_length = tokenizer, max_length
        marked = self._template.has_markers() and tokenizer.is_fast
        if mask == "template" and not marked:
            raise DataError(_why_not_marked(tokenizer))
        self.mask: AssistantMask = mask if mask != "auto" else "template" if marked else "prefix"
        self._tell = mask == "auto" and self.mask == "prefix"

    @cached_property
    def _marks(self) -> TurnMarks:
        """What the template writes around an answer; read when the first conversation needs it."""
        marks = turn_marks(self._template)
        if self._tell:
            end = f"the end of its turn, {marks.end!r}" if marks.end else "no end of its turn: the template writes none"
            self._template.tell(
                "the chat template has no {% generation %} markers: the loss is taken on the text behind each prompt, "
                f"which is the answer and {end}"
            )
        return marks

    def __call__(self, index: int, row: Conversation, *, check: bool = False) -> Tokens:
        """Return the tokens of a conversation; ``check`` also checks that the template left nothing out.

        Raises:
            DataError: If the conversation cannot be encoded, with its index.
        """
        try:
            tokens, total = self._encoded(row, check)
        except DataError as error:
            raise DataError(f"example {index}: {error}") from None
        if tokens.loss_tokens == 0:
            cut = f" within the first {self._max_length} tokens" if self._max_length else ""
            raise DataError(
                f"example {index}: expected assistant tokens to take the loss on, found none{cut} "
                f"({total} tokens, all masked); raise max_length or drop the example"
            )
        return tokens

    def _encoded(self, row: Conversation, check: bool) -> tuple[Tokens, int]:
        if not any(row.scored):
            found = "none" if all(message["role"] != "assistant" for message in row.messages) else "weight 0 on all"
            raise DataError(f"expected an assistant message to take the loss on, found {found}; give answers")
        by_markers = self.mask == "template" and self._template.has_markers(row.tools)
        text, spans = self._marked_spans(row) if by_markers else answer_spans(self._template, self._marks, row)
        chosen = [span for span in spans if span is not None]
        ids, mask = mask_of_spans(self._tokenizer, text, chosen)
        if check:
            self._template.check(row, text)
        if check and by_markers:
            check_marked_spans(self._template, row, text, chosen)
        elif check:
            check_spans(self._tokenizer, text, chosen, ids, mask)
        return Tokens(tuple(ids[: self._max_length]), tuple(mask[: self._max_length])), len(ids)

    def _marked_spans(self, row: Conversation) -> tuple[str, list[tuple[int, int]]]:
        """Return the text of a conversation, and the spans between markers without those of weight 0."""
        text, spans = self._template.render_marked(row)
        turns = [
            scored for message, scored in zip(row.messages, row.scored, strict=True) if message["role"] == "assistant"
        ]
        if all(turns):
            return text, spans
        if len(spans) != len(turns):
            raise DataError(
                f"expected markers around each of {len(turns)} answers, whose weights differ, found {len(spans)} "
                'markers; use assistant_mask="prefix" (--assistant-mask prefix)'
            )
        return text, [span for span, scored in zip(spans, turns, strict=True) if scored]


def _why_not_marked(tokenizer: "PreTrainedTokenizerBase") -> str:
    advice = 'derive the mask from prefixes with assistant_mask="prefix" (--assistant-mask prefix)'
    if tokenizer.is_fast:
        return (
            "expected a chat template that marks the assistant's tokens with {% generation %}, found no marker; add "
            f"them, or {advice}"
        )
    return f"expected a fast tokenizer, which knows where its tokens stand, found {type(tokenizer).__name__}; {advice}"


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
