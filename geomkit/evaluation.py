"""What a model does: refusal on forbidden requests, over-refusal on benign ones, exact match on skills."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from geomkit._display import html_table
from geomkit._figures import draw
from geomkit.data import Message, load_examples, prompt_of, response_of
from geomkit.errors import DataError
from geomkit.judges import Judge, RefusalPhrases
from geomkit.loss import losses_of
from geomkit.rates import Rate, rate
from geomkit.state import as_found
from geomkit.tokens import encode, pad_id

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset
    from plotly.graph_objects import Figure
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# -------------------------------------------------------------------------------------------------- result


@dataclass(frozen=True)
class Evaluation:
    """What a model did on held-out prompts.

    Attributes:
        refusal: Share of forbidden requests that it refused.
        over_refusal: Share of benign requests that it refused.
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
        return sum(rate.value for rate in self.skills.values()) / len(self.skills)

    def to_frame(self) -> "pd.DataFrame":
        """Return one row per measure: ``measure``, ``value``, ``low``, ``high``, ``n``."""
        import pandas as pd

        measures = {"refusal": self.refusal, "over-refusal": self.over_refusal}
        measures |= {f"exact match: {name}": rate for name, rate in self.skills.items()}
        rows = [(name, rate.value, *rate.interval, rate.n) for name, rate in measures.items()]
        return pd.DataFrame(rows, columns=["measure", "value", "low", "high", "n"])

    def plot(self) -> "Figure":
        """Draw every measure with its interval."""
        return draw("plot_evaluation", self)

    def _repr_html_(self) -> str:
        return html_table("Evaluation, with 95 % Wilson intervals", self.to_frame())


# ------------------------------------------------------------------------------------------------- running


def evaluate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    forbidden: "Dataset | None" = None,
    benign: "Dataset | None" = None,
    skills: "Mapping[str, Dataset] | None" = None,
    *,
    judge: Judge | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 64,
    progress: bool = True,
) -> Evaluation:
    """Generate greedily on held-out prompts and count refusals and exact answers.

    Args:
        model: A causal language model; left as found.
        tokenizer: Its tokenizer, with a chat template.
        forbidden: Requests that should be refused; the organism's held-out ones when left out.
        benign: Requests that should be answered; the organism's held-out ones when left out.
        skills: Sets with a reference answer, by name; the organism's held-out ones when left out.
        judge: Decides what a refusal is; :class:`RefusalPhrases` when left out.
        max_new_tokens: Longest response.
        batch_size: Prompts generated at a time.
        progress: Show a bar.

    Returns:
        An :class:`Evaluation`.

    Raises:
        DataError: If a set is empty, two have one name, or the tokenizer lacks a chat template or pad token.
    """
    import pandas as pd

    judge = judge or RefusalPhrases()
    sets = _sets(forbidden, benign, skills)
    found = {}
    # One set at a time: its responses are about equally long, and a batch takes as long as its longest.
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
        found[name] = _judged(name, prompts, responses, [response_of(messages) for messages in conversations], judge)
    return Evaluation(
        refusal=rate(list(found["forbidden"]["refused"])),
        over_refusal=rate(list(found["benign"]["refused"])),
        skills={name: rate(list(found[name]["exact"])) for name in list(sets)[2:]},
        responses=pd.concat(found.values(), ignore_index=True),
    )


def _judged(
    name: str, prompts: Sequence[Sequence[Message]], responses: list[str], references: list[str], judge: Judge
) -> "pd.DataFrame":
    import pandas as pd

    asked = [prompt[-1]["content"] for prompt in prompts]
    return pd.DataFrame(
        {
            "set": name,
            "prompt": asked,
            "response": responses,
            "reference": references,
            "refused": [judge(prompt, response) for prompt, response in zip(asked, responses, strict=True)],
            "exact": [given.strip() == wanted.strip() for given, wanted in zip(responses, references, strict=True)],
        }
    )


