"""Speed of a device on a model, from a few short runs; with it costs become seconds."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch import nn

from geomkit.collection.collect import collect_from_tokens
from geomkit.collection.describe.simulation import simulate
from geomkit.inputs.model_state import model_state_kept
from geomkit.inputs.tokens import Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Clock = Callable[[], float]

_LENGTHS = (16, 96)
"""Tokens of the examples that are run, two at a time."""

_EXAMPLES = 2
_LEAST = 0.3
"""Seconds that are measured of everything at least."""

_PRODUCT = (256, 1024, 1024)
"""Tokens, rows and columns of the product of two thin factors that is timed."""

_ENTRIES = 2**24
"""Entries of the tensor that AdamW updates."""


@dataclass(frozen=True)
class PassSpeed:
    """Speed of forward and backward passes: seconds = overhead + operations / rate.

    Attributes:
        rate: Floating-point operations a second.
        overhead: Seconds of a pass that do not grow with its tokens, such as reading the weights.
    """

    rate: float
    overhead: float

    def seconds(self, operations: float, passes: float = 1) -> float:
        """Return the seconds of passes with so many operations in all."""
        return passes * self.overhead + operations / self.rate


@dataclass(frozen=True)
class Speed:
    """Speed of a device on a model.

    Attributes:
        training: Passes in which autograd computes the gradients of the trainable weights.
        collecting: Passes of a collection, in which it computes those of the activations only.
        products: Floating-point operations a second of products of fp32 factors.
        updates: Weights a second that a step of AdamW with clipping updates.
    """

    training: PassSpeed
    collecting: PassSpeed
    products: float
    updates: float


def measure_speed(model: "PreTrainedModel", *, clock: Clock = time.perf_counter) -> Speed:
    """Return the speed of the model's device, from passes over a few tokens.

    It takes some seconds, and on a CPU about as long as a forward and backward pass over 500 tokens.

    Args:
        model: A causal language model of transformers; its state is restored.
        clock: What tells the time.

    Example:
        >>> import geomkit as gk
        >>> model, _ = gk.load_organism()
        >>> speed = measure_speed(model)
        >>> speed.training.rate > 1e8 and speed.updates > 1e6
        True
    """
    parameter = next(model.parameters())
    device = parameter.device
    with model_state_kept(model), torch.inference_mode(False), torch.enable_grad():
        training, collecting = (_pass_speed(model, collects, clock) for collects in (False, True))
    tokens, rows, columns = _PRODUCT
    left, right = torch.randn(tokens, rows, device=device), torch.randn(tokens, columns, device=device)
    seconds = _seconds(lambda: left.T @ right, device, clock)
    weight = nn.Parameter(torch.zeros(_ENTRIES, dtype=parameter.dtype, device=device))
    weight.grad = torch.ones_like(weight)
    optimizer = torch.optim.AdamW([weight])

    def update() -> None:
        torch.nn.utils.clip_grad_norm_([weight], 1.0)
        optimizer.step()

    return Speed(
        training,
        collecting,
        products=2 * tokens * rows * columns / seconds,
        updates=_ENTRIES / _seconds(update, device, clock),
    )


def _pass_speed(model: "PreTrainedModel", collects: bool, clock: Clock) -> PassSpeed:
    """Return rate and overhead of the line through two points: operations and seconds of a short and a longer pass."""
    points: list[tuple[int, float]] = []
    for length in _LENGTHS:
        cost = simulate(model, _EXAMPLES, length, weight_gradients=not collects)
        ids = [place % len(model.get_input_embeddings().weight) for place in range(length)]
        run = partial(_collect if collects else _train, model, ids)
        if not points:
            run()  # the first run of anything is slower
        points.append((cost.operations, _seconds(run, model.device, clock)))
    (few, short), (many, long) = points
    rate = (many - few) / max(long - short, 1e-9)
    return PassSpeed(rate, max(short - few / rate, 0.0))


def _train(model: "PreTrainedModel", ids: list[int]) -> None:
    batch = torch.tensor([ids] * _EXAMPLES, device=model.device)
    loss = model(input_ids=batch, labels=batch, use_cache=False).loss
    torch.autograd.grad(loss, [weight for weight in model.parameters() if weight.requires_grad], allow_unused=True)


def _collect(model: "PreTrainedModel", ids: list[int]) -> None:
    rows = [Tokens(tuple(ids), (True,) * len(ids))] * _EXAMPLES
    collect_from_tokens(model, rows, 0, form="factored", tokens_per_batch=_EXAMPLES * (len(ids) + 1))


def _seconds(run: Callable[[], object], device: torch.device, clock: Clock) -> float:
    """Return the median time of runs that take :data:`_LEAST` seconds together, or of one run that takes longer."""
    found: list[float] = []
    while sum(found) < _LEAST:
        _wait(device)
        start = clock()
        run()
        _wait(device)
        found.append(max(clock() - start, 1e-9))
    return median(found)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
