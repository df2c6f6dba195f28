"""The loss that geomkit differentiates: cross-entropy on assistant tokens, averaged within each example."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from geomkit.errors import CollectionError
from geomkit.inputs.batches import IGNORED, Batch, batches
from geomkit.inputs.model_state import model_state_kept
from geomkit.inputs.offloading import input_device
from geomkit.inputs.tokens import Tokens, fingerprint_of, lengths_of
from geomkit.utils.precision import at_least_fp32
from geomkit.utils.progress import slow_bar
from geomkit.utils.workers import ALONE, Workers

Reduction = Literal["example", "token"]
"""Weighting of the examples in a mean loss: equal, or proportional to their numbers of scored tokens."""

TokenLoss = Callable[[nn.Module, Batch], Tensor]
"""Function that runs a model on a batch of B examples of length L and returns (B, L − 1) losses, 0 where not scored."""


def token_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Return the cross-entropy of every next token, from one run of the model.

    Args:
        model: A causal language model.
        batch: B examples padded to length L, on the model's device.

    Returns:
        (B, L − 1) losses in nats, fp32 or better; 0 for tokens that are not the assistant's.

    Raises:
        CollectionError: If the model returns logits for another number of tokens.
    """
    mask = scored(batch)
    losses = functional.cross_entropy(scored_logits(model, batch), batch.labels[:, 1:][mask], reduction="none")
    return losses.new_zeros(mask.shape).masked_scatter(mask, losses)


def scored_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Return (N, vocabulary) logits of the N scored next tokens, fp32 or better, from one run of the model.

    Args:
        model: A causal language model.
        batch: B examples padded to length L, on the model's device.

    Raises:
        CollectionError: If the model returns logits for another number of tokens.
    """
    places = functional.pad(scored(batch), (0, 1)).flatten().nonzero()[:, 0]
    # Logits are by far the largest tensor: only those of scored tokens are copied and converted.
    return at_least_fp32(_logits(model, batch).flatten(0, 1).index_select(0, places))


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    """Return the (B, L, vocabulary) logits of one run of the model, in its dtype."""
    logits: Tensor = model(**batch.inputs(), use_cache=False).logits
    if logits.shape[1] != batch.labels.shape[1]:
        raise CollectionError(
            f"expected logits for {batch.labels.shape[1]} tokens, found {logits.shape[1]}; a model that adds tokens of "
            "its own (prompt tuning) cannot be scored"
        )
    return logits


def scored(batch: Batch) -> Tensor:
    """Return the (B, L − 1) mask of the next tokens that are scored."""
    return batch.labels[:, 1:] != IGNORED


def example_losses(losses: Tensor, batch: Batch) -> Tensor:
    """Return each example's loss: the mean of its token losses.

    Args:
        losses: (B, L − 1), from :func:`token_losses`.
        batch: The batch that the losses are from.

    Returns:
        (B,) mean loss over the assistant tokens of each example, in nats.
    """
    return losses.sum(1) / scored(batch).sum(1)


def losses_of(
    model: nn.Module,
    rows: Sequence[Tokens],
    pad: int,
    *,
    batch_size: int = 16,
    token_loss: TokenLoss = token_losses,
    workers: Workers = ALONE,
    progress: bool = False,
    title: str = "losses",
) -> list[float]:
    """Return the loss of each example, computed without gradients.

    The model runs in eval mode; its state is restored afterwards.

    Args:
        model: A causal language model.
        rows: The examples.
        pad: Id of the token that fills short rows.
        batch_size: Number of examples in a batch.
        token_loss: Function that gives the loss of each token.
        workers: The workers that divide the examples.
        progress: Show a bar, if it takes longer than five seconds.
        title: Title of the bar.

    Returns:
        Mean loss over the assistant tokens of each example, in nats.

    Raises:
        DataError: If workers give different examples.
    """
    if workers.count > 1:
        workers.refuse_differences(examples=fingerprint_of(rows))
    losses: list[float] = []
    with workers.failing_together(), model_state_kept(model), torch.no_grad():
        device = input_device(model)
        own = [rows[index] for index in workers.share(lengths_of(rows))]
        model.eval()
        with slow_bar(len(own), title, "example", progress) as bar:
            for batch in batches(own, pad, batch_size):
                on_device = batch.to(device)
                losses.extend(example_losses(token_loss(model, on_device), on_device).tolist())
                bar.update(len(batch.input_ids))
    return [loss for part in workers.gather(losses) for loss in part]
