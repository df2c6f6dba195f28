"""Examples encoded for a collection, with the provenance of what is computed from them."""

from typing import TYPE_CHECKING

from torch import nn

from geomkit.gradients.provenance import DataFingerprint, Provenance, provenance_of

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from geomkit.inputs.tokens import AssistantMask, EncodedExamples


def encode_and_note(
    model: nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    examples: "Dataset",
    *,
    reduction: str,
    layers: str,
    assistant_mask: "AssistantMask",
    max_length: int | None,
) -> "tuple[EncodedExamples, Provenance]":
    """Encode a set and say what a result on it is computed from; see :func:`provenance_of` for the arguments."""
    from geomkit.inputs.tokens import encode_lazily

    data = DataFingerprint()
    rows = encode_lazily(tokenizer, examples, assistant_mask=assistant_mask, max_length=max_length, seen=data.add)
    return rows, provenance_of(
        model, data, reduction=reduction, layers=layers, assistant_mask=assistant_mask, max_length=max_length
    )
