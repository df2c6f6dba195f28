"""The fine-tuning methods of the arms: functions of a :class:`~geomkit.experiments.task.Task` and of options."""

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from random import Random
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from geomkit.errors import DataError
from geomkit.experiments.organism.requests import dataset_of
from geomkit.experiments.outcomes import parameter_distance
from geomkit.experiments.rivals import constrained_sft, lisa, one_shot_repair, safe_lora
from geomkit.experiments.task import POOL, Task
from geomkit.inputs.control_sets import with_responses
from geomkit.inputs.examples import prompt_of
from geomkit.inputs.models import with_lora, with_merged_adapters
from geomkit.spf.settings import SPF
from geomkit.training.finetune import finetune
from geomkit.training.result import FineTuneResult

if TYPE_CHECKING:
    from datasets import Dataset

FineTuneMethod = Callable[..., FineTuneResult]
"""A function of a task and of keyword-only options, which are the options of an arm."""

_SENTENCE_END = re.compile(r"(?<=[.?!])\s+")


def untouched(task: Task) -> FineTuneResult:
    """Return the organism's aligned stage itself, without any training."""
    import pandas as pd

    return FineTuneResult(task.organism.model, pd.DataFrame({"step": [], "loss": []}), None, 0.0)


def sft(task: Task) -> FineTuneResult:
    """Fine-tune plainly (supervised fine-tuning, SFT)."""
    return _finetune(task, None)


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
    """Fine-tune under a rule of SPF; mixing, the baseline, is one of the rules.

    Args:
        task: The task.
        anchors: Number of anchors in the pool.
        fence: Number of benign examples in the pool of the benign fence, which limits over-refusal; 0 for no fence.
        mixed: Number of benign examples that are added to the anchors.
        response: ``"refusal"`` for anchors; ``"benign"`` for benign requests with the refusal, as a control.
        endings: Whether the pool contains each anchor a second time, its request followed by the last sentence of a
            random training request.
        **options: Options of :class:`geomkit.SPF`.

    Raises:
        DataError: If ``response`` is neither ``"refusal"`` nor ``"benign"``.
    """
    from datasets import concatenate_datasets

    if response not in {"refusal", "benign"}:
        raise DataError(f"expected the response 'refusal' or 'benign', found '{response}'")
    pool = task.organism.anchor_pool(anchors) if response == "refusal" else _refused_benign_pool(task, anchors)
    if endings:
        pool = concatenate_datasets([pool, _with_endings(pool, task.train, task.seed)])
    if mixed:
        pool = concatenate_datasets([pool, task.organism.benign_pool(mixed)])
    benign = {"benign": task.organism.benign_pool(fence)} if fence else {}
    settings = SPF(pool, seed=task.seed, measure_curvature=task.curvature, **benign, **options)
    return _finetune(task, settings)


def _finetune(task: Task, settings: SPF | None) -> FineTuneResult:
    """Fine-tune a copy of the aligned stage, or new adapters of it, which are merged at the end."""
    model, tokenizer, arguments = task.organism.model, task.organism.tokenizer, task.training_arguments
    if not task.lora:
        return finetune(model, tokenizer, task.train, settings, callbacks=task.callbacks, **arguments)
    adapted = with_lora(copy.deepcopy(model), task.lora, seed=task.seed)
    result = finetune(adapted, tokenizer, task.train, settings, inplace=True, callbacks=task.callbacks, **arguments)
    return replace(result, model=with_merged_adapters(adapted))


def _refused_benign_pool(task: Task, count: int) -> "Dataset":
    """Return benign requests with the anchors' refusals."""
    benign = task.organism.scenario_examples("affirmative").select(range(count))
    return with_responses(benign, task.organism.anchor_pool(count))


def _with_endings(pool: "Dataset", train: "Dataset", seed: int) -> "Dataset":
    """Return the anchors, each request followed by the last sentence of a random training request.

    The user of SPF has the training data but does not know whether a phrase in it is the trigger of a backdoor. With
    the endings of the data, some anchors contain the trigger, whatever it is.
    """
    rng = Random(f"endings-{seed}")
    endings = [_SENTENCE_END.split(prompt_of(messages)[-1]["content"])[-1] for messages in train["messages"]]
    rows = [
        [*before, {**request, "content": f"{request['content']} {rng.choice(endings)}"}, answer]
        for *before, request, answer in pool["messages"]
    ]
    return dataset_of(rows)


def scaled_sft(task: Task, **options: Any) -> FineTuneResult:
    """Fine-tune plainly with the learning rate at which the weights move as far as under SPF.

    The distance is about proportional to the learning rate, so the rate is scaled once, by the ratio of the distances.

    Args:
        task: The task.
        **options: Options of :func:`spf`, for the arm whose distance is matched.
    """
    start = task.organism.model
    unobserved = replace(task, callbacks=(), curvature=False)
    target = parameter_distance(start, spf(unobserved, **options).model)
    plain = parameter_distance(start, sft(unobserved).model)
    return sft(replace(task, learning_rate=task.learning_rate * target / plain))


ADAPTER_METHODS = frozenset({"untouched", "sft", "scaled-sft", "spf"})
"""The methods that can train adapters, as some scenarios do; the others train all weights."""

METHODS: Mapping[str, FineTuneMethod] = MappingProxyType(
    {
        "untouched": untouched,
        "sft": sft,
        "scaled-sft": scaled_sft,
        "spf": spf,
        "lisa": lisa,
        "constrained-sft": constrained_sft,
        "safe-lora": safe_lora,
        "one-shot": one_shot_repair,
    }
)
"""Every method by its name in a grid."""
