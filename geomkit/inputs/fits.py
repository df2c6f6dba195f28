"""Check that examples fit a model: token ids within its embedding, and rows within its positions.

An id beyond the embedding or a row beyond learned positions ends in an ``IndexError`` without a word on the example,
and on a GPU in the loss of the process. The check runs before the first forward pass.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from torch import nn

from geomkit.errors import DataError
from geomkit.inputs.parameters import unwrapped_model
from geomkit.inputs.tokens import EncodedExamples, Tokens, as_encoded, pad_id

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_LOGGER = logging.getLogger(__name__)

_BEYOND = 8
"""Multiple of the stated positions above which a row is refused."""

_RESERVED = 2
"""Rows that some tables of positions (OPT's) have beyond the largest number of tokens."""


def encoded_for(
    model: nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    examples: "Dataset | EncodedExamples",
    progress: bool = False,
) -> tuple[EncodedExamples, int]:
    """Return examples as encoded examples that a model can run, and the id of the token that fills short rows.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        examples: N rows with a column ``messages``, or the same from :func:`geomkit.encode`.
        progress: Show a bar, if encoding takes longer than five seconds.

    Raises:
        DataError: If the examples cannot be encoded, the tokenizer has no pad token, or a token id or a number of
            tokens is beyond what the model can take.
    """
    rows, pad = as_encoded(tokenizer, examples, progress), pad_id(tokenizer)
    refuse_unfit(model, rows, pad)
    return rows, pad


def refuse_unfit(model: nn.Module, rows: Sequence[Tokens], pad: int | None = None, *, what: str = "example") -> None:
    """Refuse token ids beyond the embedding of a model, and rows longer than its positions.

    Rows longer than ``max_position_embeddings`` of a model whose positions are computed, such as rotary ones, run, but
    the model was not made for them; these are logged.

    Args:
        model: A causal language model; one whose embedding or positions cannot be told is let pass.
        rows: The examples.
        pad: Id of the token that fills short rows, if rows are to be filled.
        what: What a row is, for the message.

    Raises:
        DataError: If there is such an id or row.
    """
    model = unwrapped_model(model)
    _refuse_unknown_ids(model, rows, pad, what)
    lengths = rows.lengths if isinstance(rows, EncodedExamples) else [len(row) for row in rows]
    longest = max(range(len(lengths)), key=lengths.__getitem__, default=None)
    if longest is not None:
        check_length(model, lengths[longest], f"{what} {longest}")


def _refuse_unknown_ids(model: nn.Module, rows: Sequence[Tokens], pad: int | None, what: str) -> None:
    """Refuse token ids beyond the embedding of a model.

    Raises:
        DataError: If there is such an id.
    """
    size = vocabulary_size(model)
    if size is None:
        return
    # Encoding again takes time, and is needed only if the tokenizer has an id that is too large.
    known = rows.tokenizer.get_vocab().values() if isinstance(rows, EncodedExamples) else None
    if known is None or max(known, default=0) >= size:
        for index, row in enumerate(rows):
            if (worst := max(row.input_ids, default=0)) >= size:
                raise DataError(_unknown_id(f"{what} {index}", worst, size))
    if pad is not None and pad >= size:
        raise DataError(_unknown_id("the pad token", pad, size))


def _unknown_id(where: str, token: int, size: int) -> str:
    return (
        f"{where}: expected token ids below {size}, the rows of the model's embedding, found {token}; give the model "
        "the rows with model.resize_token_embeddings(len(tokenizer)), or take the tokenizer that belongs to it"
    )


def check_length(model: nn.Module, length: int, where: str) -> None:
    """Refuse a number of tokens beyond a model's positions, or log one beyond what the model was made for.

    Args:
        model: A causal language model.
        length: Number of tokens.
        where: Which row has them, for the message.

    Raises:
        DataError: If the positions are stored in a table, which has no entry for the last tokens, or there are many
            times more tokens than the model was made for: its attention would not fit into memory.
    """
    if (limit := position_limit(model)) is not None and length > limit:
        raise DataError(
            f"{where}: expected at most {limit} tokens, as many as the model has positions, found {length}; cut the "
            f"examples with geomkit.encode(…, max_length={limit}) (--max-length {limit}), or drop it"
        )
    if (limit := stated_positions(model)) is not None and length > _BEYOND * limit:
        raise DataError(
            f"{where}: expected at most {_BEYOND} times the {limit} tokens that the model was made for, found {length}"
            f"; cut the examples with geomkit.encode(…, max_length={limit}) (--max-length {limit}), or drop it"
        )
    if limit is not None and length > limit:
        _LOGGER.warning(
            "%s has %d tokens, more than the %d that the model was made for; cut with max_length=%d (--max-length %d)",
            where, length, limit, limit, limit,
        )  # fmt: skip


def vocabulary_size(model: nn.Module) -> int | None:
    """Return the number of token ids that a model's input embedding knows; ``None`` if that cannot be told."""
    get = getattr(model, "get_input_embeddings", None)
    try:
        embedding = get() if get is not None else None
    except (NotImplementedError, AttributeError):
        return None
    size = getattr(embedding, "num_embeddings", None)
    if size is None and (weight := getattr(embedding, "weight", None)) is not None and weight.ndim == 2:
        size = len(weight)
    return int(size) if size else None


def stated_positions(model: nn.Module) -> int | None:
    """Return the largest number of tokens that a model's configuration states; ``None`` if it states none."""
    config = getattr(model, "config", None)
    for part in (config, getattr(config, "text_config", None)):
        for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
            if isinstance(limit := getattr(part, name, None), int) and limit > 0:
                return limit
    return None


def position_limit(model: nn.Module) -> int | None:
    """Return the largest number of tokens that a model can run; ``None`` if its positions are computed.

    Positions that are looked up in a table, as GPT-2's, have an end. The table is an embedding or a buffer that is
    named after positions and has as many rows as the configuration states positions, or a few more.
    """
    stated = stated_positions(model)
    if stated is None:
        return None
    if getattr(model.config, "model_type", None) == "mpt":  # its biases are a table that is made at each run
        return stated
    usable = [entries - reserved for entries, reserved in _tables(model) if 0 <= entries - stated <= _RESERVED]
    return min([stated, *usable]) if usable else None


def _tables(model: nn.Module) -> Iterator[tuple[int, int]]:
    """Yield the number of rows of every table of positions, and of those the number that no position gets."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and _of_positions(name):
            # Those of RoBERTa begin after the padding's, those of OPT after an offset.
            padding = -1 if module.padding_idx is None else module.padding_idx
            yield module.num_embeddings, max(padding + 1, getattr(module, "offset", 0))
    for name, buffer in model.named_buffers():
        if buffer.ndim == 2 and _of_positions(name):
            yield len(buffer), 0


def _of_positions(name: str) -> bool:
    return "pos" in name.rpartition(".")[2].lower() or name.endswith("wpe")
