"""Training arguments of a fine-tune: checks of the user's arguments, geomkit's defaults, and the fixed arguments."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from difflib import get_close_matches
from math import inf
from numbers import Real
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from geomkit.errors import DataError, GeomkitError
from geomkit.utils.arguments import as_python, is_whole

_DEFAULTS: Mapping[str, Any] = {
    "seed": 0,
    "optim": "adamw_torch",
    "logging_steps": 1,
    "save_steps": 100,
    "save_total_limit": 2,
    "report_to": "none",
    "dataloader_pin_memory": False,
}
"""geomkit's defaults of arguments for which a version of transformers has another default."""

_FIXED: Mapping[str, Any] = {
    "disable_tqdm": True,  # geomkit shows its own bar
    "logging_nan_inf_filter": False,  # a loss that is not finite must be seen, not averaged away
    "remove_unused_columns": False,  # the rows are tokens, without columns
}
"""Arguments that a fine-tune depends on and the user cannot change."""

_GEOMKIT_NAMES: Mapping[str, str] = {
    "max_steps": "steps",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "output_dir": "checkpoints",
    "resume_from_checkpoint": "checkpoints",
    "disable_tqdm": "progress",
    "lr": "learning_rate",
    "optimizer": "optim",
    "scheduler": "lr_scheduler_type",
}
"""Names of arguments in transformers and other libraries, and geomkit's name of the same argument."""

_RENAMED: Mapping[str, str] = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
"""Old names of arguments, for which newer versions of transformers show a warning, and their new names."""

_ENCODING = ("assistant_mask", "max_length")
"""Settings of :func:`geomkit.encode`, which were arguments of a fine-tune before version 0.2.0."""

_WITHOUT_EFFECT: Mapping[str, tuple[str, ...]] = {
    "a fine-tune always trains": ("do_train",),
    "evaluate with geomkit.evaluate afterwards": (
        "do_eval", "do_predict", "eval_strategy", "eval_steps", "eval_delay", "eval_on_start",
        "eval_accumulation_steps", "eval_do_concat_batches", "eval_use_gather_object", "per_device_eval_batch_size",
        "prediction_loss_only", "include_for_metrics", "batch_eval_metrics", "bf16_full_eval", "fp16_full_eval",
    ),
    "nothing is evaluated during the training": (
        "load_best_model_at_end", "metric_for_best_model", "greater_is_better",
    ),
    "a loss that is not finite ends the run": ("logging_nan_inf_filter",),
    "the rows are tokens, without columns": ("remove_unused_columns", "label_names", "length_column_name"),
    "upload the result with .push_to_hub(repo_id, tokenizer)": (
        "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push",
        "hub_revision",
    ),
    "a run can only be resumed from checkpoints that are complete": ("save_only_model",),
    "it changes settings of the whole process, which would outlast the fine-tune": ("full_determinism",),
    "a resumed run takes the batches that the uninterrupted run would take": ("ignore_data_skip",),
}  # fmt: skip
"""Arguments of transformers that would have no effect or break the run, by the reason."""

_OWN_NAMES = ("learning_rate", "steps", "epochs", "batch_size", "inplace", "progress", "callbacks", "checkpoints")
"""Keyword arguments of :func:`geomkit.finetune` itself."""


def checked_amounts(steps: object, epochs: object, batch_size: object, learning_rate: object) -> dict[str, Any]:
    """Return the length of a fine-tune, the size of its batches and its learning rate, by name, as Python numbers.

    Raises:
        DataError: If a number is missing, of another type, not finite or too small.
    """
    steps, epochs, batch_size, learning_rate = map(as_python, (steps, epochs, batch_size, learning_rate))
    amounts = {}
    for name, value, valid, what in (
        ("steps", steps, steps is None or is_whole(steps, 1), "a whole number of at least 1, such as 100, or None"),
        ("epochs", epochs, steps is not None or _is_above_zero(epochs), "a number above 0, such as 3"),
        ("batch_size", batch_size, is_whole(batch_size, 1), "a whole number of at least 1, such as 16"),
        ("learning_rate", learning_rate, _is_number(learning_rate), "a number, such as 2e-5"),
    ):
        if not valid:
            raise DataError(f"expected {name}= as {what}, found {value!r}; give one")
        amounts[name] = value
    return amounts


def _is_number(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real)


def _is_above_zero(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real) and 0 < float(value) < inf


