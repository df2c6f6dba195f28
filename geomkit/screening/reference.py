"""The safety gradient that rows are compared with: dense by parameter, preconditioned as by Adam, and its subspaces.

Where obeyed requests are given as well, the gradient of their answers is subtracted.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor, nn

from geomkit.collection.collect import collect_from_tokens
from geomkit.collection.streaming import stream
from geomkit.errors import CollectionError
from geomkit.gradients.accumulator import add
from geomkit.gradients.layer_gradient import LayerGradient, as_matrix
from geomkit.inputs.parameters import Layers, as_selection
from geomkit.inputs.tokens import Tokens
from geomkit.svd.subspaces import layer_subspace
from geomkit.utils.workers import ALONE, Workers

RANK = 10
"""Dimension of the safety subspace of each matrix: the leading left singular vectors of the mean safety gradient."""

MOMENT_ROWS = 32
"""Number of rows from which Adam's second moment is estimated."""

_BATCH_SIZE = 16
"""Rows of the batches whose gradients Adam would see."""

_FLOOR = 0.1
"""Smallest divisor of an entry, as a share of the root mean square of its parameter's divisors.

Entries that the drawn rows hardly move, such as embeddings of words that they lack, would be divided by almost nothing.
"""


@dataclass(frozen=True, eq=False)
class SafetyReference:
    """The mean safety gradient in the forms that a row's gradient is multiplied with.

    Attributes:
        gradients: The mean safety gradient, less the mean gradient of obeyed requests where there are any.
        matrices: The same, dense, by parameter: (rows, columns), see
            :attr:`~geomkit.gradients.layer_gradient.LayerGradient.matrix_shape`.
        preconditioned: The same, every entry divided by the root of Adam's second moment; ``None`` if not asked for.
        bases: (rows, k) left singular vectors of each matrix of more than one row and column.
        norm: ‖ḡ_s‖ over all parameters.
        preconditioned_norm: Norm of ``preconditioned``; NaN without it.
    """

    gradients: Mapping[str, LayerGradient]
    matrices: Mapping[str, Tensor]
    preconditioned: Mapping[str, Tensor] | None
    bases: Mapping[str, Tensor]
    norm: float
    preconditioned_norm: float


def safety_reference(
    model: nn.Module,
    safety: Sequence[Tokens],
    moment_rows: Sequence[Tokens],
    pad: int,
    *,
    obeyed: Sequence[Tokens] | None = None,
    preconditioned: bool,
    layers: Layers = "*",
    tokens_per_batch: int,
    seed: int,
    progress: bool = False,
    workers: Workers = ALONE,
) -> SafetyReference:
    """Return the safety gradient of a model.

    The memory is that of a dense copy of the weights, of two with obeyed requests, or of four if preconditioned.

    Args:
        model: A causal language model.
        safety: Refusals of forbidden requests.
        moment_rows: Rows from which Adam's second moment is estimated.
        pad: Id of the token that fills short rows.
        obeyed: Forbidden requests with answers that obey.
        preconditioned: Whether the preconditioned gradient is needed.
        layers: The choice of parameters.
        tokens_per_batch: Largest number of token positions in a batch.
        seed: Seed of the draw from ``moment_rows``.
        progress: Show progress bars.
        workers: The workers that divide the examples.

    Raises:
        DataError, CollectionError: See :func:`geomkit.collect_gradients`.
        CollectionError: If the safety gradient is zero.
    """

    def collected(rows: Sequence[Tokens]) -> dict[str, LayerGradient]:
        gradients = collect_from_tokens(
            model, rows, pad, layers=layers, tokens_per_batch=tokens_per_batch, progress=progress, workers=workers
        )
        return dict(gradients)

    gradients = collected(safety)
    if obeyed is not None:
        gradients = difference(gradients, collected(obeyed))
    matrices = {name: as_matrix(gradient) for name, gradient in gradients.items()}
    if not (norm := _norm(matrices)):
        raise CollectionError(
            "expected a safety gradient other than zero, found none; check the choice of layers and the model's weights"
        )
    bases = {
        name: layer_subspace(gradient, rank=RANK).basis
        for name, gradient in gradients.items()
        if min(gradient.matrix_shape) > 1
    }
    scaled = None
    if preconditioned:
        drawn = Random(seed).sample(range(len(moment_rows)), min(MOMENT_ROWS, len(moment_rows)))
        divisors = adam_divisors(
            model,
            [moment_rows[row] for row in drawn],
            pad,
            layers=layers,
            tokens_per_batch=tokens_per_batch,
            workers=workers,
        )
        # A parameter that no drawn row moves is not moved by Adam either.
        scaled = {
            name: matrix / divisors[name] if name in divisors else torch.zeros_like(matrix)
            for name, matrix in matrices.items()
        }
    return SafetyReference(gradients, matrices, scaled, bases, norm, _norm(scaled) if scaled else float("nan"))


