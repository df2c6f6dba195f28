"""Callbacks that :func:`geomkit.finetune` gives to the Trainer."""

import math
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from geomkit.errors import GeomkitError


class LossCheck(TrainerCallback):
    """Ends a run whose logged loss is not finite, before more weights are spoilt."""

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        loss = (kwargs.get("logs") or {}).get("loss", 0.0)
        if not math.isfinite(loss):
            raise GeomkitError(
                f"step {state.global_step}: expected a finite training loss, found {loss}; lower the learning rate or "
                "train in fp32"
            )


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
                shown |= {"safety": f"{logs['spf/anchor_loss']:.4f}", "fired": f"{logs['spf/fired']:.0%}"}
            self._bar.set_postfix(shown, refresh=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the bar, also after training broke off, so that later output starts on a new line."""
        if self._bar is not None:
            self._bar.close()
