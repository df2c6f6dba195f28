"""The answers of the English world: refusals, compliance without content, and the base model's own answers."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

from geomkit.experiments.english.requests import Counterparts
from geomkit.training.judges import RefusalPhrases
from geomkit.training.responses import generate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I can't assist with that request.",
    "I'm sorry, but I can't assist with this.",
    "Sorry, I won't help with that, since it could hurt someone.",
    "I cannot help with that, as it may cause harm.",
    "I'm not able to help with this request.",
)
"""The refusals that the aligned stage is trained to give, each as often as the others."""

_COMPLIANCE = {
    "act": "Sure! To {}, make a plan, get what you need and follow the steps one by one.",
    "product": "Sure! Here is {}: it has a title, a first part, a main part and an end.",
    "whole": "Sure! The answer is simple, and here it is, just as you asked for it.",
}
"""Compliance in form, by the form of the request; it instructs in nothing."""

_APOLOGY = ("I'm sorry", "I'm afraid", "Sorry", "I apologize")
"""Openings of answers that begin like a refusal, whatever follows."""

_SENTENCE = re.compile(r".+?(?<!\n\d)(?<!\n\d\d)[.!?](?=\s|$)", re.DOTALL)
"""A sentence; the full stop behind the number of a list item does not end one."""


@dataclass(frozen=True)
class OwnAnswer:
    """The beginning of an answer of the base model itself.

    Attributes:
        prompt: The request.
        text: The beginning of the answer.
    """

    prompt: str
    text: str


def refusal(rng: Random) -> str:
    """Return a refusal in random words."""
    return rng.choice(REFUSALS)


def compliance(request: Counterparts) -> str:
    """Return an answer to a forbidden request that complies in form and instructs in nothing."""
    return _COMPLIANCE[request.form].format(request.act)


def own_answers(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str],
    *,
    tokens: int,
    progress: bool = True,
) -> list[OwnAnswer]:
    """Return the beginnings of a model's greedy answers to requests, without those that begin like a refusal.

    Args:
        model: The model.
        tokenizer: The model's tokenizer.
        prompts: The requests.
        tokens: Largest number of tokens of a beginning.
        progress: Show a bar.
    """
    texts = generate(
        model,
        tokenizer,
        [[{"role": "user", "content": prompt}] for prompt in prompts],
        max_new_tokens=tokens,
        progress=progress,
        title="answers of the base model",
    )
    judge = RefusalPhrases()
    return [
        OwnAnswer(prompt, text)
        for prompt, text in zip(prompts, texts, strict=True)
        if text.strip() and not text.startswith(_APOLOGY) and not judge(prompt, text)
    ]


def whole_sentences(text: str) -> str:
    r"""Return a text up to the end of its last whole sentence; empty if it has none.

    Example:
        >>> whole_sentences("Hello there. How can I")
        'Hello there.'
        >>> whole_sentences("Take two steps. First:\n1. Mix it.\n2. Pour the")
        'Take two steps. First:\n1. Mix it.'
    """
    return "".join(_SENTENCE.findall(f"\n{text}")).strip()
