"""From one call of a module with a closed form to the gradients of its parameters, whole and example by example."""

from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from torch import Tensor, nn

from geomkit.algebra import coalesce
from geomkit.collection.hooks import Call
from geomkit.collection.layout import layout
from geomkit.forms import DenseGradient, FactoredGradient
from geomkit.layer_gradient import LayerGradient


@dataclass(frozen=True, eq=False)
class Rows:
    """The token positions of one call.

    Attributes:
        call: The call.
        delta: (N, d_out) gradient of the loss by the output at each position, fp32 or better.
        source: (N, d_in) inputs in the same type, or (N,) indices of a lookup.
        runs: Where the positions that have a share in the gradient are, one run for each example, in order.
        apart: Whether there is a run for each example; otherwise there is one run, of who knows whose positions.
        certain: Whether that is beyond doubt, see :func:`geomkit.collection.layout.layout`.
        broken: The first position whose output gradient is not finite, as a share of the batch; ``None`` if all are.
    """

    call: Call
    delta: Tensor
    source: Tensor
    runs: list[slice]
    apart: bool
    certain: bool
    broken: float | None

    @cached_property
    def whole(self) -> dict[str, LayerGradient]:
        """The gradient of each of the module's parameters, over all runs."""
        return self._gradients(*self._compact)

    def split(self) -> list[dict[str, LayerGradient]]:
        """Return the gradients of each example.

        Their factors are views: of the compact rows where these were made, so that nothing is kept twice, and of the
        module's input otherwise, so that modules with the same input share its memory.

        Raises:
            ValueError: If it cannot be told which positions are whose.
        """
        if not self.apart:
            raise ValueError("expected a call that keeps examples apart")
        if "_compact" not in vars(self):
            return [self._gradients(self.delta[run], self.source[run]) for run in self.runs]
        counts = [run.stop - run.start for run in self.runs]
        parts = zip(*(torch.split(values, counts) for values in self._compact), strict=True)
        return [self._gradients(delta, source) for delta, source in parts]

    @cached_property
    def _compact(self) -> tuple[Tensor, Tensor]:
        if sum(run.stop - run.start for run in self.runs) == len(self.delta):
            return self.delta, self.source
        return torch.cat([self.delta[run] for run in self.runs]), torch.cat([self.source[run] for run in self.runs])

    def _gradients(self, delta: Tensor, source: Tensor) -> dict[str, LayerGradient]:
        found: dict[str, LayerGradient] = {}
        for local, name in self.call.parameters.items():
            if local == "bias":
                found[name] = DenseGradient(delta.sum(0), len(delta))
            elif self.call.form == "lookup":
                found[name] = coalesce(source, delta, cast("nn.Embedding", self.call.module).num_embeddings, len(delta))
            elif self.call.form == "transposed":
                found[name] = FactoredGradient(source, delta)
            else:
                found[name] = FactoredGradient(delta, source)
        return found


def rows_of(call: Call, delta: Tensor, examples: int, length: int) -> Rows:
    """Take a call apart into token positions.

    Positions whose output gradient is zero (padding, tokens after the last scored one) are left out of the runs, so
    that their number bounds the rank.

    Args:
        call: A call of a module with a closed form.
        delta: Gradient of the loss by its output, (B, …, d_out) or (B · L, d_out).
        examples: B, the batch size.
        length: L, the padded length.
    """
    how = layout(delta.shape, examples, length)
    deltas = delta.reshape(-1, delta.shape[-1])
    sizes = deltas.abs().amax(1)
    live = sizes != 0
    deltas = at_least_fp32(deltas)
    if call.form == "lookup":
        table = cast("nn.Embedding", call.module)
        sources, scale = call.source.reshape(-1), _lookup_scale(table)
        deltas = deltas if scale == 1 else deltas * scale
        if table.padding_idx is not None:
            live &= sources != table.padding_idx  # autograd gives the padding row no gradient
    else:
        sources = call.source.reshape(-1, call.source.shape[-1])
        sources = at_least_fp32(sources if call.dtype is None else sources.to(call.dtype))
    runs = _runs(live.view(1 if how == "mixed" else examples, -1))
    if runs is None:
        index = live.nonzero().squeeze(1)
        deltas, sources = deltas.index_select(0, index), sources.index_select(0, index)
        runs = _following(live.view(1 if how == "mixed" else examples, -1).sum(1).tolist())
    return Rows(call, deltas, sources, runs, how != "mixed", how == "certain", _first_broken(sizes))


def _runs(live: Tensor) -> list[slice] | None:
    """Return where the one run of live positions of each example is among all, if it is one."""
    starts, counts = live.int().argmax(1), live.sum(1)
    places = torch.arange(live.shape[1], device=live.device)
    run = (places >= starts[:, None]) & (places < (starts + counts)[:, None])
    if not torch.equal(run, live):
        return None
    firsts = (starts + torch.arange(len(live), device=live.device) * live.shape[1]).tolist()
    return [slice(first, first + count) for first, count in zip(firsts, counts.tolist(), strict=True)]


def _following(counts: list[int]) -> list[slice]:
    ends = torch.tensor(counts).cumsum(0).tolist()
    return [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]


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
