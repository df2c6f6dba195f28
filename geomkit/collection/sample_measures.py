"""A few numbers of every example's own gradient, in one pass in which no gradient is kept."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from geomkit.collection.collect import coverage_of
from geomkit.collection.measures import Measure
from geomkit.collection.streaming import TOKENS_PER_BATCH, stream
from geomkit.errors import GeometryError
from geomkit.gradients.arithmetic import zero_gradient
from geomkit.gradients.gradient_set import Coverage
from geomkit.gradients.layer_gradient import LayerGradient
from geomkit.gradients.provenance import Provenance, provenance_of
from geomkit.inputs.parameters import Layers, as_selection, kind_of, layer_index
from geomkit.inputs.tokens import EncodedExamples, Tokens, as_encoded, pad_id
from geomkit.utils.display import html_table
from geomkit.utils.precision import no_autocast

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SHOWN = 12


@dataclass(frozen=True, eq=False)
class SampleMeasures:
    """What was measured of each example's own gradient.

    Attributes:
        values: By measure, then by parameter in the model's order: (N, …), a row per example in the set's order.
        losses: Each example's loss, in nats per token.
        loss_tokens: Each example's number of scored tokens.
        coverage: What share of the model was seen.
        provenance: What it was measured on.
    """

    values: Mapping[str, Mapping[str, Tensor]] = field(repr=False)
    losses: tuple[float, ...] = field(repr=False)
    loss_tokens: tuple[int, ...] = field(repr=False)
    coverage: Coverage = field(repr=False)
    provenance: Provenance | None = field(default=None, repr=False)

    def __getitem__(self, measure: str) -> Mapping[str, Tensor]:
        """Return one measure's values, by parameter.

        Raises:
            GeometryError: If there is no such measure.
        """
        if measure not in self.values:
            raise GeometryError(f"expected one of {', '.join(self.values)}, found {measure!r}; choose one of these")
        return self.values[measure]

    def side_by_side(self, measure: str) -> Tensor:
        """Return (N, …) values of all parameters side by side, one row of numbers per example.

        The inner products of the rows of sketches estimate those of whole gradients.

        Raises:
            GeometryError: If there is no such measure.
        """
        return torch.cat([values.flatten(1) for values in _as_columns(self[measure])], dim=1)

    def to_frame(self, measure: str | None = None) -> "pd.DataFrame":
        """Return a row per number, sorted by measure, parameter, example and index.

        The columns are ``example``, ``parameter``, ``kind``, ``layer``, ``measure``, ``index`` and ``value``; the index
        counts an example's numbers, row by row where they are a matrix.

        Args:
            measure: One measure; all when left out.

        Raises:
            GeometryError: If there is no such measure.
        """
        import pandas as pd

        return pd.concat(self._frames([measure] if measure else self.values), ignore_index=True)

    def _frames(self, measures: Iterable[str]) -> Iterator["pd.DataFrame"]:
        import numpy as np
        import pandas as pd

        for measure in measures:
            for parameter, values in self[measure].items():
                flat = values.reshape(len(values), -1).numpy()
                yield pd.DataFrame(
                    {
                        "example": np.repeat(np.arange(len(flat)), flat.shape[1]),
                        "parameter": parameter,
                        "kind": kind_of(parameter),
                        "layer": layer_index(parameter),
                        "measure": measure,
                        "index": np.tile(np.arange(flat.shape[1]), len(flat)),
                        "value": flat.ravel(),
                    }
                )

    def __str__(self) -> str:
        """Say what was measured, of how much."""
        return (
            f"{', '.join(self.values)} of {len(self.losses)} examples ({sum(self.loss_tokens)} loss tokens), "
            f"{self.coverage}"
        )

    def _repr_html_(self) -> str:
        first = next(self._frames(self.values)).head(_SHOWN)
        return html_table(str(self), first)


def _as_columns(values: Mapping[str, Tensor]) -> Iterator[Tensor]:
    return (each if each.ndim > 1 else each[:, None] for each in values.values())


def measure_samples(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    examples: "Dataset | EncodedExamples",
    measures: Mapping[str, Measure],
    *,
    layers: Layers = "*",
    tokens_per_batch: int = TOKENS_PER_BATCH,
    progress: bool = True,
) -> SampleMeasures:
    """Measure the gradient of each example's own loss without keeping it.

    Every example is run forward and backward once, and memory grows with nothing but the results. The model runs in
    eval mode and is left as found, also when interrupted.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer, with a chat template and a pad token.
        examples: N rows with a column ``messages``; :func:`geomkit.load_examples` makes them.
        measures: What to measure, each under a name of your choice: those of :mod:`geomkit.collection.measures`, or
            any callable
            that takes a parameter's name and the gradients of B examples and returns a tensor with B rows. Where
            batches return rows of different length, these are filled up with zeros on the right.
        layers: Glob pattern on parameter names such as ``"*.mlp.*"``, numbers of decoder layers such as ``[10, 20]``, a
            list of either, or :func:`geomkit.select`.
        tokens_per_batch: Most token positions run at a time, padding included; the knob for memory.
        progress: Show a bar, in tokens.

    Returns:
        The values, on the CPU, with each example's loss.

    Raises:
        DataError: If the examples cannot be encoded.
        GeometryError: If there is no measure, one cannot be called, or returns something else than a row per gradient.
        CollectionError: If no trainable parameter matches, weights are sharded or on meta, or a loss or gradient is
            not finite.

    Example:
        >>> import geomkit as gk
        >>> from geomkit.collection.measures import norms
        >>> from geomkit.collection.measures import singular_values
        >>> from geomkit.collection.measures import sketch
        >>> model, tokenizer = gk.load_organism()
        >>> found = measure_samples(
        ...     model,
        ...     tokenizer,
        ...     gk.load_examples("safety").select(range(3)),
        ...     {"norm": norms, "spectrum": singular_values(4), "sketch": sketch(8)},
        ...     layers="lm_head*",
        ...     progress=False,
        ... )
        >>> {measure: tuple(values["lm_head.weight"].shape) for measure, values in found.values.items()}
        {'norm': (3,), 'spectrum': (3, 4), 'sketch': (3, 8, 8)}
    """
    _refuse_bad(measures)
    rows = as_encoded(tokenizer, examples)
    found = measures_from_tokens(
        model,
        rows,
        pad_id(tokenizer),
        measures,
        layers=layers,
        tokens_per_batch=tokens_per_batch,
        progress=progress,
    )
    return replace(found, provenance=provenance_of(model, rows, reduction="example", layers=str(as_selection(layers))))


def measures_from_tokens(
    model: nn.Module,
    rows: Sequence[Tokens],
    pad: int,
    measures: Mapping[str, Measure],
    *,
    layers: Layers = "*",
    tokens_per_batch: int = TOKENS_PER_BATCH,
    progress: bool = False,
) -> SampleMeasures:
    """Measure examples that are already tokens; see :func:`measure_samples`."""
    _refuse_bad(measures)
    tables = {measure: defaultdict[str, _Table](partial(_Table, len(rows))) for measure in measures}

    def reduce(name: str, examples: Sequence[int], gradients: Sequence[LayerGradient]) -> None:
        for measure, function in measures.items():
            tables[measure][name].put(examples, _measured(measure, function, name, gradients))

    streamed = stream(
        model,
        rows,
        pad,
        as_selection(layers),
        tokens_per_batch=tokens_per_batch,
        progress=progress,
        samples=reduce,
    )
    seen = next(iter(tables.values()))
    parameters = {name: weight for name, weight in streamed.target.parameters.items() if name in seen}
    for measure, function in measures.items():
        for name, weight in parameters.items():
            # An example that has no part in a parameter, such as an expert it was not sent to, has gradient zero.
            if absent := tables[measure][name].absent():
                (value,) = _measured(measure, function, name, [zero_gradient(weight.shape, weight.device)])
                tables[measure][name].put(absent, value.expand(len(absent), *value.shape))
    return SampleMeasures(
        {measure: {name: table[name].values() for name in parameters} for measure, table in tables.items()},
        tuple(streamed.losses),
        tuple(streamed.loss_tokens),
        coverage_of(streamed.target, parameters),
    )


def _refuse_bad(measures: Mapping[str, Measure]) -> None:
    if not isinstance(measures, Mapping):
        raise GeometryError(f'expected measures by name, found {measures!r}; give e.g. {{"norm": norms}}')
    if not measures:
        raise GeometryError(
            'expected at least one measure, found none; give e.g. {"norm": geomkit.collection.measures.norms}'
        )
    for name, measure in measures.items():
        if not callable(measure):
            raise GeometryError(
                f"expected a callable for measure {name!r}, found {measure!r}; give norms, singular_values(), "
                "sketch() or inner_products() of geomkit.collection.measures, or your own"
            )


def _measured(measure: str, function: Measure, parameter: str, gradients: Sequence[LayerGradient]) -> Tensor:
    with torch.no_grad(), no_autocast(gradients[0].device):
        values = function(parameter, gradients)
    if not isinstance(values, Tensor) or values.shape[:1] != (len(gradients),):
        found = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise GeometryError(
            f"expected measure {measure!r} to return a tensor with a row for each of {len(gradients)} gradients, "
            f"found {found} for {parameter}; return (B, …)"
        )
    return values


class _Table:
    """The values of one measure and parameter, a row per example, filled batch by batch."""

    def __init__(self, examples: int) -> None:
        self._seen = torch.zeros(examples, dtype=torch.bool)
        self._values: Tensor | None = None

    def put(self, examples: Sequence[int], values: Tensor) -> None:
        """Write some examples' rows; a table that is too narrow becomes wider."""
        if self._values is None:
            self._values = torch.zeros(len(self._seen), *values.shape[1:], dtype=values.dtype)
        if values.ndim != self._values.ndim:
            raise GeometryError(
                f"expected as many dimensions of every batch, found {values.ndim} after {self._values.ndim}; return "
                "rows of one shape, or of one number of dimensions"
            )
        wider = [max(sizes) for sizes in zip(values.shape[1:], self._values.shape[1:], strict=True)]
        if wider != list(self._values.shape[1:]):
            narrow, self._values = self._values, self._values.new_zeros(len(self._seen), *wider)
            self._values[tuple(map(slice, narrow.shape))] = narrow
        part = self._values[(slice(None), *(slice(size) for size in values.shape[1:]))]
        part[torch.tensor(examples)] = values.to(self._values)
        self._seen[examples] = True

    def absent(self) -> list[int]:
        """Return the examples without a row."""
        found: list[int] = torch.nonzero(~self._seen).flatten().tolist()
        return found

    def values(self) -> Tensor:
        """Return the rows."""
        assert self._values is not None  # noqa: S101 - a table is made when a row is put
        return self._values
