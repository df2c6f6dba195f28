"""Looking at refusal while a fine-tune goes on."""

import time
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from geomkit.experiments.organisms import Organism
from geomkit.experiments.outcomes import answers, refusals

PROMPTS = 60
"""Held-out requests that are asked on the way."""


class RefusalAlong(TrainerCallback):
    """Measures refusal on held-out forbidden requests a few times, evenly spaced, the last step included.

    Attributes:
        found: Pairs of step and refusal rate.
        seconds: What asking took.
    """

    def __init__(self, organism: Organism, steps: int, times: int) -> None:
        """Choose the steps."""
        self.found: list[tuple[int, float]] = []
        self.seconds = 0.0
        self._organism = organism
        self._rows = organism.examples("eval/forbidden", PROMPTS)
        self._at = {max(1, round(steps * (place + 1) / times)) for place in range(times)}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask, where it is time."""
        if state.global_step in self._at:
            started = time.perf_counter()
            refused = refusals(self._rows, answers(kwargs["model"], self._organism, self._rows))
            self.found.append((state.global_step, sum(refused) / len(refused)))
            self.seconds += time.perf_counter() - started
