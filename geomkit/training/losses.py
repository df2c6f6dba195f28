"""Loss of each example, and its mean over examples, without gradients."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from geomkit.gradients.provenance import weights_fingerprint
from geomkit.inputs.fits import encoded_for
from geomkit.inputs.loss import losses_of
from geomkit.inputs.parameters import unwrapped_model, workers_of
from geomkit.inputs.tokens import EncodedExamples, Tokens

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def mean_loss(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    examples: "Dataset | EncodedExamples",
    *,
    batch_size: int = 16,
) -> float:
    """Return the mean over examples of their mean cross-entropy on the assistant's tokens, in nats per token.

    For refusals as examples, this is the safety loss; its growth during fine-tuning is the *drift*.

    Args:
        model: A causal language model; its state is restored.
        tokenizer: The model's tokenizer, with a chat template and a pad token.
        examples: Rows with a column ``messages``, or rows encoded by :func:`geomkit.encode`.
        batch_size: Examples run at a time.

    Returns:
        The mean loss.

    Raises:
        DataError: If the examples cannot be encoded.
    """
    with workers_of(model).failing_together():
        rows, pad = encoded_for(model, tokenizer, examples)
    losses = divided_losses(model, rows, pad, batch_size)
    return sum(losses) / len(losses)


def divided_losses(
    model: "PreTrainedModel",
    rows: Sequence[Tokens],
    pad: int,
    batch_size: int = 16,
    progress: bool = False,
    title: str = "losses",
) -> list[float]:
    """Return the loss of each example; the processes of a run divide the examples."""
    workers = workers_of(model)
    workers.refuse_differences(weights=weights_fingerprint(model) if workers.count > 1 else "")
    return losses_of(
        unwrapped_model(model), rows, pad, batch_size=batch_size, workers=workers, progress=progress, title=title
    )
