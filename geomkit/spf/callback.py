"""SPF as a callback of ``transformers.Trainer``, and of trainers built on it."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from geomkit.errors import SPFError
from geomkit.spf.certificate import Certificate
from geomkit.spf.guard import Guard
from geomkit.spf.settings import SPF

LOGGED = ("anchor_loss", "first_order_raw", "first_order", "fired", "removed", "corrected", "leak", "update_norm")
"""The fields of :class:`~geomkit.spf.step_record.StepRecord` that the Trainer logs, as ``spf/…``."""


class SPFCallback(TrainerCallback):
    """Attaches SPF when training begins, adds its measurements to the logs, and detaches SPF when training ends.

    Example::

        trainer = Trainer(model, args, train_dataset=rows, processing_class=tokenizer,
                          callbacks=[gk.SPFCallback(gk.SPF(anchors))])
    """

    def __init__(self, spf: SPF, *, resume: str | Path | None = None, progress: bool = True) -> None:
        """Store the settings.

        Args:
            spf: The settings of SPF.
            resume: The checkpoint from which training is resumed, if it is not in the output folder.
            progress: Show a bar while SPF is attached, see :meth:`SPF.attach`.
        """
        self.spf = spf
        self._resume, self._progress = resume, progress
        self._guard: Guard | None = None
        self._steps = 0

    @property
    def certificate(self) -> Certificate | None:
        """The certificate of the steps so far; ``None`` before training."""
        return self._guard.certificate if self._guard else None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach SPF to the Trainer's optimizer, in the saved state where training is resumed.

        Raises:
            SPFError: If SPF cannot be attached, or the checkpoint has no state of SPF.
        """
        self.detach()
        folder = self._resume or (_checkpoint(args, state) if state.global_step > 0 else None)
        tokenizer = self.spf.tokenizer or kwargs.get("processing_class")
        self._guard = self.spf.attach(
            kwargs["model"], kwargs["optimizer"], tokenizer, resume=folder, progress=self._progress
        )
        self._steps = self._guard.steps

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the safety gradient, if the rule adds it, before the task's gradient, so that their sum is clipped."""
        if self._guard and not args.fp16:  # in fp16 gradients stay scaled until the optimizer steps
            self._guard.mix()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that the last optimizer step ran SPF's hooks.

        Raises:
            SPFError: If the step did not run them.
        """
        if self._guard is None:
            return
        skipped = getattr(kwargs.get("optimizer"), "step_was_skipped", False)
        if self._guard.steps == self._steps and not skipped:
            raise SPFError(
                "expected optimizer.step() to run SPF's hooks, found a step without them; the training engine steps in "
                "another way: attach SPF to the optimizer that steps"
            )
        self._steps = self._guard.steps

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the guard's state into the checkpoint, as its last file."""
        if self._guard:
            self._guard.save(_checkpoint(args, state))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the last step's measurements to the logs, and to the history, which is a copy of the logs."""
        logs, records = kwargs.get("logs"), self._guard.records if self._guard else ()
        if records and logs is not None and "loss" in logs:
            measures = {f"spf/{name}": float(getattr(records[-1], name)) for name in LOGGED}
            logs.update(measures)
            state.log_history[-1].update(measures)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Detach SPF.

        Raises:
            SPFError: If weights were moved while no guarded step was seen; the best checkpoint, which the Trainer loads
                before this call where it is asked to, was reached by guarded steps.
        """
        if self._guard is None:
            return
        if args.load_best_model_at_end and state.best_model_checkpoint:
            self._guard.accept_weights()
        self._guard.detach()

    def detach(self) -> None:
        """End the projection, also after an error in training; the certificate stays available."""
        if self._guard:
            self._guard.release()


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