def check_arguments(arguments: Mapping[str, Any], checkpoints: str | Path | None) -> None:
    """Refuse training arguments that transformers does not know, or that would have no effect here.

    Args:
        arguments: The arguments by name.
        checkpoints: The folder for checkpoints, if there is one.

    Raises:
        DataError: If an argument is unknown, with the nearest known name; if geomkit has its own name for the argument;
            or if the argument would have no effect.
    """
    known_names = _known_names()
    ineffective = {name: reason for reason, names in _WITHOUT_EFFECT.items() for name in names}
    for name, value in arguments.items():
        if name in _ENCODING:
            raise DataError(
                f"expected {name}= where the examples are encoded, found it here; give "
                f"geomkit.encode(tokenizer, train, {name}={value!r}) as the examples"
            )
        if name in _GEOMKIT_NAMES:
            raise DataError(f"expected {_GEOMKIT_NAMES[name]}=, found {name}=; write {_GEOMKIT_NAMES[name]}={value!r}")
        if name in ineffective:
            raise DataError(f"expected no argument {name}=, found {name}={value!r}; {ineffective[name]}")
        if name not in known_names:
            near = get_close_matches(name, [*(known_names - set(ineffective)), *_OWN_NAMES, *_GEOMKIT_NAMES], n=1)
            hint = (
                f"did you mean {_GEOMKIT_NAMES.get(near[0], near[0])}=?"
                if near
                else "see transformers.TrainingArguments"
            )
            raise DataError(f"expected an argument of transformers.TrainingArguments, found {name}=; {hint}")
    if arguments.get("save_strategy") == "best":
        raise DataError(
            "expected save_strategy='steps', 'epoch' or 'no', found 'best'; no checkpoint is the best, as nothing is "
            "evaluated during the training"
        )
    if checkpoints is None:
        writes_files = {"save_strategy": ("steps", "epoch"), "report_to": ("tensorboard", ["tensorboard"], "all")}
        for name, values in writes_files.items():
            if arguments.get(name) in values:
                raise DataError(
                    f"expected checkpoints= to say where {name}={arguments[name]!r} writes to, found none; "
                    "give a folder"
                )


def with_defaults(arguments: Mapping[str, Any], *, save: bool) -> dict[str, Any]:
    """Return the user's arguments, and geomkit's defaults for arguments that the user left out.

    Args:
        arguments: The user's arguments, which :func:`check_arguments` has accepted.
        save: Whether the run has a folder for checkpoints.
    """
    new_names = {old: new for old, new in _RENAMED.items() if new in _known_names() and new not in arguments}
    renamed = {new_names.get(name, name): value for name, value in arguments.items()}
    return {**_DEFAULTS, "save_strategy": "steps" if save else "no"} | renamed


def make_arguments(
    folder: str | Path,
    *,
    steps: int | None,
    epochs: float,
    batch_size: int,
    learning_rate: float,
    more: Mapping[str, Any],
) -> TrainingArguments:
    """Return the arguments of the Trainer.

    Args:
        folder: The folder that the Trainer writes to.
        steps: Number of optimizer steps; ``epochs`` decides when ``None``.
        epochs: Passes over the data.
        batch_size: Examples per device and step.
        learning_rate: Peak learning rate.
        more: All other arguments, from :func:`with_defaults`.

    Raises:
        DataError: If transformers refuses the arguments, or ``fp16`` is asked for on a CPU.
    """
    with refusals_in_one_line():
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=steps if steps is not None else -1,
            num_train_epochs=epochs,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            **{**more, **_FIXED},
        )
        device = arguments.device.type
    if arguments.fp16 and device == "cpu":
        raise DataError(
            "expected a GPU for fp16=True, found a CPU, where it has no effect; leave it out, or give bf16=True and "
            "use_cpu=True"
        )
    return arguments


@contextmanager
def refusals_in_one_line(begun: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Raise a DataError of one line where transformers refuses an argument, inside the block.

    transformers checks some arguments when they are made, others when the Trainer is made or sets up its optimizer,
    and raises exceptions of many types.

    Args:
        begun: Whether the training has begun: errors after that are no refusals and are raised as they are.

    Raises:
        DataError: If transformers refuses an argument; a package that the argument needs may be missing.
    """
    try:
        yield
    except (TypeError, ValueError, ImportError, RuntimeError) as error:
        # Subclasses of RuntimeError are trouble with memory, a device or other processes.
        trouble = isinstance(error, RuntimeError) and type(error) not in {RuntimeError, NotImplementedError}
        if begun() or trouble or isinstance(error, GeomkitError):
            raise
        reason = " ".join(str(error).split())
        raise DataError(
            f"expected training arguments that transformers can work with, found: {reason}; change the argument, or "
            "install what it needs"
        ) from error


def _known_names() -> set[str]:
    """Return the names of the arguments that this version of transformers takes."""
    return {field.name for field in fields(TrainingArguments) if field.init}
