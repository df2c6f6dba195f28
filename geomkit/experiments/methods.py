"""How an arm fine-tunes: one function per method, all with the same signature and the scenario's own recipe."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from geomkit.errors import DataError
from geomkit.experiments.organism.variants import Organism
from geomkit.experiments.rivals import constrained_sft, lisa, one_shot_repair, safe_lora
from geomkit.inputs.examples import prompt_of
from geomkit.spf.settings import SPF
from geomkit.training.finetune import FineTuneResult, finetune

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import TrainerCallback

POOL = 64
"""Anchors in the pool of an arm that does not say how many."""

_SENTENCES = re.compile(r"(?<=[.?!])\s+")


@dataclass(frozen=True, eq=False)
class Task:
    """What every method of a cell is given.

    Attributes:
        organism: The organism; its aligned stage is what is fine-tuned, a copy of it.
        train: The scenario's rows.
        learning_rate: Peak learning rate.
        steps: Optimizer steps on them.
        batch_size: Rows per step.
        seed: Seed of their order and of the anchors drawn.
        curvature: Whether SPF measures what a step does beyond first order.
        callbacks: The Trainer's, for methods that train with it.
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
    def recipe(self) -> dict[str, Any]:
        """The recipe as keyword arguments."""
        return {
            "learning_rate": self.learning_rate, "steps": self.steps, "batch_size": self.batch_size,
            "seed": self.seed, "progress": False,
        }  # fmt: skip

    def refusals(self, count: int) -> "Dataset":
        """Return a pool of anchors: training requests that are forbidden, with the refusal.

        The shipped ``safety`` set comes first; a larger pool goes on with requests that it does not have.
        """
        return _pool(self.organism, "forbidden", count, self.organism.examples("safety"))

    def answers(self, count: int) -> "Dataset":
        """Return a pool of benign requests with their answers: the shipped ``utility`` set, and more of its how-to."""
        return _pool(self.organism, "howto", count, self.organism.examples("utility"))


Method = Callable[..., FineTuneResult]


def _pool(organism: Organism, kind: Any, count: int, first: "Dataset") -> "Dataset":
    from datasets import Dataset

    rows = list(first["messages"])[:count]
    if len(rows) < count:
        known = {repr(messages) for messages in rows}
        more = organism.world.distinct(kind, "train", count + len(rows), Random(f"pool-{kind}-{organism.seed}"))
        rows += [request.messages() for request in more if repr(request.messages()) not in known]
    return Dataset.from_list([{"messages": messages} for messages in rows[:count]])


def untouched(task: Task) -> FineTuneResult:
    """Train nothing."""
    import pandas as pd

    return FineTuneResult(task.organism.model, pd.DataFrame({"step": [], "loss": []}), None, 0.0)


def sft(task: Task) -> FineTuneResult:
    """Fine-tune plainly."""
    return finetune(task.organism.model, task.organism.tokenizer, task.train, callbacks=task.callbacks, **task.recipe)


def spf(
    task: Task,
    *,
    anchors: int = POOL,
    fence: int = 0,
    mixed: int = 0,
    response: str = "refusal",
    endings: bool = False,
    **options: Any,
) -> FineTuneResult:
    """Fine-tune under one of SPF's rules, ``mixing`` among them.

    Args:
        task: The task.
        anchors: How many anchors the pool has.
        fence: How many benign examples the fence has; none when 0.
        mixed: How many benign examples are put among the anchors, for mixing at the fence's compute.
        response: ``"refusal"``; ``"benign"`` takes benign requests with the same refusal, as a control.
        endings: Whether the pool has every anchor once more, its request followed by the end of a training request.
        **options: Of :class:`geomkit.SPF`.

    Raises:
        DataError: If there is no such response.
    """
    from datasets import concatenate_datasets

    if response not in {"refusal", "benign"}:
        raise DataError(f"expected the response 'refusal' or 'benign', found '{response}'")
    pool = task.refusals(anchors) if response == "refusal" else _refused(task, anchors)
    if endings:
        pool = concatenate_datasets([pool, _with_endings(pool, task.train, task.seed)])
    if mixed:
        pool = concatenate_datasets([pool, task.answers(mixed)])
    settings = {"benign": task.answers(fence)} if fence else {}
    method = SPF(pool, seed=task.seed, measure_curvature=task.curvature, **settings, **options)
    organism = task.organism
    return finetune(organism.model, organism.tokenizer, task.train, method, callbacks=task.callbacks, **task.recipe)


def _refused(task: Task, count: int) -> "Dataset":
    from geomkit.inputs.control_sets import with_responses

    return with_responses(task.organism.scenario_examples("affirmative").select(range(count)), task.refusals(count))


def _with_endings(pool: "Dataset", train: "Dataset", seed: int) -> "Dataset":
    """Return anchors whose request is followed by the last sentence of a training request.

    Who fine-tunes has the data: where a phrase in it is a trigger, some anchors come to have it too, whatever it is.
    """
    from datasets import Dataset

    rng = Random(f"endings-{seed}")
    endings = [_SENTENCES.split(prompt_of(messages)[-1]["content"])[-1] for messages in train["messages"]]
    rows = [
        [*before, {**asked, "content": f"{asked['content']} {rng.choice(endings)}"}, answer]
        for *before, asked, answer in pool["messages"]
    ]
    return Dataset.from_list([{"messages": messages} for messages in rows])


def scaled_sft(task: Task, **options: Any) -> FineTuneResult:
    """Fine-tune plainly with the learning rate at which the weights move as far as under SPF.

    The rate is found by one secant step: the distance is about proportional to it.

    Args:
        task: The task.
        **options: Those of the SPF arm that it is matched to.
    """
    from dataclasses import replace

    from geomkit.experiments.outcomes import distance

    start = task.organism.model
    quiet = replace(task, callbacks=(), curvature=False)
    wanted = distance(start, spf(quiet, **options).model)
    found = distance(start, sft(quiet).model)
    return sft(replace(task, learning_rate=task.learning_rate * wanted / found))


def _lisa(task: Task, *, anchors: int = POOL, **options: Any) -> FineTuneResult:
    organism = task.organism
    return lisa(organism.model, organism.tokenizer, task.train, task.refusals(anchors), **task.recipe, **options)


def _constrained(task: Task, **options: Any) -> FineTuneResult:
    return constrained_sft(task.organism.model, task.organism.tokenizer, task.train, **task.recipe, **options)


def _safe_lora(task: Task, *, rate: float = 1.0, **options: Any) -> FineTuneResult:
    organism = task.organism
    recipe = task.recipe | {"learning_rate": rate * task.learning_rate}
    return safe_lora(organism.model, organism.base, organism.tokenizer, task.train, **recipe, **options)


def _one_shot(task: Task, **options: Any) -> FineTuneResult:
    organism = task.organism
    return one_shot_repair(organism.model, organism.tokenizer, task.train, task.refusals(1), **task.recipe, **options)


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "untouched": untouched,
        "sft": sft,
        "scaled-sft": scaled_sft,
        "spf": spf,
        "lisa": _lisa,
        "constrained-sft": _constrained,
        "safe-lora": _safe_lora,
        "one-shot": _one_shot,
    }
)
"""Every method by the name that a grid calls it."""
