"""Measures of the gradient of every example's loss, in one pass that stores no gradient."""

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
from geomkit.inputs.fits import encoded_for
from geomkit.inputs.parameters import Layers, as_selection, kind_of, layer_index, workers_of
from geomkit.inputs.tokens import EncodedExamples, Tokens
from geomkit.utils.display import Result, html_table
from geomkit.utils.precision import no_autocast
from geomkit.utils.workers import ALONE, Workers

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SHOWN = 12
"""Number of rows of the data frame in a notebook."""


@dataclass(frozen=True, eq=False)
class SampleMeasures(Result):
    """Values of measures for the gradient of each example's loss.

    Attributes:
        values: By measure, then by parameter in the order of the model: (N, …), a row per example.
        losses: (N,) loss of each example, in nats per token.
        loss_tokens: (N,) number of scored tokens of each example.
        coverage: The parameters with and without a gradient.
        provenance: Model, data and settings.
    """

    values: Mapping[str, Mapping[str, Tensor]] = field(repr=False)
    losses: tuple[float, ...] = field(repr=False)
    loss_tokens: tuple[int, ...] = field(repr=False)
    coverage: Coverage = field(repr=False)
    provenance: Provenance | None = field(default=None, repr=False)

    def __getitem__(self, measure: str) -> Mapping[str, Tensor]:
        """Return the values of a measure, by parameter.

        Raises:
            GeometryError: If the measure is unknown.
        """
        if measure not in self.values:
            raise GeometryError(f"expected one of {', '.join(self.values)}, found {measure!r}; choose one of these")
        return self.values[measure]

    def side_by_side(self, measure: str) -> Tensor:
        """Return the values of all parameters side by side, (N, K), a row per example.

        For sketches, inner products of these rows estimate the inner products of the gradients over all parameters.

        Raises:
            GeometryError: If the measure is unknown.
        """
        return torch.cat([values.flatten(1) for values in _as_columns(self[measure])], dim=1)

    def to_frame(self, measure: str | None = None) -> "pd.DataFrame":
        """Return a data frame with a row per value, sorted by measure, parameter, example and index.

        The columns are ``example``, ``parameter``, ``kind``, ``layer``, ``measure``, ``index`` and ``value``; the index
        numbers the values of an example, row by row for a matrix.

        Args:
            measure: Name of a measure; all measures when left out.

        Raises:
            GeometryError: If the measure is unknown.
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
        """Return the names of the measures, the sizes and the coverage as text."""
        return (
            f"{', '.join(self.values)} of {len(self.losses)} examples ({sum(self.loss_tokens)} loss tokens), "
            f"{self.coverage}"
        )

    def _repr_html_(self) -> str:
        first = next(self._frames(self.values)).head(_SHOWN)  # not to_frame(), which may have millions of rows
        return html_table(str(self), first)


def _as_columns(values: Mapping[str, Tensor]) -> Iterator[Tensor]:
    return (table if table.ndim > 1 else table[:, None] for table in values.values())


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
    """Return measures of the gradient of each example's loss, without storing the gradients.

    Every example is run forward and backward once. Memory grows only with the values of the measures. Processes divide
    the examples as in :func:`geomkit.collect_gradients`.

    Args:
        model: See :func:`geomkit.collect_gradients`, also for ``layers``, ``tokens_per_batch`` and ``progress``.
        tokenizer: Tokenizer of the model.
        examples: N examples.
        measures: Measures by name: ``norms``, ``singular_values()``, ``sketch()`` or ``inner_products()`` of
            :mod:`geomkit.collection.measures`, or a function that takes the name of a parameter and the gradients of B
            examples and returns a tensor with B rows. If rows of different batches differ in length, they are filled
            with zeros on the right.
        layers: The choice of parameters.
        tokens_per_batch: Largest number of token positions in a batch.
        progress: Show a progress bar.

    Returns:
        The values of the measures, on the CPU, with the loss of each example.

    Raises:
        DataError: If the examples cannot be encoded.
        GeometryError: If there is no measure, a measure is not callable, or it does not return a row per gradient.
        CollectionError: See :func:`geomkit.collect_gradients`.

    Example:
        >>> import geomkit as gk
        >>> from geomkit.collection.measures import norms, singular_values, sketch
        >>> model, tokenizer = gk.load_organism()
        >>> measures = measure_samples(
        ...     model,
        ...     tokenizer,
        ...     gk.load_examples("safety").select(range(3)),
        ...     {"norm": norms, "spectrum": singular_values(4), "sketch": sketch(8)},
        ...     layers="lm_head*",
        ...     progress=False,
        ... )
        >>> {measure: tuple(values["lm_head.weight"].shape) for measure, values in measures.values.items()}
        {'norm': (3,), 'spectrum': (3, 4), 'sketch': (3, 8, 8)}
    """
    _refuse_bad(measures)
    workers = workers_of(model)
    with workers.failing_together():
        rows, pad = encoded_for(model, tokenizer, examples, progress)
    values = measures_from_tokens(
        model,
        rows,
        pad,
        measures,
        layers=layers,
        tokens_per_batch=tokens_per_batch,
        progress=progress,
        workers=workers,
    )
    return replace(values, provenance=provenance_of(model, rows, reduction="example", layers=str(as_selection(layers))))


def measures_from_tokens(
    model: nn.Module,
    rows: Sequence[Tokens],
    pad: int,
    measures: Mapping[str, Measure],
    *,
    layers: Layers = "*",
    tokens_per_batch: int = TOKENS_PER_BATCH,
    progress: bool = False,
    workers: Workers = ALONE,
) -> SampleMeasures:
    """Return measures of examples that are already tokens, which ``workers`` divide; see :func:`measure_samples`."""
    _refuse_bad(measures)
    workers.refuse_differences(measures=list(measures))
    tables = {measure: defaultdict[str, _Table](partial(_Table, len(rows))) for measure in measures}

    def store_values(name: str, examples: Sequence[int], gradients: Sequence[LayerGradient]) -> None:
        for measure, function in measures.items():
            tables[measure][name].put(examples, _values(measure, function, name, gradients))

    result = stream(
        model,
        rows,
        pad,
        as_selection(layers),
        tokens_per_batch=tokens_per_batch,
        progress=progress,
        samples=store_values,
        workers=workers,
    )
    for rank, received in enumerate(workers.gather(_rows_of(tables) if workers.count > 1 else {})):
        for (measure, name), table_rows in received.items() if rank != workers.rank else ():
            tables[measure][name].put(*table_rows)
    with_gradient = next(iter(tables.values()))  # all measures have the same parameters
    parameters = {name: parameter for name, parameter in result.target.parameters.items() if name in with_gradient}
    for measure, function in measures.items():
        for name, parameter in parameters.items():
            # Examples may not use a parameter, e.g. of an expert that gets no token: their gradient is zero.
            if absent := tables[measure][name].absent():
                zero = zero_gradient(parameter.shape, parameter.device)
                (value,) = _values(measure, function, name, [zero])
                tables[measure][name].put(absent, value.expand(len(absent), *value.shape))
    return SampleMeasures(
        {measure: {name: table[name].values() for name in parameters} for measure, table in tables.items()},
        tuple(result.losses),
        tuple(result.loss_tokens),
        coverage_of(result.target, parameters),
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


def _values(measure: str, function: Measure, parameter: str, gradients: Sequence[LayerGradient]) -> Tensor:
    """Return the values of a measure, after checking that there is a row per gradient."""
    with torch.no_grad(), no_autocast(gradients[0].device):
        values = function(parameter, gradients)
    if not isinstance(values, Tensor) or values.shape[:1] != (len(gradients),):
        finding = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise GeometryError(
            f"expected measure {measure!r} to return a tensor with a row for each of {len(gradients)} gradients, "
            f"found {finding} for {parameter}; return (B, …)"
        )
    return values


def _rows_of(tables: "Mapping[str, Mapping[str, _Table]]") -> dict[tuple[str, str], tuple[list[int], Tensor]]:
    """Return the rows of all tables, by measure and parameter."""
    return {(measure, name): table.rows() for measure in tables for name, table in tables[measure].items()}


class _Table:
    """Values of a measure for one parameter, a row per example, written batch by batch."""

    def __init__(self, examples: int) -> None:
        self._seen = torch.zeros(examples, dtype=torch.bool)
        self._values: Tensor | None = None

    def put(self, examples: Sequence[int], values: Tensor) -> None:
        """Write the rows of these examples, and widen the table if the new rows are longer than its rows."""
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

    def rows(self) -> tuple[list[int], Tensor]:
        """Return the examples with a row, and their rows."""
        examples: list[int] = torch.nonzero(self._seen).flatten().tolist()
        return examples, self.values()[self._seen]

    def absent(self) -> list[int]:
        """Return the examples without a row."""
        examples: list[int] = torch.nonzero(~self._seen).flatten().tolist()
        return examples

    def values(self) -> Tensor:
        """Return the values of all examples."""
        assert self._values is not None  # noqa: S101 - a table exists because a row was put
        return self._values
