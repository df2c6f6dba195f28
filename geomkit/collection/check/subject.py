"""Subject of the checks: a prepared model and a few examples, with the tolerance for the model's dtype."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import nn

from geomkit.collection.check.comparing import Comparison, Difference, Gradients, example_gradients
from geomkit.collection.collect import coverage_of
from geomkit.collection.passes import run_pass
from geomkit.collection.streaming import padded_length
from geomkit.collection.target import Target
from geomkit.gradients.accumulator import Accumulator
from geomkit.gradients.gradient_set import Coverage
from geomkit.inputs.batches import Batch, collate
from geomkit.inputs.parameters import Selection
from geomkit.inputs.tokens import Tokens

ATTENTION = "_attn_implementation"
"""Attribute of a configuration of transformers that names the attention implementation."""

_PADDING = 8  # padding positions of the longest example; shorter examples have more
_ROUNDING = {2: (1e-1, 1e-2), 4: (1e-3, 1e-3), 8: (1e-4, 1e-3)}
"""By bytes of the model's dtype: the largest relative difference in a parameter that rounding explains, and the share
of the norm over all parameters below which the gradient of a parameter is rounding noise; see
tests/benchmarks/README.md."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A model, and the examples that it is checked on.

    Attributes:
        target: The model and its chosen parameters.
        selection: The choice of parameters.
        rows: The examples.
        pad: Id of the token that fills short rows.
        tick: Function to call after every forward and backward pass.
    """

    target: Target
    selection: Selection
    rows: Sequence[Tokens]
    pad: int
    tick: Callable[[], Any]

    def __str__(self) -> str:
        """Return model, dtype, attention, device and numbers of examples and tokens as text."""
        parts = [type(self.model).__name__, str(self.dtype).removeprefix("torch."), self.attention, str(self.device)]
        tokens = sum(map(len, self.rows))
        return f"{', '.join(filter(None, parts))}; {len(self.rows)} examples, {tokens} tokens"

    @property
    def model(self) -> nn.Module:
        """The model."""
        return self.target.model

    @property
    def attention(self) -> str | None:
        """Name of the attention implementation; ``None`` if the configuration does not have it."""
        return getattr(getattr(self.model, "config", None), ATTENTION, None)

    @cached_property
    def device(self) -> torch.device:
        """Device of the model."""
        return next(self.model.parameters()).device

    @cached_property
    def dtype(self) -> torch.dtype:
        """Least precise dtype in which products are computed."""
        if torch.is_autocast_enabled(self.device.type):
            return torch.get_autocast_dtype(self.device.type)
        return min((parameter.dtype for parameter in self.model.parameters()), key=lambda dtype: dtype.itemsize)

    @property
    def tolerance(self) -> float:
        """Largest relative difference that rounding in this dtype explains."""
        return self._rounding[0]

    @property
    def _rounding(self) -> tuple[float, float]:
        return _ROUNDING[max(self.dtype.itemsize, 2)]

    @cached_property
    def length(self) -> int:
        """Padded length of all examples, larger than the length of the longest example."""
        return padded_length([max(map(len, self.rows)) + _PADDING] * len(self.rows))

    @cached_property
    def batch(self) -> Batch:
        """All examples together."""
        return collate(self.rows, self.pad, min_length=self.length).to(self.device)

    def single(self, row: Tokens, *, min_length: int = 0, side: Literal["right", "left"] = "right") -> Batch:
        """Return an example as a batch, padded to a length."""
        return collate([row], self.pad, min_length=min_length, side=side).to(self.device)

    def gradients(self, batch: Batch, target: Target | None = None) -> Sequence[Gradients]:
        """Return the gradients of each example's loss, of this model or of another target."""
        self.tick()
        return example_gradients(target or self.target, batch)

    def summed(self) -> tuple[Gradients, Coverage]:
        """Return the gradients of the sum of all losses, and which parameters have a gradient."""
        sums: dict[str, Accumulator] = defaultdict(Accumulator)
        run_pass(self.target, self.batch, reduction="example", sums=lambda name, part: sums[name].add(part))
        self.tick()
        return {name: total.total() for name, total in sums.items()}, coverage_of(self.target, sums)

    def comparison(self) -> Comparison:
        """Return an empty comparison, with the noise level of this dtype."""
        return Comparison(self.target, self._rounding[1])

    def compared(self, actual: Sequence[Gradients], expected: Sequence[Gradients]) -> Difference:
        """Return the largest difference between the gradients of all examples."""
        comparison = self.comparison()
        for example, (actual_gradients, expected_gradients) in enumerate(zip(actual, expected, strict=True)):
            comparison.add(example, actual_gradients, expected_gradients)
        return comparison.worst()
