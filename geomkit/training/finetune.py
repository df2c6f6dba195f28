"""Fine-tuning on conversations by ``transformers.Trainer``, plainly or under SPF, with checks before and after."""

import copy
import math
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from geomkit.errors import DataError, GeomkitError
from geomkit.gradients.provenance import weights_fingerprint
from geomkit.inputs.fits import encoded_for, refuse_unfit
from geomkit.inputs.loss import losses_of
from geomkit.inputs.model_state import model_state_kept
from geomkit.inputs.parameters import warn_of_lost_updates
from geomkit.inputs.tokens import EncodedExamples, Tokens
from geomkit.spf.callback import SPFCallback
from geomkit.spf.settings import SPF
from geomkit.spf.step_record import LOG_NAME
from geomkit.training.arguments import (
    check_arguments,
    checked_amounts,
    make_arguments,
    refusals_in_one_line,
    with_defaults,
)
from geomkit.training.callbacks import LossCheck, NoFurtherStep, ProgressBar, StopAfterStep
from geomkit.training.card import settings_of
from geomkit.training.checkpoints import MarkBegun, MarkComplete, last_checkpoint, run_folder
from geomkit.training.result import FineTuneResult
from geomkit.training.trainer import clean_up, make_trainer, run_trainer, settings_kept
from geomkit.utils.arguments import as_python, type_in_words
from geomkit.utils.options import check_options
from geomkit.utils.seeding import random_state_kept

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def finetune(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    train: "Dataset | EncodedExamples",
    spf: SPF | None = None,
    *,
    learning_rate: float = 2e-5,
    steps: int | None = None,
    epochs: float = 3,
    batch_size: int = 16,
    inplace: bool = False,
    progress: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
    checkpoints: str | Path | None = None,
    **training_arguments: Any,
) -> FineTuneResult:
    """Fine-tune a model on conversations, with the loss on the assistant's tokens, plainly or under SPF.

    Args:
        model: A causal language model.
        tokenizer: The model's tokenizer, with a chat template and a pad token.
        train: Rows with a column ``messages``, or rows encoded by :func:`geomkit.encode`, which also decides how the
            assistant's tokens are marked; SPF's examples then get the same ``assistant_mask``, and are not cut.
        spf: The settings of SPF; a plain fine-tune when left out.
        learning_rate: Peak learning rate.
        steps: Number of optimizer steps; ``epochs`` decides when left out.
        epochs: Passes over the data.
        batch_size: Examples per device and step.
        inplace: Train the model itself instead of a copy, which saves the copy's memory.
        progress: Show a bar.
        callbacks: More callbacks for the Trainer; they run before SPF's.
        checkpoints: A folder that a checkpoint is written to every ``save_steps``, 100 when left out. A run that was
            interrupted and is started again with the same folder and arguments resumes from the last complete
            checkpoint and ends with the weights of an uninterrupted run, to the bit. The model must be the model that
            the run began with, which ``inplace`` has changed after an interruption. Under SPF the safety gradient is
            measured anew at each checkpoint, so ``save_steps`` is one of the settings that a run depends on.
        **training_arguments: Any other argument of ``transformers.TrainingArguments`` under its own name, such as
            ``weight_decay``, ``warmup_steps``, ``lr_scheduler_type``, ``optim``, ``gradient_accumulation_steps``,
            ``seed`` (0 when left out), ``bf16`` (on a CPU with ``use_cpu``), ``gradient_checkpointing``,
            ``save_strategy``, ``report_to`` (``"none"`` when left out), ``logging_steps`` (1 when left out).

    Returns:
        A :class:`~geomkit.training.result.FineTuneResult`. After Ctrl-C, or a notebook's stop button, it holds what was
        trained up to the end of the step that was running, and ``interrupted`` is true; a second Ctrl-C is an
        exception. The global random states of Python, numpy and torch are restored, and so are the model's settings
        that only the training needs: gradient checkpointing, ``use_cache`` and mixed precision.

    Raises:
        DataError: If an argument is unknown, has no effect or is refused by transformers, the examples cannot be
            encoded or do not fit the model's embedding or positions, there is not a single step to take, or the folder
            for checkpoints holds other files, a run of another version of geomkit or a run with other settings.
        GeomkitError: If a logged loss is not finite, or after the last step a weight or the loss on the first example
            is not finite; with ``inplace`` the model's weights are then spoilt.
        SPFError: If SPF cannot be attached, or its constraint does not hold after a step.

    Example:
        >>> import geomkit as gk
        >>> model, tokenizer = gk.load_organism()
        >>> train = gk.load_examples("scenarios/new-skill")
        >>> result = gk.finetune(model, tokenizer, train, gk.SPF(gk.load_examples("safety")), steps=2, progress=False)
        >>> result.certificate.steps, result.certificate.violations
        (2, 0)
    """
    # 1. Refuse what can be refused before the model is touched.
    _check_kinds(spf, callbacks)
    amounts = checked_amounts(steps, epochs, batch_size, learning_rate)
    given = {name: as_python(value) for name, value in training_arguments.items()}
    own = amounts | ({} if steps is None else {"epochs": None})  # steps decide
    check_options(own | given)
    check_arguments(given, checkpoints)
    folder = Path(checkpoints) if checkpoints else None
    more = with_defaults(given, save=folder is not None)
    encoded, pad = encoded_for(model, tokenizer, train, progress)
    rows = list(encoded)
    if spf is None:  # else SPF says so when it is attached
        warn_of_lost_updates(dict(model.named_parameters()))
    else:
        spf = _fitting(spf, model, encoded, folder, progress)
    with tempfile.TemporaryDirectory() as scratch, random_state_kept(), ExitStack() as held:
        arguments = make_arguments(folder or scratch, **amounts, more=more)
        if folder and arguments.process_index == 0:
            held.enter_context(run_folder(folder))
        # 2. A checkpoint in the folder belongs to this run if all settings that the run depends on are equal.
        settings = more | amounts | {
            "train": encoded.fingerprint, "spf": None if spf is None else spf.describe(),
            "log": None if spf is None else spf.log, "model": weights_fingerprint(model),
        }  # fmt: skip
        with arguments.main_process_first(local=False, desc="looking for checkpoints"):
            resume = last_checkpoint(folder, settings) if folder else None
        # 3. Train, and restore the random states and the model's settings, also after an exception.
        trained = model if inplace else copy.deepcopy(model)
        begun, stop = MarkBegun(folder, settings), StopAfterStep()
        guard = SPFCallback(spf, resume=resume, progress=progress) if spf is not None else None
        bar = ProgressBar() if progress else None
        ours = [begun, NoFurtherStep(), LossCheck(), *callbacks, guard, bar, stop, MarkComplete() if folder else None]
        present = [callback for callback in ours if callback is not None]
        started = time.perf_counter()
        with model_state_kept(trained), settings_kept(trained), refusals_in_one_line(lambda: begun.begun):
            trainer = make_trainer(trained, tokenizer, rows, pad, arguments, present)
            try:
                with stop.listening(arguments.world_size):
                    run_trainer(trainer, resume)
            finally:
                if guard:
                    guard.detach()
                if bar:
                    bar.close()
                clean_up(trainer)
            _check_trained(trained, rows, pad)
    trained.eval()
    certificate, seconds = guard.certificate if guard else None, time.perf_counter() - started
    told = settings_of(own | {name: more[name] for name in ("optim", "seed")} | given, len(rows), spf, model)
    history = _history(trainer.state.log_history)
    return FineTuneResult(
        trained, history, certificate, seconds, stop.interrupted, settings=told, steps=trainer.state.global_step
    )


