"""What :func:`geomkit.describe` says: a line per parameter, how much there is to run, and in how much memory."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from textwrap import shorten
from typing import TYPE_CHECKING, Literal

import torch

from geomkit.collection.describe.memory import total_bytes
from geomkit.inputs.parameters import Kind
from geomkit.utils.display import html_table, human_bytes, human_count, text_table

if TYPE_CHECKING:
    import pandas as pd

Way = Literal["closed form", "autograd, samples by replay"]


@dataclass(frozen=True)
class ParameterPlan:
    """What would be done about one parameter.

    Attributes:
        name: The name that it is collected under.
        others: The other names of a tied or shared parameter.
        kind: Kind of module it belongs to.
        layer: Decoder layer, ``None`` outside the layers.
        shape: Its shape.
        module: Class of the module that owns it; several are joined by a plus sign.
        way: How its gradient is obtained.
        trainable: Whether it needs a gradient.
        chosen: Whether its gradient is collected; never without being trainable.
        result: Most bytes of its gradient in the sum; ``None`` if it is not chosen or nothing bounds them.
        samples: Most bytes of the examples' own gradients, likewise; 0 if they are not asked for.
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
        """How many numbers the parameter has."""
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Workload:
    """How much there is to run.

    Attributes:
        examples: Number of examples.
        tokens: Their tokens.
        loss_tokens: How many of these are scored.
        batches: Number of forward and backward passes.
        positions: Most token positions of a pass, padding included.
        padding: Share of all positions that is padding.
    """

    examples: int
    tokens: int
    loss_tokens: int
    batches: int
    positions: int
    padding: float


@dataclass(frozen=True)
class Memory:
    """What a collection needs beside the weights, in bytes.

    The first two are upper bounds for models that call each module once and keep their examples apart. The last two
    are estimates on the generous side, for the largest batch, of what autograd keeps; kernels, allocators and models
    that are not built of linear layers and norms may take more.

    Attributes:
        result: Of the summed gradients; ``None`` where the number of tokens decides and is not known.
        samples: Of the examples' own gradients, likewise; 0 if they are not asked for.
        logits: Of the logits in fp32, their softmax and their gradients.
        activations: Of everything else that a batch keeps until its backward pass is over.
        weights: Of the model's own weights, which are there already.
    """

    result: int | None
    samples: int | None
    logits: int
    activations: int
    weights: int


@dataclass(frozen=True, eq=False)
class Description:
    """What :func:`geomkit.collect_gradients` would do.

    Attributes:
        model: Class of the model.
        choice: The conditions that the chosen parameters satisfy.
        parameters: Every parameter, in the model's order.
        workload: How much there is to run; ``None`` without examples.
        memory: What it needs.
        per_sample: Whether each example's own gradient is kept.
    """

    model: str
    choice: str
    parameters: tuple[ParameterPlan, ...] = field(repr=False)
    workload: Workload | None
    memory: Memory
    per_sample: bool

    @property
    def share(self) -> float:
        """Share of the trainable entries that is chosen, between 0 and 1."""
        trainable = _entries(p for p in self.parameters if p.trainable)
        return _entries(p for p in self.parameters if p.chosen) / trainable if trainable else 0.0

    def to_frame(self) -> "pd.DataFrame":
        """Return a row per parameter.

        The columns are ``parameter``, ``also``, ``kind``, ``layer``, ``shape``, ``module``, ``way``, ``trainable``,
        ``chosen``, ``result_bytes`` and ``sample_bytes``.
        """
        import pandas as pd

        return pd.DataFrame(
            [
                {
                    "parameter": each.name,
                    "also": ", ".join(each.others),
                    "kind": each.kind,
                    "layer": each.layer,
                    "shape": "×".join(map(str, each.shape)),
                    "module": each.module,
                    "way": each.way,
                    "trainable": each.trainable,
                    "chosen": each.chosen,
                    "result_bytes": each.result,
                    "sample_bytes": each.samples,
                }
                for each in self.parameters
            ]
        )

    def __str__(self) -> str:
        """Show a line per kind of module, then the totals."""
        return "\n".join([self._head(), "", *_kind_table(self.parameters), "", *self._totals()])

    def _head(self) -> str:
        entries, trainable = _entries(self.parameters), _entries(p for p in self.parameters if p.trainable)
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
        kept = [f"sum {_at_most(memory.result)}"]
        kept += [f"samples {_at_most(memory.samples)}"] if self.per_sample else []
        return [
            *lines,
            f"gradients {', '.join(kept)}",
            f"a batch   about {human_bytes(memory.logits + memory.activations)} (logits "
            f"{human_bytes(memory.logits)}, activations {human_bytes(memory.activations)}), estimated",
            f"weights   {human_bytes(memory.weights)}, there already",
        ]

    def _repr_html_(self) -> str:
        totals = "<br>".join(self._totals())
        return f"{html_table(self._head(), self.to_frame())}<p>{totals}</p>"


def _kind_table(parameters: Sequence[ParameterPlan]) -> list[str]:
    """Return a line per kind of module and way to the gradient, and a heading."""
    groups: dict[tuple[str, str], list[ParameterPlan]] = {}
    for each in parameters:
        groups.setdefault((each.kind, f"{each.way}, tied" if each.others else each.way), []).append(each)
    rows = [("kind", "chosen", "entries", "memory", "gradient by")]
    for (kind, way), members in groups.items():
        chosen = [each for each in members if each.chosen]
        frozen = sum(not each.trainable for each in members)
        size = total_bytes(each.result for each in chosen)
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


def _entries(parameters: Iterable[ParameterPlan]) -> int:
    return sum(each.entries for each in parameters)


def _at_most(size: int | None) -> str:
    return "grow with the tokens; give examples" if size is None else f"at most {human_bytes(size)}"
