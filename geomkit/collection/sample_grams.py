"""Inner products between the gradients of all examples, in memory that does not grow with their number."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from geomkit.collection.exchange import exchange_samples
from geomkit.collection.memory import Counts, aliases_by_parameter, most_sample_bytes
from geomkit.collection.streaming import TOKENS_PER_BATCH, ExampleSink, stream
from geomkit.errors import GeometryError
from geomkit.gradients.arithmetic import gram
from geomkit.gradients.layer_gradient import LayerGradient
from geomkit.inputs.fits import encoded_for
from geomkit.inputs.parameters import (
    Layers,
    Selection,
    as_selection,
    chosen_parameters,
    unwrapped_model,
    workers_of,
)
from geomkit.inputs.tokens import EncodedExamples, Tokens
from geomkit.utils.precision import no_autocast
from geomkit.utils.progress import with_bar
from geomkit.utils.workers import ALONE, Workers

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MEMORY = 4 * 2**30
"""Default number of bytes for the gradients of a block."""


def sample_grams(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    a: "Dataset | EncodedExamples",
    b: "Dataset | EncodedExamples | None" = None,
    *,
    layers: Layers = "*",
    memory: float = MEMORY,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Return the exact inner products between the gradients of the losses of all examples.

    The examples are divided into blocks whose gradients fit into ``memory``. The gradients of a block stay in memory
    while the other examples run. If all examples are one block, every example is run once; with K blocks of one set, an
    example is run (K + 1)/2 times on average. For estimates in one pass over any number of examples, see
    :func:`geomkit.collection.measures.sketch`. Processes divide the examples as in
    :func:`geomkit.collect_gradients`, and each of them holds the gradients of a block.

    Args:
        model: See :func:`geomkit.collect_gradients`, also for ``layers`` and ``tokens_per_batch``.
        tokenizer: Tokenizer of the model.
        a: N examples.
        b: M other examples; the examples of ``a`` when left out.
        layers: The choice of parameters.
        memory: Largest number of bytes of a block's gradients, in addition to the memory of a batch and 8·N·M bytes of
            the result for each parameter. A block has at least one example, however long.
        tokens_per_batch: Largest number of token positions in a batch.
        progress: Show a progress bar for each pass, in tokens.

    Returns:
        (N, M) inner products by parameter, in the order of the model, fp64 on the CPU; equal to the result of
        :func:`geomkit.gradients.gradient_set.layer_grams` for sets that were collected per sample.

    Raises:
        DataError: If the examples cannot be encoded.
        GeometryError: If ``memory`` is not positive.
        CollectionError: See :func:`geomkit.collect_gradients`.

    Example:
        >>> import geomkit as gk
        >>> model, tokenizer = gk.load_organism()
        >>> safety = gk.load_examples("safety").select(range(3))
        >>> grams = sample_grams(model, tokenizer, safety, layers="lm_head*", progress=False)
        >>> grams["lm_head.weight"].shape
        torch.Size([3, 3])
    """
    workers = workers_of(model)
    with workers.failing_together():
        rows, pad = encoded_for(model, tokenizer, a, progress)
        others = None if b is None else encoded_for(model, tokenizer, b, progress)[0]
    return grams_from_tokens(
        model,
        rows,
        others,
        pad,
        layers=layers,
        memory=memory,
        tokens_per_batch=tokens_per_batch,
        progress=progress,
        workers=workers,
    )


