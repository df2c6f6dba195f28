"""What a command reads: example sets, a model with its tokenizer, encoded examples, and a choice of layers."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from geomkit.cli.columns import ColumnReader
from geomkit.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from geomkit.inputs.parameters import Layers
    from geomkit.inputs.tokens import AssistantMask, EncodedExamples


def read_sets(names: Sequence[str], columns: str | None) -> "list[Dataset]":
    """Return the examples of each set, with the columns named by the user where a set has them.

    Raises:
        DataError: If a set cannot be read, an example has no answer, or no set has the named columns.
    """
    from geomkit.inputs.examples import check_answers, load_examples

    reader = ColumnReader(columns)
    read = [reader(partial(load_examples, name)) for name in names]
    reader.check()
    for rows, name in zip(read, names, strict=True):
        check_answers(rows, name)
    return read


def load_and_encode(
    model: str,
    conversations: "Sequence[Dataset]",
    assistant_mask: str,
    max_length: int | None,
    pad_token: str | None,
    dtype: str,
    device: str | None,
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase, list[EncodedExamples]]":
    """Return a model, its tokenizer and the encoded examples of each set.

    Args:
        model: The value of ``--model``.
        conversations: The examples of each set.
        assistant_mask: The value of ``--assistant-mask``.
        max_length: Longer examples are cut to this many tokens.
        pad_token: Pad token, for tokenizers without one.
        dtype: The value of ``--dtype``.
        device: The value of ``--device``.

    Raises:
        DataError: If there is no such mask, the model cannot be loaded, or an example cannot be encoded.
    """
    from geomkit.inputs.tokens import encode

    masks: dict[str, AssistantMask] = {"auto": "auto", "template": "template", "prefix": "prefix"}
    if assistant_mask not in masks:
        raise DataError(f"expected --assistant-mask auto, template or prefix, found '{assistant_mask}'")
    mask = masks[assistant_mask]
    loaded, tokenizer = load_model_by_name(model, dtype, device, pad_token)
    encoded = [encode(tokenizer, rows, assistant_mask=mask, max_length=max_length) for rows in conversations]
    return loaded, tokenizer, encoded


def load_model_by_name(
    name: str, dtype: str, device: str | None, pad_token: str | None
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Return a model and its tokenizer by the value of ``--model``.

    Raises:
        DataError: If the model cannot be loaded, or is one of the English world and has to be loaded in another way.
    """
    from geomkit.experiments.organisms import ENGLISH, load_organism
    from geomkit.inputs.models import load_model

    if name.partition("/")[0] != ENGLISH or Path(name).exists():
        return load_model(name, dtype=dtype, device=device, pad_token=pad_token)
    if dtype not in {"auto", "float32"} or device is not None or pad_token is not None:
        raise DataError(
            f"expected no --dtype, --device and --pad-token for '{name}', which is a merged adapter in float32 on the "
            "CPU; leave them out"
        )
    return load_organism(name)


def layers_by_text(text: str) -> "Layers":
    """Return numbers of decoder layers if the text has nothing else between its commas, else glob patterns.

    Raises:
        DataError: If the text has both, or nothing between two commas.
    """
    parts = [part.strip() for part in text.split(",")]
    if all(part.isdecimal() for part in parts):
        return [int(part) for part in parts]
    if any(part.isdecimal() for part in parts) or not all(parts):
        raise DataError(
            f"expected --layers as numbers like 10,20 or as patterns like '*.mlp.*', found '{text}'; give one kind, "
            "with single commas"
        )
    return parts
