"""The ``transformers.Trainer`` of a fine-tune: made for encoded rows, run, and its traces on the model removed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from geomkit.inputs.batches import collate
from geomkit.inputs.tokens import Tokens
from geomkit.training.callbacks import AllStepsTakenError
from geomkit.training.checkpoints import MarkComplete

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_OF_TRAINING = (
    "gradient_checkpointing", "_gradient_checkpointing_func", "_require_grads_hook", "_require_grads_hooks",
    "forward", "_original_forward", "neftune_noise_alpha", "use_cache",
)  # fmt: skip
"""Attributes that the Trainer sets on a model's modules and its configuration, and does not reset."""


@contextmanager
def settings_kept(model: "PreTrainedModel") -> Iterator[None]:
    """Restore the model's settings that only the training needs when the block ends.

    Left on, gradient checkpointing slows every later gradient, and the ``forward`` of mixed precision would round the
    results of every later measurement, though not after saving and loading.
    """
    parts = [model.config, *model.modules()]
    before = [{name: vars(part)[name] for name in _OF_TRAINING if name in vars(part)} for part in parts]
    hooked = hasattr(model, "_require_grads_hook")
    try:
        yield
    finally:
        if not hooked and hasattr(model, "_require_grads_hook"):
            model.disable_input_require_grads()
        for part, attributes in zip(parts, before, strict=True):
            for name in _OF_TRAINING:
                vars(part).pop(name, None)
            vars(part).update(attributes)


def make_trainer(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    rows: Sequence[Tokens],
    pad: int,
    arguments: TrainingArguments,
    callbacks: list[TrainerCallback],
) -> Trainer:
    """Return a Trainer on encoded rows that shows neither the Trainer's bar nor the Trainer's lines of text."""
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=_Rows(rows),
        data_collator=lambda batch: _collated(batch, pad),
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    # Reporters (report_to) come after SPF, which adds its measures to the logs, and before the mark of a checkpoint.
    reporters = tuple(INTEGRATION_TO_CALLBACK.values())
    trainer.callback_handler.callbacks.sort(
        key=lambda callback: 2 if isinstance(callback, MarkComplete) else int(isinstance(callback, reporters))
    )
    return trainer


def run_trainer(trainer: Trainer, resume: Path | None) -> None:
    """Train, and end a resumed run whose steps were all taken as the Trainer ends a run."""
    try:
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    except AllStepsTakenError:
        handler = trainer.callback_handler
        trainer.control = handler.on_train_end(trainer.args, trainer.state, trainer.control)


def clean_up(trainer: Trainer) -> None:
    """Drop the gradients, and the Trainer's hook on embeddings, which a training that broke off leaves behind."""
    if hook := getattr(trainer, "neftune_hook_handle", None):
        hook.remove()
    trainer.model.zero_grad(set_to_none=True)


class _Rows(Sequence[Tokens]):
    """The encoded training examples as a data set for the Trainer, which asks for a length and for items."""

    def __init__(self, rows: Sequence[Tokens]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return self._rows[index]


def _collated(rows: Sequence[Tokens], pad: int) -> dict[str, Tensor]:
    """Return (B, T) tensors of a batch, padded to its longest row, under the names that models take."""
    batch = collate(rows, pad)
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": batch.labels}
