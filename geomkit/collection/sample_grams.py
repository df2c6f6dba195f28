"""Every inner product between the gradients of examples, in memory that does not grow with their number."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from geomkit.collection.describe.memory import Counts, aliases_by_parameter, most_sample_bytes
from geomkit.collection.streaming import TOKENS_PER_BATCH, ExampleSink, stream
from geomkit.errors import GeometryError
from geomkit.gradients.arithmetic import gram
from geomkit.gradients.layer_gradient import LayerGradient
from geomkit.inputs.parameters import Layers, Selection, as_selection, chosen_parameters, unwrapped_model
from geomkit.inputs.tokens import EncodedExamples, Tokens, as_encoded, pad_id
from geomkit.utils.precision import no_autocast

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MEMORY = 4 * 2**30
"""Bytes of gradients held at a time where nothing else is said."""


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
    """Compute every inner product between the gradients of examples' own losses, exactly.

    The gradients of as many examples as fit into ``memory`` are held while the other examples stream by, then those
    of the next, and so on. If all fit it is one pass over the examples; with K blocks of one set, an example is run
    (K + 1)/2 times on average. For estimates in one pass over any number, see
    :func:`geomkit.collection.measures.sketch`.

    Args:
        model: A causal language model, which runs in eval mode and is left as found.
        tokenizer: Its tokenizer, with a chat template and a pad token.
        a: N rows with a column ``messages``.
        b: M others; those of ``a`` when left out.
        layers: Glob pattern on parameter names such as ``"*.mlp.*"``, numbers of decoder layers such as ``[10, 20]``, a
            list of either, or :func:`geomkit.select`.
        memory: Most bytes of gradients to hold, beside what running a batch takes and the result's 8·N·M for each
            parameter. One example is always held, however long.
        tokens_per_batch: Most token positions run at a time, padding included.
        progress: Show a bar for each pass, in tokens.

    Returns:
        (N, M) inner products in fp64 on the CPU, by parameter in the model's order, as
        :func:`geomkit.gradients.gradient_set.layer_grams` gives them from sets that were collected per sample.

    Raises:
        DataError: If the examples cannot be encoded.
        GeometryError: If ``memory`` is not positive.
        CollectionError: If no trainable parameter matches, weights are sharded or on meta, or a loss or gradient is
            not finite.

    Example:
        >>> import geomkit as gk
        >>> model, tokenizer = gk.load_organism()
        >>> safety = gk.load_examples("safety").select(range(3))
        >>> grams = sample_grams(model, tokenizer, safety, layers="lm_head*", progress=False)
        >>> grams["lm_head.weight"].shape
        torch.Size([3, 3])
    """
    return grams_from_tokens(
        model,
        as_encoded(tokenizer, a),
        None if b is None else as_encoded(tokenizer, b),
        pad_id(tokenizer),
        layers=layers,
        memory=memory,
        tokens_per_batch=tokens_per_batch,
        progress=progress,
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
) -> dict[str, Tensor]:
    """Compute the inner products of examples that are already tokens; see :func:`sample_grams`."""
    if memory <= 0:
        raise GeometryError(f"expected bytes to hold gradients in, found memory={memory}; give e.g. 4e9")
    passes = _Passes(model, pad, as_selection(layers), tokens_per_batch, progress)
    held = blocks_of(_sizes(model, passes.chosen, a), memory)
    if b is None:
        return _within(passes, a, held)
    swapped = blocks_of(_sizes(model, passes.chosen, b), memory)
    # What is held is run once, what goes by once for each block.
    if _tokens(a) + len(held) * _tokens(b) <= _tokens(b) + len(swapped) * _tokens(a):
        return _between(passes, a, b, held)
    return {name: found.T.contiguous() for name, found in _between(passes, b, a, swapped).items()}


def blocks_of(sizes: Sequence[int], memory: float) -> list[list[int]]:
    """Divide examples into runs that fit into some memory, the largest first; one that does not is a run of its own.

    Example:
        >>> blocks_of([3, 9, 4, 5], memory=9)
        [[1], [3, 2], [0]]
    """
    blocks: list[list[int]] = []
    left = 0.0
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        if not blocks or sizes[index] > left:
            blocks.append([])
            left = memory
        blocks[-1].append(index)
        left -= sizes[index]
    return blocks


def _sizes(model: nn.Module, chosen: Selection, rows: Sequence[Tokens]) -> list[int]:
    """Bound the bytes of each example's gradient."""
    inner = unwrapped_model(model)
    parameters, uses = dict(inner.named_parameters()), aliases_by_parameter(inner)
    wanted = [(parameters[name], uses[name]) for name in set(chosen_parameters(inner, chosen).values())]
    return [sum(most_sample_bytes(*each, counts) or 0 for each in wanted) for counts in map(_counts, rows)]


