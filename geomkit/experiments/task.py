"""The task of a fine-tune: the organism, the scenario's rows and training settings, and pools of examples."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, Any

from geomkit.experiments.organism.requests import RequestKind
from geomkit.experiments.organism.variants import Organism

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
        seed: Seed of the order of the rows and of the anchors drawn.
        curvature: Whether SPF measures the second-order part of each step.
        callbacks: Callbacks of the Trainer; the rivals, which do not need them, ignore them.
    """

    organism: Organism
    train: "Dataset" = field(repr=False)
    learning_rate: float
    steps: int
    batch_size: int
    seed: int
    curvature: bool = False
    callbacks: "Sequence[TrainerCallback]" = ()

    @property
    def training_arguments(self) -> dict[str, Any]:
        """The training settings as keyword arguments of :func:`geomkit.finetune`."""
        return {
            "learning_rate": self.learning_rate, "steps": self.steps, "batch_size": self.batch_size,
            "seed": self.seed, "progress": False,
        }  # fmt: skip

    def anchor_pool(self, count: int) -> "Dataset":
        """Return ``count`` anchors: forbidden training requests with the refusal.

        The rows of the shipped ``safety`` set come first; a larger pool goes on with other requests.
        """
        return self._pool("forbidden", count, self.organism.examples("safety"))

    def benign_pool(self, count: int) -> "Dataset":
        """Return ``count`` benign requests with answers: the shipped ``utility`` set, then more how-to requests."""
        return self._pool("howto", count, self.organism.examples("utility"))

    def _pool(self, kind: RequestKind, count: int, shipped: "Dataset") -> "Dataset":
        from datasets import Dataset

        rows = list(shipped["messages"])[:count]
        if len(rows) < count:
            shipped_texts = {repr(messages) for messages in rows}
            rng = Random(f"pool-{kind}-{self.organism.seed}")
            # Draw as many more requests as there are rows, since some of the drawn requests may be rows already.
            drawn = self.organism.world.distinct(kind, "train", count + len(rows), rng)
            rows += [request.messages() for request in drawn if repr(request.messages()) not in shipped_texts]
        return Dataset.from_list([{"messages": messages} for messages in rows[:count]])
