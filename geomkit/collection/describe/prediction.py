"""Time and memory of a collection, an analysis and a step of a fine-tune, before they run.

Passes are simulated (:mod:`geomkit.collection.describe.simulation`); what comes on top is counted by formulas. Seconds
are operations over the speed that :mod:`geomkit.collection.describe.speed` measures on the device.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from geomkit.collection.describe.memory import Counts, aliases_by_parameter, most_result_bytes, most_sample_bytes
from geomkit.collection.describe.simulation import PassCost, simulate
from geomkit.collection.describe.speed import Speed
from geomkit.collection.streaming import padded_length
from geomkit.inputs.batches import plan_batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BATCH = 16
_ANCHORS = 8
_EXAMPLES = 32
_SETS = 3
"""Defaults of :func:`geomkit.finetune`, :class:`geomkit.SPF` and :func:`geomkit.analyze`: examples of a step, anchors
of a step, most examples of a set; an analysis has three sets."""

_READINGS = 3
"""Products of the weights with the anchors' inputs in a step of SPF: before it, after it, and as it is applied."""

_DENSE_PRODUCTS = 6 * 9 * 2
"""Columns that a dense gradient is multiplied by in a subspace iteration: nine directions, both ways, six times."""


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
    model: "PreTrainedModel", counts: Counts, tokens_per_batch: int, speed: Speed | None
) -> list[Prediction]:
    """Return predictions for a collection, an analysis and a step of a fine-tune, plain and under SPF.

    Args:
        model: The model; what of it is trainable is trained, and collected. It may be on the meta device.
        counts: The examples: those that are collected, like those of each set that is analysed, like the anchors, and
            those that are trained on.
        tokens_per_batch: Largest number of token positions in a batch of a collection.
        speed: Speed of the device on the model; without it there are no seconds.
    """
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    plain = _training(model, counts, weights, speed)
    return [
        _collection(model, counts, tokens_per_batch, weights, speed),
        _analysis(model, counts, tokens_per_batch, weights, speed),
        plain,
        _training_under_spf(model, counts, plain, speed),
    ]


# ---------------------------------------------------------------------------------------------------- collection


def _collection(
    model: "PreTrainedModel", counts: Counts, tokens_per_batch: int, weights: int, speed: Speed | None
) -> Prediction:
    """The passes, and the matrix of each weight whose factors would be larger than it, from 2 T m n operations."""
    cost, seconds = _passes(model, counts.lengths, tokens_per_batch, speed)
    gradients = _bytes(model, counts)
    if speed is not None and seconds is not None:
        tokens = counts.tokens
        formed = [m * n for m, n in _matrices(model) if tokens * (m + n) > m * n]
        seconds += 2 * tokens * sum(formed) / speed.products
    return Prediction("collecting the sum", {"weights": weights, "a batch": cost.peak, "gradients": gradients}, seconds)


