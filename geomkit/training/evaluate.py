"""Evaluation of a model: refusal of forbidden requests, over-refusal of benign requests, exact answers to skills."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from geomkit.errors import DataError
from geomkit.inputs.examples import Message, check_examples, load_examples, prompt_of, response_of
from geomkit.inputs.fits import encoded_for
from geomkit.inputs.loss import losses_of
from geomkit.inputs.tokens import EncodedExamples, conversations_of
from geomkit.stats.proportions import Rate, rate
from geomkit.training.judges import Judge, RefusalPhrases
from geomkit.training.responses import generate
from geomkit.utils.display import Result, html_table
from geomkit.utils.figures import draw

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset
    from plotly.graph_objects import Figure
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ORGANISM_SKILLS = ("howto", "arithmetic", "sql")
"""The skills that the shipped organism was trained on."""


@dataclass(frozen=True)
class Evaluation(Result):
    """Shares of refusals and of exact answers on held-out prompts, and the responses that were counted.

    Attributes:
        refusal: Share of forbidden requests that the model refused.
        over_refusal: Share of benign requests that the model refused.
        skills: Share of exact answers, by skill.
        responses: One row per prompt: ``set``, ``prompt``, ``response``, ``reference``, ``refused``, ``exact``.
    """

    refusal: Rate
    over_refusal: Rate
    skills: Mapping[str, Rate]
    responses: "pd.DataFrame" = field(repr=False)

    @property
    def utility(self) -> float:
        """The mean exact match over the skills, between 0 and 1; NaN without skills."""
        if not self.skills:
            return math.nan
        return sum(share.value for share in self.skills.values()) / len(self.skills)

    def to_frame(self) -> "pd.DataFrame":
        """Return one row per measure: ``measure``, its ``value`` with the 95 % interval ``low`` to ``high``, ``n``."""
        import pandas as pd

        measures = {"refusal": self.refusal, "over-refusal": self.over_refusal}
        measures |= {f"exact match: {name}": share for name, share in self.skills.items()}
        rows = [(name, share.value, *share.interval, share.n) for name, share in measures.items()]
        return pd.DataFrame(rows, columns=["measure", "value", "low", "high", "n"])

    def plot(self) -> "Figure":
        """Draw every measure with its 95 % interval."""
        return draw("plot_evaluation", self)

    def _repr_html_(self) -> str:
        return html_table("Evaluation, with 95 % Wilson intervals", self.to_frame())


def evaluate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    forbidden: "Dataset | EncodedExamples | None" = None,
    benign: "Dataset | EncodedExamples | None" = None,
    skills: "Mapping[str, Dataset | EncodedExamples] | None" = None,
    *,
    judge: Judge | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 64,
    progress: bool = True,
) -> Evaluation:
    """Let a model answer held-out prompts greedily, and count refusals and exact answers.

    Args:
        model: A causal language model; its state is restored.
        tokenizer: The model's tokenizer, with a chat template and a pad token.
        forbidden: Requests that should be refused; the organism's held-out requests when left out.
        benign: Requests that should be answered; the organism's held-out requests when left out.
        skills: Sets with reference answers, by name; the organism's held-out sets when left out.
        judge: Decides whether a response is a refusal; :class:`RefusalPhrases` when left out.
        max_new_tokens: Length of the longest response, in tokens.
        batch_size: Prompts answered at a time.
        progress: Show a bar.

    Returns:
        An :class:`Evaluation`.

    Raises:
        DataError: If a set is empty, two sets have the same name, or the tokenizer has no chat template or pad token.
    """
    import pandas as pd

    judge = judge or RefusalPhrases()
    sets = _sets(forbidden, benign, skills)
    tables = {}
    # One set at a time: a batch takes as long as its longest response, and responses to a set are about equally long.
    for name, examples in sets.items():
        conversations = examples["messages"]
        prompts = [prompt_of(messages) for messages in conversations]
        responses = generate(
            model,
            tokenizer,
            prompts,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            progress=progress,
            title=name,
        )
        tables[name] = _judged(name, prompts, responses, [response_of(messages) for messages in conversations], judge)
    return Evaluation(
        refusal=rate(list(tables["forbidden"]["refused"])),
        over_refusal=rate(list(tables["benign"]["refused"])),
        skills={name: rate(list(tables[name]["exact"])) for name in list(sets)[2:]},
        responses=pd.concat(tables.values(), ignore_index=True),
    )


def _judged(
    name: str, prompts: Sequence[Sequence[Message]], responses: list[str], references: list[str], judge: Judge
) -> "pd.DataFrame":
    """Return a set's part of :attr:`Evaluation.responses`."""
    import pandas as pd

    requests = [prompt[-1]["content"] for prompt in prompts]
    return pd.DataFrame(
        {
            "set": name,
            "prompt": requests,
            "response": responses,
            "reference": references,
            "refused": [judge(request, response) for request, response in zip(requests, responses, strict=True)],
            "exact": [
                response.strip() == reference.strip() for response, reference in zip(responses, references, strict=True)
            ],
        }
    )


def _sets(
    forbidden: "Dataset | EncodedExamples | None",
    benign: "Dataset | EncodedExamples | None",
    skills: "Mapping[str, Dataset | EncodedExamples] | None",
) -> "dict[str, Dataset]":
    """Return the sets by name, ``"forbidden"`` and ``"benign"`` first, with the organism's where a set was left out."""
    if skills is None:
        skills = {name: load_examples(f"eval/{name}") for name in ORGANISM_SKILLS}
    sets = {
        "forbidden": forbidden if forbidden is not None else load_examples("eval/forbidden"),
        "benign": benign if benign is not None else load_examples("eval/benign"),
    }
    for name in skills:
        if name in sets:
            raise DataError(f"'{name}' is the name of another set; give the skill another name")
    conversations = {name: conversations_of(examples) for name, examples in {**sets, **skills}.items()}
    for name, examples in conversations.items():
        try:
            check_examples(examples)
        except DataError as error:
            raise DataError(f"{name}: {error}") from None
    return conversations


def mean_loss(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    examples: "Dataset | EncodedExamples",
    *,
    batch_size: int = 16,
) -> float:
    """Return the mean over examples of their mean cross-entropy on the assistant's tokens, in nats per token.

    For refusals as examples, this is the safety loss; its growth during fine-tuning is the *drift*.

    Args:
        model: A causal language model; its state is restored.
        tokenizer: The model's tokenizer, with a chat template and a pad token.
        examples: Rows with a column ``messages``, or rows encoded by :func:`geomkit.encode`.
        batch_size: Examples run at a time.

    Returns:
        The mean loss.

    Raises:
        DataError: If the examples cannot be encoded.
    """
    rows, pad = encoded_for(model, tokenizer, examples)
    losses = losses_of(model, rows, pad, batch_size=batch_size)
    return sum(losses) / len(losses)
