"""Batches of encoded examples: grouping of examples by length, and padding to the longest of a batch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from geomkit.inputs.tokens import Tokens
from geomkit.utils.options import check_option

IGNORED = -100
"""Label of a token that is not scored, as in transformers."""


@dataclass(frozen=True)
class Batch:
    """B examples, padded to one length L for a model.

    Attributes:
        input_ids: (B, L) token ids.
        attention_mask: (B, L), 1 on tokens and 0 on padding.
        labels: (B, L) token ids on assistant tokens, :data:`IGNORED` elsewhere.
        examples: (B,) index of each example in its set.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    examples: tuple[int, ...]

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device."""
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device), self.examples)

    def single(self, row: int) -> "Batch":
        """Return a batch of one example of this batch, without padding."""
        not_padding = self.attention_mask[row].bool()
        ids, mask, labels = (
            values[row][not_padding][None] for values in (self.input_ids, self.attention_mask, self.labels)
        )
        return Batch(ids, mask, labels, self.examples[row : row + 1])

    def inputs(self) -> dict[str, Tensor]:
        """Return a model's keyword arguments: ids and mask, and positions if padding on the left shifts them."""
        inputs = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        if bool(self.attention_mask[:, 0].all()):
            return inputs
        return inputs | {"position_ids": (self.attention_mask.cumsum(1) - 1).clamp_min(0)}


def collate(
    rows: Sequence[Tokens],
    pad: int,
    *,
    examples: Sequence[int] | None = None,
    side: Literal["right", "left"] = "right",
    min_length: int = 0,
) -> Batch:
    """Return examples as one batch, padded to a common length.

    Args:
        rows: B examples.
        pad: Id of the token that fills short rows.
        examples: Index of each example in its set; 0 to B − 1 when left out.
        side: Side of the padding, ``"right"`` or ``"left"``.
        min_length: Smallest padded length.

    Returns:
        A batch of shape (B, L), where L is the length of the longest example or ``min_length``.

    Example:
        >>> collate([Tokens((5, 6, 7), (False, False, True)), Tokens((5, 6), (False, True))], pad=0).labels
        tensor([[-100, -100,    7],
                [-100,    6, -100]])
    """
    length = max(min_length, *map(len, rows))
    input_ids = torch.full((len(rows), length), pad)
    attention_mask = torch.zeros((len(rows), length), dtype=torch.long)
    labels = torch.full((len(rows), length), IGNORED)
    for index, row in enumerate(rows):
        columns = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        ids = torch.tensor(row.input_ids)
        input_ids[index, columns] = ids
        attention_mask[index, columns] = 1
        labels[index, columns] = torch.where(torch.tensor(row.loss_mask), ids, IGNORED)
    return Batch(input_ids, attention_mask, labels, tuple(examples if examples is not None else range(len(rows))))


def plan_batches(lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """Return groups of examples of similar length, so that batches have little padding.

    Args:
        lengths: (N,) number of tokens of each example.
        tokens_per_batch: Largest number of token positions in a batch, padding included; a longer example is alone.

    Returns:
        Indices of the examples, batch by batch, the longest first: a lack of memory shows in the first batch.

    Raises:
        DataError: If ``tokens_per_batch`` is no positive number.

    Example:
        >>> plan_batches([3, 9, 4, 5], tokens_per_batch=12)
        [[1], [3, 2], [0]]
    """
    check_option("tokens_per_batch", tokens_per_batch)
    plan: list[list[int]] = []
    for index in longest_first(lengths):
        if plan and lengths[plan[-1][0]] * (len(plan[-1]) + 1) <= tokens_per_batch:
            plan[-1].append(index)
        else:
            plan.append([index])
    return plan


def longest_first(lengths: Sequence[int]) -> list[int]:
    """Return the indices of examples by their length, the longest first.

    Example:
        >>> longest_first([3, 9, 4, 9])
        [1, 3, 2, 0]
    """
    return sorted(range(len(lengths)), key=lambda index: -lengths[index])


def batches(rows: Sequence[Tokens], pad: int, batch_size: int) -> Iterator[Batch]:
    """Yield batches of examples in order, padded on the right.

    Args:
        rows: The examples.
        pad: Id of the token that fills short rows.
        batch_size: Number of examples in a batch; the last batch may have fewer.
    """
    for start in range(0, len(rows), batch_size):
        chunk = rows[start : start + batch_size]
        yield collate(chunk, pad, examples=range(start, start + len(chunk)))
