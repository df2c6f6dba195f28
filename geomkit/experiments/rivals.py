"""Published rivals of SPF, implemented from their formulas; each docstring names the simplifications.

Every rival trains a copy of the organism's aligned stage with the settings of :func:`geomkit.finetune`: AdamW without
weight decay, a learning rate that falls linearly to 0, the gradient clipped at norm 1, and the mean loss of the batch's
assistant tokens.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from geomkit.errors import DataError, GeomkitError
from geomkit.experiments.organism.training import encode_conversations, shuffled_batches
from geomkit.experiments.task import POOL, Task
from geomkit.inputs.batches import Batch
from geomkit.inputs.examples import check_examples
from geomkit.inputs.loss import scored, token_losses
from geomkit.inputs.tokens import pad_id
from geomkit.training.finetune import finetune
from geomkit.training.result import FineTuneResult
from geomkit.utils.seeding import random_state_kept

if TYPE_CHECKING:
    from datasets import Dataset

BatchLoss = Callable[[nn.Module, Batch], Tensor]
"""A loss: a function of a model and a batch that returns a scalar."""


# ------------------------------------------------------------------------------------------------------------- Lisa


def lisa(
    task: Task, *, anchors: int = POOL, task_steps: int = 10, safety_steps: int = 5, rho: float = 1.0
) -> FineTuneResult:
    """Alternate between two states, fine-tuning and alignment, with a proximal term (Lisa, arXiv 2405.18641, alg. 2).

    In either state, the loss has the proximal term ρ/2 ‖θ − θ'‖², where θ' is the last iterate of the other state. One
    optimizer serves both states. ``task.steps`` counts the steps on the task only, as for every other method.

    Args:
        task: The task.
        anchors: Number of refusals in the pool of the alignment state.
        task_steps: Steps on the task before the state changes.
        safety_steps: Steps on refusals before the state changes back; 0 leaves the alignment state out.
        rho: ρ; the paper's default of 1 is meant for adapters with billions of weights.

    Raises:
        DataError: If a set cannot be encoded or there is no step to take.
        GeomkitError: If a loss is not finite.
    """
    batches = {
        "task": _task_batches(task, task.train, task.seed),
        "safety": _task_batches(task, task.organism.anchor_pool(anchors), task.seed + 1),
    }
    if task_steps < 1 or safety_steps < 0:
        raise DataError(f"expected task_steps ≥ 1 and safety_steps ≥ 0, found {task_steps} and {safety_steps}")
    states = _alternating_states(task.steps, task_steps, safety_steps)
    proximal = _ProximalLoss(rho)

    def alternating_batches() -> Iterator[Batch]:
        for state in states:
            proximal.enter(state)
            yield next(batches[state])

    return _train(task, alternating_batches(), proximal.loss, len(states))


def _alternating_states(steps: int, task_steps: int, safety_steps: int) -> list[str]:
    """Return the state of every step, ``"task"`` or ``"safety"``, with ``steps`` steps on the task in all."""
    states: list[str] = []
    for start in range(0, steps, task_steps):
        states += ["task"] * min(task_steps, steps - start) + ["safety"] * safety_steps
    return states


@dataclass(eq=False)
class _ProximalLoss:
    """The token loss plus ρ/2 ‖θ − θ'‖², where θ' is the last iterate of the other state.

    The first state has no proximal term, as there is no other state before it.

    Attributes:
        rho: ρ.
        state: The current state.
        changed: Whether the state has changed since the last loss.
        start: θ' by parameter name.
    """

    rho: float
    state: str = ""
    changed: bool = False
    start: Mapping[str, Tensor] | None = None

    def enter(self, state: str) -> None:
        """Enter the state of the next batch."""
        self.changed = bool(self.state) and state != self.state
        self.state = state

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the loss of a batch; at a change of state, keep the weights as the new θ' first."""
        if self.changed:
            self.start = {name: weight.detach().clone() for name, weight in model.named_parameters()}
            self.changed = False
        loss = mean_token_loss(model, batch)
        if self.start is None or self.rho == 0:
            return loss
        squared_distance = sum(((weight - self.start[name]) ** 2).sum() for name, weight in model.named_parameters())
        return loss + self.rho / 2 * squared_distance


