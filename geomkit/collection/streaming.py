"""Running a model over a whole set in batches by token budget, whatever is done with the gradients."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import get_args

import torch
from torch import nn

from geomkit.collection.passes import ProductSink, WholeSink, run_pass
from geomkit.collection.target import Target
from geomkit.errors import CollectionError, DataError
from geomkit.gradients.layer_gradient import LayerGradient
from geomkit.inputs.batches import collate, plan_batches
from geomkit.inputs.loss import Reduction, TokenLoss, token_losses
from geomkit.inputs.model_state import (
    compilation_and_parameter_hooks_off,
    grads_set_aside,
    model_state_kept,
    one_collection_at_a_time,
)
from geomkit.inputs.parameters import Selection, chosen_parameters, refuse_unseen_values, unwrapped_model
from geomkit.inputs.tokens import EncodedExamples, Tokens, lengths_of
from geomkit.utils.precision import full_precision

TOKENS_PER_BATCH = 4096
"""Positions in a batch where nothing else is said: a few GiB of activations for a model of a billion parameters."""

ExampleSink = Callable[[str, Sequence[int], Sequence[LayerGradient]], None]


@dataclass(frozen=True, eq=False)
class Streamed:
    """What is known after the last batch.

    Attributes:
        target: The parameters and what was noticed about them.
        losses: Each example's loss, in nats per token, in the set's order.
        loss_tokens: Each example's number of scored tokens.
    """

    target: Target
    losses: list[float]
    loss_tokens: list[int]


def stream(
    model: nn.Module,
    rows: Sequence[Tokens],
    pad: int,
    chosen: Selection,
    *,
    reduction: Reduction = "example",
    tokens_per_batch: int = TOKENS_PER_BATCH,
    progress: bool = False,
    whole: WholeSink | None = None,
    samples: ExampleSink | None = None,
    products: ProductSink | None = None,
    token_loss: TokenLoss = token_losses,
) -> Streamed:
    """Run every example forward and backward once and hand out the gradients; the model is left as found.

    Args:
        model: A causal language model, which runs in eval mode.
        rows: The examples.
        pad: The id that fills short rows.
        chosen: Which parameters to collect.
        reduction: How examples weigh in the sum: alike (1 each), or by their scored tokens.
        tokens_per_batch: Most positions in a batch, padding included.
        progress: Show a bar, in tokens.
        whole: Receives parts of the gradient of the weighted sum of all losses.
        samples: Receives, batch by batch, the gradients of examples' own losses and the examples' indices.
        products: See :func:`geomkit.collection.passes.run_pass`.
        token_loss: The loss of each token; of another one than the cross-entropy only the sum can be had.

    Raises:
        CollectionError: If no trainable parameter is chosen, weights cannot be seen, or a loss or gradient is not
            finite.
    """
    from tqdm.auto import tqdm

    if reduction not in get_args(Reduction):
        raise CollectionError(f"expected the reduction {' or '.join(get_args(Reduction))}, found {reduction!r}")
    _refuse_unscored(rows)
    device = next(model.parameters()).device
    lengths = lengths_of(rows)
    losses, scored = [0.0] * len(rows), [0] * len(rows)
    with (
        watched(model, chosen) as target,
        tqdm(total=sum(lengths), desc="gradients", unit="token", unit_scale=True, disable=not progress) as bar,
    ):
        for plan in plan_batches(lengths, tokens_per_batch):
            examples = [rows[index] for index in plan]
            batch = collate(examples, pad, examples=plan, min_length=padded_length(list(map(len, examples)))).to(device)
            own = run_pass(
                target,
                batch,
                reduction=reduction,
                whole=whole,
                samples=_numbered(samples, plan),
                products=products,
                token_loss=token_loss,
            )
            for index, example, loss in zip(plan, examples, own, strict=True):
                losses[index], scored[index] = loss, example.loss_tokens
            bar.update(sum(map(len, examples)))
    return Streamed(target, losses, scored)


@contextmanager
def watched(model: nn.Module, chosen: Selection) -> Iterator[Target]:
    """Make a model ready for passes inside the block, and leave it as found.

    It runs in eval mode, fp32 products stay fp32, and only what is chosen needs a gradient.

    Args:
        model: A causal language model.
        chosen: Which parameters to collect.

    Yields:
        What to collect, for :func:`geomkit.collection.passes.run_pass`.

    Raises:
        CollectionError: If no trainable parameter is chosen, or weights cannot be seen.
    """
    inner = unwrapped_model(model)
    target = Target(inner, chosen_parameters(inner, chosen))
    refuse_unseen_values(target.parameters, CollectionError)
    with (
        torch.inference_mode(False),
        one_collection_at_a_time(inner),
        model_state_kept(inner),
        grads_set_aside(inner),
        compilation_and_parameter_hooks_off(inner),
        full_precision(),
    ):
        for module in inner.modules():  # eval() may be overridden, and do more than that
            module.training = False
        for parameter in set(inner.parameters()) - set(target.parameters.values()):
            parameter.requires_grad_(False)
        yield target


def _refuse_unscored(rows: Sequence[Tokens]) -> None:
    if not rows:
        raise DataError("expected at least one example, found none")
    if not isinstance(rows, EncodedExamples):  # those were checked when they were encoded
        for index, row in enumerate(rows):
            if row.loss_tokens == 0:
                raise DataError(f"example {index}: expected tokens to take the loss on, found none of {len(row)}")


def padded_length(lengths: Sequence[int]) -> int:
    """Choose a padded length other than the batch size: a first dimension of that size could be either."""
    longest = max(lengths)
    return longest + 1 if longest == len(lengths) else longest


def _numbered(
    samples: ExampleSink | None, plan: Sequence[int]
) -> Callable[[str, Sequence[LayerGradient]], None] | None:
    if samples is None:
        return None
    return lambda name, gradients: samples(name, plan, gradients)
