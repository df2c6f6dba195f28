"""The plain training loop of the organism: AdamW on the loss of the assistant's tokens, on one thread."""

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
from geomkit.inputs.tokens import Tokens, encode_at_once

if TYPE_CHECKING:
    from tqdm import tqdm
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

_SORTED_BATCHES = 4
"""Number of batches that are sorted by length together: enough to save padding, few enough to mix the kinds."""


@dataclass(frozen=True)
class StageSettings:
    """The training settings of a stage.

    Attributes:
        steps: Optimizer steps.
        batch_size: Examples per step.
        learning_rate: Peak learning rate; it warms up over 5 % of the steps, then falls to 0 along a half cosine.
        weight_decay: AdamW's decoupled weight decay.
    """

    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float = 0.0


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread inside the block, and restore the caller's number of threads.

    On one thread, sums are taken in a fixed order, so two runs give the same bits; at this size it is also faster.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def encode_conversations(tokenizer: "PreTrainedTokenizerFast", conversations: Sequence[list[Message]]) -> list[Tokens]:
    """Return conversations as tokens, with a loss mask on the assistant's tokens."""
    return encode_at_once(tokenizer, conversations)


def bucketed(rows: Iterator[Tokens], pad: int, batch_size: int, rng: Random) -> Iterator[Batch]:
    """Yield batches of examples of similar length; the batches of a small pool of examples come in random order."""
    while pool := list(islice(rows, _SORTED_BATCHES * batch_size)):
        pool.sort(key=len)
        chunks = [pool[start : start + batch_size] for start in range(0, len(pool), batch_size)]
        rng.shuffle(chunks)
        for chunk in chunks:
            yield collate(chunk, pad)


def shuffled_batches(rows: Sequence[Tokens], pad: int, batch_size: int, rng: Random) -> Iterator[Batch]:
    """Yield batches without end; each pass over the rows has its own random order, and may end with a short batch."""
    while True:
        order = rng.sample(range(len(rows)), len(rows))
        for start in range(0, len(order), batch_size):
            yield collate([rows[index] for index in order[start : start + batch_size]], pad)


def answer_loss(model: "LlamaForCausalLM", batch: Batch) -> Tensor:
    """Return the mean cross-entropy of the assistant's tokens.

    The padding is on the right, where a causal model cannot look, so no attention mask is needed. The head runs only on
    the positions with a label, which makes a step cheaper.
    """
    hidden = model.model(input_ids=batch.input_ids[:, :-1], use_cache=False).last_hidden_state
    labels = batch.labels[:, 1:]
    scored = labels != IGNORED
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[scored]), labels[scored])


def fit(
    model: "LlamaForCausalLM", batches: Iterator[Batch], settings: StageSettings, bar: "tqdm[Any] | None" = None
) -> None:
    """Train a model in place with the settings of a stage."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, betas=(0.9, 0.98), fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, settings.steps))
    descend(model, islice(batches, settings.steps), optimizer, schedule, bar)


def descend(
    model: "LlamaForCausalLM",
    batches: Iterator[Batch],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    bar: "tqdm[Any] | None" = None,
) -> None:
    """Take an optimizer step for each batch, with the gradient clipped at norm 1; leave the model in eval mode."""
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
    """Return the learning rate at a step, as a fraction of the peak: linear warm-up, then a half cosine to 0.

    Example:
        >>> [round(warmup_cosine(step, 100), 2) for step in (0, 4, 52, 99)]
        [0.2, 1.0, 0.51, 0.0]
    """
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))
