"""One forward and one backward pass over a batch, handing out the gradient of every chosen parameter.

Three ways lead to an example's own gradient, the cheapest that is exact being taken: the closed form of its module's
call, the module run again on the example alone, the whole model run again on the example alone.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from geomkit.algebra import add
from geomkit.errors import CollectionError
from geomkit.hooks import Call, Tape, recording
from geomkit.layer_gradient import DenseGradient, LayerGradient
from geomkit.loss import Reduction, example_losses, scored, token_losses
from geomkit.replay import replayed
from geomkit.rows import Rows, at_least_fp32, rows_of
from geomkit.state import casts_uncached, no_autocast
from geomkit.tokens import Batch
from geomkit.uses import Uses, uses_of

WholeSink = Callable[[str, LayerGradient], None]
SampleSink = Callable[[str, Sequence[LayerGradient]], None]


@dataclass
class Target:
    """What to collect, and what was noticed on the way.

    Attributes:
        model: The model.
        names: Every name of each chosen parameter to the one it is collected under.
        notes: What a reader should know about a parameter.
        ran: Names of parameters whose module was called.
        verified: Parameters whose doubtful split was found right, with the batch size it was right for.
        inseparable: Parameters whose examples have to be run alone.
    """

    model: nn.Module
    names: dict[str, str]
    notes: dict[str, str] = field(default_factory=dict)
    ran: set[str] = field(default_factory=set)
    verified: set[tuple[str, int]] = field(default_factory=set)
    inseparable: set[str] = field(default_factory=set)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The chosen parameters, in the model's order."""
        return {name: parameter for name, parameter in self.model.named_parameters() if name in self.names}


def run_pass(
    target: Target,
    batch: Batch,
    *,
    reduction: Reduction,
    whole: WholeSink | None = None,
    samples: SampleSink | None = None,
) -> list[float]:
    """Run a batch forward and backward once.

    Args:
        target: What to collect.
        batch: B examples on the model's device.
        reduction: How examples weigh in the sum: alike (1 each), or by their scored tokens.
        whole: Receives, part by part, the gradient of the weighted sum of the examples' losses.
        samples: Receives, once for each parameter, the gradients of the B examples' own losses.

    Returns:
        The loss of each example.

    Raises:
        CollectionError: If a loss or a gradient is not finite, or the graph cannot be seen whole.
    """
    return _Pass(target, batch, reduction, whole, samples).run()


