"""Gradients of a module with a closed form, from its input and output gradient: of the batch, and of each example.

For a linear layer y_t = W x_t with output gradients δ_t = ∂loss/∂y_t, the gradient is G = Σ_t δ_t x_tᵀ, a sum over
token positions t: with the rows δ_t in L and x_t in R it is LᵀR. An example's gradient is the same sum over its own
positions.
"""

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
    """The token positions of a call, from which the gradients of the module's parameters follow.

    Attributes:
        call: The call.
        deltas: (N, d_out) gradient of the loss with respect to the output at each position, fp32 or fp64.
        inputs: (N, d_in) input at each position in the same dtype, or (N,) row numbers of a lookup.
        outputs: (N, d_out) output W x at each position, if it was stored.
        runs: Positions with a non-zero share in the gradient, as one run for each example, in order.
        separable: Whether there is a run for each example; otherwise all positions are in one run.
        certain: Whether the order of the examples is beyond doubt, see :func:`example_order`.
        first_broken: First example whose input or output gradient is not finite; −1 if the example is not known, and
            ``None`` if all are finite.
    """

    call: Call
    deltas: Tensor
    inputs: Tensor
    outputs: Tensor | None
    runs: list[slice]
    separable: bool
    certain: bool
    first_broken: int | None

    @cached_property
    def summed(self) -> dict[str, LayerGradient]:
        """Gradient of each parameter of the module, summed over all examples."""
        return self._gradients(*self._compact)

    @property
    def weight_product(self) -> Tensor | None:
        """⟨W, G⟩ = Σ_t ⟨W x_t, δ_t⟩ of a weight and its gradient, 0-d, fp64; ``None`` if outputs were not stored."""
        if self.outputs is None:
            return None
        parts = [(self.outputs[run] * self.deltas[run]).sum(dtype=torch.float64) for run in self.runs]
        return torch.stack(parts).sum()

    def split(self) -> list[dict[str, LayerGradient]]:
        """Return the gradients of each example, by parameter.

        The factors are views, so that no number is stored twice: views of the compact rows if these exist, otherwise of
        the module's input, whose memory modules with the same input then share.

        Raises:
            ValueError: If the examples are not separable.
        """
        if not self.separable:
            raise ValueError("expected a call that keeps examples apart")
        if "_compact" not in vars(self):
            return [self._gradients(self.deltas[run], self.inputs[run]) for run in self.runs]
        counts = [run.stop - run.start for run in self.runs]
        parts = zip(*(torch.split(values, counts) for values in self._compact), strict=True)
        return [self._gradients(deltas, inputs) for deltas, inputs in parts]

    @cached_property
    def _compact(self) -> tuple[Tensor, Tensor]:
        """Output gradients and inputs of the positions in all runs."""
        live = sum(run.stop - run.start for run in self.runs)
        if live == len(self.deltas):
            return self.deltas, self.inputs
        # A view keeps the memory of the other positions, too, which is accepted if these are the smaller part.
        if len(self.runs) == 1 and 2 * live >= len(self.deltas):
            return self.deltas[self.runs[0]], self.inputs[self.runs[0]]
        return torch.cat([self.deltas[run] for run in self.runs]), torch.cat([self.inputs[run] for run in self.runs])

    def _gradients(self, deltas: Tensor, inputs: Tensor) -> dict[str, LayerGradient]:
        """Return the gradient of each parameter, summed over the given positions."""
        gradients: dict[str, LayerGradient] = {}
        for local, name in self.call.parameters.items():
            if local == "bias":  # Σ_t δ_t
                gradients[name] = DenseGradient(deltas.sum(0), len(deltas))
            elif _is_lookup(self.call):  # δ_t in the row that was looked up
                size = cast("nn.Embedding", self.call.module).num_embeddings
                gradients[name] = coalesce(inputs, deltas, size, len(deltas))
            elif self.call.form == "transposed":  # Σ_t x_t δ_tᵀ
                gradients[name] = FactoredGradient(inputs, deltas)
            else:  # Σ_t δ_t x_tᵀ
                gradients[name] = FactoredGradient(deltas, inputs)
        return gradients


