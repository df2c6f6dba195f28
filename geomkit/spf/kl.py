"""The KL divergence from the model before training, as a safety loss (SafeGrad, arXiv 2508.07172)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from geomkit.inputs.batches import Batch, batches
from geomkit.inputs.loss import next_token_logits, scored
from geomkit.inputs.model_state import model_state_kept
from geomkit.inputs.tokens import Tokens


class ReferenceModel:
    """What the model said before training, at every scored token of some anchors.

    Attributes:
        said: For each anchor the log-probabilities of its scored tokens, (scored tokens, vocabulary), fp32.
    """

    def __init__(self, said: Sequence[Tensor]) -> None:
        """Keep what was said."""
        self.said = list(said)

    @classmethod
    def of(cls, model: nn.Module, rows: Sequence[Tokens], pad: int, *, batch_size: int = 16) -> "ReferenceModel":
        """Run a model over anchors; it is left as found.

        Args:
            model: A causal language model.
            rows: The anchors.
            pad: The id that fills short rows.
            batch_size: Anchors run at a time.
        """
        said: list[Tensor] = []
        device = next(model.parameters()).device
        with model_state_kept(model), torch.no_grad():
            model.eval()
            for batch in batches(rows, pad, batch_size):
                here = batch.to(device)
                words = torch.log_softmax(next_token_logits(model, here), -1).float()
                said.extend(own[counts] for own, counts in zip(words, scored(here), strict=True))
        return cls(said)

    def losses(self, model: nn.Module, batch: Batch, chosen: Sequence[int]) -> Tensor:
        """Return KL(before ‖ now) at each next token.

        Args:
            model: The model now.
            batch: B anchors of length L.
            chosen: Which anchor each of the batch's examples is.

        Returns:
            (B, L − 1) divergences in nats; 0 where a token is not scored.
        """
        now = torch.log_softmax(next_token_logits(model, batch), -1)
        before = torch.zeros_like(now)
        before[scored(batch)] = torch.cat([self.said[chosen[example]] for example in batch.examples]).to(now)
        return (before.exp() * (before - now)).sum(-1) * scored(batch)
