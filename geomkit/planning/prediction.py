"""Time and memory of a collection, an analysis and a step of a fine-tune, before they run.

Passes are simulated (:mod:`geomkit.planning.simulation`): their seconds are operations over the speed that
:mod:`geomkit.planning.speed` measures on the device. The seconds of the work on gradients are those of
:mod:`geomkit.planning.rehearsal`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import comb
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from geomkit.analysis.probe import Probe
from geomkit.collection.memory import Counts, aliases_by_parameter, most_result_bytes, most_sample_bytes
from geomkit.collection.streaming import padded_length
from geomkit.inputs.batches import plan_batches
from geomkit.planning.rehearsal import Rehearsal
from geomkit.planning.simulation import PassCost, simulate
from geomkit.planning.speed import Speed
from geomkit.spf.settings import SPF

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BATCH = 16
"""Examples of a step of :func:`geomkit.finetune`."""

_SETS = 3


@dataclass(frozen=True)
class Pace:
    """What turns work into seconds.

    Attributes:
        speed: Speed of passes on the device.
        rehearsal: Seconds of the work on gradients.
    """

    speed: Speed
    rehearsal: Rehearsal


@dataclass(frozen=True)
class Prediction:
    """Predicted time and memory of a task.

    Attributes:
        task: The task, in words.
        memory: Bytes at the peak, by what they are for; the weights of the model are a part.
        seconds: Seconds; ``None`` where no speed is known.
    """

    task: str
    memory: dict[str, int] = field(repr=False)
    seconds: float | None

    @property
    def peak(self) -> int:
        """Bytes at the peak."""
        return sum(self.memory.values())


def predict_tasks(
    model: "PreTrainedModel", counts: Counts, tokens_per_batch: int, pace: Pace | None
) -> list[Prediction]:
    """Return predictions for a collection, an analysis and a step of a fine-tune, plain and under SPF.

    Args:
        model: The model; what of it is trainable is trained, and collected. It may be on the meta device.
        counts: The examples: those that are collected, like those of each set that is analysed, like the anchors, and
            those that are trained on.
        tokens_per_batch: Largest number of token positions in a batch of a collection.
        pace: What turns work into seconds; without it there are none.
    """
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    plain = _training(model, counts, weights, pace)
    return [
        _collection(model, counts, tokens_per_batch, weights, pace),
        _analysis(model, counts, tokens_per_batch, weights, pace),
        plain,
        _training_under_spf(model, counts, plain, pace),
    ]


# ---------------------------------------------------------------------------------------------------- collection


def _collection(
    model: "PreTrainedModel", counts: Counts, tokens_per_batch: int, weights: int, pace: Pace | None
) -> Prediction:
    """The passes, and the matrix of each weight whose factors would be larger than it, from 2 T m n operations."""
    cost, seconds = _passes(model, counts.lengths, tokens_per_batch, pace)
    gradients = _bytes(model, counts)
    if pace is not None and seconds is not None:
        seconds += _formed(model, counts.tokens) / pace.speed.products
    return Prediction("collecting the sum", {"weights": weights, "a batch": cost.peak, "gradients": gradients}, seconds)


def _passes(
    model: "PreTrainedModel", lengths: Sequence[int], tokens_per_batch: int, pace: Pace | None
) -> tuple[PassCost, float | None]:
    """Return the cost of the largest batch of a collection, and the seconds of all batches."""
    batches = [[lengths[index] for index in batch] for batch in plan_batches(lengths, tokens_per_batch)]
    shapes = [(len(batch), padded_length(batch)) for batch in batches]
    largest = max(shapes, key=lambda shape: shape[0] * shape[1])
    cost = simulate(model, *largest, weight_gradients=False)
    positions = sum(examples * length for examples, length in shapes)
    operations = cost.operations * positions / (largest[0] * largest[1])
    return cost, None if pace is None else pace.speed.collecting.seconds(operations, len(batches))


def _formed(model: nn.Module, tokens: int) -> int:
    """Return the operations that form the summed gradients of T tokens that are smaller as matrices, 2 T m n each."""
    shapes = [tuple(weight.shape) for weight in model.parameters() if weight.requires_grad and weight.ndim == 2]
    return sum(2 * tokens * m * n for m, n in shapes if tokens * (m + n) > m * n)


def _bytes(model: nn.Module, counts: Counts, *, samples: bool = False) -> int:
    """Return the bytes of the gradients of all trainable parameters: of the sum, or of the single examples."""
    aliases = aliases_by_parameter(model)
    return sum(
        (
            most_sample_bytes(parameter, aliases[name], counts)
            if samples
            else most_result_bytes(parameter, aliases[name], counts, keep_factors=False)
        )
        or 0
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    )


# ------------------------------------------------------------------------------------------------------ analysis


def _analysis(
    model: "PreTrainedModel", counts: Counts, tokens_per_batch: int, weights: int, pace: Pace | None
) -> Prediction:
    """Three sets of examples like these, collected with their factors, and then measured parameter by parameter."""
    drawn = analysed(counts)
    cost, collecting = _passes(model, drawn.lengths, tokens_per_batch, pace)
    factors = _SETS * _bytes(model, drawn, samples=True)
    # The last set runs while the factors of the others are there; then there are those of all sets, without a batch.
    batch = max(cost.peak - factors // _SETS, 0)
    memory = {"weights": weights, "factors": factors, "a batch": batch}
    seconds = None
    if pace is not None and collecting is not None:
        answers = _answers(model, drawn, pace.speed)
        seconds = _SETS * collecting + answers + pace.rehearsal.analysis
    return Prediction(f"an analysis of {_SETS} × {len(drawn.lengths)} examples", memory, seconds)


def _answers(model: "PreTrainedModel", counts: Counts, speed: Speed) -> float:
    """Return the seconds of answers of the greatest length, after a forward pass over all prompts."""
    by_token = simulate(model, 1, 2, weight_gradients=False).operations / 4
    tokens = counts.tokens - counts.scored + len(counts.lengths) * Probe.max_new_tokens
    return speed.answering.seconds(by_token * tokens, Probe.max_new_tokens)


# ----------------------------------------------------------------------------------------------------- fine-tune


def _training(model: "PreTrainedModel", counts: Counts, weights: int, pace: Pace | None) -> Prediction:
    """A step of AdamW: the copy that :func:`geomkit.finetune` trains, two states for each weight, and a pass.

    The pass of the longest rows is the peak, unless the gradients with two temporary tensors of the largest are more.
    """
    batch = min(_BATCH, len(counts.lengths))
    longest = simulate(model, batch, max(counts.lengths), weight_gradients=True)
    trained = _trained_bytes(model)
    memory = {
        "weights": weights,
        "the copy that is trained": weights,
        "states of AdamW": 2 * sum(trained),
        "a pass": max(longest.peak, sum(trained) + 2 * max(trained)),
    }
    seconds = None
    if pace is not None:
        entries = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        operations = longest.operations * _expected_longest(counts.lengths, batch) / max(counts.lengths)
        seconds = pace.speed.training.seconds(operations) + entries / pace.speed.updates
    return Prediction(f"a step of a fine-tune on {batch} examples", memory, seconds)


def _trained_bytes(model: nn.Module) -> list[int]:
    """Return the bytes of each trainable parameter."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [parameter.numel() * parameter.element_size() for parameter in parameters]


