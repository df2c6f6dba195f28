"""Callbacks that :func:`geomkit.finetune` gives to the Trainer."""

import logging
import math
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from geomkit.errors import GeomkitError

_LOGGER = logging.getLogger(__name__)


class LossCheck(TrainerCallback):
    """Ends a run whose logged loss is not finite, before more weights are spoilt."""

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        loss = (kwargs.get("logs") or {}).get("loss", 0.0)
        if not math.isfinite(loss):
            raise GeomkitError(
                f"step {state.global_step}: expected a finite training loss, found {loss}; lower the learning rate or "
                "train in fp32"
            )


class AllStepsTakenError(Exception):
    """Raised before a step beyond the last one; a Trainer that resumes a finished run would take it."""


class NoFurtherStep(TrainerCallback):
    """Ends a resumed run before its first step where all its steps were taken already."""

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step >= state.max_steps:
            raise AllStepsTakenError


class ProgressBar(TrainerCallback):
    """Shows a bar over the steps with the loss, and under SPF the anchors' loss and the share of projected blocks."""

    def __init__(self) -> None:
        self._bar: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        from tqdm.auto import tqdm

        self._bar = tqdm(total=state.max_steps, initial=state.global_step, desc="fine-tune", unit="step")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._bar.update()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs.get("logs") or {}
        if "loss" in logs:
            shown = {"loss": f"{logs['loss']:.3f}"}
            if "spf/fired" in logs:
                shown |= {"safety": f"{logs['spf/anchor_loss']:z.4f}", "fired": f"{logs['spf/fired']:.0%}"}
            self._bar.set_postfix(shown, refresh=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the bar, also after training broke off, so that later output starts on a new line."""
        if self._bar is not None:
            self._bar.close()


class StopAfterStep(TrainerCallback):
    """Ends the training after the step in which an interruption came; a second interruption ends it at once.

    A step is never left half done: its weights are projected and its record is in the certificate.
    """

    def __init__(self) -> None:
        self._asked = False
        self.interrupted = False

    @contextmanager
    def listening(self, processes: int = 1) -> Iterator[None]:
        """Catch interruptions inside the block.

        Signals reach the main thread only, and processes that train together would stop at different steps, so in
        other threads and with several processes an interruption stays an exception. A process that ignores them, such
        as one in the background of a shell script, goes on to ignore them.

        Args:
            processes: Number of processes that train together.
        """
        if processes > 1 or threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.getsignal(signal.SIGINT)
        if before in {None, signal.SIG_IGN}:  # None: a handler that is not Python's could not be restored
            yield
            return
        signal.signal(signal.SIGINT, self._ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _ask(self, *_: Any) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        _LOGGER.warning("interrupted: the fine-tune ends after this step; interrupt again to end it at once")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._asked and state.global_step < state.max_steps:
            self.interrupted = control.should_training_stop = True
