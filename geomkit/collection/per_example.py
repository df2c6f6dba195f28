"""Gradients of the single examples of a batch.

An example's gradient is computed in the cheapest of three ways that is exact:

1. closed form: the module's gradient over the positions of the example;
2. replay: the module is run again on the example alone;
3. rerun: the whole model is run again on the example alone.

Two checks guard the first two ways. The sum of replayed gradients must be the gradient that autograd computed for the
whole batch. And if the shape of a tensor leaves it in doubt which positions belong to which example, the gradient of
one example is compared with a rerun. A parameter that fails a check is rerun.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from geomkit.collection.closed_form import ClosedFormGradients
from geomkit.collection.hooks import Call
from geomkit.collection.replay import Replay, replayed
from geomkit.collection.target import Target
from geomkit.gradients.accumulator import add
from geomkit.gradients.dense import DenseGradient
from geomkit.gradients.layer_gradient import LayerGradient
from geomkit.inputs.batches import Batch
from geomkit.utils.precision import at_least_fp32, no_autocast

SampleSink = Callable[[str, Sequence[LayerGradient]], None]
"""Function that takes the name of a parameter and the gradients of the losses of the B examples of a batch."""


class PerExampleGradients:
    """The gradients of the examples of a batch, given to a function parameter by parameter as soon as complete."""

    def __init__(self, target: Target, batch: Batch, weights: Sequence[float], sink: SampleSink) -> None:
        """Start without any gradient.

        Args:
            target: The parameters to collect.
            batch: B examples.
            weights: (B,) weight of each example's loss in the summed loss that is differentiated.
            sink: Receives the name of a parameter and the gradients of the B examples' losses.
        """
        self._target, self._batch, self._weights, self._sink = target, batch, weights, sink
        self._batch_size, self._length = batch.input_ids.shape
        self._calls_to_come: Counter[str] = Counter()  # calls with a closed form, by parameter
        self._by_autograd: set[str] = set()
        self._read_more_than_called: set[str] = set()
        self._parts: dict[str, list[list[LayerGradient]]] = {}  # by parameter, then by example
        self._to_rerun = set(target.inseparable)
        self._doubtful: set[str] = set()
        self._replays: dict[Call, Replay | None] = {}

    def expect(
        self, calls: Counter[str], by_autograd: set[str], used_outside: set[str], read_more_than_called: set[str]
    ) -> None:
        """Set the number and the kind of uses of each parameter, before the backward pass.

        Args:
            calls: Number of calls with a closed form, for each parameter.
            by_autograd: Parameters whose gradient of the summed loss autograd computes, as a use has no closed form.
            used_outside: Parameters in ``by_autograd`` with uses outside module calls.
            read_more_than_called: Parameters in ``by_autograd`` that are read more often than their modules are called.
        """
        self._calls_to_come, self._by_autograd = calls, by_autograd
        self._read_more_than_called = read_more_than_called
        self._to_rerun |= used_outside

    def receive(self, gradients: ClosedFormGradients) -> None:
        """Add a call with a closed form to each example's gradient."""
        names = [name for name in gradients.call.parameters.values() if name not in self._to_rerun]
        if not gradients.separable:
            self._to_rerun.update(names)
            return
        if not gradients.certain:
            self._doubt(names)
        by_example = gradients.split()
        for name in names:
            self._add_part(name, [own_gradients[name] for own_gradients in by_example])
            self._calls_to_come[name] -= 1
            # Complete: all calls are there, no call is in doubt, and all uses are calls with a closed form.
            if self._calls_to_come[name] == 0 and name not in self._by_autograd | self._doubtful:
                self._hand_on(name)

    def finish(self, calls: Iterable[Call], summed: Mapping[str, Tensor]) -> None:
        """Complete the other parameters after the backward pass.

        Args:
            calls: All calls.
            summed: Gradients of the summed loss that autograd computed, by parameter.
        """
        # 1. Replay modules without a closed form, and compare the sum over examples with autograd's gradient.
        opaque = [call for call in calls if call.form is None]
        for name, total in summed.items():
            if name not in self._to_rerun and not (
                self._add_replayed_parts(name, opaque, total) and self._adds_up_to(name, total)
            ):
                self._to_rerun.add(name)
        # 2. Compare an example with a rerun if its positions are in doubt.
        self._verify([name for name in self._parts if name in self._doubtful - self._to_rerun])
        for name in [name for name in self._parts if name not in self._to_rerun]:
            self._hand_on(name)
        # 3. Rerun the model on each example alone for the remaining parameters.
        if names := [name for name in self._target.parameters if name in self._to_rerun]:
            by_example = [self._target.by_autograd(self._batch.single(row), names) for row in range(self._batch_size)]
            with torch.no_grad(), no_autocast(self._batch.input_ids.device):
                for name in names:
                    self._sink(name, [gradients[name] for gradients in by_example])

    def _doubt(self, names: Iterable[str]) -> None:
        self._doubtful.update(name for name in names if (name, self._batch_size) not in self._target.verified)

    def _add_part(self, name: str, gradients: Sequence[LayerGradient]) -> None:
        """Store a part of each example's gradient, divided by the weight w_i of the example in the summed loss."""
        by_example = self._parts.setdefault(name, [[] for _ in range(self._batch_size)])
        for parts, gradient, weight in zip(by_example, gradients, self._weights, strict=True):
            parts.append(gradient if weight == 1 else gradient.scaled(1 / weight))

    def _hand_on(self, name: str) -> None:
        with torch.no_grad(), no_autocast(self._batch.input_ids.device):
            self._sink(name, [add(parts, keep_factors=True) for parts in self._parts.pop(name)])

    def _add_replayed_parts(self, name: str, opaque: Iterable[Call], total: Tensor) -> bool:
        """Store the parts of calls without a closed form; return whether all of them could be replayed."""
        # A single example: autograd's gradient is the example's.
        if self._batch_size == 1:
            self._parts[name] = [[]]
            self._add_part(name, [DenseGradient(at_least_fp32(total), int(self._batch.attention_mask.sum()))])
            return True
        for call in opaque:
            if name in call.parameters.values():
                replay = self._replay(call)
                if replay is None or any(name not in gradients for gradients in replay.gradients):
                    return False
                # An elementwise module reads its weight once per call; with more reads it is something else.
                if replay.elementwise and name in self._read_more_than_called:
                    return False
                if not replay.certain:
                    self._doubt([name])
                self._add_part(name, [gradients[name] for gradients in replay.gradients])
        return name in self._parts

    def _adds_up_to(self, name: str, total: Tensor) -> bool:
        """Return whether Σ_i w_i G_i is the gradient that autograd computed, up to rounding."""
        weighted = zip(self._parts[name], self._weights, strict=True)
        parts = [part.dense() * weight for example_parts, weight in weighted for part in example_parts]
        # Rounding is relative to the parts, which may cancel in the sum.
        size = sum(float(part.norm()) for part in parts)
        return bool((sum(parts) - total).norm() <= _rounding_bound(total) * size)

    def _replay(self, call: Call) -> Replay | None:
        if call not in self._replays:
            with torch.no_grad():
                self._replays[call] = replayed(call, self._batch_size, self._length)
        return self._replays[call]

    def _verify(self, names: Sequence[str]) -> None:
        """Compare the gradients of the shortest example, which is the cheapest to rerun, with a rerun."""
        if not names:
            return
        row = int(self._batch.attention_mask.sum(1).argmin())
        for name, expected in self._target.by_autograd(self._batch.single(row), names).items():
            difference = float((add(self._parts[name][row]).dense() - expected.dense()).norm())
            bound = _kernel_bound(self._target.parameters[name]) * expected.norm
            if difference > bound:
                self._target.inseparable.add(name)
            # A zero gradient would be equal in any order of the examples, so that it verifies nothing.
            if difference <= bound and expected.norm > 0:
                self._target.verified.add((name, self._batch_size))
            else:
                self._to_rerun.add(name)


def _rounding_bound(like: Tensor) -> float:
    """Return the largest relative rounding between two ways to compute a sum, of which autograd's has this dtype."""
    return 1e-5 if like.dtype in {torch.float32, torch.float64} else 5e-2


def _kernel_bound(like: Tensor) -> float:
    """Return the largest relative difference of an example's gradient in a batch and alone, due to other kernels."""
    return 1e-3 if like.dtype in {torch.float32, torch.float64} else 1e-1
