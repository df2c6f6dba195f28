"""The training arguments of a fine-tune: geomkit's own, the user's, and those that geomkit must decide."""

from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from geomkit.errors import DataError

_DEFAULTS: Mapping[str, Any] = {
    "seed": 0,
    "optim": "adamw_torch",
    "logging_steps": 1,
    "save_steps": 100,
    "save_total_limit": 2,
    "report_to": "none",
    "dataloader_pin_memory": False,
}
"""What geomkit takes where the user says nothing, and transformers would take something else."""

_DECIDED: Mapping[str, Any] = {
    "disable_tqdm": True,  # geomkit shows its own bar
    "logging_nan_inf_filter": False,  # a loss that is not finite must be seen, not averaged away
    "remove_unused_columns": False,  # the rows are tokens, without columns
}
"""What a run needs to be as it is here."""

_OURS = {
    "max_steps": "steps",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "output_dir": "checkpoints",
    "resume_from_checkpoint": "checkpoints",
    "disable_tqdm": "progress",
    "optimizer": "optim",
    "scheduler": "lr_scheduler_type",
}
"""Names that mean something here, and the name to use instead."""

_WITHOUT_EFFECT = {
    "do_train": "a fine-tune always trains",
    "do_eval": "evaluate with geomkit.evaluate afterwards",
    "do_predict": "evaluate with geomkit.evaluate afterwards",
    "eval_strategy": "evaluate with geomkit.evaluate afterwards",
    "load_best_model_at_end": "nothing is evaluated during the training",
    "logging_nan_inf_filter": "a loss that is not finite ends the run",
    "remove_unused_columns": "the rows are tokens, without columns",
    "push_to_hub": "save the result with .save(folder, tokenizer) and upload that",
}
"""Arguments of transformers that would be ignored or break the run, and why."""


def check_arguments(given: Mapping[str, Any], checkpoints: str | Path | None) -> None:
    """Refuse training arguments that transformers does not know, or that would have no effect here.

    Args:
        given: The arguments by name.
        checkpoints: The folder for checkpoints, if there is one.

    Raises:
        DataError: If an argument is unknown, with the nearest known name; if geomkit has its own name for it; or if
            it would have no effect.
    """
    known = {field.name for field in fields(TrainingArguments) if field.init}
    for name in given:
        if name in _OURS:
            raise DataError(f"expected {_OURS[name]}=, found {name}=; write {_OURS[name]}={given[name]!r}")
        if name in _WITHOUT_EFFECT:
            raise DataError(f"expected no argument {name}=, which has no effect here: {_WITHOUT_EFFECT[name]}")
        if name not in known:
            near = get_close_matches(name, [*known, "steps", "epochs", "batch_size", "checkpoints"], n=1)
            hint = f"; did you mean {near[0]}=?" if near else "; see transformers.TrainingArguments"
            raise DataError(f"expected an argument of transformers.TrainingArguments, found {name}={hint}")
    if checkpoints is None:
        lost = [name for name in ("save_strategy", "report_to") if given.get(name, "no") not in {"no", "none"}]
        if lost:
            raise DataError(
                f"expected checkpoints= to say where {lost[0]}={given[lost[0]]!r} writes to, found none; give a folder"
            )


def training_arguments(
    folder: str | Path,
    *,
    steps: int | None,
    epochs: float,
    batch_size: int,
    learning_rate: float,
    save: bool,
    given: Mapping[str, Any],
) -> TrainingArguments:
    """Return the arguments of the Trainer: geomkit's defaults, overridden by the user's, and those decided here.

    Args:
        folder: Where the Trainer writes to.
        steps: Number of optimizer steps; ``epochs`` decides when ``None``.
        epochs: Passes over the data.
        batch_size: Examples per device and step.
        learning_rate: Peak learning rate.
        save: Whether checkpoints are kept.
        given: The user's arguments, which :func:`check_arguments` has seen.

    Raises:
        DataError: If transformers refuses them.
    """
    saving = {"save_strategy": "steps" if save else "no"}
    try:
        return TrainingArguments(
            output_dir=str(folder),
            max_steps=steps if steps is not None else -1,
            num_train_epochs=epochs,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            **{**_DEFAULTS, **saving, **given, **_DECIDED},
        )
    except (TypeError, ValueError, ImportError) as error:
        raise DataError(f"expected arguments that transformers takes, found: {' '.join(str(error).split())}") from None
