"""The task of a fine-tune: the organism, and the scenario's rows and training settings."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from geomkit.experiments.organism.interface import Organism

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import TrainerCallback

POOL = 64
"""Number of anchors in the pool of an arm that does not give another number."""


@dataclass(frozen=True, eq=False)
class Task:
    """The inputs of a fine-tuning method: the organism, the training rows, and the training settings.

    Attributes:
        organism: The organism; a method trains a copy of its aligned stage.
        train: The training rows of the scenario.
        learning_rate: Peak learning rate.
        steps: Optimizer steps on the training rows.
        batch_size: Rows per step.
        seed: Seed of the order of the rows, of the anchors drawn, and of new adapters.
        lora: Rank of the adapters that are trained; 0 trains all weights.
        curvature: Whether SPF measures the second-order part of each step.
        callbacks: Callbacks of the Trainer; the rivals, which do not need them, ignore them.
    """

    organism: Organism
    train: "Dataset" = field(repr=False)
    learning_rate: float
    steps: int
    batch_size: int
    seed: int
    lora: int = 0
    curvature: bool = False
    callbacks: "Sequence[TrainerCallback]" = ()

    @property
    def training_arguments(self) -> dict[str, Any]:
        """The training settings as keyword arguments of :func:`geomkit.finetune`."""
        return {
            "learning_rate": self.learning_rate, "steps": self.steps, "batch_size": self.batch_size,
            "seed": self.seed, "progress": False,
        }  # fmt: skip
