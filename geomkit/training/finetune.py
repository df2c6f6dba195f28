"""The included fine-tuning loop: ``transformers.Trainer`` with the parts that a safe run needs."""

import copy
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from geomkit.errors import DataError, GeomkitError
from geomkit.inputs.batches import collate
from geomkit.inputs.loss import losses_of
from geomkit.inputs.model_state import as_found
from geomkit.inputs.tokens import EncodedExamples, Tokens, as_encoded, pad_id
from geomkit.spf.callback import SPFCallback
from geomkit.spf.certificate import Certificate
from geomkit.spf.settings import SPF
from geomkit.training.arguments import check_arguments
from geomkit.training.arguments import training_arguments as make_arguments
from geomkit.training.callbacks import LossCheck, ProgressBar
from geomkit.training.checkpoints import LOG, MarkComplete, begin_or_resume, fingerprint
from geomkit.utils.display import html_table
from geomkit.utils.figures import draw
from geomkit.utils.seeding import random_state_kept

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset
    from plotly.graph_objects import Figure
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class FineTuneResult:
    """A finished fine-tune.

    Attributes:
        model: The trained model, in eval mode.
        history: One row per step: ``step``, ``loss``, ``learning_rate``, ``grad_norm``, and SPF's measures.
        certificate: What the updates did to the safety loss; ``None`` without SPF.
        seconds: Wall time of the training.
    """

    model: "PreTrainedModel" = field(repr=False)
    history: "pd.DataFrame" = field(repr=False)
    certificate: Certificate | None
    seconds: float

    def to_frame(self) -> "pd.DataFrame":
        """Return the history."""
        return self.history

    def plot(self) -> "Figure":
        """Draw the training loss."""
        return draw("plot_history", self)

    def save(self, folder: str | Path, tokenizer: "PreTrainedTokenizerBase") -> Path:
        """Write a checkpoint that ``from_pretrained`` loads; it appears whole or not at all.

        Args:
            folder: Where to; must not hold anything yet. An empty folder is filled, its configuration last.
            tokenizer: The model's tokenizer, saved beside it.

        Returns:
            The folder.

        Raises:
            DataError: If the folder exists and is not empty.
        """
        target = free_folder(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target if target.exists() else target.parent
        with tempfile.TemporaryDirectory(dir=beside, prefix=f".{target.name}-") as unfinished:
            self.model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
            if self.certificate is not None:
                self.certificate.to_frame().to_json(Path(unfinished) / "spf.jsonl", orient="records", lines=True)
            if beside == target:
                _move_files(Path(unfinished), target)
            else:
                Path(unfinished).chmod(0o755)
                Path(unfinished).rename(target)
                Path(unfinished).mkdir()  # for TemporaryDirectory to remove
        return Path(folder)

    def _repr_html_(self) -> str:
        certificate = f"; {self.certificate}" if self.certificate else ""
        return html_table(f"Fine-tune of {len(self.history)} steps, {self.seconds:.0f} s{certificate}", self.history)


def free_folder(folder: str | Path) -> Path:
    """Return a folder that can be written to, or raise before any work is done.

    Args:
        folder: The folder; a link is followed.

    Returns:
        Its absolute path.

    Raises:
        DataError: If it exists and is not empty.
    """
    path = Path(folder).resolve()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise DataError(f"expected a new or empty folder at {folder}, found something there; choose another --out")
    return path


def _move_files(source: Path, target: Path) -> None:
    """Fill a folder that may not be replaced: a working directory, a mount, one with permissions of its own."""
    # Configuration last: until then from_pretrained finds no checkpoint rather than a part of one.
    for path in sorted(source.iterdir(), key=lambda path: (path.name.endswith("config.json"), path.name)):
        path.rename(target / path.name)


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
    """Fine-tune on conversations, with the loss on assistant tokens, plainly or under SPF.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer, with a chat template and a pad token.
        train: Rows with a column ``messages``, or the same from :func:`geomkit.encode`, which also decides how the
            assistant's tokens are marked: SPF's examples are then encoded alike.
        spf: What to protect; a plain fine-tune when left out.
        learning_rate: Peak learning rate.
        steps: Number of optimizer steps; ``epochs`` decides when left out.
        epochs: Passes over the data.
        batch_size: Examples per device and step.
        inplace: Train the model itself instead of a copy; saves the copy's memory.
        progress: Show a bar.
        callbacks: More callbacks for the Trainer; they run before SPF's.
        checkpoints: A folder that a checkpoint is written to every ``save_steps``, 100 when left out. A run that finds
            a checkpoint of its own there goes on from the last that is complete, to the weights that it would have had
            uninterrupted. The model must be the one that the run began with, which ``inplace`` has changed after an
            interruption. Under SPF each checkpoint has the safety gradient measured anew, so ``save_steps`` is part of
            what a run depends on.
        **training_arguments: Any other argument of ``transformers.TrainingArguments`` under its own name, such as
            ``weight_decay``, ``warmup_steps``, ``lr_scheduler_type``, ``optim``, ``gradient_accumulation_steps``,
            ``seed`` (0 when left out), ``bf16``, ``gradient_checkpointing``, ``save_strategy``, ``report_to``.

    Returns:
        A :class:`FineTuneResult`. Python's, numpy's and torch's global random states are left as found.

    Raises:
        DataError: If the examples cannot be encoded, there is not a single step to take, or the folder for checkpoints
            holds something else or a run with other settings.
        GeomkitError: If the loss is not finite, or after the last step a weight or the loss on the first example is
            not; with ``inplace`` the model's weights are then spoilt.
        SPFError: If SPF cannot be attached, or its constraint does not hold after a step.

    Example:
        >>> import geomkit as gk
        >>> model, tokenizer = gk.load_organism()
        >>> train = gk.load_examples("scenarios/new-skill")
        >>> result = gk.finetune(model, tokenizer, train, gk.SPF(gk.load_examples("safety")), steps=2, progress=False)
        >>> result.certificate.steps, result.certificate.violations
        (2, 0)
    """
    import pandas as pd

    if (steps if steps is not None else epochs) <= 0:
        raise DataError(f"expected something to train, found steps={steps} and epochs={epochs}; give a positive number")
    check_arguments(training_arguments, checkpoints)
    encoded = as_encoded(tokenizer, train)
    rows, pad = list(encoded), pad_id(tokenizer)
    if spf is not None:
        spf = spf.encoded_like(encoded)
        if checkpoints and spf.log is None:
            spf = replace(spf, log=Path(checkpoints) / LOG)
    settings = training_arguments | {
        "learning_rate": learning_rate, "steps": steps, "epochs": epochs, "batch_size": batch_size,
        "train": encoded.fingerprint, "spf": None if spf is None else spf.describe(),
        "log": None if spf is None else spf.log,
    }  # fmt: skip
    resume = begin_or_resume(Path(checkpoints), settings | {"model": fingerprint(model)}) if checkpoints else None
    trained = model if inplace else copy.deepcopy(model)
    guard = SPFCallback(spf, resume=resume) if spf is not None else None
    bar = ProgressBar() if progress else None
    mark = MarkComplete() if checkpoints else None
    own = [callback for callback in (LossCheck(), *callbacks, guard, bar, mark) if callback is not None]
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch, random_state_kept(), as_found(trained):
        arguments = make_arguments(
            checkpoints or scratch,
            steps=steps,
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            save=checkpoints is not None,
            given=training_arguments,
        )
        trainer = Trainer(
            model=trained,
            args=arguments,
            train_dataset=_Rows(rows),
            data_collator=lambda batch: _collated(batch, pad),
            processing_class=tokenizer,
            callbacks=own,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        try:
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        finally:
            if guard:
                guard.detach()
            if bar:
                bar.close()
            trained.zero_grad(set_to_none=True)
        _check_trained(trained, rows, pad)
    trained.eval()
    history = pd.DataFrame([row for row in trainer.state.log_history if "loss" in row])
    return FineTuneResult(trained, history, guard.certificate if guard else None, time.perf_counter() - started)


def _check_trained(model: "PreTrainedModel", rows: Sequence[Tokens], pad: int) -> None:
    """Refuse a model that the last step ruined, which no logged loss shows any more."""
    advice = "lower the learning rate or train in fp32"
    for name, weight in model.named_parameters():
        if weight.requires_grad and not bool(torch.isfinite(weight).all()):
            raise GeomkitError(f"{name}: expected finite weights after training, found NaN or inf; {advice}")
    # Finite weights can be so large that every output is NaN.
    (loss,) = losses_of(model, rows[:1], pad)
    if not math.isfinite(loss):
        raise GeomkitError(f"expected a finite loss after training, found {loss} on example 0; {advice}")


class _Rows(Sequence[Tokens]):
    """The training rows as the Trainer wants to see them: something with a length and an index."""

    def __init__(self, rows: Sequence[Tokens]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return self._rows[index]


def _collated(rows: Sequence[Tokens], pad: int) -> dict[str, Tensor]:
    batch = collate(rows, pad)
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": batch.labels}
