"""The KL divergence from the model before training, as a safety loss (SafeGrad, arXiv 2508.07172)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from geomkit.inputs.batches import Batch, batches
from geomkit.inputs.loss import next_token_logits, scored
from geomkit.inputs.model_state import model_state_kept
from geomkit.inputs.tokens import Tokens


class ReferenceModel:
    """The next-token log-probabilities of the model before training, at every scored token of the anchors.

    Attributes:
        log_probabilities: One fp32 tensor per anchor, (scored tokens, vocabulary).
    """

    def __init__(self, log_probabilities: Sequence[Tensor]) -> None:
        """Store the log-probabilities."""
        self.log_probabilities = list(log_probabilities)

    @classmethod
    def of(cls, model: nn.Module, rows: Sequence[Tokens], pad: int, *, batch_size: int = 16) -> "ReferenceModel":
        """Run a model over anchors in eval mode, and restore its mode.

        Args:
            model: A causal language model.
            rows: The anchors.
            pad: The id that fills short rows.
            batch_size: Anchors per forward pass.
        """
        log_probabilities: list[Tensor] = []
        device = next(model.parameters()).device
        with model_state_kept(model), torch.no_grad():
            model.eval()
            for batch in batches(rows, pad, batch_size):
                moved = batch.to(device)
                predictions = torch.log_softmax(next_token_logits(model, moved), -1).float()
                log_probabilities.extend(
                    prediction[mask] for prediction, mask in zip(predictions, scored(moved), strict=True)
                )
        return cls(log_probabilities)

    def losses(self, model: nn.Module, batch: Batch, indices: Sequence[int]) -> Tensor:
        """Return KL(before ‖ now) at each next token.

        Args:
            model: The model now.
            batch: B anchors of length L.
            indices: Index of the anchor of each example in the batch.

        Returns:
            (B, L − 1) divergences in nats; 0 where a token is not scored.
        """
        now = torch.log_softmax(next_token_logits(model, batch), -1)
        before = torch.zeros_like(now)
        before[scored(batch)] = torch.cat([self.log_probabilities[indices[example]] for example in batch.examples]).to(
            now
        )
        return (before.exp() * (before - now)).sum(-1) * scored(batch)