def _counts(row: Tokens) -> Counts:
    counts = Counts()
    counts.add(row)
    return counts


def _tokens(rows: Sequence[Tokens]) -> int:
    return sum(map(len, rows))


@dataclass(frozen=True)
class _Passes:
    """How examples are run.

    Attributes:
        model: The model.
        pad: The id that fills short rows.
        chosen: Which parameters to collect.
        tokens_per_batch: Most positions in a batch.
        progress: Whether to show bars.
    """

    model: nn.Module
    pad: int
    chosen: Selection
    tokens_per_batch: int
    progress: bool

    def run(self, rows: Sequence[Tokens], places: Sequence[int], sink: ExampleSink) -> list[str]:
        """Run the examples at some places, hand their gradients on with these, and return the parameters' names."""

        def placed(name: str, examples: Sequence[int], gradients: Sequence[LayerGradient]) -> None:
            with torch.no_grad(), no_autocast(gradients[0].device):
                sink(name, [places[example] for example in examples], gradients)

        streamed = stream(
            self.model,
            [rows[place] for place in places],
            self.pad,
            self.chosen,
            tokens_per_batch=self.tokens_per_batch,
            progress=self.progress,
            samples=placed,
        )
        return list(streamed.target.parameters)


_Held = Mapping[str, Mapping[int, LayerGradient]]
"""By parameter, then by example: one that has no part in a parameter is not there, and its inner products are zero."""


def _held(passes: _Passes, rows: Sequence[Tokens], block: Sequence[int]) -> tuple[_Held, list[str]]:
    held: dict[str, dict[int, LayerGradient]] = defaultdict(dict)
    names = passes.run(rows, block, lambda name, *found: held[name].update(zip(*found, strict=True)))
    return held, names


def _within(passes: _Passes, rows: Sequence[Tokens], blocks: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Meet each block with itself and with those after it; the other half is the same by symmetry."""
    tables = _Tables(len(rows), len(rows))

    def put_twice(name: str, places: Sequence[int], others: Sequence[int], products: Tensor) -> None:
        tables.put(name, places, others, products)
        tables.put(name, others, places, products.T)

    for nth, block in enumerate(blocks):
        held, tables.names = _held(passes, rows, block)
        for name, own in held.items():
            gradients = list(own.values())
            tables.put(name, list(own), list(own), gram(gradients, gradients))
        if rest := [place for later in blocks[nth + 1 :] for place in later]:
            _meet(passes, held, rows, rest, put_twice)
        del held  # before the next block is there
    return tables.in_order()


def _between(
    passes: _Passes, a: Sequence[Tokens], b: Sequence[Tokens], blocks: Sequence[Sequence[int]]
) -> dict[str, Tensor]:
    """Meet each block of one set with the whole other set."""
    tables = _Tables(len(a), len(b))
    for block in blocks:
        held, tables.names = _held(passes, a, block)
        _meet(passes, held, b, range(len(b)), tables.put)
        del held  # before the next block is there
    return tables.in_order()


def _meet(
    passes: _Passes,
    held: _Held,
    rows: Sequence[Tokens],
    places: Sequence[int],
    put: Callable[[str, Sequence[int], Sequence[int], Tensor], None],
) -> None:
    """Let examples stream by and take the inner products of what is held with each batch of them."""

    def sink(name: str, others: Sequence[int], gradients: Sequence[LayerGradient]) -> None:
        if own := held.get(name):
            put(name, list(own), others, gram(list(own.values()), gradients))

    passes.run(rows, places, sink)


class _Tables:
    """Inner products by parameter, zero where none was put."""

    def __init__(self, rows: int, columns: int) -> None:
        self._shape = rows, columns
        self._tables: dict[str, Tensor] = {}
        self.names: Sequence[str] = ()

    def put(self, name: str, rows: Sequence[int], columns: Sequence[int], products: Tensor) -> None:
        table = self._tables.get(name)
        if table is None:
            table = self._tables[name] = torch.zeros(self._shape, dtype=torch.float64)
        table[torch.tensor(rows)[:, None], torch.tensor(columns)] = products.cpu()

    def in_order(self) -> dict[str, Tensor]:
        """Return the tables in the model's order."""
        return {name: self._tables[name] for name in self.names if name in self._tables}
