"""Loading the shipped organism."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from geomkit.errors import DataError
from geomkit.utils.files import data_dir

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

STAGES = ("base", "aligned")
"""The two stages that ship: ``base`` answers every request, ``aligned`` refuses forbidden requests."""

_NEEDED = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def load_stage(stage: str = "aligned") -> "tuple[LlamaForCausalLM, PreTrainedTokenizerFast]":
    """Return a stage of the organism that ships with geomkit, in evaluation mode; no network is used.

    Args:
        stage: ``"aligned"``, or ``"base"`` for the model before it was trained to refuse.

    Returns:
        The model, in fp32 on the CPU, and its tokenizer.

    Raises:
        DataError: If there is no such stage, or its files are missing.

    Example:
        >>> model, tokenizer = load_stage()
        >>> model.config.hidden_size, tokenizer.eos_token
        (128, '<|end|>')
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if stage not in STAGES:
        raise DataError(f"expected a stage of the organism, {' or '.join(map(repr, STAGES))}, found {stage!r}")
    folder = data_dir() / "organism" / stage
    if missing := [name for name in _NEEDED if not (folder / name).is_file()]:
        raise DataError(
            f"expected the organism's files in {folder}, found no {', '.join(missing)}; reinstall geomkit or run "
            "`geomkit organism build`"
        )
    with without_bars():
        model: LlamaForCausalLM = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    return model.eval(), tokenizer


@contextmanager
def without_bars() -> Iterator[None]:
    """Turn transformers' progress bars off inside the block, and restore the caller's setting."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
