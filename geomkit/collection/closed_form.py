"""From one call of a module with a closed form to the gradients of its parameters, whole and example by example."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from geomkit.collection.hooks import Call
from geomkit.gradients.dense import DenseGradient
from geomkit.gradients.factored import FactoredGradient
from geomkit.gradients.indexed import coalesce
from geomkit.gradients.layer_gradient import LayerGradient
from geomkit.utils.precision import at_least_fp32


@dataclass(frozen=True, eq=False)
class ClosedFormGradients:
    """The token positions of one call.

    Attributes:
        call: The call.
        delta: (N, d_out) gradient of the loss by the output at each position, fp32 or better.
        source: (N, d_in) inputs in the same type, or (N,) indices of a lookup.
        image: (N, d_out) what the weight made of the inputs, if that was kept.
        runs: Where the positions that have a share in the gradient are, one run for each example, in order.
        apart: Whether there is a run for each example; otherwise there is one run, of who knows whose positions.
        certain: Whether that is beyond doubt, see :func:`geomkit.collection.closed_form.layout`.
        broken: The first example with an input or output gradient that is not finite, −1 if who knows whose it is;
            ``None`` if all are finite.
    """

    call: Call
    delta: Tensor
    source: Tensor
    image: Tensor | None
    runs: list[slice]
    apart: bool
    certain: bool
    broken: int | None

    @cached_property
    def whole(self) -> dict[str, LayerGradient]:
        """The gradient of each of the module's parameters, over all runs."""
        return self._gradients(*self._compact)

    @property
    def product(self) -> Tensor | None:
        """⟨W, G⟩ = Σ_t ⟨W r_t, l_t⟩ of the weight and its gradient, 0-d, fp64; ``None`` without an image."""
        if self.image is None:
            return None
        parts = [(self.image[run] * self.delta[run]).sum(dtype=torch.float64) for run in self.runs]
        return torch.stack(parts).sum()

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
        live = sum(run.stop - run.start for run in self.runs)
        if live == len(self.delta):
            return self.delta, self.source
        if len(self.runs) == 1 and 2 * live >= len(self.delta):  # a view keeps the rest alive, which is little here
            return self.delta[self.runs[0]], self.source[self.runs[0]]
        return torch.cat([self.delta[run] for run in self.runs]), torch.cat([self.source[run] for run in self.runs])

    def _gradients(self, delta: Tensor, source: Tensor) -> dict[str, LayerGradient]:
        found: dict[str, LayerGradient] = {}
        for local, name in self.call.parameters.items():
            if local == "bias":
                found[name] = DenseGradient(delta.sum(0), len(delta))
            elif _is_lookup(self.call):
                found[name] = coalesce(source, delta, cast("nn.Embedding", self.call.module).num_embeddings, len(delta))
            elif self.call.form == "transposed":
                found[name] = FactoredGradient(source, delta)
            else:
                found[name] = FactoredGradient(delta, source)
        return found