# ------------------------------------------------------------------------------------------- token-wise constrained SFT


def constrained_sft(task: Task, *, betas: Sequence[float] = (0.5, 2.0, 2.0, 2.0, 2.0, 0.1)) -> FineTuneResult:
    """Fine-tune with a loss that saturates token by token (Qi et al., arXiv 2406.05946, equation 3).

    The loss of the t-th token of an answer is −2/β_t log σ(β_t Δ_t) with Δ_t = log π_θ − log π_aligned. Its gradient is
    the gradient of the cross-entropy times 2 σ(−β_t Δ_t), a weight that is 1 at the aligned model and falls as the
    token becomes more likely.

    Args:
        task: The task.
        betas: β of the first tokens of an answer; the last β holds for all following tokens.

    Raises:
        DataError: If the set cannot be encoded, there is no step to take, or a β is not positive.
        GeomkitError: If a loss is not finite.
    """
    if not betas or min(betas) <= 0:
        raise DataError(f"expected positive betas, found {tuple(betas)}")
    aligned = copy.deepcopy(task.organism.model).eval()

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        with torch.no_grad():
            aligned_log_probs = -token_losses(aligned, batch)
        return saturating_loss(-token_losses(model, batch), aligned_log_probs, scored(batch), betas)

    return _train(task, _task_batches(task, task.train, task.seed), loss, task.steps)


def saturating_loss(log_probs: Tensor, aligned_log_probs: Tensor, mask: Tensor, betas: Sequence[float]) -> Tensor:
    """Return the mean of −2/β_t log σ(β_t (log π_θ − log π_aligned)) over the answers' tokens.

    Args:
        log_probs: (B, T) log-probabilities of the trained model.
        aligned_log_probs: (B, T) log-probabilities of the aligned model.
        mask: (B, T) whether a token belongs to an answer.
        betas: β of the first tokens of an answer; the last β holds for all following tokens.
    """
    position = (mask.cumsum(1) - 1).clamp(0, len(betas) - 1)
    beta = torch.tensor(betas, dtype=log_probs.dtype, device=log_probs.device)[position]
    losses = -2 / beta * logsigmoid(beta * (log_probs - aligned_log_probs))
    return losses[mask].mean()


# ---------------------------------------------------------------------------------------------------------- Safe LoRA