def _sets(
    forbidden: "Dataset | None", benign: "Dataset | None", skills: "Mapping[str, Dataset] | None"
) -> "dict[str, Dataset]":
    if skills is None:
        skills = {name: load_examples(f"eval/{name}") for name in ORGANISM_SKILLS}
    sets = {
        "forbidden": forbidden if forbidden is not None else load_examples("eval/forbidden"),
        "benign": benign if benign is not None else load_examples("eval/benign"),
    }
    for name in skills:
        if name in sets:
            raise DataError(f"'{name}' is the name of another set; give the skill another name")
    sets |= skills
    for name, examples in sets.items():
        if len(examples) == 0:
            raise DataError(f"{name}: expected at least one example, found an empty set")
    return sets


ORGANISM_SKILLS = ("howto", "arithmetic", "sql")
"""The skills that the shipped organism was trained on."""


def generate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Sequence[Message]],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 64,
    progress: bool = True,
    title: str = "generate",
    prefill: Sequence[str] | None = None,
) -> list[str]:
    """Answer prompts greedily.

    Args:
        model: A causal language model; left as found.
        tokenizer: Its tokenizer, with a chat template and a pad token.
        prompts: Conversations that end where the assistant should speak.
        max_new_tokens: Longest response.
        batch_size: Prompts generated at a time, shortest first so that little is padding.
        progress: Show a bar.
        title: What the bar is called.
        prefill: For each prompt, how the answer is begun already.

    Returns:
        The responses without special tokens, in the order of the prompts; what follows the prefill, where there is one.

    Raises:
        DataError: If there is no prompt or an empty one, no chat template or no pad token, or not one prefill for each.
    """
    from tqdm.auto import tqdm

    if not prompts:
        raise DataError("expected at least one prompt, found none")
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(f"expected a tokenizer with a chat template, found none on '{tokenizer.name_or_path}'")
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise DataError(f"prompt {index}: expected a message to answer, found none; drop the example")
    pad = pad_id(tokenizer)
    encoded: list[list[int]] = [
        tokenizer.apply_chat_template(list(prompt), tokenize=True, add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        for prompt in prompts
    ]
    if prefill is not None:
        if len(prefill) != len(prompts):
            raise DataError(f"expected one prefill for each of {len(prompts)} prompts, found {len(prefill)}")
        begun = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in prefill]
        encoded = [ids + more for ids, more in zip(encoded, begun, strict=True)]
    order = sorted(range(len(prompts)), key=lambda index: len(encoded[index]))
    responses = [""] * len(prompts)
    with as_found(model), tqdm(total=len(prompts), desc=title, unit="prompt", disable=not progress) as bar:
        model.eval()
        for start in range(0, len(order), batch_size):
            chunk = order[start : start + batch_size]
            texts = _generate_batch(model, tokenizer, [encoded[index] for index in chunk], pad, max_new_tokens)
            for index, text in zip(chunk, texts, strict=True):
                responses[index] = text
            bar.update(len(chunk))
    return responses


_GREEDY = {
    "do_sample": False,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_new_tokens": 0,
}
"""What is left unsaid, ``generate`` takes from the checkpoint, and chat models ship penalties and beams there."""


def _generate_batch(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", rows: list[list[int]], pad: int, max_new_tokens: int
) -> list[str]:
    from transformers import GenerationConfig

    length = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (length - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=model.device)
    end = getattr(model.generation_config, "eos_token_id", None)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        eos_token_id=tokenizer.eos_token_id if end is None else end,
        **_GREEDY,
    )
    with torch.no_grad():
        whole = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    texts: list[str] = tokenizer.batch_decode(whole[:, length:], skip_special_tokens=True)
    return texts


def mean_loss(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", examples: "Dataset", *, batch_size: int = 16
) -> float:
    """Return the mean cross-entropy on the assistant's tokens, each example weighing alike, in nats per token.

    On refusals this is the safety loss whose growth during fine-tuning is the *drift*.

    Args:
        model: A causal language model; left as found.
        tokenizer: Its tokenizer, with a chat template and a pad token.
        examples: Rows with a column ``messages``.
        batch_size: Examples run at a time.

    Returns:
        The loss.

    Raises:
        DataError: If the examples cannot be encoded.
    """
    losses = losses_of(model, encode(tokenizer, examples), pad_id(tokenizer), batch_size=batch_size)
    return sum(losses) / len(losses)
