"""Published rivals of SPF, each our own implementation of its formula: what is simplified is said in each.

All of them train a copy with the recipe of :func:`geomkit.finetune`: AdamW without decay, a learning rate that falls
linearly to 0, the gradient clipped at norm 1, the mean loss of the batch's assistant tokens.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from geomkit.errors import DataError, GeomkitError
from geomkit.inputs.batches import Batch, collate
from geomkit.inputs.loss import scored, token_losses
from geomkit.inputs.tokens import Tokens, encode, pad_id
from geomkit.training.finetune import FineTuneResult, finetune
from geomkit.utils.seeding import random_state_kept

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Loss = Callable[[nn.Module, Batch], Tensor]
"""The loss of a batch, a scalar."""


# ----------------------------------------------------------------------------------------------------- the four


def lisa(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    train: "Dataset",
    safety: "Dataset",
    *,
    learning_rate: float,
    steps: int,
    batch_size: int,
    seed: int = 0,
    task_steps: int = 10,
    safety_steps: int = 5,
    rho: float = 1.0,
    progress: bool = False,
) -> FineTuneResult:
    """Fine-tune in two states by turns, each near where the other ended (Lisa, arXiv 2405.18641, algorithm 2).

    The loss of either state has the proximal term ρ/2 ‖θ − θ'‖², where θ' is the other state's last iterate. One
    optimizer serves both states. Steps of the task are counted, so that it is learnt as long as elsewhere.

    Args:
        model: The aligned model; a copy is trained.
        tokenizer: Its tokenizer.
        train: The task.
        safety: Forbidden requests with refusals.
        learning_rate: Peak learning rate.
        steps: Steps on the task.
        batch_size: Examples per step, of either.
        seed: Seed of the order.
        task_steps: Steps on the task before the state changes.
        safety_steps: Steps on safety before it changes back; 0 leaves that state out.
        rho: ρ; the paper's 1 is meant for adapters of billions of weights.
        progress: Show a bar.

    Raises:
        DataError: If a set cannot be encoded or there is no step to take.
        GeomkitError: If a loss is not finite.
    """
    pad = pad_id(tokenizer)
    sides = {
        "task": _stream(encode(tokenizer, train), pad, batch_size, Random(seed)),
        "safety": _stream(encode(tokenizer, safety), pad, batch_size, Random(seed + 1)),
    }
    if task_steps < 1 or safety_steps < 0:
        raise DataError(f"expected task_steps ≥ 1 and safety_steps ≥ 0, found {task_steps} and {safety_steps}")
    turns = _turns(steps, task_steps, safety_steps)
    anchor = _Anchor(rho)

    def batches() -> Iterator[Batch]:
        for state in turns:
            anchor.enter(state)
            yield next(sides[state])

    return _train(model, batches(), anchor.loss, learning_rate, len(turns), progress)


def constrained_sft(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    train: "Dataset",
    *,
    learning_rate: float,
    steps: int,
    batch_size: int,
    seed: int = 0,
    betas: Sequence[float] = (0.5, 2.0, 2.0, 2.0, 2.0, 0.1),
    progress: bool = False,
) -> FineTuneResult:
    """Fine-tune with a loss that saturates token by token (Qi et al., arXiv 2406.05946, equation 3).

    Of the t-th token of an answer the loss is −2/β_t log σ(β_t (log π_θ − log π_aligned)): its gradient is that of the
    cross-entropy times 2 σ(−β_t Δ_t), which is 1 at the aligned model and falls as the token becomes more likely.

    Args:
        model: The aligned model; a copy is trained.
        tokenizer: Its tokenizer.
        train: The task.
        learning_rate: Peak learning rate.
        steps: Optimizer steps.
        batch_size: Examples per step.
        seed: Seed of the order.
        betas: β of the first tokens; the last one goes for all that follow.
        progress: Show a bar.

    Raises:
        DataError: If the set cannot be encoded, there is no step to take, or a β is not positive.
        GeomkitError: If a loss is not finite.
    """
    if not betas or min(betas) <= 0:
        raise DataError(f"expected positive betas, found {tuple(betas)}")
    aligned = copy.deepcopy(model).eval()

    def loss(now: nn.Module, batch: Batch) -> Tensor:
        with torch.no_grad():
            before = -token_losses(aligned, batch)
        return saturating_loss(-token_losses(now, batch), before, scored(batch), betas)

    rows = _stream(encode(tokenizer, train), pad_id(tokenizer), batch_size, Random(seed))
    return _train(model, rows, loss, learning_rate, steps, progress)


def saturating_loss(now: Tensor, before: Tensor, counts: Tensor, betas: Sequence[float]) -> Tensor:
    """Return the mean of −2/β_t log σ(β_t (now − before)) over the tokens that count.

    Args:
        now: (B, T) log-probabilities.
        before: (B, T) those of the aligned model.
        counts: (B, T) which tokens are an answer's.
        betas: β of the first tokens of an answer; the last one goes for all that follow.
    """
    place = (counts.cumsum(1) - 1).clamp(0, len(betas) - 1)
    beta = torch.tensor(betas, dtype=now.dtype, device=now.device)[place]
    each = -2 / beta * logsigmoid(beta * (now - before))
    return each[counts].mean()


def safe_lora(
    model: "PreTrainedModel",
    base: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    train: "Dataset",
    *,
    learning_rate: float,
    steps: int,
    batch_size: int,
    seed: int = 0,
    rank: int = 8,
    threshold: float = 0.5,
    progress: bool = False,
) -> FineTuneResult:
    """Fine-tune adapters, then turn those off the alignment's direction (Safe LoRA, arXiv 2405.16833).

    With V = W_aligned − W_base and C = VVᵀ/‖V‖_F, an adapter with cos(CBA, BA) ≤ threshold is replaced by CBA. As in
    the published code, C is no projector: it is neither idempotent nor of scale 1. Every linear layer but the head gets
    an adapter.

    Args:
        model: The aligned model; a copy is trained.
        base: The model before alignment.
        tokenizer: Its tokenizer.
        train: The task.
        learning_rate: Peak learning rate of the adapters, which need a larger one than weights do.
        steps: Optimizer steps.
        batch_size: Examples per step.
        seed: Seed of the order and of the adapters.
        rank: Rank of the adapters; their scale is 2.
        threshold: The cosine.
        progress: Show a bar.

    Returns:
        The merged model.

    Raises:
        DataError: If the set cannot be encoded, or the two models' layers differ.
        GeomkitError: If ``peft`` is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise GeomkitError("Safe LoRA needs the package peft; pip install peft") from None
    before, after = dict(base.named_parameters()), dict(model.named_parameters())
    names = [
        name for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings()
    ]  # fmt: skip
    for name in names:
        found = before.get(f"{name}.weight")
        if found is None or found.shape != after[f"{name}.weight"].shape:
            raise DataError(f"{name}: expected the same layer in the base model, found another; give the right base")
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names, lora_dropout=0.0)
    with random_state_kept():
        torch.manual_seed(seed)
        adapted = get_peft_model(copy.deepcopy(model), config)
        result = finetune(
            adapted, tokenizer, train, learning_rate=learning_rate, steps=steps, batch_size=batch_size, seed=seed,
            inplace=True, progress=progress,
        )  # fmt: skip
    merged = adapted.merge_and_unload()
    with torch.no_grad():
        for name, weight in merged.named_parameters():
            if name.removesuffix(".weight") in names:
                change = weight - after[name]
                weight.copy_(after[name] + turned(change, after[name] - before[name], threshold))
    return FineTuneResult(merged.eval(), result.history, None, result.seconds)


