"""Loading of the stages: the base model, and the base model with the adapter merged into it."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from geomkit.errors import DataError
from geomkit.experiments.english.sources import BASE_MODEL, LOCAL_COPIES, base_model
from geomkit.experiments.organism.load import STAGES, without_bars
from geomkit.gradients.provenance import weights_fingerprint
from geomkit.inputs.models import load_model, require_peft, with_merged_adapters, with_saved_adapter
from geomkit.utils.files import data_dir, read_json

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

_LOGGER = logging.getLogger(__name__)

FOLDER = "english"
"""Folder of the English world in the shipped data."""

FINGERPRINT = "base_fingerprint.json"
"""File beside the adapter with the fingerprint of the base model that it was trained on."""


def load_base(source: str | Path | None = None) -> "tuple[LlamaForCausalLM, PreTrainedTokenizerBase]":
    """Return the base model in fp32 on the CPU, and its tokenizer.

    Args:
        source: A folder, a GGUF file or an id on the hub; when left out, see :func:`.sources.base_model`.

    Raises:
        DataError: If the model cannot be loaded.
    """
    place = str(source or base_model())
    try:
        with without_bars():
            model, tokenizer = load_model(place, dtype="float32", device="cpu")
    except DataError as error:
        if place != BASE_MODEL:
            raise
        raise DataError(f"{error}; without the hub, name a folder of local copies in {LOCAL_COPIES}") from None
    return model, tokenizer


def load_english(
    stage: str = "aligned", source: str | Path | None = None
) -> "tuple[LlamaForCausalLM, PreTrainedTokenizerBase]":
    """Return a stage of the English world in fp32 on the CPU, in evaluation mode, and its tokenizer.

    Args:
        stage: ``"aligned"``, or ``"base"`` for the model before it was trained to refuse.
        source: The base model: a folder, a GGUF file or an id on the hub; when left out, see
            :func:`.sources.base_model`.

    Raises:
        DataError: If there is no such stage, ``peft`` or the adapter is missing, or the base model cannot be loaded or
            has other shapes.
    """
    if stage not in STAGES:
        raise DataError(f"expected a stage of the English world, {' or '.join(map(repr, STAGES))}, found {stage!r}")
    model, tokenizer = load_base(source)
    return (model if stage == "base" else with_adapter(model, data_dir() / FOLDER / "adapter")), tokenizer


def with_adapter(model: "LlamaForCausalLM", folder: Path) -> "LlamaForCausalLM":
    """Return the base model with an adapter merged into its weights; the model itself is changed.

    Raises:
        DataError: If ``peft`` or the adapter is missing, or the adapter does not fit the model.
    """
    require_peft("the English world")
    advice = "reinstall geomkit or run `geomkit organism build --world english`"
    if not (folder / "adapter_model.safetensors").is_file():
        raise DataError(f"expected the adapter of the English world in {folder}, found none; {advice}")
    if read_json(folder / FINGERPRINT, "the fingerprint of the base model", advice) != weights_fingerprint(model):
        _LOGGER.warning(
            "the base model is not the one that the adapter was trained on, as another copy or quantisation of it: the "
            "figures of the model card need not hold; evaluate the model first"
        )
    return with_merged_adapters(with_saved_adapter(model, folder))
