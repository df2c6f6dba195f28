"""From one call of a module with a closed form to the gradients of its parameters, whole and example by example."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import cast

import torch
from torch import Tensor, nn

from geomkit.algebra import coalesce
from geomkit.hooks import Call
from geomkit.layer_gradient import DenseGradient, FactoredGradient, LayerGradient
from geomkit.layout import layout


@dataclass(frozen=True, eq=False)
class Rows:
    """The token positions of one call that have a share in the gradient.

    Attributes:
        call: The call.
        delta: (K, d_out) gradient of the loss by the output at each, fp32 or better.
        source: (K, d_in) inputs in the same type, or (K,) indices of a lookup.
        counts: How many of the K belong to each example, in order; ``None`` where that cannot be told.
        certain: Whether the counts are beyond doubt, see :func:`geomkit.layout.layout`.
        broken: The first position whose output gradient is not finite, as a share of the batch; ``None`` if all are.
    """

    call: Call
    delta: Tensor
    source: Tensor
    counts: list[int] | None
    certain: bool = True
    broken: float | None = None

    @cached_property
    def gradients(self) -> dict[str, LayerGradient]:
        """The gradient of each of the module's parameters, over all rows."""
        return {name: self._gradient(local) for local, name in self.call.parameters.items()}

    def _gradient(self, local: str) -> LayerGradient:
        if local == "bias":
            return DenseGradient(self.delta.sum(0), len(self.delta))
        if self.call.form == "lookup":
            table = cast("nn.Embedding", self.call.module)
            return coalesce(self.source, self.delta, table.num_embeddings, len(self.source))
        if self.call.form == "transposed":
            return FactoredGradient(self.source, self.delta)
        return FactoredGradient(self.delta, self.source)

    def split(self) -> "list[Rows]":
        """Return the rows of each example; views, not copies.

        Raises:
            ValueError: If it cannot be told which rows are whose.
        """
        if self.counts is None:
            raise ValueError("expected a call that keeps examples apart")
        parts = zip(torch.split(self.delta, self.counts), torch.split(self.source, self.counts), strict=True)
        return [replace(self, delta=delta, source=source, counts=[len(delta)]) for delta, source in parts]


def rows_of(call: Call, delta: Tensor, examples: int, length: int) -> Rows:
    """Take a call apart into token positions.

    Positions whose output gradient is zero (padding, tokens after the last scored one) are dropped, so that their
    number bounds the rank.

    Args:
        call: A call of a module with a closed form.
        delta: Gradient of the loss by its output, (B, …, d_out) or (B · L, d_out).
        examples: B, the batch size.
        length: L, the padded length.
    """
    deltas = delta.reshape(-1, delta.shape[-1])
    sizes = deltas.abs().amax(1)
    live = sizes != 0
    sources, scale = call.source, 1.0
    if call.form == "lookup":
        table = cast("nn.Embedding", call.module)
        sources, scale = sources.reshape(-1), _lookup_scale(table)
        if table.padding_idx is not None:
            live &= sources != table.padding_idx  # autograd gives the padding row no gradient
    else:
        sources = sources.reshape(-1, sources.shape[-1])
        sources = at_least_fp32(sources if call.dtype is None else sources.to(call.dtype))
    deltas = at_least_fp32(deltas)
    deltas = deltas if scale == 1 else deltas * scale
    how = layout(delta.shape, examples, length)
    counts = None if how == "mixed" else live.view(examples, -1).sum(1).tolist()
    return Rows(call, *_kept((deltas, sources), live, counts), counts, how == "certain", _first_broken(sizes))


def _kept(values: tuple[Tensor, Tensor], live: Tensor, counts: list[int] | None) -> tuple[Tensor, Tensor]:
    """Take the live rows; where they are one run in each example, as a copy of runs, which is faster than by index."""
    if bool(live.all()):
        return values
    if counts is not None:
        grid = live.view(len(counts), -1)
        starts = grid.int().argmax(1).tolist()
        runs = [slice(start, start + count) for start, count in zip(starts, counts, strict=True)]
        if all(bool(row[run].all()) for row, run in zip(grid, runs, strict=True)):
            first, second = (value.view(len(counts), grid.shape[1], *value.shape[1:]) for value in values)
            return (
                torch.cat([row[run] for row, run in zip(first, runs, strict=True)]),
                torch.cat([row[run] for row, run in zip(second, runs, strict=True)]),
            )
    index = live.nonzero().squeeze(1)
    return values[0].index_select(0, index), values[1].index_select(0, index)


def at_least_fp32(values: Tensor) -> Tensor:
    """Return the values in fp32, or in fp64 if they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _first_broken(sizes: Tensor) -> float | None:
    if bool(torch.isfinite(sizes).all()):
        return None
    return int(torch.nonzero(~torch.isfinite(sizes))[0]) / len(sizes)


def _lookup_scale(table: nn.Embedding) -> float:
    """Return what a scaled embedding multiplies its rows by, rounded as the module rounds it."""
    scale = getattr(table, "embed_scale", 1.0)
    return float(torch.as_tensor(scale).to(table.weight.dtype))
