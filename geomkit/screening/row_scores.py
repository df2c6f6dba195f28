"""The inner product of each row's gradient with the safety gradient, and its norms, in one pass over the rows."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import nn

from geomkit.collection.streaming import StreamResult, stream
from geomkit.gradients.batch_products import products_and_norms
from geomkit.gradients.layer_gradient import LayerGradient
from geomkit.inputs.batches import longest_first
from geomkit.inputs.parameters import Layers, as_selection
from geomkit.inputs.tokens import Tokens, lengths_of
from geomkit.screening.parts import Columns, Parts
from geomkit.screening.reference import SafetyReference
from geomkit.utils.precision import no_autocast
from geomkit.utils.saving import saveable
from geomkit.utils.workers import ALONE, Workers, first_process

BATCHES_PER_PART = 16
"""Number of full batches of each process whose rows are one part: the most work that an interruption costs."""


@saveable
@dataclass(frozen=True, eq=False)
class RowScores:
    """What N rows would do to the loss on refusals, to first order; a positive score raises it.

    Attributes:
        raw: (N,) −⟨g, ḡ_s⟩: the change of the mean safety loss per unit of learning rate, for a step of gradient
            descent on the row alone. With obeyed requests, ḡ_s is less the mean gradient of their answers, and the
            change is that of log p(obeying) − log p(refusing).
        cosine: (N,) the same per unit of length of both gradients: minus their cosine.
        adam: (N,) minus the cosine of g and of the safety gradient divided by the root of Adam's second moment; NaN if
            not asked for.
        share: (N,) share of the squared norm of the row's matrix gradients in the safety subspace.
        norm: (N,) ‖g‖.
        loss: (N,) loss of each row, in nats per token.
        loss_tokens: (N,) number of scored tokens.
        tokens: (N,) number of all tokens.
    """

    raw: np.ndarray
    cosine: np.ndarray
    adam: np.ndarray
    share: np.ndarray
    norm: np.ndarray
    loss: np.ndarray
    loss_tokens: np.ndarray
    tokens: np.ndarray

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.raw)


MEASURES = tuple(field.name for field in fields(RowScores))
"""Names of the scores of a row."""


def score_rows(
    model: nn.Module,
    rows: Sequence[Tokens],
    pad: int,
    reference: SafetyReference,
    *,
    layers: Layers = "*",
    tokens_per_batch: int,
    title: str,
    progress: bool = False,
    parts: Parts | None = None,
    workers: Workers = ALONE,
) -> RowScores:
    """Return the scores of rows, each of which is run forward and backward once.

    A row's gradient is never formed: with the two thin factors of a linear layer, D (T × d_out) and X (T × d_in), the
    inner product is the sum of (D ḡ_s) ∘ X over tokens, one more product of the forward pass. Memory does not grow with
    the rows but for their eight numbers each.

    Args:
        model: A causal language model.
        rows: N rows.
        pad: Id of the token that fills short rows.
        reference: The safety gradient.
        layers: The choice of parameters, that of the reference.
        tokens_per_batch: Largest number of token positions in a batch.
        title: Title of the bar.
        progress: Show a bar, in tokens.
        parts: Where finished rows are kept.
        workers: The workers that divide the rows.

    Raises:
        DataError, CollectionError: See :func:`geomkit.collect_gradients`.
    """

    def score(chunk: Sequence[int]) -> Columns:
        return _chunk_scores(model, [rows[row] for row in chunk], pad, reference, layers, tokens_per_batch, workers)

    columns = in_parts(
        score, lengths_of(rows), MEASURES, parts or Parts(None, "", workers),
        most=BATCHES_PER_PART * tokens_per_batch * workers.count, title=title, progress=progress,
    )  # fmt: skip
    return RowScores(**columns)


def in_parts(
    score: Callable[[Sequence[int]], Columns],
    lengths: Sequence[int],
    measures: Sequence[str],
    parts: Parts,
    *,
    most: int,
    title: str,
    progress: bool = False,
) -> dict[str, np.ndarray]:
    """Return the values of N rows by measure, computed part by part, the longest rows first.

    Args:
        score: Function that takes the numbers of some rows, and returns their values by measure.
        lengths: (N,) number of tokens of each row.
        measures: The measures.
        parts: Where finished rows are kept; rows that are finished there are not computed.
        most: Largest number of tokens of a part, unless a single row has more.
        title: Title of the bar.
        progress: Show a bar, in tokens.

    Returns:
        For each measure, (N,) values.

    Raises:
        DataError: If a file of finished rows is damaged.
    """
    from tqdm.auto import tqdm

    values: dict[int, tuple[float, ...]] = parts.finished(len(lengths), measures)
    with tqdm(
        total=sum(lengths), desc=title, unit="token", unit_scale=True, initial=sum(lengths[row] for row in values),
        disable=not (progress and first_process()),
    ) as bar:  # fmt: skip
        left = [row for row in longest_first(lengths) if row not in values]
        for chunk in _chunks(left, lengths, most):
            columns = score(chunk)
            parts.add(chunk, columns)
            values |= zip(chunk, zip(*(columns[name].tolist() for name in measures), strict=True), strict=True)
            bar.update(sum(lengths[row] for row in chunk))
    by_measure = np.array([values[row] for row in range(len(lengths))]).T
    return dict(zip(measures, by_measure, strict=True))


def _chunks(rows: Sequence[int], lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Yield rows in order, in groups of at most ``most`` tokens."""
    chunk: list[int] = []
    tokens = 0
    for row in rows:
        if chunk and tokens + lengths[row] > most:
            yield chunk
            chunk, tokens = [], 0
        chunk.append(row)
        tokens += lengths[row]
    if chunk:
        yield chunk