def closed_form_gradients(call: Call, delta: Tensor, batch_size: int, length: int) -> ClosedFormGradients:
    """Return the token positions of a call, from which its gradients follow.

    Positions whose output gradient is zero (padding, tokens after the last scored token) are not in the runs, so that
    the number of positions bounds the rank.

    Args:
        call: A call of a module with a closed form.
        delta: Gradient of the loss with respect to the output, (B, …, d_out) or (B · L, d_out).
        batch_size: B.
        length: L, the padded length.
    """
    # 1. One row per position: δ_t, and the input x_t as the module used it.
    order = example_order(delta, batch_size, length)
    deltas = _positions(delta)
    sizes = torch.maximum(deltas.amax(1), -deltas.amin(1))  # max |δ|, without a copy of the size of the deltas
    live = sizes != 0
    deltas = at_least_fp32(deltas)
    if _is_lookup(call):
        table = cast("nn.Embedding", call.module)
        inputs = call.tensor_input.reshape(-1)
        deltas = deltas * _lookup_scale(table) if call.form == "scaled lookup" else deltas
        if table.padding_idx is not None:
            live &= inputs != table.padding_idx  # autograd gives the row of the padding token no gradient
    else:
        inputs = _positions(call.tensor_input)
        # Autocast rounds the input of a linear layer, but leaves fp64 as it is.
        rounds_inputs = call.autocast_dtype is not None and inputs.dtype != torch.float64
        inputs = at_least_fp32(inputs.to(call.autocast_dtype) if rounds_inputs else inputs)
    # 2. The live positions of each example. Usually they are one run, so that its rows are a view.
    groups = 1 if order == "mixed" else batch_size
    first_broken = _first_broken(sizes, inputs, groups)
    output = call.unchanged_output()
    outputs = None if output is None else _positions(output)
    live_by_group = live.view(groups, -1).cpu().numpy()
    runs = _runs(live_by_group) if live_by_group.size else [slice(0, 0)] * groups
    # 3. Otherwise the live positions are copied, one example after the other.
    if runs is None:
        index = torch.from_numpy(live_by_group.ravel().nonzero()[0]).to(deltas.device)
        deltas, inputs = deltas.index_select(0, index), inputs.index_select(0, index)
        outputs = None if outputs is None else outputs.index_select(0, index)
        runs = _consecutive_runs(live_by_group.sum(1))
    example_unknown = order == "mixed" and first_broken is not None
    return ClosedFormGradients(
        call,
        deltas,
        inputs,
        outputs,
        runs,
        separable=order != "mixed",
        certain=order == "certain",
        first_broken=-1 if example_unknown else first_broken,
    )


def _positions(value: Tensor) -> Tensor:
    """Return a tensor (…, d) as (N, d), one row per position."""
    return value.reshape(math.prod(value.shape[:-1]), value.shape[-1])


def _runs(live: np.ndarray) -> list[slice] | None:
    """Return the run of live positions of each example, or ``None`` if the positions of an example are not one run."""
    length = live.shape[1]
    counts, first = live.sum(1), live.argmax(1)
    last = length - 1 - live[:, ::-1].argmax(1)
    if ((last + 1 - first != counts) & (counts > 0)).any():
        return None
    starts = np.arange(len(live)) * length + first
    return [slice(start, stop) for start, stop in zip(starts.tolist(), (starts + counts).tolist(), strict=True)]


def _consecutive_runs(counts: np.ndarray) -> list[slice]:
    """Return runs of the given lengths, one after the other."""
    ends = counts.cumsum()
    return [slice(start, end) for start, end in zip((ends - counts).tolist(), ends.tolist(), strict=True)]


def _first_broken(sizes: Tensor, inputs: Tensor, groups: int) -> int | None:
    """Return the first group with a value that is not finite and not multiplied by a zero output gradient."""
    if math.isfinite(float(sizes.sum() + inputs.sum())):  # the usual case, with one transfer from the device
        return None
    broken = ~torch.isfinite(sizes) | ((sizes != 0) & ~torch.isfinite(inputs.reshape(len(sizes), -1)).all(1))
    return int(broken.nonzero()[0]) * groups // len(broken) if bool(broken.any()) else None


def _lookup_scale(table: nn.Embedding) -> float:
    """Return the factor of a scaled embedding, rounded to the dtype of the weight as the module rounds it."""
    return float(torch.as_tensor(table.embed_scale).to(table.weight.dtype))


def _is_lookup(call: Call) -> bool:
    return call.form in {"lookup", "scaled lookup"}


ExampleOrder = Literal["certain", "doubtful", "mixed"]


def example_order(value: Tensor, batch_size: int, length: int) -> ExampleOrder:
    """Return how certain it is that a tensor holds the first example, then the second example, and so on.

    Args:
        value: Input or output of a module. The last dimension of floating-point values is features, not positions.
        batch_size: B; not equal to L, unless it is 1.
        length: L, the padded length.

    Returns:
        ``"certain"`` if the first dimension is the only one of size B and another has size L; ``"doubtful"`` if the
        sizes fit, but would also fit another order, e.g. for B · L positions in one dimension; ``"mixed"`` if the
        examples are not one after the other, or a dimension of tokens only happens to have size B.

    Example:
        >>> import torch
        >>> [example_order(torch.zeros(shape), 2, 7) for shape in ((2, 7, 64), (14, 64), (7, 2, 64), (2, 64))]
        ['certain', 'doubtful', 'mixed', 'mixed']
    """
    shape = value.shape[:-1] if value.is_floating_point() or value.is_complex() else value.shape
    if batch_size == 1 or (shape.count(batch_size) == 1 == shape[:1].count(batch_size) and length in shape[1:]):
        return "certain"
    if shape[:1] == (batch_size * length,) or (shape[:1] == (batch_size,) and len(shape) > 1):
        return "doubtful"
    return "mixed"