def turned(change: Tensor, alignment: Tensor, threshold: float) -> Tensor:
    """Return CBA where cos(CBA, BA) ≤ threshold, with C = VVᵀ/‖V‖_F, else BA.

    Args:
        change: BA, (rows, columns).
        alignment: V, of the same shape.
        threshold: The cosine.
    """
    scale = torch.linalg.vector_norm(alignment)
    moved = alignment @ (alignment.T @ change) / scale if scale > 0 else torch.zeros_like(change)
    norms = torch.linalg.vector_norm(moved) * torch.linalg.vector_norm(change)
    cosine = float((moved * change).sum() / norms) if norms > 0 else 0.0
    return moved if cosine <= threshold else change


def one_shot_repair(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    train: "Dataset",
    safety: "Dataset",
    *,
    learning_rate: float,
    steps: int,
    batch_size: int,
    seed: int = 0,
    repair_steps: int = 10,
    progress: bool = False,
) -> FineTuneResult:
    """Fine-tune plainly, then repair with one refusal (arXiv 2601.01887); the sample is the first, not a chosen one.

    Args:
        model: The aligned model; a copy is trained.
        tokenizer: Its tokenizer.
        train: The task.
        safety: Forbidden requests with refusals, of which the first is used.
        learning_rate: Peak learning rate, of the repair too.
        steps: Steps on the task.
        batch_size: Examples per step.
        seed: Seed of the order.
        repair_steps: Steps on the refusal; 0 repairs nothing.
        progress: Show a bar.

    Raises:
        DataError: If a set cannot be encoded or there is no step to take.
        GeomkitError: If a loss is not finite.
    """
    recipe: dict[str, Any] = {"learning_rate": learning_rate, "seed": seed, "progress": progress}
    tuned = finetune(model, tokenizer, train, steps=steps, batch_size=batch_size, **recipe)
    if repair_steps == 0:
        return tuned
    one = safety.select([0])
    repaired = finetune(tuned.model, tokenizer, one, steps=repair_steps, batch_size=1, inplace=True, **recipe)
    return FineTuneResult(repaired.model, tuned.history, None, tuned.seconds + repaired.seconds)