def _expected_longest(lengths: Sequence[int], draws: int) -> float:
    """Return the expected length of the longest of some examples that are drawn at random, without replacement."""
    # P(all draws are among the first i in ascending order)
    below = [comb(count, draws) / comb(len(lengths), draws) for count in range(len(lengths) + 1)]
    return float((np.sort(lengths) * np.diff(below)).sum())


def _training_under_spf(model: "PreTrainedModel", counts: Counts, plain: Prediction, pace: Pace | None) -> Prediction:
    """The plain step, a pass over the anchors, and the work of the default rule on every block.

    While the task's gradients are there, the anchors' pass stores its own activations, and leaves their gradients.
    """
    anchors = drawn_anchors(counts)
    cost = simulate(model, len(anchors.lengths), max(anchors.lengths), weight_gradients=False)
    task = sum(_trained_bytes(model))
    memory = dict(plain.memory)
    memory["a pass"] = max(memory["a pass"], task + cost.peak)
    memory["gradients of the anchors"] = _bytes(model, anchors)
    seconds = None
    if pace is not None and plain.seconds is not None:
        seconds = plain.seconds + pace.speed.collecting.seconds(cost.operations) + pace.rehearsal.guard
        seconds += _formed(model, anchors.tokens) / pace.speed.products
    return Prediction(plain.task + f" under SPF, {len(anchors.lengths)} anchors", memory, seconds)


# -------------------------------------------------------------------------------------------------------- shared


def analysed(counts: Counts) -> Counts:
    """Return the counts of a set of an analysis with default settings."""
    return counts.subset(Probe.examples or len(counts.lengths))


def drawn_anchors(counts: Counts) -> Counts:
    """Return the counts of the anchors of a step with default settings."""
    return counts.subset(SPF.anchors_per_step)