def _check_kinds(spf: object, callbacks: object) -> None:
    """Refuse settings of SPF of another type, and callbacks that are no list."""
    if spf is not None:
        if not isinstance(spf, SPF):
            raise DataError(f"expected geomkit.SPF(anchors=…) or nothing as spf, found {type_in_words(spf)}; give that")
        check_options(vars(spf) | {"anchors": None})
    if not isinstance(callbacks, Sequence):
        raise DataError(f"expected a list of callbacks, found {type_in_words(callbacks)}; give callbacks=[…]")


def _fitting(spf: SPF, model: "PreTrainedModel", train: EncodedExamples, folder: Path | None, progress: bool) -> SPF:
    """Return SPF with its examples encoded like the training rows, and with a log in the folder for checkpoints.

    Raises:
        DataError: If the examples cannot be encoded, or do not fit the model.
    """
    spf = spf.encoded_like(train, progress)
    for name, examples in (("anchor", spf.anchors), ("benign example", spf.benign)):
        if isinstance(examples, EncodedExamples):
            refuse_unfit(model, examples, what=name)
    return replace(spf, log=folder / LOG_NAME) if folder and spf.log is None else spf


def _history(log: Sequence[dict[str, float]]) -> "pd.DataFrame":
    """Return the logged steps as a data frame; the last entry of the log, a summary, is no step."""
    import pandas as pd

    steps = [entry for entry in log if "loss" in entry]
    return pd.DataFrame(steps, columns=None if steps else ["step", "loss"])


def _check_trained(model: "PreTrainedModel", rows: Sequence[Tokens], pad: int) -> None:
    """Refuse a model that the last step ruined: the last logged loss was computed before that step.

    Raises:
        GeomkitError: If a trained weight or the loss of the first example is not finite.
    """
    advice = "lower the learning rate or train in fp32"
    for name, weight in model.named_parameters():
        if weight.requires_grad and not bool(torch.isfinite(weight).all()):
            raise GeomkitError(f"{name}: expected finite weights after training, found NaN or inf; {advice}")
    # Finite weights can still be so large that every output is NaN.
    (loss,) = losses_of(model, rows[:1], pad)
    if not math.isfinite(loss):
        raise GeomkitError(f"expected a finite loss after training, found {loss} on example 0; {advice}")
