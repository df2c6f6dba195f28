"""One forward and one backward pass over a batch, handing out the gradient of every chosen parameter."""

from collections import Counter
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from geomkit.collection.closed_form import closed_form_gradients
from geomkit.collection.graph_uses import GraphUses, graph_uses
from geomkit.collection.hooks import Call, Tape, hand_over, recording
from geomkit.collection.per_example import SampleSink, Separation
from geomkit.collection.target import Target
from geomkit.errors import CollectionError
from geomkit.gradients.dense import DenseGradient
from geomkit.gradients.layer_gradient import LayerGradient
from geomkit.inputs.batches import Batch
from geomkit.inputs.loss import Reduction, TokenLoss, example_losses, scored, token_losses
from geomkit.utils.precision import at_least_fp32, casts_uncached, no_autocast

WholeSink = Callable[[str, LayerGradient], None]
ProductSink = Callable[[str, Tensor | None], None]


def run_pass(
    target: Target,
    batch: Batch,
    *,
    reduction: Reduction = "example",
    whole: WholeSink | None = None,
    samples: SampleSink | None = None,
    products: ProductSink | None = None,
    token_loss: TokenLoss = token_losses,
) -> list[float]:
    """Run a batch forward and backward once.

    Args:
        target: What to collect.
        batch: B examples on the model's device.
        reduction: How examples weigh in the sum: alike (1 each), or by their scored tokens.
        whole: Receives, part by part, the gradient of the weighted sum of the examples' losses.
        samples: Receives, once for each parameter, the gradients of the B examples' own losses.
        products: Receives, for each part that ``whole`` receives, the parameter's inner product with it where the
            forward pass tells it (0-d, fp64), and ``None`` otherwise.
        token_loss: The loss of each token; of another one than the cross-entropy only the sum can be had.

    Returns:
        The loss of each example.

    Raises:
        CollectionError: If a loss or a gradient is not finite, or the graph cannot be seen whole.
    """
    one = _Pass(target, batch, reduction, whole, samples, products, token_loss)
    try:
        return one.run()
    finally:
        for call in one.tape.calls:
            call.end()


