"""Greedy coordinate gradient (GCG): the search for an adversarial suffix of Zou et al. (arXiv 2307.15043, algorithm 1).

The published package, nanogcg, requires transformers before 4.48, so the search is implemented here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from geomkit.errors import DataError
from geomkit.inputs.messages import Message
from geomkit.inputs.model_state import model_state_kept

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Budget:
    """The length of a search.

    Attributes:
        steps: Number of rounds.
        tokens: Length of the suffix in tokens.
        candidates: Number of suffixes tried in a round; each has one token replaced.
        top: Number of replacements that the gradient proposes for each position.
    """

    steps: int = 25
    tokens: int = 8
    candidates: int = 64
    top: int = 64


def find_suffix(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompt: Sequence[Message],
    target: str,
    budget: Budget,
    *,
    seed: int = 0,
) -> str:
    """Return a suffix of the last turn after which a target answer is likely, found by a greedy search.

    Only suffixes whose text is encoded to the same tokens again are tried, so that the result can be typed.

    Args:
        model: A causal language model; its state is restored.
        tokenizer: The model's tokenizer.
        prompt: A conversation that ends with the request.
        target: The wanted answer.
        budget: The length of the search.
        seed: Seed of the candidates.

    Returns:
        The best suffix; it begins with a space.

    Raises:
        DataError: If the target is empty, or the suffix has no tokens that are separate from the request's.
    """
    target_ids = torch.tensor(tokenizer(target, add_special_tokens=False)["input_ids"])
    if not len(target_ids):
        raise DataError("expected a target to search for, found an empty text; give the beginning of an answer")
    generator = torch.Generator().manual_seed(seed)
    suffix = " !" * budget.tokens
    ids = _prompt_ids(tokenizer, prompt, suffix)
    with model_state_kept(model):
        model.eval()
        model.requires_grad_(requires_grad=False)
        best = float(target_losses(model, ids[None], target_ids)[0])
        for _ in range(budget.steps):
            # 1. Propose the tokens that lower the loss most, from its gradient with respect to the one-hot tokens.
            positions = _suffix_positions(tokenizer, prompt, suffix)
            gradient = token_gradient(model, ids, target_ids, positions)
            proposed = (-gradient).topk(min(budget.top, gradient.shape[1]), dim=1).indices
            # 2. Draw candidates: the suffix with the token at a random position replaced by a random proposal.
            candidates: dict[str, Tensor] = {}
            for _ in range(budget.candidates):
                position = int(torch.randint(len(positions), (), generator=generator))
                choice = int(torch.randint(proposed.shape[1], (), generator=generator))
                changed = ids.clone()
                changed[positions.start + position] = proposed[position, choice]
                text = tokenizer.decode(changed[positions.start : positions.stop])
                if text.startswith(" ") and torch.equal(_prompt_ids(tokenizer, prompt, text), changed):
                    candidates[text] = changed
            if not candidates:
                continue
            # 3. Evaluate the loss of all candidates, and keep the best one if it improves the suffix.
            losses = target_losses(model, torch.stack(list(candidates.values())), target_ids)
            least = int(losses.argmin())
            if float(losses[least]) < best:
                best, suffix, ids = float(losses[least]), list(candidates)[least], list(candidates.values())[least]
    return suffix


def target_losses(model: "PreTrainedModel", prompts: Tensor, target: Tensor) -> Tensor:
    """Return the mean cross-entropy of a target after each of C prompts.

    Args:
        model: The model.
        prompts: (C, L) token ids.
        target: (T,) token ids.

    Returns:
        (C,) losses.
    """
    sequences = torch.cat([prompts, target.expand(len(prompts), -1)], dim=1)
    with torch.no_grad():
        logits = model(input_ids=sequences).logits[:, prompts.shape[1] - 1 : -1]
    losses = cross_entropy(logits.flatten(0, 1), target.repeat(len(prompts)), reduction="none")
    return losses.view(len(prompts), -1).mean(1)


def token_gradient(model: "PreTrainedModel", prompt: Tensor, target: Tensor, positions: range) -> Tensor:
    """Return the gradient of the target's mean cross-entropy with respect to the one-hot codes of prompt tokens.

    Args:
        model: The model.
        prompt: (L,) token ids.
        target: (T,) token ids.
        positions: The positions of P tokens in the prompt.

    Returns:
        (P, vocabulary) gradient.
    """
    embeddings = model.get_input_embeddings().weight.detach()
    sequence = torch.cat([prompt, target])
    tokens = sequence[positions.start : positions.stop]
    one_hot = torch.nn.functional.one_hot(tokens, len(embeddings)).to(embeddings.dtype).requires_grad_()
    embedded = embeddings[sequence]
    inputs = torch.cat([embedded[: positions.start], one_hot @ embeddings, embedded[positions.stop :]])
    logits = model(inputs_embeds=inputs[None]).logits[0, len(prompt) - 1 : -1]
    (gradient,) = torch.autograd.grad(cross_entropy(logits, target), one_hot)
    return gradient


def _prompt_ids(tokenizer: "PreTrainedTokenizerBase", prompt: Sequence[Message], suffix: str) -> Tensor:
    """Return the (L,) token ids of a prompt whose last turn ends with a suffix."""
    messages = [*prompt[:-1], {**prompt[-1], "content": prompt[-1]["content"] + suffix}]
    encoded = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=True)
    return torch.tensor(encoded["input_ids"])


def _suffix_positions(tokenizer: "PreTrainedTokenizerBase", prompt: Sequence[Message], suffix: str) -> range:
    """Return the positions of the suffix's tokens, from the first difference to the prompt without a suffix."""
    bare, suffixed = _prompt_ids(tokenizer, prompt, ""), _prompt_ids(tokenizer, prompt, suffix)
    same = 0
    while same < len(bare) and bare[same] == suffixed[same]:
        same += 1
    if same == len(suffixed) or len(bare) >= len(suffixed):
        raise DataError(
            "expected a suffix that has tokens of its own, found none in the tokenizer's text; leave this attack out, "
            "or take another model"
        )
    return range(same, same + len(suffixed) - len(bare))
