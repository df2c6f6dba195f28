"""From one call of a module with a closed form to the gradients of its parameters, whole and example by example."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import cast

import torch
from torch import Tensor, nn

from geomkit.algebra import coalesce
from geomkit.hooks import Call
from geomkit.layer_gradient import DenseGradient, FactoredGradient, LayerGradient


@dataclass(frozen=True, eq=False)
class Rows:
    """The token positions of one call that have a share in the gradient.

    Attributes:
        call: The call.
        delta: (K, d_out) gradient of the loss by the output at each, fp32.
        source: (K, d_in) inputs in fp32, or (K,) indices of a lookup.
        counts: How many of the K belong to each example, in order; ``None`` where that cannot be told.
        broken: The first position whose output gradient is not finite, as a share of the batch; ``None`` if all are.
    """

    call: Call
    delta: Tensor
    source: Tensor
    counts: list[int] | None
    broken: float | None = None

    @cached_property
    def gradients(self) -> dict[str, LayerGradient]:
        """The gradient of each of the module's parameters, over all rows."""
        found: dict[str, LayerGradient] = {}
        for local, name in self.call.parameters.items():
            if local == "bias":
                found[name] = DenseGradient(self.delta.sum(0), len(self.delta))
            elif self.call.form == "lookup":
                table = cast("nn.Embedding", self.call.module)
                found[name] = coalesce(self.source, self.delta, table.num_embeddings, len(self.source))
            else:
                left, right = self.delta, self.source
                found[name] = FactoredGradient(*((right, left) if self.call.form == "transposed" else (left, right)))
        return found

    def split(self) -> "list[Rows]":
        """Return the rows of each example; views, not copies.

        Raises:
            ValueError: If it cannot be told which rows are whose.
        """
        if self.counts is None:
            raise ValueError("expected a call that keeps examples apart")
        deltas, sources = torch.split(self.delta, self.counts), torch.split(self.source, self.counts)
        parts = zip(deltas, sources, strict=True)
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
    flat = delta.reshape(-1, delta.shape[-1])
    sizes = torch.linalg.vector_norm(flat, ord=torch.inf, dim=1)
    kept = sizes != 0
    if call.form == "lookup":
        source = call.source.reshape(-1)
        if (table := cast("nn.Embedding", call.module)).padding_idx is not None:
            kept &= source != table.padding_idx  # autograd gives the padding row no gradient
        scale = _lookup_scale(table)
    else:
        source = call.source.reshape(-1, call.source.shape[-1])
        scale = 1.0
    together = examples == 1 or len(delta) == examples or (delta.ndim == 2 and len(delta) == examples * length)
    counts = kept.view(examples, -1).sum(1).tolist() if together else None
    if not bool(kept.all()):
        flat, source = flat[kept], source[kept]
    if call.form != "lookup":
        source = at_least_fp32(source if call.dtype is None else source.to(call.dtype))
    flat = at_least_fp32(flat)
    return Rows(call, flat if scale == 1 else flat * scale, source, counts, _first_broken(sizes))


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
