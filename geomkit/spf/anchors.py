"""The examples an SPF run measures its constraints on: a pool of them, and a draw for each step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from geomkit.errors import DataError
from geomkit.tokens import Tokens

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from geomkit.judges import Judge


@dataclass(frozen=True)
class AnchorPool:
    """A pool of anchors and a seeded draw of some of them for each step.

    Attributes:
        rows: The pool.
        per_step: How many are drawn for a step, without replacement; the whole pool when it is no larger.
        seed: Seed of the draws.
    """

    rows: tuple[Tokens, ...]
    per_step: int
    seed: int = 0

    def __post_init__(self) -> None:
        """Check that something can be drawn.

        Raises:
            DataError: If the pool is empty or nothing is to be drawn.
        """
        if not self.rows or self.per_step < 1:
            raise DataError(
                f"expected at least one anchor and one per step, found {len(self.rows)} and {self.per_step}"
            )

    @property
    def fixed(self) -> bool:
        """Whether every step has the same anchors."""
        return self.per_step >= len(self.rows)

    def draw(self, step: int) -> Sequence[int]:
        """Choose the anchors of one step; the same for the same seed and step, so that a run can be resumed."""
        if self.fixed:
            return range(len(self.rows))
        generator = np.random.default_rng((self.seed, step))
        return sorted(generator.choice(len(self.rows), self.per_step, replace=False).tolist())


def own_refusals(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    examples: "Dataset",
    *,
    judge: "Judge | None" = None,
    max_new_tokens: int = 64,
    progress: bool = True,
) -> "Dataset":
    """Make anchors of forbidden requests: those that the model refuses, with its own greedy refusals.

    A refusal in other words than the model's own has a gradient that points from one wording to the other.

    Args:
        model: A causal language model, before its fine-tune; left as found.
        tokenizer: Its tokenizer, with a chat template and a pad token.
        examples: Conversations; the last assistant message of each is replaced.
        judge: Decides what a refusal is; :class:`~geomkit.judges.RefusalPhrases` when left out.
        max_new_tokens: Longest response.
        progress: Show a bar.

    Returns:
        The conversations that end in a refusal, in one column, ``messages``.

    Raises:
        DataError: If there is no example, or the model refuses none.

    Example:
        >>> import geomkit as gk
        >>> model, tokenizer = gk.load_organism()
        >>> requests = gk.load_examples("eval/forbidden").select(range(2))
        >>> gk.own_refusals(model, tokenizer, requests, progress=False)[0]["messages"][1]["content"]
        "I'm sorry, but I can't help with that."
    """
    from geomkit.control_sets import own_responses
    from geomkit.judges import RefusalPhrases

    answered = own_responses(model, tokenizer, examples, max_new_tokens=max_new_tokens, progress=progress)
    decide = judge or RefusalPhrases()
    refused = [
        place
        for place, (*_, request, answer) in enumerate(answered["messages"])
        if decide(request["content"], answer["content"])
    ]
    if not refused:
        raise DataError(
            f"expected a model that refuses at least one of {len(answered)} requests, found none refused; take "
            "requests that it refuses, or write the refusals"
        )
    return answered.select(refused)