def _chunk_scores(
    model: nn.Module,
    rows: Sequence[Tokens],
    pad: int,
    reference: SafetyReference,
    layers: Layers,
    tokens_per_batch: int,
    workers: Workers,
) -> dict[str, np.ndarray]:
    """Return the values of every measure, in the order of the rows."""
    sums = RowSums(len(rows), reference)
    result = stream(
        model, rows, pad, as_selection(layers), tokens_per_batch=tokens_per_batch, samples=sums.add, workers=workers
    )
    return sums.columns(result, lengths_of(rows), workers)


class RowSums:
    """Sums over parameters, for each row: two inner products, and squared norms: all, of matrices, in the subspace.

    Args:
        rows: Number of rows.
        reference: The safety gradient.
    """

    def __init__(self, rows: int, reference: SafetyReference) -> None:
        """Begin with zeros."""
        self._table = torch.zeros(5, rows, dtype=torch.float64)
        self._reference = reference

    def add(self, name: str, examples: Sequence[int], gradients: Sequence[LayerGradient]) -> None:
        """Add a parameter to the sums of a batch's rows; see :data:`geomkit.collection.streaming.ExampleSink`."""
        reference = self._reference
        with torch.no_grad(), no_autocast(gradients[0].device):
            basis = reference.bases.get(name)
            # A parameter without a safety gradient has a part in the norm only.
            matrices = [
                forms[name] for forms in (reference.matrices, reference.preconditioned) if forms and name in forms
            ]
            products, squares, inside = products_and_norms(gradients, matrices, basis)
            zeros = torch.zeros_like(squares)
            terms = [*products, *[zeros] * (2 - len(products)), squares, zeros if basis is None else squares, inside]
            if self._table.device != squares.device:
                self._table = self._table.to(squares.device)
            self._table[:, list(examples)] += torch.stack(terms)

    def columns(self, result: StreamResult, lengths: Sequence[int], workers: Workers = ALONE) -> dict[str, np.ndarray]:
        """Return the values of every measure, in the order of the rows.

        Args:
            result: The result of the pass in which :meth:`add` was called.
            lengths: Number of tokens of each row.
            workers: The workers that divided the rows.
        """
        reference = self._reference
        table = torch.stack(workers.gather(self._table.cpu())).sum(0)
        product, preconditioned, squares, matrix_squares, inside = table.numpy()
        norm = np.sqrt(squares)
        with np.errstate(invalid="ignore", divide="ignore"):
            cosine = np.where(norm > 0, -product / (norm * reference.norm), 0.0)
            adam = np.where(norm > 0, -preconditioned / (norm * reference.preconditioned_norm), 0.0)
            share = np.where(matrix_squares > 0, inside / matrix_squares, 0.0)
        return {
            "raw": -product,
            "cosine": cosine,
            "adam": adam if reference.preconditioned else np.full(len(lengths), np.nan),
            "share": share,
            "norm": norm,
            "loss": np.array(result.losses),
            "loss_tokens": np.array(result.loss_tokens, dtype=np.float64),
            "tokens": np.array(lengths, dtype=np.float64),
        }
