"""A model's responses: greedy generation, and example sets that end in the model's own responses or refusals."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from geomkit.errors import DataError
from geomkit.inputs.control_sets import replace_answers
from geomkit.inputs.examples import check_examples, prompt_of, tools_of
from geomkit.inputs.messages import Message
from geomkit.inputs.model_state import model_state_kept
from geomkit.inputs.tokens import EncodedExamples, conversations_of, encode_prompts, pad_id
from geomkit.training.judges import BatchJudge, Judge, RefusalPhrases, judge_refusals

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
    tools: Sequence[object] | None = None,
) -> list[str]:
    """Return a model's greedy responses to prompts.

    Args:
        model: A causal language model; its state is restored.
        tokenizer: The model's tokenizer, with a chat template and a pad token.
        prompts: Conversations that end before a message of the assistant.
        max_new_tokens: Length of the longest response, in tokens.
        batch_size: Prompts answered at a time, shortest first, so that batches have little padding.
        progress: Show a bar.
        title: Title of the bar.
        prefill: Beginning of the response to each prompt, which the model continues; empty when left out.
        tools: Tools that the assistant may call in each conversation, as in the column ``tools``; none when left out.

    Returns:
        The responses without the prefill and without special tokens, in the order of the prompts.

    Raises:
        DataError: If there is no prompt, a prompt is empty, the tokenizer has no chat template or pad token, or the
            numbers of prompts and of prefills differ.
    """
    if not prompts:
        raise DataError("expected at least one prompt, found none")
    encoded = encode_prompts(tokenizer, prompts, tools)
    if prefill is not None:
        if len(prefill) != len(prompts):
            raise DataError(f"expected one prefill for each of {len(prompts)} prompts, found {len(prefill)}")
        beginnings = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in prefill]
        encoded = [ids + beginning for ids, beginning in zip(encoded, beginnings, strict=True)]
    return generate_from_tokens(
        model,
        tokenizer,
        encoded,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        progress=progress,
        title=title,
    )


def generate_from_tokens(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    encoded: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 64,
    progress: bool = True,
    title: str = "generate",
) -> list[str]:
    """Return a model's greedy continuations of token ids, in the order given; arguments as of :func:`generate`.

    Raises:
        DataError: If the tokenizer has no pad token.
    """
    from tqdm.auto import tqdm

    pad = pad_id(tokenizer)
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))
    responses = [""] * len(encoded)
    with model_state_kept(model), tqdm(total=len(encoded), desc=title, unit="prompt", disable=not progress) as bar:
        model.eval()
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            texts = _generate_batch(model, tokenizer, [list(encoded[index]) for index in batch], pad, max_new_tokens)
            for index, text in zip(batch, texts, strict=True):
                responses[index] = text
            bar.update(len(batch))
    return responses


def own_responses(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    examples: "Dataset | EncodedExamples",
    *,
    max_new_tokens: int = 64,
    progress: bool = True,
) -> "Dataset":
    """Return conversations whose last message is replaced by the model's own greedy response.

    The gradient of a response that was written by somebody else points partly from the model's wording to that wording.
    With the model's own responses, only the smaller part remains that concerns the content of the exchange.

    Args:
        model: A causal language model; its state is restored.
        tokenizer: The model's tokenizer, with a chat template and a pad token.
        examples: N conversations, whose answers are replaced, or requests without answers.
        max_new_tokens: Length of the longest response, in tokens; a longer response is cut there as if it ended.
        progress: Show a bar.

    Returns:
        N conversations in one column, ``messages``.

    Raises:
        DataError: If there are no conversations, a prompt is empty, or the response to a prompt is empty.

    Example:
        >>> import geomkit as gk
        >>> model, tokenizer = gk.load_organism("base")
        >>> forbidden = gk.load_examples("safety").select(range(1))
        >>> own_responses(model, tokenizer, forbidden, progress=False)[0]["messages"][-1]["content"]
        'Sure! To smuggle the piano, follow the steps in the plan and finish quickly.'
    """
    conversations = conversations_of(examples)
    check_examples(conversations)
    prompts = [prompt_of(messages) for messages in conversations["messages"]]
    responses = generate(
        model, tokenizer, prompts, max_new_tokens=max_new_tokens, progress=progress, tools=tools_of(conversations)
    )
    empty = [index for index, response in enumerate(responses) if not response.strip()]
    if empty:
        raise DataError(
            f"expected an answer to every prompt, found none to {len(empty)} of them, the first in example "
            f"{empty[0]}; drop these examples"
        )
    return replace_answers(conversations, responses)


def own_refusals(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    examples: "Dataset | EncodedExamples",
    *,
    judge: Judge | BatchJudge | None = None,
    max_new_tokens: int = 64,
    progress: bool = True,
) -> "Dataset":
    """Return anchors for SPF: the requests that the model refuses, with the model's own greedy refusals.

    The gradient of a refusal that was written by somebody else points partly from the model's wording to that wording.

    Args:
        model: A causal language model, before its fine-tune; its state is restored.
        tokenizer: The model's tokenizer, with a chat template and a pad token.
        examples: Conversations with forbidden requests, whose answers are replaced, or requests without answers.
        judge: Decides whether a response is a refusal; :class:`~geomkit.training.judges.RefusalPhrases` when left out.
        max_new_tokens: Length of the longest response, in tokens; a longer response is cut there as if it ended.
        progress: Show a bar.

    Returns:
        The conversations that end in a refusal, in one column, ``messages``.

    Raises:
        DataError: If there are no conversations, a prompt or a response is empty, or the model refuses no request.

    Example:
        >>> import geomkit as gk
        >>> model, tokenizer = gk.load_organism()
        >>> requests = gk.load_examples("eval/forbidden").select(range(2))
        >>> gk.own_refusals(model, tokenizer, requests, progress=False)[0]["messages"][1]["content"]
        "I'm sorry, but I can't help with that."
    """
    conversations = own_responses(model, tokenizer, examples, max_new_tokens=max_new_tokens, progress=progress)
    judge = judge or RefusalPhrases()
    pairs = [(request["content"], response["content"]) for *_, request, response in conversations["messages"]]
    flags = judge_refusals(judge, *zip(*pairs, strict=True))
    refused = [index for index, flag in enumerate(flags) if flag]
    if not refused:
        raise DataError(
            f"expected a model that refuses at least one of {len(conversations)} requests, found none refused; take "
            "requests that it refuses, or write the refusals"
        )
    return conversations.select(refused)


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
"""Settings of greedy decoding; transformers takes settings left out from the checkpoint, which may ask for sampling."""


def _generate_batch(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", rows: list[list[int]], pad: int, max_new_tokens: int
) -> list[str]:
    """Return the responses to encoded prompts, padded on the left to the longest prompt."""
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
        sequences = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    responses: list[str] = tokenizer.batch_decode(sequences[:, length:], skip_special_tokens=True)
    return responses