def grams_from_tokens(
    model: nn.Module,
    a: Sequence[Tokens],
    b: Sequence[Tokens] | None,
    pad: int,
    *,
    layers: Layers = "*",
    memory: float = MEMORY,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    progress: bool = False,
    workers: Workers = ALONE,
) -> dict[str, Tensor]:
    """Return the inner products of examples that are already tokens, with ``workers`` to divide them.

    See :func:`sample_grams`.
    """
    workers.refuse_differences(memory=memory, sets=1 if b is None else 2)
    if memory <= 0:
        raise GeometryError(f"expected bytes to hold gradients in, found memory={memory}; give e.g. 4e9")
    passes = _Passes(model, pad, as_selection(layers), tokens_per_batch, progress, workers)
    # 1. Blocks of examples whose gradients fit into memory, from upper bounds of their sizes.
    a_blocks = blocks_of(_sizes(model, passes.selection, a), memory)
    # 2. One set: every pair of blocks once.
    if b is None:
        return _grams_within(passes, a, a_blocks)
    # 3. Two sets: the set in blocks is run once, the other set once for each block. Take the cheaper choice.
    b_blocks = blocks_of(_sizes(model, passes.selection, b), memory)
    if _tokens(a) + len(a_blocks) * _tokens(b) <= _tokens(b) + len(b_blocks) * _tokens(a):
        return _grams_between(passes, a, b, a_blocks)
    return {name: table.T.contiguous() for name, table in _grams_between(passes, b, a, b_blocks).items()}


def blocks_of(sizes: Sequence[int], memory: float) -> list[list[int]]:
    """Return blocks of examples that fit into memory, the largest examples first; a larger example is a block alone.

    Example:
        >>> blocks_of([3, 9, 4, 5], memory=9)
        [[1], [3, 2], [0]]
    """
    blocks: list[list[int]] = []
    free = 0.0
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        if not blocks or sizes[index] > free:
            blocks.append([])
            free = memory
        blocks[-1].append(index)
        free -= sizes[index]
    return blocks


def _sizes(model: nn.Module, selection: Selection, rows: Sequence[Tokens]) -> list[int]:
    """Return an upper bound of the bytes of each example's gradient."""
    inner = unwrapped_model(model)
    parameters, aliases = dict(inner.named_parameters()), aliases_by_parameter(inner)
    collected = [(parameters[name], aliases[name]) for name in set(chosen_parameters(inner, selection).values())]
    return [
        sum(most_sample_bytes(parameter, names, counts) or 0 for parameter, names in collected)
        for counts in (Counts.of([row]) for row in rows)
    ]


def _tokens(rows: Sequence[Tokens]) -> int:
    return sum(map(len, rows))


@dataclass(frozen=True)
class _Passes:
    """Model and settings of all passes.

    Attributes:
        model: The model.
        pad: Id of the token that fills short rows.
        selection: The choice of parameters.
        tokens_per_batch: Largest number of token positions in a batch.
        progress: Whether to show progress bars.
        workers: The workers that divide the examples of every pass.
    """

    model: nn.Module
    pad: int
    selection: Selection
    tokens_per_batch: int
    progress: bool
    workers: Workers

    def run(self, rows: Sequence[Tokens], indices: Sequence[int], sink: ExampleSink) -> Mapping[str, nn.Parameter]:
        """Run this worker's part of the examples with these indices, and return the parameters.

        Args:
            rows: All examples.
            indices: The examples to run.
            sink: Receives the gradients.
        """

        def with_set_indices(name: str, examples: Sequence[int], gradients: Sequence[LayerGradient]) -> None:
            with torch.no_grad(), no_autocast(gradients[0].device):
                sink(name, [indices[example] for example in examples], gradients)

        result = stream(
            self.model,
            [rows[index] for index in indices],
            self.pad,
            self.selection,
            tokens_per_batch=self.tokens_per_batch,
            progress=self.progress,
            samples=with_set_indices,
            workers=self.workers,
        )
        return result.target.parameters


_BlockGradients = Mapping[str, Mapping[int, LayerGradient]]
"""Gradients by parameter, then by example. A missing example has gradient zero, so that its inner products are zero."""


