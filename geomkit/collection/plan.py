"""What a collection would do, before anything runs: which parameters, how, of how many tokens, in how much memory."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from textwrap import shorten
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from geomkit._display import html_table
from geomkit.batching import plan_batches
from geomkit.collect import Form
from geomkit.collection.estimates import (
    Counts,
    Use,
    activation_bytes,
    human_bytes,
    logit_bytes,
    most_result_bytes,
    most_sample_bytes,
    uses_by_parameter,
)
from geomkit.collection.selection import chosen_parameters, selection, unwrapped_model
from geomkit.collection.streaming import TOKENS_PER_BATCH, padded_length
from geomkit.errors import DataError
from geomkit.names import Kind, kind_of, layer_index
from geomkit.tokens import AssistantMask, encode_lazily

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
            f"{self.model}: {_count(entries)} parameters, {_count(trainable)} trainable, {self.share:.1%} of these "
            f"chosen ({shorten(self.choice, 80, placeholder=' …')})"
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


def describe(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    examples: "Dataset | None" = None,
    *,
    per_sample: bool = False,
    layers: str | Sequence[str] = "*",
    kinds: Kind | Collection[Kind] | None = None,
    indices: int | Collection[int] | None = None,
    form: Form = "auto",
    tokens_per_batch: int = TOKENS_PER_BATCH,
    assistant_mask: AssistantMask = "template",
    max_length: int | None = None,
) -> Description:
    """Say what :func:`geomkit.collect_gradients` with these arguments would do, without running the model.

    A model on the meta device will do, so that a large one can be sized up before it is loaded. What only a run
    shows, such as a weight that is used without its module being called, is in the result's ``coverage``.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer, if there are examples.
        examples: Rows with a column ``messages``, to count tokens and batches of. Without them, memory is that of
            any number of examples, in batches as large as they may be.
        per_sample: See :func:`geomkit.collect_gradients`, as for all that follow.
        layers: Glob pattern, or several, on parameter names.
        kinds: Kinds of module.
        indices: Decoder layers.
        form: Form of the summed gradients.
        tokens_per_batch: Most token positions run at a time.
        assistant_mask: How assistant tokens are found.
        max_length: Cut longer examples to this many tokens.

    Returns:
        A :class:`Description`; ``print`` it.

    Raises:
        DataError: If only one of tokenizer and examples is given, or examples cannot be encoded.
        CollectionError: If no trainable parameter matches.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> with torch.device("meta"):
        ...     model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2))
        >>> description = describe(model, kinds="mlp")
        >>> round(description.share, 2), human_bytes(description.memory.result)
        (0.41, '1.01 GiB')
    """
    if (tokenizer is None) != (examples is None):
        given, missing = ("examples", "a tokenizer") if tokenizer is None else ("a tokenizer", "examples")
        raise DataError(f"expected a tokenizer and examples or neither, found only {given}; give {missing} too")
    inner = unwrapped_model(model)
    chosen = selection(layers, kinds, indices)
    counts = None
    if tokenizer is not None and examples is not None:
        counts = Counts()
        encode_lazily(tokenizer, examples, assistant_mask=assistant_mask, max_length=max_length, seen=counts.add)
    workload = _workload(counts, tokens_per_batch) if counts else None
    wanted = set(chosen_parameters(inner, chosen).values())
    uses = uses_by_parameter(inner)
    parameters = []
    for name, parameter in inner.named_parameters():
        whole = most_result_bytes(parameter, uses[name], counts, keep_factors=form == "factored")
        own = most_sample_bytes(parameter, uses[name], counts) if per_sample else 0
        parameters.append(_planned(name, parameter, uses[name], name in wanted, whole, own))
    return Description(
        model=type(inner).__name__,
        choice=str(chosen),
        parameters=tuple(parameters),
        workload=workload,
        memory=_memory(inner, parameters, workload.positions if workload else tokens_per_batch),
        per_sample=per_sample,
    )


def _workload(counts: Counts, tokens_per_batch: int) -> Workload:
    batches = [[counts.lengths[index] for index in batch] for batch in plan_batches(counts.lengths, tokens_per_batch)]
    positions = [len(lengths) * padded_length(lengths) for lengths in batches]
    return Workload(
        examples=len(counts.lengths),
        tokens=counts.tokens,
        loss_tokens=counts.scored,
        batches=len(batches),
        positions=max(positions),
        padding=1 - counts.tokens / sum(positions),
    )


def _planned(
    name: str, parameter: nn.Parameter, uses: Sequence[Use], chosen: bool, result: int | None, samples: int | None
) -> ParameterPlan:
    return ParameterPlan(
        name=name,
        others=tuple(use.name for use in uses if use.name != name),
        kind=kind_of(name),
        layer=layer_index(name),
        shape=tuple(parameter.shape),
        module=" + ".join(dict.fromkeys(type(use.module).__name__ for use in uses)),
        way="closed form" if all(use.form for use in uses) else "autograd, samples by replay",
        trainable=parameter.requires_grad,
        chosen=chosen,
        result=result if chosen else None,
        samples=samples if chosen else None,
    )


def _memory(model: nn.Module, parameters: Sequence[ParameterPlan], positions: int) -> Memory:
    chosen = [each for each in parameters if each.chosen]
    by_autograd = sum(4 * each.entries for each in chosen if each.way != "closed form")
    return Memory(
        result=_total(each.result for each in chosen),
        samples=_total(each.samples for each in chosen),
        logits=logit_bytes(model, positions),
        activations=activation_bytes(model, positions) + by_autograd,
        weights=sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()),
    )


def _total(sizes: Iterable[int | None]) -> int | None:
    known = list(sizes)
    return None if None in known else sum(size for size in known if size is not None)


# ------------------------------------------------------------------------------------------------- what is printed


def _kind_table(parameters: Sequence[ParameterPlan]) -> list[str]:
    """Return a line per kind of module and way to the gradient, and a heading."""
    groups: dict[tuple[str, str], list[ParameterPlan]] = {}
    for each in parameters:
        groups.setdefault((each.kind, f"{each.way}, tied" if each.others else each.way), []).append(each)
    rows = [("kind", "chosen", "entries", "memory", "gradient by")]
    for (kind, way), members in groups.items():
        chosen = [each for each in members if each.chosen]
        frozen = sum(not each.trainable for each in members)
        rows.append(
            (
                kind,
                f"{len(chosen)} of {len(members)}" + (f" ({frozen} frozen)" if frozen else ""),
                _count(_entries(chosen)),
                _size(_total(each.result for each in chosen)),
                way if chosen else "",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _entries(parameters: Iterable[ParameterPlan]) -> int:
    return sum(each.entries for each in parameters)


def _count(number: int) -> str:
    """Write a number of parameters to three digits.

    Example:
        >>> _count(999), _count(8_030_261_248)
        ('999', '8.03B')
    """
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def _size(size: int | None) -> str:
    return "unbounded" if size is None else human_bytes(size)


def _at_most(size: int | None) -> str:
    return "grow with the tokens; give examples" if size is None else f"at most {human_bytes(size)}"
