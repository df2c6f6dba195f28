"""What a check runs on: a watched model and a few examples, in batches of any padding, and how exact it can be."""

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
"""Where a configuration of transformers keeps which attention is used."""

_PADDING = 8  # positions that are added to the longest example; the shorter ones get more
_ROUNDING = {2: (1e-1, 1e-2), 4: (1e-3, 1e-3), 8: (1e-4, 1e-3)}
"""By the bytes of a number that the model computes in: the worst difference that rounding leaves in any parameter, and
the share of the whole gradient below which a parameter's own is taken for noise. Tiny models of fourteen families had
at most 2e-5 in fp32 (the organism 2e-4) and 0.11 in bf16, where a ReLU at its kink had 0.5; eager attention takes
softmax in fp32 whatever the type."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A model that is watched, and the examples that it is checked on.

    Attributes:
        target: The model and its chosen parameters.
        chosen: What chose them.
        rows: The examples.
        pad: The id that fills short rows.
        tick: Called after every forward and backward pass.
    """

    target: Target
    chosen: Selection
    rows: Sequence[Tokens]
    pad: int
    tick: Callable[[], Any]

    def __str__(self) -> str:
        """Say what is checked on what."""
        parts = [type(self.model).__name__, str(self.dtype).removeprefix("torch."), self.attention, str(self.device)]
        tokens = sum(map(len, self.rows))
        return f"{', '.join(filter(None, parts))}; {len(self.rows)} examples, {tokens} tokens"

    @property
    def model(self) -> nn.Module:
        """The model."""
        return self.target.model

    @property
    def attention(self) -> str | None:
        """The attention that it uses, if it says."""
        return getattr(getattr(self.model, "config", None), ATTENTION, None)

    @cached_property
    def device(self) -> torch.device:
        """Where it is."""
        return next(self.model.parameters()).device

    @cached_property
    def dtype(self) -> torch.dtype:
        """The least precise type that products are computed in."""
        if torch.is_autocast_enabled(self.device.type):
            return torch.get_autocast_dtype(self.device.type)
        return min((parameter.dtype for parameter in self.model.parameters()), key=lambda dtype: dtype.itemsize)

    @property
    def tolerance(self) -> float:
        """The worst difference that rounding in this type explains."""
        return self._rounding[0]

    @property
    def _rounding(self) -> tuple[float, float]:
        return _ROUNDING[max(self.dtype.itemsize, 2)]

    @cached_property
    def length(self) -> int:
        """The padded length of every example, longer than any of them."""
        return padded_length([max(map(len, self.rows)) + _PADDING] * len(self.rows))

    @cached_property
    def batch(self) -> Batch:
        """All examples together."""
        return collate(self.rows, self.pad, min_length=self.length).to(self.device)

    def single(self, row: Tokens, *, min_length: int = 0, side: Literal["right", "left"] = "right") -> Batch:
        """One example as a batch, with padding up to a length."""
        return collate([row], self.pad, min_length=min_length, side=side).to(self.device)

    def gradients(self, batch: Batch, target: Target | None = None) -> Sequence[Gradients]:
        """Collect the gradient of each example's own loss, of this model or of its twin."""
        self.tick()
        return example_gradients(target or self.target, batch)

    def summed(self) -> tuple[Gradients, Coverage]:
        """Collect the gradient of the sum of all losses, and say which parameters have a part in it."""
        sums: dict[str, Accumulator] = defaultdict(Accumulator)
        run_pass(self.target, self.batch, reduction="example", whole=lambda name, part: sums[name].add(part))
        self.tick()
        return {name: total.total() for name, total in sums.items()}, coverage_of(self.target, sums)

    def comparison(self) -> Comparison:
        """Start a comparison that takes for noise what this type leaves."""
        return Comparison(self.target, self._rounding[1])

    def compared(self, found: Sequence[Gradients], expected: Sequence[Gradients]) -> Difference:
        """Compare the gradients of all examples."""
        comparison = self.comparison()
        for example, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
            comparison.add(example, ours, theirs)
        return comparison.worst()
