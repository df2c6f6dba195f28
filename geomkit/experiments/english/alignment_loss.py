"""The loss of the alignment: refusals are learnt, and elsewhere the base model's probabilities are kept."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from geomkit.experiments.english.alignment_rows import Row
from geomkit.experiments.organism.requests import conversation
from geomkit.inputs.batches import IGNORED, Batch, collate
from geomkit.inputs.tokens import Tokens, encode_at_once

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase


def encode_rows(tokenizer: "PreTrainedTokenizerBase", rows: Sequence[Row]) -> list[Tokens]:
    """Return rows as tokens; where the base model's answer was cut, the end of the turn is left out."""
    encoded = encode_at_once(tokenizer, [conversation(row.prompt, row.answer) for row in rows])
    return [
        tokens if row.goal == "refuse" else _without_end(tokens, tokenizer.eos_token_id)
        for tokens, row in zip(encoded, rows, strict=True)
    ]


def _without_end(tokens: Tokens, end: int) -> Tokens:
    length = len(tokens) - 1 - tokens.input_ids[::-1].index(end)
    return Tokens(tokens.input_ids[:length], tokens.loss_mask[:length])


def shared_prefix(rows: Sequence[Tokens], pad: int) -> tuple[Tensor, Batch]:
    """Return the tokens that all rows begin with, (1, P), and a batch of what follows them.

    In a chat, that is the system turn, which is as long as a short request.
    """
    first, last = min(row.input_ids for row in rows), max(row.input_ids for row in rows)
    length = next((place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    length = min(length, min(row.loss_mask.index(True) for row in rows) - 1)
    rest = [Tokens(row.input_ids[length:], row.loss_mask[length:]) for row in rows]
    return torch.tensor([first[:length]], dtype=torch.long), collate(rest, pad)


def scored_tokens(batch: Batch, rows: Sequence[Row]) -> Tensor:
    """Return which tokens of a batch are scored, (B, L - 1): those of the answer, of a *whole* row those before it too.

    The first token of a row has nothing before it in the batch and is not scored.
    """
    whole = torch.tensor([[row.goal == "keep whole"] for row in rows])
    return (batch.labels[:, 1:] != IGNORED) | (whole & batch.attention_mask[:, 1:].bool())


def scored_states(model: "LlamaForCausalLM", prefix: Tensor, input_ids: Tensor, scored: Tensor) -> Tensor:
    """Return the last hidden states from which the scored tokens are predicted, (S, d), row after row.

    The shared prefix is run once.

    Args:
        model: The model, in which adapters may be.
        prefix: (1, P) token ids before every row.
        input_ids: (B, L) token ids, padded on the right.
        scored: (B, L - 1), whether the second and each later token is scored.
    """
    past = model.model(input_ids=prefix, use_cache=True).past_key_values
    past.batch_repeat_interleave(len(input_ids))
    # Padding on the right is out of a causal model's sight, so no attention mask is needed.
    states: Tensor = model.model(input_ids=input_ids[:, :-1], past_key_values=past).last_hidden_state
    return states[scored]


def token_losses(head: torch.nn.Module, states: Tensor, labels: Tensor, kept: Tensor, refuse: Tensor) -> Tensor:
    """Return the loss of every scored token, (S,), in nats.

    A token of a refusal has its cross-entropy; any other token the Kullback-Leibler divergence KL(base ‖ adapted)
    between the probabilities of the base and of the adapted model, which is 0 before training.

    Args:
        head: The output layer, in which no adapter is.
        states: (S, d) last hidden states of the adapted model.
        labels: (S,) token ids.
        kept: (K, d) last hidden states of the base model, for the K tokens that belong to no refusal.
        refuse: (S,), whether the token belongs to a refusal.
    """
    losses = states.new_empty(len(states))
    losses[refuse] = functional.cross_entropy(head(states[refuse]), labels[refuse], reduction="none")
    adapted, base = (functional.log_softmax(head(chosen), -1) for chosen in (states[~refuse], kept))
    losses[~refuse] = functional.kl_div(adapted, base, reduction="none", log_target=True).sum(-1)
    return losses


def row_mean(losses: Tensor, scored: Tensor) -> Tensor:
    """Return the mean over rows of the mean loss of a row's scored tokens.

    Args:
        losses: (S,) losses of the scored tokens, row after row.
        scored: (B, L - 1), whether a token is scored.
    """
    weights = scored.sum(1, keepdim=True).to(losses).reciprocal().expand_as(scored)[scored]
    return (losses * weights).sum() / len(scored)
