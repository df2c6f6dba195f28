"""The loss on assistant tokens, against the cross-entropy of all logits."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from geomkit.inputs.batches import IGNORED, Batch, collate
from geomkit.inputs.loss import scored, token_losses
from geomkit.inputs.tokens import Tokens
from tests.helpers.tiny import tiny_llama


def batch() -> Batch:
    """Two examples of 9 and 6 tokens, in which scored tokens are in several runs, and one without a scored token."""
    masks = [(False,) * 3 + (True, True, False, False, True, True), (False,) * 5 + (True,), (False,) * 4]
    return collate([Tokens(tuple(range(5, 5 + len(mask))), mask) for mask in masks], pad=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_and_gradients_are_those_of_all_logits(dtype: torch.dtype) -> None:
    model, rows = tiny_llama().to(dtype), batch()
    logits = model(**rows.inputs()).logits[:, :-1].float()
    expected = cross_entropy(logits.transpose(1, 2), rows.labels[:, 1:], ignore_index=IGNORED, reduction="none")
    losses = token_losses(model, rows)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected)
    assert not losses[~scored(rows)].any()
    gradients, references = (torch.autograd.grad(loss.sum(), list(model.parameters())) for loss in (losses, expected))
    tolerances = {} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(gradients, references, **tolerances)