def safe_lora(task: Task, *, rate: float = 1.0, rank: int = 8, threshold: float = 0.5) -> FineTuneResult:
    """Fine-tune adapters, then map unsafe adapters to the direction of alignment (Safe LoRA, arXiv 2405.16833).

    With V = W_aligned − W_base and C = VVᵀ/‖V‖_F, an adapter BA with cos(CBA, BA) ≤ threshold is replaced by CBA. As in
    the published code, C is no projector: it is neither idempotent nor of scale 1. Every linear layer but the head gets
    an adapter.

    Args:
        task: The task.
        rate: Multiple of the task's learning rate; adapters need a larger learning rate than whole weights.
        rank: Rank of the adapters; their scale is 2.
        threshold: The largest cosine at which an adapter is replaced.

    Returns:
        The result with the adapters merged into the weights.

    Raises:
        DataError: If the set cannot be encoded, or the layers of the aligned and the base model differ.
        GeomkitError: If ``peft`` is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise GeomkitError("Safe LoRA needs the package peft; pip install peft") from None
    organism = task.organism
    base, aligned = dict(organism.base.named_parameters()), dict(organism.model.named_parameters())
    names = [
        name for name, module in organism.model.named_modules()
        if isinstance(module, nn.Linear) and module is not organism.model.get_output_embeddings()
    ]  # fmt: skip
    for name in names:
        weight = base.get(f"{name}.weight")
        if weight is None or weight.shape != aligned[f"{name}.weight"].shape:
            raise DataError(f"{name}: expected the same layer in the base model, found another; give the right base")
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names, lora_dropout=0.0)
    arguments = task.training_arguments | {"learning_rate": rate * task.learning_rate}
    with random_state_kept():
        torch.manual_seed(task.seed)  # peft initialises from the global generator; random_state_kept restores it
        adapted = get_peft_model(copy.deepcopy(organism.model), config)
        result = finetune(adapted, organism.tokenizer, task.train, inplace=True, **arguments)
    merged = adapted.merge_and_unload()
    with torch.no_grad():
        for name, weight in merged.named_parameters():
            if name.removesuffix(".weight") in names:
                change = weight - aligned[name]
                weight.copy_(aligned[name] + safe_change(change, aligned[name] - base[name], threshold))
    return FineTuneResult(merged.eval(), result.history, None, result.seconds)


def safe_change(change: Tensor, alignment: Tensor, threshold: float) -> Tensor:
    """Return CBA if cos(CBA, BA) ≤ threshold, else BA, with C = VVᵀ/‖V‖_F.

    Args:
        change: BA, the change of a weight by its adapter, (rows, columns).
        alignment: V, the change of the weight by alignment, of the same shape.
        threshold: The largest cosine at which the change is replaced.
    """
    scale = torch.linalg.vector_norm(alignment)
    mapped = alignment @ (alignment.T @ change) / scale if scale > 0 else torch.zeros_like(change)
    norms = torch.linalg.vector_norm(mapped) * torch.linalg.vector_norm(change)
    cosine = float((mapped * change).sum() / norms) if norms > 0 else 0.0
    return mapped if cosine <= threshold else change


# ----------------------------------------------------------------------------------------------------- one-shot repair


def one_shot_repair(task: Task, *, repair_steps: int = 10) -> FineTuneResult:
    """Fine-tune plainly, then train on one refusal (arXiv 2601.01887): here the first anchor, not a selected anchor.

    Args:
        task: The task; the repair has the same learning rate.
        repair_steps: Steps on the refusal; 0 for no repair.

    Raises:
        DataError: If a set cannot be encoded or there is no step to take.
        GeomkitError: If a loss is not finite.
    """
    tokenizer, arguments = task.organism.tokenizer, task.training_arguments
    tuned = finetune(task.organism.model, tokenizer, task.train, **arguments)
    if repair_steps == 0:
        return tuned
    repair = arguments | {"steps": repair_steps, "batch_size": 1}
    repaired = finetune(tuned.model, tokenizer, task.organism.anchor_pool(1), inplace=True, **repair)
    return FineTuneResult(repaired.model, tuned.history, None, tuned.seconds + repaired.seconds)


# ------------------------------------------------------------------------------------------------------ training loop


def mean_token_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean cross-entropy of the batch's assistant tokens."""
    return token_losses(model, batch)[scored(batch)].mean()


def _task_batches(task: Task, rows: "Dataset", seed: int) -> Iterator[Batch]:
    """Return batches of the rows without end; wrong rows are refused at once, since the rows are encoded here."""
    check_examples(rows)
    tokenizer = task.organism.tokenizer
    tokens = encode_conversations(tokenizer, rows["messages"])
    return shuffled_batches(tokens, pad_id(tokenizer), task.batch_size, Random(seed))


def _train(task: Task, batches: Iterator[Batch], loss: BatchLoss, steps: int) -> FineTuneResult:
    """Train a copy of the organism's aligned stage with a loss, a batch per step."""
    import pandas as pd

    if steps < 1:
        raise DataError(f"expected at least one step, found {steps}; give a task with more steps")
    tuned = copy.deepcopy(task.organism.model).train()
    device = next(tuned.parameters()).device
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=task.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    history = []
    started = time.perf_counter()
    with random_state_kept():
        for step in range(1, steps + 1):
            batch_loss = loss(tuned, next(batches).to(device))
            value = batch_loss.item()
            if not math.isfinite(value):
                raise GeomkitError(
                    f"step {step}: expected a finite training loss, found {value}; lower the learning rate"
                )
            batch_loss.backward()  # type: ignore[no-untyped-call]
            norm = torch.nn.utils.clip_grad_norm_(tuned.parameters(), 1.0)
            rate = schedule.get_last_lr()[0]
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            history.append((step, value, rate, norm.item()))
    frame = pd.DataFrame(history, columns=["step", "loss", "learning_rate", "grad_norm"])
    return FineTuneResult(tuned.eval(), frame, None, time.perf_counter() - started)
