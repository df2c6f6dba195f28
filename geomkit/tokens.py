"""The token batches, with a loss mask, that are made of examples.

Only the tokens of assistant turns count in a loss; everything else is context.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from geomkit.data import Message
from geomkit.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label of a position that does not count in the loss, as in transformers."""

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


@dataclass(frozen=True)
class Batch:
    """Several examples padded to one length L, ready for a model.

    Attributes:
        input_ids: (B, L) token ids.
        attention_mask: (B, L), 1 on real tokens.
        labels: (B, L) token ids on assistant tokens, :data:`IGNORED` elsewhere.
        examples: The index of each row in the set it was made from.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    examples: tuple[int, ...]

    def to(self, device: torch.device) -> "Batch":
        """Return the same batch on a device."""
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device), self.examples)

    def single(self, row: int) -> "Batch":
        """Return one example without its padding."""
        real = self.attention_mask[row].bool()
        ids, mask, labels = (part[row][real][None] for part in (self.input_ids, self.attention_mask, self.labels))
        return Batch(ids, mask, labels, self.examples[row : row + 1])

    def inputs(self) -> dict[str, Tensor]:
        """Return what a causal model takes: ids and mask, and positions where padding on the left shifts them."""
        given = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        if bool(self.attention_mask[:, 0].all()):
            return given
        return given | {"position_ids": (self.attention_mask.cumsum(1) - 1).clamp_min(0)}


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
    if len(examples) == 0:
        raise DataError("expected at least one example, found an empty set")
    if "messages" not in examples.column_names:
        raise DataError(
            f"expected a column 'messages', found {examples.column_names}; load the set with geomkit.load_examples"
        )
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


def collate(
    rows: Sequence[Tokens],
    pad: int,
    *,
    examples: Sequence[int] | None = None,
    side: Literal["right", "left"] = "right",
    least: int = 0,
) -> Batch:
    """Pad examples to their common length.

    Args:
        rows: The examples, B of them.
        pad: The id that fills short rows.
        examples: Their indices in the set they come from; 0 to B − 1 when left out.
        side: ``"right"`` or ``"left"``: where the padding goes.
        least: Pad to at least this length.

    Returns:
        A :class:`Batch` of shape (B, L), L the longest example's length or ``least``.

    Example:
        >>> collate([Tokens((5, 6, 7), (False, False, True)), Tokens((5, 6), (False, True))], pad=0).labels
        tensor([[-100, -100,    7],
                [-100,    6, -100]])
    """
    length = max(least, *map(len, rows))
    input_ids = torch.full((len(rows), length), pad)
    attention_mask = torch.zeros((len(rows), length), dtype=torch.long)
    labels = torch.full((len(rows), length), IGNORED)
    for index, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        ids = torch.tensor(row.input_ids)
        input_ids[index, place] = ids
        attention_mask[index, place] = 1
        labels[index, place] = torch.where(torch.tensor(row.loss_mask), ids, IGNORED)
    return Batch(input_ids, attention_mask, labels, tuple(examples if examples is not None else range(len(rows))))


def plan_batches(lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """Group examples of similar length, so that little is padded.

    Args:
        lengths: Number of tokens of each example.
        tokens_per_batch: Most positions in a batch, padding included; a longer example runs alone.

    Returns:
        The examples' indices, batch by batch, the longest first: what does not fit into memory shows at once.

    Raises:
        DataError: If the budget is not positive.

    Example:
        >>> plan_batches([3, 9, 4, 5], tokens_per_batch=12)
        [[1], [3, 2], [0]]
    """
    if tokens_per_batch < 1:
        raise DataError(f"expected at least one token per batch, found {tokens_per_batch}; give e.g. 4096")
    plan: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if plan and lengths[plan[-1][0]] * (len(plan[-1]) + 1) <= tokens_per_batch:
            plan[-1].append(index)
        else:
            plan.append([index])
    return plan


def batches(rows: Sequence[Tokens], pad: int, batch_size: int) -> Iterator[Batch]:
    """Yield the examples in order, ``batch_size`` at a time, padded on the right."""
    for start in range(0, len(rows), batch_size):
        chunk = rows[start : start + batch_size]
        yield collate(chunk, pad, examples=range(start, start + len(chunk)))