# ------------------------------------------------------------------------------------------------- what they share


@dataclass(eq=False)
class _Anchor:
    """The proximal term ρ/2 ‖θ − θ'‖² to where the other state ended; none before there was another.

    Attributes:
        rho: ρ.
        state: The state that is on.
        changed: Whether it has just come on.
        start: θ'.
    """

    rho: float
    state: str = ""
    changed: bool = False
    start: Mapping[str, Tensor] | None = None

    def enter(self, state: str) -> None:
        self.changed = bool(self.state) and state != self.state
        self.state = state

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        if self.changed:
            self.start = {name: weight.detach().clone() for name, weight in model.named_parameters()}
            self.changed = False
        loss = mean_token_loss(model, batch)
        if self.start is None or self.rho == 0:
            return loss
        near = sum(((weight - self.start[name]) ** 2).sum() for name, weight in model.named_parameters())
        return loss + self.rho / 2 * near


def _turns(steps: int, task_steps: int, safety_steps: int) -> list[str]:
    turns: list[str] = []
    for start in range(0, steps, task_steps):
        turns += ["task"] * min(task_steps, steps - start) + ["safety"] * safety_steps
    return turns


def mean_token_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean cross-entropy of the batch's assistant tokens."""
    return token_losses(model, batch)[scored(batch)].mean()


def _stream(rows: Sequence[Tokens], pad: int, batch_size: int, rng: Random) -> Iterator[Batch]:
    """Yield batches without end, each pass in an order of its own."""
    while True:
        order = rng.sample(range(len(rows)), len(rows))
        for start in range(0, len(order), batch_size):
            yield collate([rows[index] for index in order[start : start + batch_size]], pad)


def _train(
    model: "PreTrainedModel", batches: Iterator[Batch], loss: Loss, learning_rate: float, steps: int, progress: bool
) -> FineTuneResult:
    """Train a copy of a model."""
    import pandas as pd
    from tqdm.auto import tqdm

    if steps < 1:
        raise DataError(f"expected at least one step, found {steps}")
    tuned = copy.deepcopy(model).train()
    device = next(tuned.parameters()).device
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    history = []
    started = time.perf_counter()
    with random_state_kept():
        for step in tqdm(range(1, steps + 1), desc="fine-tune", unit="step", disable=not progress):
            value = loss(tuned, next(batches).to(device))
            shown = value.item()
            if not math.isfinite(shown):
                raise GeomkitError(
                    f"step {step}: expected a finite training loss, found {shown}; lower the learning rate"
                )
            value.backward()  # type: ignore[no-untyped-call]
            norm = torch.nn.utils.clip_grad_norm_(tuned.parameters(), 1.0)
            rate = schedule.get_last_lr()[0]
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            history.append((step, shown, rate, norm.item()))
    frame = pd.DataFrame(history, columns=["step", "loss", "learning_rate", "grad_norm"])
    return FineTuneResult(tuned.eval(), frame, None, time.perf_counter() - started)
