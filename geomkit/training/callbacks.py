"""Callbacks that :func:`geomkit.finetune` gives to the Trainer."""

import math
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from geomkit.errors import GeomkitError


class LossCheck(TrainerCallback):
    """Stops a run whose loss is not finite before it does more harm."""

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        loss = (kwargs.get("logs") or {}).get("loss", 0.0)
        if not math.isfinite(loss):
            raise GeomkitError(
                f"step {state.global_step}: expected a finite training loss, found {loss}; lower the learning rate or "
                "train in fp32"
            )


class ProgressBar(TrainerCallback):
    """One bar over the steps, with the loss beside it, and under SPF that on the anchors and the share that fired."""

    def __init__(self) -> None:
        self._bar: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        from tqdm.auto import tqdm

        self._bar = tqdm(total=state.max_steps, initial=state.global_step, desc="fine-tune", unit="step")

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs.get("logs") or {}
        if "loss" in logs:
            self._bar.update()
            shown = {"loss": f"{logs['loss']:.3f}"}
            if "spf/fired" in logs:
                shown |= {"safety": f"{logs['spf/anchor_loss']:.4f}", "fired": f"{logs['spf/fired']:.0%}"}
            self._bar.set_postfix(shown, refresh=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the bar, also where training broke off: what is printed next starts a line of its own."""
        if self._bar is not None:
            self._bar.close()
