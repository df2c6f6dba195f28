"""One forward and one backward pass over a batch, which give the gradient of every parameter to collect.

A parameter's gradient comes from one of two sources. If all its uses in the autograd graph are calls of modules with a
closed form, it is the sum of their closed forms, and autograd need not compute it. Otherwise autograd computes it.
"""

from collections import Counter
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from geomkit.collection.closed_form import closed_form_gradients
from geomkit.collection.graph_uses import GraphUses, graph_uses
from geomkit.collection.hooks import Call, Tape, hand_over, recording
from geomkit.collection.per_example import PerExampleGradients, SampleSink
from geomkit.collection.target import Target
from geomkit.errors import CollectionError
from geomkit.gradients.dense import DenseGradient
from geomkit.gradients.layer_gradient import LayerGradient
from geomkit.inputs.batches import Batch
from geomkit.inputs.loss import Reduction, TokenLoss, example_losses, scored, token_losses
from geomkit.utils.precision import at_least_fp32, casts_uncached, no_autocast

SumSink = Callable[[str, LayerGradient], None]
"""Function that takes the name of a parameter and a part of its gradient of the summed loss."""

ProductSink = Callable[[str, Tensor | None], None]
"""Function that takes the name of a parameter and its inner product with a part of its gradient, or ``None``."""


def run_pass(
    target: Target,
    batch: Batch,
    *,
    reduction: Reduction = "example",
    sums: SumSink | None = None,
    samples: SampleSink | None = None,
    products: ProductSink | None = None,
    token_loss: TokenLoss = token_losses,
) -> list[float]:
    """Run a batch forward and backward once, and give its gradients to functions.

    Args:
        target: The parameters to collect.
        batch: B examples on the device of the model.
        reduction: Weights of the examples in the summed loss: 1 each, or the number of scored tokens.
        sums: Receives the gradient of the summed loss, part by part, for each parameter.
        samples: Receives the gradients of the losses of the B examples, once for each parameter.
        products: Receives, for each part that ``sums`` receives, the inner product ⟨W, G⟩ of the parameter and the part
            (0-d, fp64); ``None`` if the forward pass does not give it.
        token_loss: Function that gives the loss of each token. With another loss than the cross-entropy, gradients of
            single examples are not available.

    Returns:
        The loss of each example, in nats per token.

    Raises:
        CollectionError: If a loss or a gradient is not finite, or a part of the graph is hidden.
    """
    current = _Pass(target, batch, reduction, sums, samples, products, token_loss)
    try:
        return current.run()
    finally:
        for call in current.tape.calls:
            call.end()


