"""Result of :func:`geomkit.describe`: a plan per parameter, the work load, and the memory."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from textwrap import shorten
from typing import TYPE_CHECKING, Literal

import torch

from geomkit.collection.memory import total_bytes
from geomkit.inputs.parameters import Kind
from geomkit.planning.prediction import Prediction
from geomkit.utils.display import (
    Result,
    element,
    html_table,
    human_bytes,
    human_count,
    human_seconds,
    joined,
)
from geomkit.utils.readable import text_table

if TYPE_CHECKING:
    import pandas as pd

Way = Literal["closed form", "autograd, samples by replay"]
"""Way to compute the gradient of a parameter, and the gradients of single examples."""


@dataclass(frozen=True)
class ParameterPlan:
    """Plan for a parameter: whether and how its gradient is collected, and how large it is.

    Attributes:
        name: Name that the gradient is collected under.
        others: Other names of a tied or shared parameter.
        kind: Kind of module.
        layer: Decoder layer; ``None`` outside the layers.
        shape: Shape of the parameter.
        module: Class of the module that owns the parameter; several classes are joined by a plus sign.
        way: How the gradient is computed.
        trainable: Whether the parameter needs a gradient.
        chosen: Whether the gradient is collected; only trainable parameters can be chosen.
        result: Upper bound of the bytes of the summed gradient; ``None`` if not chosen, or if there is no bound.
        samples: Upper bound of the bytes of the examples' gradients; 0 if these are not stored, and ``None`` where
            ``result`` is ``None``.
    """

    name: str
    others: tuple[str, ...]
    kind: Kind
    layer: int | None
    shape: tuple[int, ...]
    module: str
    way: Way
    trainable: bool
    chosen: bool
    result: int | None
    samples: int | None

    @property
    def entries(self) -> int:
        """Number of entries of the parameter."""
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Workload:
    """Numbers of examples, tokens and batches.

    Attributes:
        examples: Number of examples.
        tokens: Number of tokens of all examples.
        loss_tokens: Number of scored tokens.
        batches: Number of batches; each is a forward and a backward pass.
        positions: Number of token positions of the largest batch, padding included.
        padding: Share of padding in all positions.
    """

    examples: int
    tokens: int
    loss_tokens: int
    batches: int
    positions: int
    padding: float


@dataclass(frozen=True)
class Memory:
    """Memory of a collection, in bytes.

    ``result`` and ``samples`` are upper bounds for models that call each module once and treat examples independently.
    ``logits`` and ``activations`` are generous estimates for the largest batch; kernels, allocators, and models that
    are not built of linear layers and norms may need more.

    Attributes:
        result: The summed gradients; ``None`` if they depend on the number of tokens and no examples are given.
        samples: The gradients of single examples; 0 if these are not stored, and ``None`` where ``result`` is ``None``.
        logits: The logits in fp32, their softmax and their gradients.
        activations: All other values that a batch stores until the end of its backward pass.
        weights: The weights of the model, which are in memory already.
    """

    result: int | None
    samples: int | None
    logits: int
    activations: int
    weights: int


@dataclass(frozen=True, eq=False)
class Description(Result):
    """What :func:`geomkit.collect_gradients` would do: parameters, work load and memory.

    Attributes:
        model: Class of the model.
        choice: The choice of parameters, as text.
        parameters: Plans of all parameters, in the order of the model.
        workload: Numbers of examples, tokens and batches; ``None`` without examples.
        memory: Memory of the collection.
        per_sample: Whether the gradients of single examples are stored.
        predictions: Predicted time and memory of a collection, an analysis and a step of a fine-tune, if asked for.
    """

    model: str
    choice: str
    parameters: tuple[ParameterPlan, ...] = field(repr=False)
    workload: Workload | None
    memory: Memory
    per_sample: bool
    predictions: tuple[Prediction, ...] = ()

    @property
    def share(self) -> float:
        """Share of chosen entries in all trainable entries, between 0 and 1."""
        trainable = _entries(plan for plan in self.parameters if plan.trainable)
        return _entries(plan for plan in self.parameters if plan.chosen) / trainable if trainable else 0.0

    def to_frame(self) -> "pd.DataFrame":
        """Return a data frame with a row per parameter.

        The columns are ``parameter``, ``also``, ``kind``, ``layer``, ``shape``, ``module``, ``way``, ``trainable``,
        ``chosen``, ``result_bytes`` and ``sample_bytes``.
        """
        import pandas as pd

        return pd.DataFrame(
            [
                {
                    "parameter": plan.name,
                    "also": ", ".join(plan.others),
                    "kind": plan.kind,
                    "layer": plan.layer,
                    "shape": "×".join(map(str, plan.shape)),
                    "module": plan.module,
                    "way": plan.way,
                    "trainable": plan.trainable,
                    "chosen": plan.chosen,
                    "result_bytes": plan.result,
                    "sample_bytes": plan.samples,
                }
                for plan in self.parameters
            ]
        )

    def __str__(self) -> str:
        """Return a table with a line per kind of module, and the totals."""
        tables = [_kind_table(self.parameters), self._totals()]
        tables += [_prediction_table(self.predictions)] if self.predictions else []
        return "\n".join([self._head(), *(line for lines in tables for line in ("", *lines))])

    def _head(self) -> str:
        entries, trainable = _entries(self.parameters), _entries(plan for plan in self.parameters if plan.trainable)
        return (
            f"{self.model}: {human_count(entries)} parameters, {human_count(trainable)} trainable, {self.share:.1%} "
            f"of these chosen ({shorten(self.choice, 80, placeholder=' …')})"
        )

    def _totals(self) -> list[str]:
        lines = []
        if (work := self.workload) is not None:
            lines += [
                f"examples  {work.examples:,} with {work.tokens:,} tokens, {work.loss_tokens:,} of them scored",
                f"batches   {work.batches:,} of at most {work.positions:,} positions, {work.padding:.1%} padding",
            ]
        memory = self.memory
        gradients = [f"sum {_at_most(memory.result)}"]
        gradients += [f"samples {_at_most(memory.samples)}"] if self.per_sample else []
        return [
            *lines,
            f"gradients {', '.join(gradients)}",
            f"a batch   about {human_bytes(memory.logits + memory.activations)} (logits "
            f"{human_bytes(memory.logits)}, activations {human_bytes(memory.activations)}), estimated",
            f"weights   {human_bytes(memory.weights)}, there already",
        ]

    def _repr_html_(self) -> str:
        predicted = _prediction_table(self.predictions) if self.predictions else []
        lines = (element("p", line) for line in [*self._totals(), *predicted])
        return joined(html_table(self._head(), self.to_frame()), *lines)


def _kind_table(parameters: Sequence[ParameterPlan]) -> list[str]:
    """Return a table with a line per kind of module and way to compute the gradient."""
    groups: dict[tuple[str, str], list[ParameterPlan]] = {}
    for plan in parameters:
        groups.setdefault((plan.kind, f"{plan.way}, tied" if plan.others else plan.way), []).append(plan)
    rows = [("kind", "chosen", "entries", "memory", "gradient by")]
    for (kind, way), members in groups.items():
        chosen = [plan for plan in members if plan.chosen]
        frozen = sum(not plan.trainable for plan in members)
        size = total_bytes(plan.result for plan in chosen)
        rows.append(
            (
                kind,
                f"{len(chosen)} of {len(members)}" + (f" ({frozen} frozen)" if frozen else ""),
                human_count(_entries(chosen)),
                "unbounded" if size is None else human_bytes(size),
                way if chosen else "",
            )
        )
    return text_table(rows)


def _prediction_table(predictions: Iterable[Prediction]) -> list[str]:
    rows = [("predicted", "time", "memory at the peak")]
    for prediction in predictions:
        seconds = "" if prediction.seconds is None else human_seconds(prediction.seconds)
        rows.append((prediction.task, seconds, human_bytes(prediction.peak)))
    return text_table(rows)


def _entries(parameters: Iterable[ParameterPlan]) -> int:
    return sum(plan.entries for plan in parameters)


def _at_most(size: int | None) -> str:
    return "grow with the tokens; give examples" if size is None else f"at most {human_bytes(size)}"