def difference(gradients: dict[str, LayerGradient], subtracted: dict[str, LayerGradient]) -> dict[str, LayerGradient]:
    """Return the difference of two gradients by parameter; a parameter that one of them lacks is zero there.

    Both are emptied on the way, parameter by parameter, so that no third copy of the weights is in memory.
    """
    found = {}
    for name in [*gradients, *(name for name in subtracted if name not in gradients)]:
        parts = [gradients.pop(name)] if name in gradients else []
        if name in subtracted:
            parts.append(subtracted.pop(name).scaled(-1.0))
        found[name] = add(parts)
    return found


def adam_divisors(
    model: nn.Module,
    rows: Sequence[Tokens],
    pad: int,
    *,
    layers: Layers = "*",
    tokens_per_batch: int,
    workers: Workers = ALONE,
) -> dict[str, Tensor]:
    """Return √v of every entry: the root of the second moment with which AdamW would begin to fine-tune on such rows.

    The second moment of the mean gradient of a batch of B rows is v = μ² + σ²/B, with the mean μ and the variance σ² of
    the rows' gradients, here with B = 16. Adam's own v is its running mean, so that at the first steps it is v up to
    noise. Divisors below a tenth of their parameter's root mean square are raised to it.

    Args:
        model: A causal language model.
        rows: The rows.
        pad: Id of the token that fills short rows.
        layers: The choice of parameters.
        tokens_per_batch: Largest number of token positions in a batch.
        workers: The workers that divide the rows.

    Returns:
        By parameter, (rows, columns) divisors, for the parameters with a gradient.
    """
    sums: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}

    def add_up(name: str, _examples: Sequence[int], gradients: Sequence[LayerGradient]) -> None:
        for matrix in map(as_matrix, gradients):
            if name not in sums:
                sums[name], squares[name] = torch.zeros_like(matrix), torch.zeros_like(matrix)
            sums[name].add_(matrix)
            squares[name].addcmul_(matrix, matrix)

    found = stream(
        model, rows, pad, as_selection(layers), tokens_per_batch=tokens_per_batch, samples=add_up, workers=workers
    )
    seen = set().union(*workers.gather(set(sums)))
    divisors = {}
    for name in (name for name in found.target.parameters if name in seen):
        like = found.target.parameters[name]
        for moments in (sums, squares):
            if name not in moments:
                moments[name] = as_matrix_zeros(like)
            workers.sum_in_place(moments[name])
        mean = sums[name] / len(rows)
        variance = (squares[name] / len(rows) - mean.square()).clamp_min_(0)
        moment = mean.square() + variance / _BATCH_SIZE
        divisors[name] = moment.sqrt().clamp_min_(
            max(_FLOOR * float(moment.mean().sqrt()), torch.finfo(mean.dtype).tiny)
        )
    return divisors


def as_matrix_zeros(parameter: Tensor) -> Tensor:
    """Return zeros of the shape in which a parameter's gradient is a matrix, fp32 or fp64."""
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    rows = (parameter.numel(), 1) if parameter.ndim < 2 else (-1, parameter.shape[-1])
    return torch.zeros(parameter.shape, dtype=dtype, device=parameter.device).reshape(rows)


def _norm(matrices: Mapping[str, Tensor]) -> float:
    squares = [float(matrix.square().sum(dtype=torch.float64)) for matrix in matrices.values()]
    return math.sqrt(sum(squares))
