"""The plain loop that trains the organism: AdamW on the assistant's tokens, one thread, one seed."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from geomkit.experiments.organism.requests import Message
from geomkit.inputs.batches import IGNORED, Batch, collate
from geomkit.inputs.tokens import Tokens, encode

if TYPE_CHECKING:
    from tqdm import tqdm
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

_POOL = 4  # batches whose examples are sorted by length together: less padding, still mixed kinds


@dataclass(frozen=True)
class Course:
    """How long and how fast one stage is trained.

    Attributes:
        steps: Optimizer steps.
        batch_size: Examples per step.
        learning_rate: The peak; warms up over 5 % of the steps, then falls to 0 along a half cosine.
        weight_decay: AdamW's decoupled decay.
    """

    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float = 0.0


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread and put the caller's setting back.

    One thread makes sums associate in one order, so two runs give the same bits; at this size it is also faster.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def tokenise(tokenizer: "PreTrainedTokenizerFast", conversations: Sequence[list[Message]]) -> list[Tokens]:
    """Turn conversations into tokens with a loss mask on the assistant's."""
    from datasets import Dataset

    return encode(tokenizer, Dataset.from_list([{"messages": messages} for messages in conversations]))


def bucketed(rows: Iterator[Tokens], pad: int, batch_size: int, rng: Random) -> Iterator[Batch]:
    """Yield batches of examples of similar length, in random order within a small pool."""
    while pool := list(islice(rows, _POOL * batch_size)):
        pool.sort(key=len)
        chunks = [pool[start : start + batch_size] for start in range(0, len(pool), batch_size)]
        rng.shuffle(chunks)
        for chunk in chunks:
            yield collate(chunk, pad)


def answer_loss(model: "LlamaForCausalLM", batch: Batch) -> Tensor:
    """Return the mean cross-entropy of the assistant's tokens.

    Padding is on the right, where a causal model cannot look, so no mask is needed; the head runs only where
    there is a label, which saves a tenth of the step.
    """
    hidden = model.model(input_ids=batch.input_ids[:, :-1], use_cache=False).last_hidden_state
    labels = batch.labels[:, 1:]
    scored = labels != IGNORED
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[scored]), labels[scored])


def fit(model: "LlamaForCausalLM", batches: Iterator[Batch], course: Course, bar: "tqdm[Any] | None" = None) -> None:
    """Train a model in place."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=course.learning_rate, weight_decay=course.weight_decay, betas=(0.9, 0.98), fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, course.steps))
    descend(model, islice(batches, course.steps), optimizer, schedule, bar)


def descend(
    model: "LlamaForCausalLM",
    batches: Iterator[Batch],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    bar: "tqdm[Any] | None" = None,
) -> None:
    """Take one step for each batch, the gradient clipped at norm 1, and leave the model in eval mode."""
    model.train()
    for batch in batches:
        loss = answer_loss(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if bar is not None:
            bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.eval()


def warmup_cosine(step: int, steps: int) -> float:
    """Return the share of the peak learning rate at a step.

    Example:
        >>> [round(warmup_cosine(step, 100), 2) for step in (0, 4, 52, 99)]
        [0.2, 1.0, 0.51, 0.0]
    """
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))
