"""Passes over a whole set of examples, in batches, with functions that receive the gradients."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import get_args

import torch
from torch import nn

from geomkit.collection.passes import ProductSink, SumSink, run_pass
from geomkit.collection.per_example import SampleSink
from geomkit.collection.target import Target
from geomkit.errors import CollectionError, DataError
from geomkit.gradients.layer_gradient import LayerGradient
from geomkit.gradients.provenance import weights_fingerprint
from geomkit.inputs.batches import Batch, collate, longest_first, plan_batches
from geomkit.inputs.loss import Reduction, TokenLoss, token_losses
from geomkit.inputs.model_state import (
    compilation_and_parameter_hooks_off,
    grads_set_aside,
    model_state_kept,
    one_collection_at_a_time,
)
from geomkit.inputs.offloading import input_device, offloaded_weights_loaded
from geomkit.inputs.parameters import Selection, chosen_parameters, refuse_unseen_values, unwrapped_model
from geomkit.inputs.tokens import EncodedExamples, Tokens, fingerprint_of, lengths_of
from geomkit.utils.precision import full_precision
from geomkit.utils.workers import ALONE, Workers, first_process

TOKENS_PER_BATCH = 4096
"""Default number of token positions in a batch: a few GiB of activations for a model of a billion parameters."""

ExampleSink = Callable[[str, Sequence[int], Sequence[LayerGradient]], None]
"""Function that takes a parameter's name, the indices of a batch's examples and the gradients of their losses."""


@dataclass(frozen=True, eq=False)
class StreamResult:
    """Losses of all examples, and the findings about the parameters.

    Attributes:
        target: The parameters, with findings about them of all workers.
        losses: (N,) loss of each example, in nats per token, in the order of the set.
        loss_tokens: (N,) number of scored tokens of each example.
    """

    target: Target
    losses: list[float]
    loss_tokens: list[int]


def stream(
    model: nn.Module,
    rows: Sequence[Tokens],
    pad: int,
    selection: Selection,
    *,
    reduction: Reduction = "example",
    tokens_per_batch: int = TOKENS_PER_BATCH,
    progress: bool = False,
    sums: SumSink | None = None,
    samples: ExampleSink | None = None,
    products: ProductSink | None = None,
    token_loss: TokenLoss = token_losses,
    workers: Workers = ALONE,
) -> StreamResult:
    """Run every example forward and backward once, and give the gradients to functions.

    The state of the model is restored afterwards, also after an exception. Several workers divide the examples: the
    functions of each receive the gradients of its own part, and the result is about all examples.

    Args:
        model: A causal language model; it runs in eval mode.
        rows: N examples.
        pad: Id of the token that fills short rows.
        selection: The choice of parameters.
        reduction: Weights of the examples in the summed loss: 1 each, or the number of scored tokens.
        tokens_per_batch: Largest number of token positions in a batch, padding included.
        progress: Show a progress bar, in tokens.
        sums: Receives parts of the gradient of the summed loss.
        samples: Receives the gradients of the examples' losses, batch by batch, with the indices of the examples.
        products: See :func:`geomkit.collection.passes.run_pass`.
        token_loss: See :func:`geomkit.collection.passes.run_pass`.
        workers: The workers that divide the examples.

    Raises:
        DataError: If there is no example, an example has no scored token, or workers give different examples, weights
            or settings.
        CollectionError: If no trainable parameter is chosen, weights are sharded or on the meta device, or a loss or
            gradient is not finite.
    """
    from tqdm.auto import tqdm

    if workers.count > 1:
        settings = f"{selection}, {reduction}, {tokens_per_batch}"
        workers.refuse_differences(examples=fingerprint_of(rows), weights=weights_fingerprint(model), settings=settings)
    with workers.failing_together():
        if reduction not in get_args(Reduction):
            raise CollectionError(
                f"expected the reduction {' or '.join(get_args(Reduction))}, found {reduction!r}; give one of these "
                "as reduction="
            )
        _refuse_unscored(rows)
        # Parts of the examples in the order of the batches: side by side, they are what one process runs.
        lengths = lengths_of(rows)
        order = longest_first(lengths)
        own = [order[place] for place in workers.share([lengths[index] for index in order])]
        losses: dict[int, float] = {}
        loss_tokens: dict[int, int] = {}
        total, hidden = sum(lengths[index] for index in own), not (progress and first_process())
        with (
            prepared(model, selection, progress) as target,
            tqdm(total=total, desc="gradients", unit="token", unit_scale=True, disable=hidden) as bar,
        ):
            for examples, batch in _batches_of(rows, pad, own, tokens_per_batch):
                batch_losses = run_pass(
                    target,
                    batch.to(input_device(target.model)),
                    reduction=reduction,
                    sums=sums,
                    samples=_with_indices(samples, list(batch.examples)),
                    products=products,
                    token_loss=token_loss,
                )
                losses |= zip(batch.examples, batch_losses, strict=True)
                loss_tokens |= zip(batch.examples, (row.loss_tokens for row in examples), strict=True)
                bar.update(sum(map(len, examples)))
    return _joined(workers, target, losses, loss_tokens)


def _batches_of(
    rows: Sequence[Tokens], pad: int, indices: Sequence[int], tokens_per_batch: int
) -> Iterator[tuple[list[Tokens], Batch]]:
    """Yield the examples with some indices in batches, each batch also as its rows."""
    lengths = lengths_of(rows)
    for plan in plan_batches([lengths[index] for index in indices], tokens_per_batch):
        own = [indices[place] for place in plan]
        examples = [rows[index] for index in own]
        yield examples, collate(examples, pad, examples=own, min_length=padded_length(list(map(len, examples))))


def _joined(
    workers: Workers, target: Target, losses: Mapping[int, float], loss_tokens: Mapping[int, int]
) -> StreamResult:
    """Return the result for the examples of all workers, with the findings of all workers about the parameters."""
    every_loss: dict[int, float] = {}
    every_count: dict[int, int] = {}
    every_note: dict[str, str] = {}
    for called, notes, own_losses, own_counts in workers.gather((target.called, target.notes, losses, loss_tokens)):
        target.called |= called
        every_note = notes | every_note  # of two remarks on a parameter, the first worker's, on all workers
        every_loss |= own_losses
        every_count |= own_counts
    target.notes = every_note
    examples = range(len(every_loss))
    return StreamResult(target, [every_loss[index] for index in examples], [every_count[index] for index in examples])


@contextmanager
def prepared(model: nn.Module, selection: Selection, progress: bool = False) -> Iterator[Target]:
    """Prepare a model for passes inside the block, and restore its state afterwards.

    Inside the block the model is in eval mode, fp32 products are computed in fp32, and only the chosen parameters need
    a gradient.

    Args:
        model: A causal language model.
        selection: The choice of parameters.
        progress: Show a bar while offloaded weights are loaded, if that takes longer than five seconds.

    Yields:
        The parameters to collect, for :func:`geomkit.collection.passes.run_pass`.

    Raises:
        CollectionError: If no trainable parameter is chosen, or weights are sharded or on the meta device.
    """
    inner = unwrapped_model(model)
    with torch.inference_mode(False), one_collection_at_a_time(inner), offloaded_weights_loaded(inner, progress):
        target = Target(inner, chosen_parameters(inner, selection))
        refuse_unseen_values(target.parameters, CollectionError)
        with (
            model_state_kept(inner),
            grads_set_aside(inner),
            compilation_and_parameter_hooks_off(inner),
            full_precision(),
        ):
            for module in inner.modules():  # not eval(), which a module may override with side effects
                module.training = False
            for parameter in set(inner.parameters()) - set(target.parameters.values()):
                parameter.requires_grad_(False)
            yield target


def _refuse_unscored(rows: Sequence[Tokens]) -> None:
    if not rows:
        raise DataError("expected at least one example, found none; give a set with rows")
    if not isinstance(rows, EncodedExamples):  # encoded examples were checked by encode
        for index, row in enumerate(rows):
            if row.loss_tokens == 0:
                raise DataError(
                    f"example {index}: expected tokens to take the loss on, found none of {len(row)}; drop the example"
                )


def padded_length(lengths: Sequence[int]) -> int:
    """Return a padded length other than the batch size, so that the size of a dimension tells what it is."""
    longest = max(lengths)
    return longest + 1 if longest == len(lengths) else longest


def _with_indices(samples: ExampleSink | None, indices: Sequence[int]) -> SampleSink | None:
    """Return the function for a batch that adds the indices of the examples."""
    if samples is None:
        return None
    return lambda name, gradients: samples(name, indices, gradients)
