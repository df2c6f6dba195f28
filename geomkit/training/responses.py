"""The model's own answers: greedy generation, and example sets made of what the model says."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from geomkit.errors import DataError
from geomkit.inputs.control_sets import replace_answers
from geomkit.inputs.examples import Message, check_examples, prompt_of
from geomkit.inputs.model_state import model_state_kept
from geomkit.inputs.tokens import pad_id

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from geomkit.training.judges import Judge


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
    with model_state_kept(model), tqdm(total=len(prompts), desc=title, unit="prompt", disable=not progress) as bar:
        model.eval()
        for start in range(0, len(order), batch_size):
            chunk = order[start : start + batch_size]
            texts = _generate_batch(model, tokenizer, [encoded[index] for index in chunk], pad, max_new_tokens)
            for index, text in zip(chunk, texts, strict=True):
                responses[index] = text
            bar.update(len(chunk))
    return responses


def own_responses(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    examples: "Dataset",
    *,
    max_new_tokens: int = 64,
    progress: bool = True,
) -> "Dataset":
    """Answer every prompt as the model itself would, greedily.

    A written response differs from the model's own in wording, and a gradient then also points from one wording to
    the other. Without that difference what remains is small, and about the exchange.

    Args:
        model: A causal language model; left as found.
        tokenizer: Its tokenizer, with a chat template and a pad token.
        examples: N conversations, whose last assistant messages are replaced.
        max_new_tokens: Longest response; one that is cut there is taken as if it ended.
        progress: Show a bar.

    Returns:
        N conversations in one column, ``messages``.

    Raises:
        DataError: If there are no conversations, a prompt is empty, or the model says nothing to one.

    Example:
        >>> import geomkit as gk
        >>> model, tokenizer = gk.load_organism("base")
        >>> forbidden = gk.load_examples("safety").select(range(1))
        >>> own_responses(model, tokenizer, forbidden, progress=False)[0]["messages"][-1]["content"]
        'Sure! To smuggle the piano, follow the steps in the plan and finish quickly.'
    """
    check_examples(examples)
    prompts = [prompt_of(messages) for messages in examples["messages"]]
    answers = generate(model, tokenizer, prompts, max_new_tokens=max_new_tokens, progress=progress)
    silent = [place for place, answer in enumerate(answers) if not answer.strip()]
    if silent:
        raise DataError(
            f"expected an answer to every prompt, found none to {len(silent)} of them, the first in example "
            f"{silent[0]}; drop these examples"
        )
    return replace_answers(examples, answers)


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
        judge: Decides what a refusal is; :class:`~geomkit.training.judges.RefusalPhrases` when left out.
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
    from geomkit.training.judges import RefusalPhrases

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
