"""Speed of a device on a model, from a few short runs; with it costs become seconds."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch import nn

from geomkit.collection.collect import collect_from_tokens
from geomkit.inputs.model_state import model_state_kept
from geomkit.inputs.tokens import Tokens
from geomkit.planning.simulation import simulate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Clock = Callable[[], float]

Run = tuple[float, Callable[[], object]]
"""What is timed, and how much work it does."""

_LENGTHS = (16, 96)
"""Tokens of the examples that are run, two at a time."""

_EXAMPLES = 2
_PROMPTS = (2, 32)
"""Prompts whose last tokens are run."""

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
        answering: Forward passes over the last token of some prompts, of which generation takes one for each new token.
        products: Floating-point operations a second of products of fp32 factors.
        updates: Weights a second that a step of AdamW with clipping updates.
        device: The device.
        clock: What told the time.
    """

    training: PassSpeed
    collecting: PassSpeed
    answering: PassSpeed
    products: float
    updates: float
    device: torch.device
    clock: Clock = time.perf_counter


def measure_speed(model: "PreTrainedModel", *, clock: Clock = time.perf_counter, progress: bool = False) -> Speed:
    """Return the speed of the model's device, from passes over a few tokens.

    It takes some seconds, and on a CPU about as long as a forward and backward pass over 500 tokens.

    Args:
        model: A causal language model of transformers; its state is restored.
        clock: What tells the time.
        progress: Show a bar, in runs.

    Example:
        >>> import geomkit as gk
        >>> model, _ = gk.load_organism()
        >>> speed = measure_speed(model)
        >>> speed.training.rate > 1e8 and speed.updates > 1e6
        True
    """
    from tqdm.auto import tqdm

    device = model.device
    passes = [_lengths(model, _train, True), _lengths(model, _collect, False), _answers(model)]
    others = [_product(device), _update(device, next(model.parameters()).dtype)]
    seconds: list[float] = []
    runs = [run for pair in passes for _, run in pair] + [run for _, run in others]
    with model_state_kept(model), torch.inference_mode(False), torch.enable_grad():
        for place, run in enumerate(tqdm(runs, desc="speed", unit="run", disable=not progress)):
            if place % 2 == 0 and place < 2 * len(passes):
                run()  # the first run of anything is slower
            seconds.append(median_seconds(run, device, clock))
    training, collecting, answering = (
        _line(pair, seconds[2 * place : 2 * place + 2]) for place, pair in enumerate(passes)
    )
    products, updates = (work / took for (work, _), took in zip(others, seconds[-2:], strict=True))
    return Speed(training, collecting, answering, products, updates, device, clock)


def _line(runs: Sequence[Run], seconds: Sequence[float]) -> PassSpeed:
    """Return rate and overhead of the line through two points: operations and seconds of a small and a larger pass."""
    (few, _), (many, _) = runs
    short, long = seconds
    rate = (many - few) / max(long - short, 1e-9)
    return PassSpeed(rate, max(short - few / rate, 0.0))


def _lengths(
    model: "PreTrainedModel", run: "Callable[[PreTrainedModel, list[int]], None]", weight_gradients: bool
) -> list[Run]:
    """Return a pass over short examples and one over longer ones, with their operations."""
    # Without the pad token: its embedding may be zero, and through the norms its gradient grows beyond all bounds.
    words = [word for word in range(len(model.get_input_embeddings().weight)) if word != model.config.pad_token_id]
    rows = [[words[place % len(words)] for place in range(length)] for length in _LENGTHS]
    costs = [simulate(model, _EXAMPLES, length, weight_gradients=weight_gradients) for length in _LENGTHS]
    return [(cost.operations, partial(run, model, ids)) for cost, ids in zip(costs, rows, strict=True)]


def _answers(model: "PreTrainedModel") -> list[Run]:
    """Return a forward pass over one token of few prompts and one of more, with their operations."""
    # Forward and backward through the activations are the same number of operations, two tokens twice that of one.
    by_prompt = simulate(model, 1, 2, weight_gradients=False).operations / 4
    return [(count * by_prompt, partial(_answer, model, count)) for count in _PROMPTS]


def _product(device: torch.device) -> Run:
    """Return a product of two thin factors, with its operations."""
    tokens, rows, columns = _PRODUCT
    left, right = torch.randn(tokens, rows, device=device), torch.randn(tokens, columns, device=device)
    return 2 * tokens * rows * columns, lambda: left.T @ right


def _update(device: torch.device, dtype: torch.dtype) -> Run:
    """Return a step of AdamW with clipping, with the number of its weights."""
    weight = nn.Parameter(torch.zeros(_ENTRIES, dtype=dtype, device=device))
    weight.grad = torch.ones_like(weight)
    optimizer = torch.optim.AdamW([weight])

    def update() -> None:
        torch.nn.utils.clip_grad_norm_([weight], 1.0)
        optimizer.step()

    return _ENTRIES, update


def _train(model: "PreTrainedModel", ids: list[int]) -> None:
    batch = torch.tensor([ids] * _EXAMPLES, device=model.device)
    loss = model(input_ids=batch, labels=batch, use_cache=False).loss
    torch.autograd.grad(loss, [weight for weight in model.parameters() if weight.requires_grad], allow_unused=True)


@torch.no_grad()
def _answer(model: "PreTrainedModel", prompts: int) -> None:
    model(input_ids=torch.zeros(prompts, 1, dtype=torch.long, device=model.device), use_cache=False)


def _collect(model: "PreTrainedModel", ids: list[int]) -> None:
    rows = [Tokens(tuple(ids), (True,) * len(ids))] * _EXAMPLES
    collect_from_tokens(model, rows, 0, form="factored", tokens_per_batch=_EXAMPLES * (len(ids) + 1))


def median_seconds(run: Callable[[], object], device: torch.device, clock: Clock) -> float:
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
