"""Telling the gradients of a batch's examples apart.

Three ways lead to an example's own gradient, the cheapest that is exact being taken: the closed form of its module's
call, the module run again on the example alone, the whole model run again on the example alone. The second is
compared with autograd's sum, and a split that the shapes leave in doubt with the third.
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


class Separation:
    """The examples' gradients of one batch, handed on parameter by parameter as soon as they are complete."""

    def __init__(self, target: Target, batch: Batch, weights: Sequence[float], sink: SampleSink) -> None:
        """Start with nothing.

        Args:
            target: What to collect.
            batch: B examples.
            weights: Of each example's loss in the sum that is differentiated.
            sink: Receives a parameter's name and the gradients of the B examples' own losses.
        """
        self._target, self._batch, self._weights, self._sink = target, batch, weights, sink
        self._examples, self._length = batch.input_ids.shape
        self._expected: Counter[str] = Counter()  # calls with a closed form whose part is still to come
        self._direct: set[str] = set()
        self._several: set[str] = set()
        self._parts: dict[str, list[list[LayerGradient]]] = {}
        self._alone = set(target.inseparable)
        self._doubtful: set[str] = set()
        self._replays: dict[Call, Replay | None] = {}

    def expect(self, calls: Counter[str], direct: set[str], outside: set[str], several: set[str]) -> None:
        """Say what is to come.

        Args:
            calls: For each parameter, the number of calls with a closed form.
            direct: The parameters whose sum autograd forms: parts of them are not all from such calls.
            outside: Of these, the ones that are used where no call tells.
            several: Of these, the ones that are used more often than their modules are called.
        """
        self._expected, self._direct, self._several = calls, direct, several
        self._alone |= outside

    def receive(self, rows: ClosedFormGradients) -> None:
        """Take a call's share of each example's gradient."""
        names = [name for name in rows.call.parameters.values() if name not in self._alone]
        if not rows.apart:
            self._alone.update(names)
            return
        if not rows.certain:
            self._doubt(names)
        split = rows.split()
        for name in names:
            self._keep(name, [part[name] for part in split])
            self._expected[name] -= 1
            if self._expected[name] == 0 and name not in self._direct | self._doubtful:
                self._hand_on(name)

    def finish(self, calls: Iterable[Call], sums: Mapping[str, Tensor]) -> None:
        """Complete what is left after the backward pass.

        Args:
            calls: All calls.
            sums: The gradients that autograd formed itself, of the weighted sum.
        """
        opaque = [call for call in calls if call.form is None]
        for name, total in sums.items():
            if name not in self._alone and not (
                self._add_opaque_parts(name, opaque, total) and self._sum_up_to(name, total)
            ):
                self._alone.add(name)
        self._verify([name for name in self._parts if name in self._doubtful - self._alone])
        for name in [name for name in self._parts if name not in self._alone]:
            self._hand_on(name)
        if names := [name for name in self._target.parameters if name in self._alone]:
            found = [self._target.by_autograd(self._batch.single(row), names) for row in range(self._examples)]
            with torch.no_grad(), no_autocast(self._batch.input_ids.device):
                for name in names:
                    self._sink(name, [gradients[name] for gradients in found])

    def _doubt(self, names: Iterable[str]) -> None:
        self._doubtful.update(name for name in names if (name, self._examples) not in self._target.verified)

    def _keep(self, name: str, gradients: Sequence[LayerGradient]) -> None:
        """Keep a part of each example's gradient; ``gradients`` are of the weighted losses."""
        kept = self._parts.setdefault(name, [[] for _ in range(self._examples)])
        for parts, gradient, weight in zip(kept, gradients, self._weights, strict=True):
            parts.append(gradient if weight == 1 else gradient.scaled(1 / weight))

    def _hand_on(self, name: str) -> None:
        with torch.no_grad(), no_autocast(self._batch.input_ids.device):
            self._sink(name, [add(parts, keep_factors=True) for parts in self._parts.pop(name)])

    def _add_opaque_parts(self, name: str, opaque: Iterable[Call], total: Tensor) -> bool:
        """Add the parts of calls without a closed form; tell whether there were such parts, for all examples."""
        if self._examples == 1:
            self._parts[name] = [[]]
            self._keep(name, [DenseGradient(at_least_fp32(total), int(self._batch.attention_mask.sum()))])
            return True
        for call in opaque:
            if name in call.parameters.values():
                again = self._replayed(call)
                if again is None or any(name not in gradients for gradients in again.gradients):
                    return False
                if again.elementwise and name in self._several:  # a norm reads its weight once
                    return False
                if not again.certain:
                    self._doubt([name])
                self._keep(name, [gradients[name] for gradients in again.gradients])
        return name in self._parts

    def _sum_up_to(self, name: str, total: Tensor) -> bool:
        """Tell whether the examples' gradients, weighted, sum up to what autograd formed."""
        weighted = zip(self._parts[name], self._weights, strict=True)
        found = [part.dense() * weight for parts, weight in weighted for part in parts]
        # Rounding is that of the parts, which may cancel.
        size = sum(float(part.norm()) for part in found)
        return bool((sum(found) - total).norm() <= _rounding(total) * size)

    def _replayed(self, call: Call) -> Replay | None:
        if call not in self._replays:
            with torch.no_grad():
                self._replays[call] = replayed(call, self._examples, self._length)
        return self._replays[call]

    def _verify(self, names: Sequence[str]) -> None:
        """Run the shortest example alone where its place in the batch is in doubt, and compare."""
        if not names:
            return
        row = int(self._batch.attention_mask.sum(1).argmin())
        for name, expected in self._target.by_autograd(self._batch.single(row), names).items():
            difference = float((add(self._parts[name][row]).dense() - expected.dense()).norm())
            bound = _kernels(self._target.parameters[name]) * expected.norm
            if difference > bound:
                self._target.inseparable.add(name)
            if difference <= bound and expected.norm > 0:
                self._target.verified.add((name, self._examples))
            else:  # wrong, or nothing against nothing, which shows nothing
                self._alone.add(name)


def _rounding(like: Tensor) -> float:
    """Bound what rounding leaves between two ways to one sum, of which autograd's is in a tensor's type."""
    return 1e-5 if like.dtype in {torch.float32, torch.float64} else 5e-2


def _kernels(like: Tensor) -> float:
    """Bound what else an example's gradient differs by in a batch and alone, with and without padding."""
    return 1e-3 if like.dtype in {torch.float32, torch.float64} else 1e-1