class _Pass:
    def __init__(
        self,
        target: Target,
        batch: Batch,
        reduction: Reduction,
        sums: SumSink | None,
        samples: SampleSink | None,
        products: ProductSink | None,
        token_loss: TokenLoss,
    ) -> None:
        self.target, self.batch, self.token_loss = target, batch, token_loss
        self.sums, self.products = sums, products
        self.parameters = target.parameters
        self.batch_size, self.length = batch.input_ids.shape
        weights = scored(batch).sum(1).double() if reduction == "token" else torch.ones(self.batch_size).double()
        self.weights = weights.to(batch.input_ids.device)
        self.per_example = PerExampleGradients(target, batch, self.weights.tolist(), samples) if samples else None
        self.tape = Tape()
        self.by_autograd: set[str] = set()  # parameters whose gradient of the summed loss autograd computes
        self.used_outside: set[str] = set()  # of these, parameters with uses that no module call explains

    def run(self) -> list[float]:
        batch_size, store_outputs = self.batch_size if self.per_example else 1, self.products is not None
        model, names = self.target.model, self.target.canonical_names
        with (
            torch.enable_grad(),
            casts_uncached(),
            recording(model, names, self._receive, batch_size=batch_size, store_outputs=store_outputs) as self.tape,
        ):
            # 1. Forward: the loss Σ_i w_i loss_i, while the tape records all module calls.
            losses = example_losses(self.token_loss(model, self.batch), self.batch)
            self.tape.is_open = False
            _refuse_broken_losses(losses, self.batch)
            loss = (losses * self.weights.to(losses)).sum()
            # 2. Plan: which parameters have only closed forms, from the uses in the autograd graph.
            uses = graph_uses(loss)
            self._plan(uses)
            # 3. Backward. Hooks receive the output gradients of calls on the way (`_receive`). Autograd returns the
            # gradients of its own parameters, and the output gradients of calls at the start of the graph.
            computed = {name: self.parameters[name] for name in self.parameters if name in self.by_autograd}
            starts = self._graph_starts(uses)
            edges = [edge for _, _, edge in starts]
            sources: list[Tensor | GradientEdge] = [*computed.values(), *edges, *self._other_leaves(uses)]
            gradients = torch.autograd.grad(loss, sources, allow_unused=True) if sources else ()  # type: ignore[arg-type]
            for (call, index, _), delta in zip(starts, gradients[len(computed) :], strict=False):
                hand_over(call, self._receive, index, delta)
        # 4. Hand on the gradients that autograd computed, and split what is left into examples.
        self._finish({name: value for name, value in zip(computed, gradients, strict=False) if value is not None})
        return [float(value) for value in losses.detach()]

    def _plan(self, uses: GraphUses) -> None:
        """Decide which gradients autograd computes, and note unusual uses of parameters."""
        self.target.called |= self.tape.called
        # 1. The calls that the loss depends on, by parameter.
        reached = [call for call in self.tape.calls if any(edge and uses.reaches(edge) for edge in call.output_edges)]
        named = [(name, call) for call in reached for name in call.parameters.values()]
        calls = Counter(name for name, _ in named)
        opaque = {name for name, call in named if call.form is None}
        overwritten = {name for name, call in named if call.input_overwritten}
        for name, parameter in self.parameters.items():
            # 2. A call with a closed form reads each parameter once. More reads than calls are uses outside the calls;
            # a call without a closed form may read it any number of times.
            used_outside = (uses.of(parameter) > calls[name] and name not in opaque) or name in overwritten
            # 3. Autograd computes the gradient if a use has no closed form, or the input of a closed form is lost.
            if used_outside or (name in opaque and uses.of(parameter)):
                self.by_autograd.add(name)
            if used_outside:
                self.used_outside.add(name)
                reason = "input overwritten after the call" if name in overwritten else "used outside its module's call"
                self.target.notes[name] = reason
            elif calls[name] > 1:
                modules = len({id(call.module) for call_name, call in named if call_name == name})
                self.target.notes[name] = f"shared by {modules} modules" if modules > 1 else "module called repeatedly"
        if self.per_example:
            closed = Counter(name for name, call in named if call.form is not None)
            read_more_than_called = {name for name in opaque if uses.of(self.parameters[name]) > calls[name]}
            self.per_example.expect(closed, self.by_autograd, self.used_outside, read_more_than_called)

    def _graph_starts(self, uses: GraphUses) -> list[tuple[Call, int, GradientEdge]]:
        """Return the outputs of calls at the start of the graph, whose gradients autograd must be asked for."""
        starts = [call for call in self.tape.calls if call.at_graph_start]
        outputs = [(call, index, edge) for call in starts for index, edge in enumerate(call.output_edges)]
        return [(call, index, edge) for call, index, edge in outputs if edge and uses.reaches(edge)]

    def _other_leaves(self, uses: GraphUses) -> list[Tensor]:
        """Return the leaves that are not parameters to collect, such as input embeddings that need a gradient.

        The backward pass reaches all calls if autograd is asked for these leaves: below every call is another call, a
        call at the start of the graph, or one of these leaves.
        """
        parameter_ids = {id(parameter) for parameter in self.parameters.values()}
        return [leaf for leaf in uses.leaves if id(leaf) not in parameter_ids]

    def _receive(self, call: Call, delta: Tensor) -> None:
        """Compute and hand on the gradients of a call with a closed form, once its output gradient is known."""
        names = list(call.parameters.values())
        if self.per_example is None and self.by_autograd.issuperset(names):
            return
        with torch.no_grad(), no_autocast(delta.device):
            gradients = closed_form_gradients(call, delta, self.batch_size, self.length)
            if gradients.first_broken is not None:
                raise self._broken_gradient(names[0], gradients.first_broken)
            for name in names:
                if name not in self.by_autograd:
                    if self.sums is not None:
                        self.sums(name, gradients.summed[name])
                    if self.products is not None:
                        self.products(name, gradients.weight_product)
            if self.per_example is not None:
                self.per_example.receive(gradients)
        call.release_tensors()

    def _finish(self, computed: Mapping[str, Tensor]) -> None:
        """Hand on the gradients of the summed loss that autograd computed, and complete the gradients of examples."""
        if any(parameter.grad is not None for parameter in self.target.model.parameters()):
            raise CollectionError(
                "expected a model that leaves the backward pass to autograd, found one with its own (a custom or "
                "offloaded checkpoint); turn that off"
            )
        for name, value in computed.items():
            if not bool(torch.isfinite(value).all()):
                raise self._broken_gradient(name)
            if self.sums is not None:
                with torch.no_grad(), no_autocast(value.device):
                    self.sums(name, DenseGradient(at_least_fp32(value), int(self.batch.attention_mask.sum())))
            if self.products is not None:
                self.products(name, None)
        if self.per_example is not None:
            self.per_example.finish(self.tape.calls, computed)

    def _broken_gradient(self, name: str, row: int = -1) -> CollectionError:
        """Return the error for a gradient that is not finite; without a row, examples are tried one after the other."""
        finding = f"expected a finite gradient of {name}, found NaN or inf"
        if row >= 0:
            return _with_advice(f"example {self.batch.examples[row]}: {finding}")
        for row, example in enumerate(self.batch.examples):
            if not bool(torch.isfinite(self.target.by_autograd(self.batch.single(row), [name])[name].dense()).all()):
                return _with_advice(f"example {example}: {finding}")
        return _with_advice(f"examples {list(self.batch.examples)}: {finding} for all together, though for none alone")


def _with_advice(finding: str) -> CollectionError:
    return CollectionError(f"{finding}; run the model in fp32, or drop the example")


def _refuse_broken_losses(losses: Tensor, batch: Batch) -> None:
    broken = torch.nonzero(~torch.isfinite(losses))
    if len(broken):
        row = int(broken[0, 0])
        raise CollectionError(
            f"example {batch.examples[row]}: expected a finite loss, found {float(losses[row].detach())}; "
            "check the model's weights, or run it in fp32"
        )
