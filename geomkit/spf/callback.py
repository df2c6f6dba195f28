"""SPF in ``transformers.Trainer`` and everything built on it."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from geomkit.errors import SPFError
from geomkit.spf.certificate import Certificate
from geomkit.spf.guard import Guard
from geomkit.spf.method import SPF


class SPFCallback(TrainerCallback):
    """Attaches SPF when training begins, adds its measures to the logs, detaches when training ends.

    Example::

        trainer = Trainer(model, args, train_dataset=rows, processing_class=tokenizer,
                          callbacks=[gk.SPFCallback(gk.SPF(anchors))])
    """

    def __init__(self, spf: SPF) -> None:
        """Keep what to attach."""
        self.spf = spf
        self._guard: Guard | None = None

    @property
    def certificate(self) -> Certificate | None:
        """What the steps so far did to the safety loss; ``None`` before training."""
        return self._guard.certificate if self._guard else None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach to the optimizer that the Trainer has made by now.

        Raises:
            SPFError: If training resumes: the loss that drift is measured from, and the draws of the anchors, belong
                to the run's beginning.
        """
        self.detach()
        if state.global_step > 0:
            raise SPFError(
                f"expected training from the beginning, found a resume at step {state.global_step}, where the safety "
                "loss before training is not known any more; train in one go"
            )
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        self._guard = self.spf.attach(model, optimizer, self.spf.tokenizer or kwargs.get("processing_class"))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the safety gradient of a rule that mixes, before the task's, so that both are clipped together."""
        if self._guard:
            self._guard.mix()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the last step's measures to what is logged, and to the history, which has its own copy by now."""
        logs, certificate = kwargs.get("logs"), self.certificate
        if certificate and certificate.steps and logs is not None and "loss" in logs:
            last = certificate.records[-1]
            measures = {
                "spf/anchor_loss": last.anchor_loss,
                "spf/first_order": last.first_order,
                "spf/fired": last.fired,
            }
            logs.update(measures)
            state.log_history[-1].update(measures)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Detach."""
        self.detach()

    def detach(self) -> None:
        """End the projection, also after training broke off; the certificate stays."""
        if self._guard:
            self._guard.detach()