def _block_gradients(
    passes: _Passes, rows: Sequence[Tokens], block: Sequence[int]
) -> tuple[_BlockGradients, list[str]]:
    """Return the gradients of a block's examples, and the names of all parameters."""
    by_example: dict[int, dict[str, LayerGradient]] = {index: {} for index in sorted(block)}

    def store(name: str, examples: Sequence[int], batch_gradients: Sequence[LayerGradient]) -> None:
        for example, gradient in zip(examples, batch_gradients, strict=True):
            by_example[example][name] = gradient

    parameters = passes.run(rows, block, store)
    exchange_samples(passes.workers, list(by_example.values()), parameters)
    gradients: dict[str, dict[int, LayerGradient]] = {}
    for example, by_name in by_example.items():
        for name, gradient in by_name.items():
            gradients.setdefault(name, {})[example] = gradient
    return gradients, list(parameters)


def _grams_within(passes: _Passes, rows: Sequence[Tokens], blocks: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Return the inner products within one set: of each block with itself and with all later blocks, by symmetry."""
    tables = _Tables(len(rows), len(rows), passes.workers)

    def put_symmetric(name: str, block: Sequence[int], batch: Sequence[int], products: Tensor) -> None:
        tables.put(name, block, batch, products)
        tables.put(name, batch, block, products.T)

    for nth, block in enumerate(blocks):
        in_memory, tables.names = _block_gradients(passes, rows, block)
        by_name = with_bar(in_memory.items(), "inner products", "parameter", passes.progress, total=len(in_memory))
        for name, by_example in by_name:
            examples, gradients = list(by_example), list(by_example.values())
            own = passes.workers.share([1] * len(examples))
            if part := gradients[own.start : own.stop]:
                tables.put(name, examples[own.start : own.stop], examples, gram(part, gradients))
        if later := [index for later_block in blocks[nth + 1 :] for index in later_block]:
            _put_products(passes, in_memory, rows, later, put_symmetric)
        del in_memory  # before the gradients of the next block are computed
    return tables.in_order()


def _grams_between(
    passes: _Passes, a: Sequence[Tokens], b: Sequence[Tokens], blocks: Sequence[Sequence[int]]
) -> dict[str, Tensor]:
    """Return the inner products between two sets: of each block of ``a`` with all of ``b``."""
    tables = _Tables(len(a), len(b), passes.workers)
    for block in blocks:
        in_memory, tables.names = _block_gradients(passes, a, block)
        _put_products(passes, in_memory, b, range(len(b)), tables.put)
        del in_memory  # before the gradients of the next block are computed
    return tables.in_order()


def _put_products(
    passes: _Passes,
    in_memory: _BlockGradients,
    rows: Sequence[Tokens],
    indices: Sequence[int],
    put: Callable[[str, Sequence[int], Sequence[int], Tensor], None],
) -> None:
    """Run examples, and put the inner products of their gradients with a block's gradients into a table."""

    def sink(name: str, examples: Sequence[int], gradients: Sequence[LayerGradient]) -> None:
        if by_example := in_memory.get(name):
            put(name, list(by_example), examples, gram(list(by_example.values()), gradients))

    passes.run(rows, indices, sink)


class _Tables:
    """Inner products by parameter; zero for pairs that no worker puts. Each pair is put by one worker."""

    def __init__(self, rows: int, columns: int, workers: Workers) -> None:
        self._shape = rows, columns
        self._workers = workers
        self._tables: dict[str, Tensor] = {}
        self.names: Sequence[str] = ()

    def put(self, name: str, rows: Sequence[int], columns: Sequence[int], products: Tensor) -> None:
        self._table(name)[torch.tensor(rows)[:, None], torch.tensor(columns)] = products.cpu()

    def in_order(self) -> dict[str, Tensor]:
        """Return the tables of all workers together, in the order of the model."""
        present = set().union(*self._workers.gather(set(self._tables)))
        tables = {name: self._table(name) for name in self.names if name in present}
        for table in tables.values():
            self._workers.sum_in_place(table)
        return tables

    def _table(self, name: str) -> Tensor:
        """Return the table of a parameter, which is made if there is none."""
        if name not in self._tables:
            self._tables[name] = torch.zeros(self._shape, dtype=torch.float64)
        return self._tables[name]