class _Pass:
    def __init__(
        self, target: Target, batch: Batch, reduction: Reduction, whole: WholeSink | None, samples: SampleSink | None
    ) -> None:
        self.target, self.batch, self.whole, self.samples = target, batch, whole, samples
        self.parameters = target.parameters
        self.examples, self.length = batch.input_ids.shape
        counts = scored(batch).sum(1)
        self.weights = counts.double() if reduction == "token" else torch.ones(self.examples, dtype=torch.float64)
        self.tape = Tape()
        self.direct: set[str] = set()  # autograd forms their sum
        self.expected: Counter[str] = Counter()  # calls with a closed form whose part is still to come
        self.parts: dict[str, list[list[LayerGradient]]] = {}
        self.alone = set(target.inseparable)
        self.doubtful: set[str] = set()
        self.replays: dict[Call, tuple[list[dict[str, LayerGradient]] | None, bool]] = {}

    def run(self) -> list[float]:
        spread = self.examples if self.samples else 1
        with (
            torch.enable_grad(),
            casts_uncached(),
            recording(self.target.model, self.target.names, self._receive, spread=spread) as self.tape,
        ):
            own = example_losses(token_losses(self.target.model, self.batch), self.batch)
            self.tape.open = False
            _refuse_broken_losses(own, self.batch)
            loss = (own * self.weights.to(own)).sum()
            uses = uses_of(loss)
            self._plan(uses)
            held = {name: self.parameters[name] for name in self.parameters if name in self.direct}
            starts = [e for call in self.tape.calls if call.starts for e in call.outputs if e and uses.reaches(e)]
            known = {id(parameter) for parameter in self.parameters.values()}
            # Such as embedded inputs that were told to need a gradient: every call leads to a start or to one of them.
            leaves = [leaf for leaf in uses.leaves if id(leaf) not in known]
            sources: list[Tensor | GradientEdge] = [*held.values(), *starts, *leaves]
            found = torch.autograd.grad(loss, sources) if sources else ()  # type: ignore[arg-type]
        self._finish(dict(zip(held, found, strict=False)))
        return [float(value) for value in own.detach()]

    def _plan(self, uses: Uses) -> None:
        """Choose who forms each sum, and note what is unusual."""
        self.target.ran |= self.tape.ran
        reached = [call for call in self.tape.calls if any(e and uses.reaches(e) for e in call.outputs)]
        named = [(name, call) for call in reached for name in call.parameters.values()]
        self.expected = Counter(name for name, call in named if call.form is not None)
        calls = Counter(name for name, _ in named)
        opaque = {name for name, call in named if call.form is None}
        for name, parameter in self.parameters.items():
            used = uses.of(parameter)
            outside = used > calls[name] and name not in opaque
            if outside or (used and name in opaque):
                self.direct.add(name)
            if outside:
                self.target.notes[name] = "used outside its module's call"
            elif calls[name] > 1:
                modules = len({id(call.module) for other, call in named if other == name})
                self.target.notes[name] = f"shared by {modules} modules" if modules > 1 else "module called repeatedly"

    # ------------------------------------------------------------------------------------- during the backward pass

    def _receive(self, call: Call, delta: Tensor) -> None:
        names = set(call.parameters.values())
        if self.samples is None and names <= self.direct:
            return
        with torch.no_grad(), no_autocast(delta.device):
            rows = rows_of(call, delta, self.examples, self.length)
            if rows.broken is not None and rows.counts is None:
                raise self._find_broken(next(iter(names)))
            if rows.broken is not None:
                raise _broken_gradient(next(iter(names)), self.batch.examples[int(rows.broken * self.examples)])
            if self.whole is not None:
                for name in names - self.direct:
                    self.whole(name, rows.gradients[name])
            if self.samples is not None:
                self._receive_samples(rows)
        call.release()

    def _receive_samples(self, rows: Rows) -> None:
        names = [name for name in rows.call.parameters.values() if name not in self.alone]
        if rows.counts is None:
            self.alone.update(names)
            return
        self._doubt(names if not rows.certain else ())
        split = [part.gradients for part in rows.split()]
        for name in names:
            self._keep([part[name] for part in split], name)
            self.expected[name] -= 1
            if self.expected[name] == 0 and name not in self.direct | self.doubtful:
                self._emit(name)

    def _doubt(self, names: Iterable[str]) -> None:
        self.doubtful.update(name for name in names if (name, self.examples) not in self.target.verified)

    def _keep(self, gradients: Sequence[LayerGradient], name: str) -> None:
        """Keep a part of each example's gradient; ``gradients`` are of the weighted losses."""
        kept = self.parts.setdefault(name, [[] for _ in range(self.examples)])
        for mine, gradient, weight in zip(kept, gradients, self.weights.tolist(), strict=True):
            mine.append(gradient if weight == 1 else gradient.scaled(1 / weight))

    def _emit(self, name: str) -> None:
        if self.samples is not None:
            with no_autocast(self.batch.input_ids.device):
                self.samples(name, [add(parts, keep_factors=True) for parts in self.parts.pop(name)])

    # -------------------------------------------------------------------------------------- after the backward pass

    def _finish(self, sums: Mapping[str, Tensor]) -> None:
        for name, value in sums.items():
            if not bool(torch.isfinite(value).all()):
                raise self._find_broken(name)
            if self.whole is not None:
                with no_autocast(value.device):
                    self.whole(name, DenseGradient(at_least_fp32(value), int(self.batch.attention_mask.sum())))
        if self.samples is None:
            return
        self.alone |= {
            name for name, value in sums.items() if name in self.alone or not self._finish_replay(name, value)
        }
        self._verify([name for name in self.parts if name in self.doubtful - self.alone])
        for name in list(self.parts):
            if name not in self.alone:
                self._emit(name)
        self._run_alone([name for name in self.parameters if name in self.alone])

    def _verify(self, names: Sequence[str]) -> None:
        """Run the shortest example alone where its place in the batch is in doubt, and compare."""
        if not names:
            return
        row = int(self.batch.attention_mask.sum(1).argmin())
        for name, expected in self._alone(row, names).items():
            found = add(self.parts[name][row])
            right = (found.dense() - expected.dense()).norm() <= _tolerance(self.parameters[name]) * expected.norm
            if right:
                self.target.verified.add((name, self.examples))
            else:
                self.target.inseparable.add(name)
                self.alone.add(name)

    def _finish_replay(self, name: str, expected: Tensor) -> bool:
        """Complete the samples of a parameter whose module has no closed form; tell whether their sum is right."""
        if self.examples == 1:
            self.parts[name] = [[]]
            self._keep([DenseGradient(at_least_fp32(expected), int(self.batch.attention_mask.sum()))], name)
            return True
        for call in self.tape.calls:
            if call.form is None and name in call.parameters.values():
                again, certain = self._replayed(call)
                if again is None or any(name not in part for part in again):
                    return False
                self._doubt(() if certain else [name])
                self._keep([part[name] for part in again], name)
        if name not in self.parts:
            return False
        total = sum(
            weight * gradient.dense()
            for parts, weight in zip(self.parts[name], self.weights.tolist(), strict=True)
            for gradient in parts
        )
        difference = torch.linalg.vector_norm(total - expected)
        return bool(difference <= _tolerance(expected) * torch.linalg.vector_norm(expected))

    def _replayed(self, call: Call) -> tuple[list[dict[str, LayerGradient]] | None, bool]:
        if call not in self.replays:
            with torch.no_grad():
                self.replays[call] = replayed(call, self.examples, self.length)
        return self.replays[call]

    def _run_alone(self, names: Sequence[str]) -> None:
        if not names:
            return
        found = [self._alone(row, names) for row in range(self.examples)]
        if self.samples is not None:
            for name in names:
                self.samples(name, [gradients[name] for gradients in found])

    def _alone(self, row: int, names: Sequence[str]) -> dict[str, LayerGradient]:
        single = self.batch.single(row)
        with torch.enable_grad():
            (loss,) = example_losses(token_losses(self.target.model, single), single)
            results = torch.autograd.grad(loss, [self.parameters[name] for name in names], materialize_grads=True)
        return {
            name: DenseGradient(at_least_fp32(result), single.input_ids.shape[1])
            for name, result in zip(names, results, strict=True)
        }

    def _find_broken(self, name: str) -> CollectionError:
        for row, example in enumerate(self.batch.examples):
            if not bool(torch.isfinite(self._alone(row, [name])[name].dense()).all()):
                return _broken_gradient(name, example)
        return CollectionError(
            f"{name}: expected a finite gradient, found NaN or inf for the batch of examples "
            f"{list(self.batch.examples)}, though for none alone; lower tokens_per_batch, or run the model in fp32"
        )


def _tolerance(expected: Tensor) -> float:
    """Bound what rounding can leave between two ways to the same sum; the module's own type is autograd's."""
    return 1e-3 if expected.dtype in {torch.float32, torch.float64} else 5e-2


def _refuse_broken_losses(losses: Tensor, batch: Batch) -> None:
    broken = torch.nonzero(~torch.isfinite(losses))
    if len(broken):
        row = int(broken[0, 0])
        raise CollectionError(
            f"example {batch.examples[row]}: expected a finite loss, found {float(losses[row].detach())}; "
            "check the model's weights, or run it in fp32"
        )


def _broken_gradient(name: str, example: int) -> CollectionError:
    return CollectionError(
        f"example {example}: expected a finite gradient of {name}, found NaN or inf; run the model in fp32, or drop "
        "the example"
    )
