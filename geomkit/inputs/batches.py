"""Batches of token rows: which examples go together, and how they are padded."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from geomkit.errors import DataError
from geomkit.inputs.tokens import Tokens

IGNORED = -100
"""Label of a position that does not count in the loss, as in transformers."""


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


def collate(
    rows: Sequence[Tokens],
    pad: int,
    *,
    examples: Sequence[int] | None = None,
    side: Literal["right", "left"] = "right",
    min_length: int = 0,
) -> Batch:
    """Pad examples to their common length.

    Args:
        rows: The examples, B of them.
        pad: The id that fills short rows.
        examples: Their indices in the set they come from; 0 to B − 1 when left out.
        side: ``"right"`` or ``"left"``: where the padding goes.
        min_length: Pad to at least this length.

    Returns:
        A :class:`Batch` of shape (B, L), L the longest example's length or ``min_length``.

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