def closed_form_gradients(call: Call, delta: Tensor, examples: int, length: int) -> ClosedFormGradients:
    """Take a call apart into token positions.

    Positions whose output gradient is zero (padding, tokens after the last scored one) are left out of the runs, so
    that their number bounds the rank.

    Args:
        call: A call of a module with a closed form.
        delta: Gradient of the loss by its output, (B, …, d_out) or (B · L, d_out).
        examples: B, the batch size.
        length: L, the padded length.
    """
    how = layout(delta, examples, length)
    deltas = _positions(delta)
    sizes = deltas.abs().amax(1)
    live = sizes != 0
    deltas = at_least_fp32(deltas)
    if _is_lookup(call):
        table = cast("nn.Embedding", call.module)
        sources = call.source.reshape(-1)
        deltas = deltas * _lookup_scale(table) if call.form == "scaled lookup" else deltas
        if table.padding_idx is not None:
            live &= sources != table.padding_idx  # autograd gives the padding row no gradient
    else:
        sources = _positions(call.source)
        # Autocast leaves fp64 alone.
        rounded = call.dtype is not None and sources.dtype != torch.float64
        sources = at_least_fp32(sources.to(call.dtype) if rounded else sources)
    groups = 1 if how == "mixed" else examples
    broken = _first_broken(sizes, sources, groups)
    image = call.product_as_made()
    images = None if image is None else _positions(image)
    known = live.view(groups, -1).cpu().numpy()
    runs = _runs(known) if known.size else [slice(0, 0)] * groups
    if runs is None:
        index = torch.from_numpy(known.ravel().nonzero()[0]).to(deltas.device)
        deltas, sources = deltas.index_select(0, index), sources.index_select(0, index)
        images = None if images is None else images.index_select(0, index)
        runs = _following(known.sum(1))
    unknown = how == "mixed" and broken is not None
    return ClosedFormGradients(
        call, deltas, sources, images, runs, how != "mixed", how == "certain", -1 if unknown else broken
    )


def _positions(value: Tensor) -> Tensor:
    return value.reshape(math.prod(value.shape[:-1]), value.shape[-1])


def _runs(live: np.ndarray) -> list[slice] | None:
    """Return where the one run of live positions of each example is among all, if it is one."""
    runs = []
    for place, own in enumerate(live):
        said = own.tobytes()  # searched much faster than an array of a few numbers
        first, count = max(said.find(1), 0), said.count(1)
        if count and said.rfind(1) + 1 - first != count:
            return None
        runs.append(slice(place * len(own) + first, place * len(own) + first + count))
    return runs


def _following(counts: np.ndarray) -> list[slice]:
    ends = counts.cumsum()
    return [slice(start, end) for start, end in zip((ends - counts).tolist(), ends.tolist(), strict=True)]


def _first_broken(sizes: Tensor, sources: Tensor, groups: int) -> int | None:
    # A sum that is finite has finite parts only, and takes one look at them.
    if math.isfinite(float(sizes.sum() + sources.sum())):
        return None
    broken = ~torch.isfinite(sizes) | ((sizes != 0) & ~torch.isfinite(sources.reshape(len(sizes), -1)).all(1))
    return int(broken.nonzero()[0]) * groups // len(broken) if bool(broken.any()) else None


def _lookup_scale(table: nn.Embedding) -> float:
    """Return what a scaled embedding multiplies its rows by, rounded as the module rounds it."""
    return float(torch.as_tensor(table.embed_scale).to(table.weight.dtype))


def _is_lookup(call: Call) -> bool:
    return call.form in {"lookup", "scaled lookup"}


Layout = Literal["certain", "doubtful", "mixed"]


def layout(value: Tensor, examples: int, length: int) -> Layout:
    """Tell how sure it is that a tensor holds the first example, then the second, and so on.

    Args:
        value: An input or output of some module; the last dimension of numbers that are no indices is features.
        examples: B, the batch size; not equal to the length, unless it is 1.
        length: L, the padded length.

    Returns:
        ``"certain"`` where only the first dimension has the batch's size and another has the length's; ``"doubtful"``
        where the size fits but another order would have it too, as with all positions in one dimension; ``"mixed"``
        where the examples are not apart, or it is tokens that happen to be as many as the examples.

    Example:
        >>> import torch
        >>> [layout(torch.zeros(shape), 2, 7) for shape in ((2, 7, 64), (14, 64), (7, 2, 64), (2, 64))]
        ['certain', 'doubtful', 'mixed', 'mixed']
    """
    shape = value.shape[:-1] if value.is_floating_point() or value.is_complex() else value.shape
    if examples == 1 or (shape.count(examples) == 1 == shape[:1].count(examples) and length in shape[1:]):
        return "certain"
    if shape[:1] == (examples * length,) or (shape[:1] == (examples,) and len(shape) > 1):
        return "doubtful"
    return "mixed"
