"""The KL divergence from the model before training, as a safety loss (SafeGrad, arXiv 2508.07172)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from geomkit.inputs.batches import Batch, batches
from geomkit.inputs.loss import scored, scored_logits
from geomkit.inputs.model_state import model_state_kept
from geomkit.inputs.offloading import input_device
from geomkit.inputs.tokens import Tokens
from geomkit.utils.progress import slow_bar

_SCALE = 2**15
"""Factor of stored probabilities, with which fp16 has all its digits for probabilities from 2e-9 to 1."""


class ReferenceModel:
    """The next-token probabilities of the model before training, at every scored token of the anchors.

    Attributes:
        probabilities: One fp16 tensor per anchor, (scored tokens, vocabulary), scaled by 2¹⁵, on the CPU. The rounding
            changes a divergence by about 1e-4 of itself, and by less than 1e-6 nats.
    """

    def __init__(self, probabilities: Sequence[Tensor]) -> None:
        """Store the probabilities."""
        self.probabilities = list(probabilities)

    @classmethod
    def of(
        cls, model: nn.Module, rows: Sequence[Tokens], pad: int, *, batch_size: int = 16, progress: bool = False
    ) -> "ReferenceModel":
        """Run a model over anchors in eval mode, and restore its mode.

        Args:
            model: A causal language model.
            rows: The anchors.
            pad: The id that fills short rows.
            batch_size: Anchors per forward pass.
            progress: Show a bar, if it takes longer than five seconds.
        """
        probabilities: list[Tensor] = []
        device = input_device(model)
        with model_state_kept(model), torch.no_grad():
            model.eval()
            with slow_bar(len(rows), "anchors before", "example", progress) as bar:
                for batch in batches(rows, pad, batch_size):
                    moved = batch.to(device)
                    predictions = (_SCALE * torch.softmax(scored_logits(model, moved), -1)).half().cpu()
                    probabilities.extend(torch.split(predictions, scored(moved).sum(1).tolist()))
                    bar.update(len(batch.input_ids))
        return cls(probabilities)

    def losses(self, model: nn.Module, batch: Batch, indices: Sequence[int]) -> Tensor:
        """Return KL(before ‖ now) at each next token.

        Args:
            model: The model now.
            batch: B anchors of length L.
            indices: Index of the anchor of each example in the batch.

        Returns:
            (B, L − 1) divergences in nats; 0 where a token is not scored.
        """
        mask = scored(batch)
        now = torch.log_softmax(scored_logits(model, batch), -1)
        before = torch.cat([self.probabilities[indices[example]] for example in batch.examples])
        before = before.to(now.device, now.dtype)
        before = before / before.sum(-1, keepdim=True)  # without the scale; the rounded numbers are the reference
        divergences = (torch.xlogy(before, before) - before * now).sum(-1)
        return divergences.new_zeros(mask.shape).masked_scatter(mask, divergences)