class _Pass:
    def __init__(
        self,
        target: Target,
        batch: Batch,
        reduction: Reduction,
        whole: WholeSink | None,
        samples: SampleSink | None,
        products: ProductSink | None,
        token_loss: TokenLoss,
    ) -> None:
        self.target, self.batch, self.token_loss = target, batch, token_loss
        self.whole, self.products = whole, products
        self.parameters = target.parameters
        self.examples, self.length = batch.input_ids.shape
        weights = scored(batch).sum(1).double() if reduction == "token" else torch.ones(self.examples).double()
        self.weights = weights.to(batch.input_ids.device)
        self.separation = Separation(target, batch, self.weights.tolist(), samples) if samples else None
        self.tape = Tape()
        self.direct: set[str] = set()  # autograd itself forms their sum
        self.outside: set[str] = set()  # of these, those that are used where no module's call tells

    def run(self) -> list[float]:
        spread, keep = self.examples if self.separation else 1, self.products is not None
        with (
            torch.enable_grad(),
            casts_uncached(),
            recording(self.target.model, self.target.names, self._receive, spread=spread, products=keep) as self.tape,
        ):
            own = example_losses(self.token_loss(self.target.model, self.batch), self.batch)
            self.tape.open = False
            _refuse_broken_losses(own, self.batch)
            loss = (own * self.weights.to(own)).sum()
            uses = graph_uses(loss)
            self._plan(uses)
            held = {name: self.parameters[name] for name in self.parameters if name in self.direct}
            starts = self._starts(uses)
            edges = [edge for _, _, edge in starts]
            sources: list[Tensor | GradientEdge] = [*held.values(), *edges, *self._other_leaves(uses)]
            found = torch.autograd.grad(loss, sources, allow_unused=True) if sources else ()  # type: ignore[arg-type]
            for (call, place, _), delta in zip(starts, found[len(held) :], strict=False):
                hand_over(call, self._receive, place, delta)
        self._finish({name: value for name, value in zip(held, found, strict=False) if value is not None})
        return [float(value) for value in own.detach()]

    def _plan(self, uses: GraphUses) -> None:
        """Choose who forms each sum, and note what is unusual."""
        self.target.ran |= self.tape.ran
        reached = [call for call in self.tape.calls if any(edge and uses.reaches(edge) for edge in call.outputs)]
        named = [(name, call) for call in reached for name in call.parameters.values()]
        calls = Counter(name for name, _ in named)
        opaque = {name for name, call in named if call.form is None}
        overwritten = {name for name, call in named if call.overwritten}
        for name, parameter in self.parameters.items():
            # A call of a module with a closed form reads its parameters once; more is somebody else's use.
            outside = (uses.of(parameter) > calls[name] and name not in opaque) or name in overwritten
            if outside or (name in opaque and uses.of(parameter)):
                self.direct.add(name)
            if outside:
                self.outside.add(name)
                said = "input overwritten after the call" if name in overwritten else "used outside its module's call"
                self.target.notes[name] = said
            elif calls[name] > 1:
                modules = len({id(call.module) for other, call in named if other == name})
                self.target.notes[name] = f"shared by {modules} modules" if modules > 1 else "module called repeatedly"
        if self.separation:
            closed = Counter(name for name, call in named if call.form is not None)
            several = {name for name in opaque if uses.of(self.parameters[name]) > calls[name]}
            self.separation.expect(closed, self.direct, self.outside, several)

    def _starts(self, uses: GraphUses) -> list[tuple[Call, int, GradientEdge]]:
        """Return the outputs of calls before which nothing needs a gradient: autograd must be asked for these."""
        starts = [call for call in self.tape.calls if call.starts]
        places = [(call, place, edge) for call in starts for place, edge in enumerate(call.outputs)]
        return [(call, place, edge) for call, place, edge in places if edge and uses.reaches(edge)]

    def _other_leaves(self, uses: GraphUses) -> list[Tensor]:
        """Return the leaves that are no parameters, such as embedded inputs that were told to need a gradient.

        Every call leads to another one before it, to a start, or to one of these: asking for them passes all calls.
        """
        known = {id(parameter) for parameter in self.parameters.values()}
        return [leaf for leaf in uses.leaves if id(leaf) not in known]

    def _receive(self, call: Call, delta: Tensor) -> None:
        """Take a call apart as soon as its output's gradient is there."""
        names = list(call.parameters.values())
        if self.separation is None and self.direct.issuperset(names):
            return
        with torch.no_grad(), no_autocast(delta.device):
            rows = closed_form_gradients(call, delta, self.examples, self.length)
            if rows.broken is not None:
                raise self._broken_gradient(names[0], rows.broken)
            for name in names:
                if name not in self.direct:
                    if self.whole is not None:
                        self.whole(name, rows.whole[name])
                    if self.products is not None:
                        self.products(name, rows.product)
            if self.separation is not None:
                self.separation.receive(rows)
        call.release()

    def _finish(self, sums: Mapping[str, Tensor]) -> None:
        if any(parameter.grad is not None for parameter in self.target.model.parameters()):
            raise CollectionError(
                "expected a model that leaves the backward pass to autograd, found one that runs its own (a custom or "
                "offloaded checkpoint); turn that off"
            )
        for name, value in sums.items():
            if not bool(torch.isfinite(value).all()):
                raise self._broken_gradient(name)
            if self.whole is not None:
                with torch.no_grad(), no_autocast(value.device):
                    self.whole(name, DenseGradient(at_least_fp32(value), int(self.batch.attention_mask.sum())))
            if self.products is not None:
                self.products(name, None)
        if self.separation is not None:
            self.separation.finish(self.tape.calls, sums)

    def _broken_gradient(self, name: str, row: int = -1) -> CollectionError:
        """Name the example whose gradient is not finite, given its row or by trying each."""
        said = f"expected a finite gradient of {name}, found NaN or inf"
        if row >= 0:
            return _advised(f"example {self.batch.examples[row]}: {said}")
        for row, example in enumerate(self.batch.examples):
            if not bool(torch.isfinite(self.target.by_autograd(self.batch.single(row), [name])[name].dense()).all()):
                return _advised(f"example {example}: {said}")
        return _advised(f"examples {list(self.batch.examples)}: {said} for all together, though for none alone")


def _advised(said: str) -> CollectionError:
    return CollectionError(f"{said}; run the model in fp32, or drop the example")


def _refuse_broken_losses(losses: Tensor, batch: Batch) -> None:
    broken = torch.nonzero(~torch.isfinite(losses))
    if len(broken):
        row = int(broken[0, 0])
        raise CollectionError(
            f"example {batch.examples[row]}: expected a finite loss, found {float(losses[row].detach())}; "
            "check the model's weights, or run it in fp32"
        )