def _passes(
    model: "PreTrainedModel", lengths: Sequence[int], tokens_per_batch: int, speed: Speed | None
) -> tuple[PassCost, float | None]:
    """Return the cost of the largest batch of a collection, and the seconds of all batches."""
    batches = [[lengths[index] for index in batch] for batch in plan_batches(lengths, tokens_per_batch)]
    shapes = [(len(batch), padded_length(batch)) for batch in batches]
    largest = max(shapes, key=lambda shape: shape[0] * shape[1])
    cost = simulate(model, *largest, weight_gradients=False)
    positions = sum(examples * length for examples, length in shapes)
    operations = cost.operations * positions / (largest[0] * largest[1])
    return cost, None if speed is None else speed.collecting.seconds(operations, len(batches))


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
    model: "PreTrainedModel", counts: Counts, tokens_per_batch: int, weights: int, speed: Speed | None
) -> Prediction:
    """Three sets of examples like these, collected with their factors, and then measured parameter by parameter."""
    drawn = _subset(counts, _EXAMPLES)
    cost, collecting = _passes(model, drawn.lengths, tokens_per_batch, speed)
    factors = _SETS * _bytes(model, drawn, samples=True)
    # The last set runs while the factors of the others are there; then there are those of all sets, without a batch.
    batch = max(cost.peak - factors // _SETS, 0)
    memory = {"weights": weights, "factors": factors, "a batch": batch}
    seconds = None
    if speed is not None and collecting is not None:
        seconds = _SETS * collecting + sum(_measured(model, drawn)) / speed.products
    return Prediction(f"an analysis of {_SETS} × {len(drawn.lengths)} examples", memory, seconds)


def _measured(model: nn.Module, counts: Counts) -> list[float]:
    """Return the fp32 operations of the measurements of each matrix, for T tokens of each of three sets.

    1. Inner products of the examples within the three sets, and of two pairs of sets, in fp64, which counts twice: from
       Gram matrices of tokens 2 T² (m + n), or from the gradients 2 T m n and N² m n, whichever is less.
    2. A decomposition of the mean gradient of each set with r = min(T, m, n): a reduction to r × r, and about 9 r³
       for the singular vectors (Golub and Van Loan, Matrix Computations, table 8.6.1), in fp64.
    """
    tokens, examples = counts.tokens, len(counts.lengths)
    found = []
    for rows, columns in _matrices(model):
        pairs = min(2 * tokens**2 * (rows + columns), 2 * (tokens + examples**2) * rows * columns)
        r = min(tokens, rows, columns)
        decomposition = 2 * tokens * r * (rows + columns) + 9 * r**3
        found.append(2.0 * (5 * pairs + _SETS * decomposition))
    return found


# ----------------------------------------------------------------------------------------------------- fine-tune


def _training(model: "PreTrainedModel", counts: Counts, weights: int, speed: Speed | None) -> Prediction:
    """A step of AdamW: the copy that :func:`geomkit.finetune` trains, two states for each weight, and a pass.

    The pass of the longest rows is the peak, unless the gradients with two temporary tensors of the largest are more.
    """
    longest = simulate(model, _BATCH, max(counts.lengths), weight_gradients=True)
    trained = _trained_bytes(model)
    memory = {
        "weights": weights,
        "the copy that is trained": weights,
        "states of AdamW": 2 * sum(trained),
        "a pass": max(longest.peak, sum(trained) + 2 * max(trained)),
    }
    seconds = None
    if speed is not None:
        entries = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        operations = longest.operations * _expected_longest(counts.lengths, _BATCH) / max(counts.lengths)
        seconds = speed.training.seconds(operations) + entries / speed.updates
    return Prediction(f"a step of a fine-tune on {_BATCH} examples", memory, seconds)


def _trained_bytes(model: nn.Module) -> list[int]:
    """Return the bytes of each trainable parameter."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [parameter.numel() * parameter.element_size() for parameter in parameters]


def _expected_longest(lengths: Sequence[int], draws: int) -> float:
    """Return the expected length of the longest of some examples that are drawn at random."""
    below = np.arange(len(lengths) + 1) / len(lengths)  # P(a draw is one of the first i in ascending order)
    return float((np.sort(lengths) * np.diff(below**draws)).sum())


def _training_under_spf(model: "PreTrainedModel", counts: Counts, plain: Prediction, speed: Speed | None) -> Prediction:
    """The plain step, a pass over the anchors, and the work of the default rule on every matrix.

    While the task's gradients are there, the anchors' pass stores its own activations, and leaves their gradients.
    """
    anchors = _subset(counts, _ANCHORS)
    length = round(_expected_longest(anchors.lengths, _ANCHORS))
    cost = simulate(model, _ANCHORS, length, weight_gradients=False)
    task = sum(_trained_bytes(model))
    memory = dict(plain.memory)
    memory["a pass"] = max(memory["a pass"], task + cost.peak)
    memory["gradients of the anchors"] = _bytes(model, anchors)
    seconds = None
    if speed is not None and plain.seconds is not None:
        seconds = plain.seconds + speed.collecting.seconds(cost.operations)
        seconds += sum(_projected(model, anchors.tokens)) / speed.products
    return Prediction(plain.task + f" under SPF, {_ANCHORS} anchors", memory, seconds)


def _projected(model: nn.Module, tokens: int) -> list[float]:
    """Return the operations of a step of the default rule on each matrix, for T tokens of the anchors.

    While its factors are smaller than the matrix, T (m + n) ≤ m n, the safety gradient is added to the task's once and
    the weights are multiplied by its inputs at each reading, 2 T m n each. Otherwise it is formed once, and multiplied
    by the directions of the subspace iteration.
    """
    found = []
    for rows, columns in _matrices(model):
        entries = rows * columns
        factored = tokens * (rows + columns) <= entries
        found.append(2.0 * entries * (tokens * (1 + _READINGS) if factored else tokens + _DENSE_PRODUCTS))
    return found


# -------------------------------------------------------------------------------------------------------- shared


def _matrices(model: nn.Module) -> list[tuple[int, int]]:
    """Return the shapes of all trainable matrices."""
    return [
        (parameter.shape[0], parameter.shape[1])
        for parameter in model.parameters()
        if parameter.requires_grad and parameter.ndim == 2
    ]


def _subset(counts: Counts, most: int) -> Counts:
    """Return counts as if at most so many of the examples had been drawn, with means in place of what is random."""
    if len(counts.lengths) <= most:
        return counts
    share = most / len(counts.lengths)
    lengths = np.quantile(counts.lengths, (np.arange(most) + 0.5) / most).round().astype(int).tolist()
    ids = set(sorted(counts.ids)[: max(round(share * counts.ids_by_example), 1)])
    return Counts(lengths, round(share * counts.scored), ids, round(share * counts.ids_by_example))
