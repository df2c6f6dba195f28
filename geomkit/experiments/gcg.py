"""Greedy coordinate gradient: the search for a suffix of Zou et al. (arXiv 2307.15043, algorithm 1).

Written here as the package of that name, nanogcg, asks for transformers before 4.48.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from geomkit.errors import DataError
from geomkit.inputs.examples import Message
from geomkit.inputs.model_state import as_found

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Budget:
    """How long is searched.

    Attributes:
        steps: Rounds.
        tokens: Length of the suffix.
        candidates: Suffixes tried in a round, each with one token replaced.
        top: How many replacements the gradient proposes for each place.
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
    """Search for a suffix of the last turn after which a target answer is likely.

    Only suffixes that come back from text to the same tokens are tried, so that what is found can be typed.

    Args:
        model: A causal language model; left as found.
        tokenizer: Its tokenizer.
        prompt: A conversation that ends with the request.
        target: The answer wanted.
        budget: How long is searched.
        seed: Seed of the candidates.

    Returns:
        The best suffix, a space first.

    Raises:
        DataError: If the target is empty, or no suffix can be told apart in the tokenizer's text.
    """
    wanted = torch.tensor(tokenizer(target, add_special_tokens=False)["input_ids"])
    if not len(wanted):
        raise DataError("expected a target to search for, found an empty text")
    generator = torch.Generator().manual_seed(seed)
    suffix = " !" * budget.tokens
    ids = _encoded(tokenizer, prompt, suffix)
    with as_found(model):
        model.eval()
        model.requires_grad_(requires_grad=False)
        best = float(target_losses(model, ids[None], wanted)[0])
        for _ in range(budget.steps):
            places = _places(tokenizer, prompt, suffix)
            gradient = token_gradient(model, ids, wanted, places)
            proposed = (-gradient).topk(min(budget.top, gradient.shape[1]), dim=1).indices
            found = {}
            for _ in range(budget.candidates):
                place = int(torch.randint(len(places), (), generator=generator))
                choice = int(torch.randint(proposed.shape[1], (), generator=generator))
                changed = ids.clone()
                changed[places.start + place] = proposed[place, choice]
                text = tokenizer.decode(changed[places.start : places.stop])
                if text.startswith(" ") and torch.equal(_encoded(tokenizer, prompt, text), changed):
                    found[text] = changed
            if not found:
                continue
            losses = target_losses(model, torch.stack(list(found.values())), wanted)
            least = int(losses.argmin())
            if float(losses[least]) < best:
                best, suffix, ids = float(losses[least]), list(found)[least], list(found.values())[least]
    return suffix


def target_losses(model: "PreTrainedModel", prompts: Tensor, target: Tensor) -> Tensor:
    """Return the mean cross-entropy of a target after each of some prompts.

    Args:
        model: The model.
        prompts: (C, L) token ids.
        target: (T,) token ids.

    Returns:
        (C,) losses.
    """
    whole = torch.cat([prompts, target.expand(len(prompts), -1)], dim=1)
    with torch.no_grad():
        logits = model(input_ids=whole).logits[:, prompts.shape[1] - 1 : -1]
    each = cross_entropy(logits.flatten(0, 1), target.repeat(len(prompts)), reduction="none")
    return each.view(len(prompts), -1).mean(1)


def token_gradient(model: "PreTrainedModel", prompt: Tensor, target: Tensor, places: range) -> Tensor:
    """Return the gradient of the target's mean cross-entropy by the one-hot code of some tokens.

    Args:
        model: The model.
        prompt: (L,) token ids.
        target: (T,) token ids.
        places: Which of the prompt's tokens.

    Returns:
        (places, vocabulary).
    """
    table = model.get_input_embeddings().weight.detach()
    whole = torch.cat([prompt, target])
    chosen = whole[places.start : places.stop]
    one_hot = torch.nn.functional.one_hot(chosen, len(table)).to(table.dtype).requires_grad_()
    embedded = table[whole]
    inputs = torch.cat([embedded[: places.start], one_hot @ table, embedded[places.stop :]])
    logits = model(inputs_embeds=inputs[None]).logits[0, len(prompt) - 1 : -1]
    (gradient,) = torch.autograd.grad(cross_entropy(logits, target), one_hot)
    return gradient


def _encoded(tokenizer: "PreTrainedTokenizerBase", prompt: Sequence[Message], suffix: str) -> Tensor:
    messages = [*prompt[:-1], {**prompt[-1], "content": prompt[-1]["content"] + suffix}]
    found = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=True)
    return torch.tensor(found["input_ids"])


def _places(tokenizer: "PreTrainedTokenizerBase", prompt: Sequence[Message], suffix: str) -> range:
    """Return where the suffix's tokens are: what differs from the prompt without it, up to the template's end."""
    bare, whole = _encoded(tokenizer, prompt, ""), _encoded(tokenizer, prompt, suffix)
    same = 0
    while same < len(bare) and bare[same] == whole[same]:
        same += 1
    if same == len(whole) or len(bare) >= len(whole):
        raise DataError("expected a suffix that has tokens of its own, found none in the tokenizer's text")
    return range(same, same + len(whole) - len(bare))
