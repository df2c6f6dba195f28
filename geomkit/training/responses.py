"""A model's responses: greedy generation, and example sets that end in the model's own responses or refusals."""

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from geomkit.errors import DataError
from geomkit.gradients.provenance import weights_fingerprint
from geomkit.inputs.answer_spans import turn_marks
from geomkit.inputs.control_sets import replace_answers
from geomkit.inputs.examples import check_examples, prompt_of, tools_of
from geomkit.inputs.fits import position_limit, refuse_unfit
from geomkit.inputs.messages import Message
from geomkit.inputs.model_state import model_state_kept
from geomkit.inputs.offloading import input_device
from geomkit.inputs.parameters import unwrapped_model, workers_of
from geomkit.inputs.templates import ChatTemplate
from geomkit.inputs.tokens import (
    EncodedExamples,
    Tokens,
    conversations_of,
    encode_prompts,
    pad_id,
    tokens_fingerprint,
)
from geomkit.training.judges import BatchJudge, Judge, RefusalPhrases, judge_refusals
from geomkit.utils.options import check_options
from geomkit.utils.workers import first_process

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_LOGGER = logging.getLogger(__name__)


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
    """Return a model's greedy responses to prompts, each up to the end of the turn.

    A response ends at the end-of-sequence token of the model's generation config (of the tokenizer, without one), or
    where the chat template ends a turn (with a special token or in plain text), or at the model's last position.
    Processes divide the prompts as in :func:`geomkit.collect_gradients`, and each of them returns all responses.

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
            numbers of prompts and of prefills differ, or a prompt does not fit the model's embedding or positions.
    """
    model = unwrapped_model(model)
    with workers_of(model).failing_together():
        check_options({"max_new_tokens": max_new_tokens, "batch_size": batch_size})
        if not prompts:
            raise DataError("expected at least one prompt, found none; give a set with rows")
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
        ends=response_ends(model, tokenizer),
        stop=end_of_turn_text(tokenizer),
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
    ends: Sequence[int] | None = None,
    pad: int | None = None,
    stop: str = "",
) -> list[str]:
    """Return a model's greedy continuations of token ids, in the order given; other arguments as of :func:`generate`.

    Args:
        model: A causal language model; its state is restored.
        tokenizer: The model's tokenizer, with a pad token.
        encoded: N prompts as token ids.
        max_new_tokens: Length of the longest continuation, in tokens.
        batch_size: Prompts continued at a time.
        progress: Show a bar.
        title: Title of the bar.
        ends: Tokens after which a continuation ends; the end-of-sequence tokens when left out, which is right for raw
            text: a chat template's end of turn is an ordinary token there.
        pad: The id that fills short rows, which the model does not attend to; the tokenizer's when left out.
        stop: Text before which a continuation ends; none if empty.

    Raises:
        DataError: If the tokenizer has no pad token, or a prompt does not fit the model's embedding or positions.
    """
    from tqdm.auto import tqdm

    model, workers = unwrapped_model(model), workers_of(model)
    prompts = [Tokens(tuple(ids), (False,) * len(ids)) for ids in encoded]
    if workers.count > 1:
        workers.refuse_differences(prompts=tokens_fingerprint(prompts), weights=weights_fingerprint(model))
    responses: dict[int, str] = {}
    with workers.failing_together():
        pad = pad_id(tokenizer) if pad is None else pad
        ends = list(_ends_of_sequence(model, tokenizer) if ends is None else ends)
        refuse_unfit(model, prompts, pad, what="prompt")
        order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))
        own = [order[place] for place in workers.share([1] * len(order))]
        hidden = not (progress and first_process())
        with model_state_kept(model), tqdm(total=len(own), desc=title, unit="prompt", disable=hidden) as bar:
            model.eval()
            for start in range(0, len(own), batch_size):
                batch = own[start : start + batch_size]
                rows = [list(encoded[index]) for index in batch]
                texts = _generate_batch(model, tokenizer, rows, pad, ends, _room(model, rows, max_new_tokens), stop)
                responses |= zip(batch, texts, strict=True)
                bar.update(len(batch))
    every_response = dict(item for part in workers.gather(responses) for item in part.items())
    return [every_response[index] for index in range(len(encoded))]


def _room(model: "PreTrainedModel", rows: Sequence[Sequence[int]], wanted: int) -> int:
    """Return the number of tokens to generate: fewer than wanted if the model has not as many positions.

    Raises:
        DataError: If there is room for none.
    """
    longest, limit = max(map(len, rows)), position_limit(model)
    if limit is None or longest + wanted <= limit:
        return wanted
    if longest >= limit:
        raise DataError(f"expected prompts below the model's {limit} tokens, found {longest}; shorten or drop them")
    _LOGGER.warning("responses to prompts of %d tokens end where the model's %d positions do", longest, limit)
    return limit - longest


_TURN = "geomkit"
"""Text of the turns from which the end of a turn is read."""


def end_of_turn(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """Return the special token with which the chat template ends a turn of the assistant; ``None`` if it has none.

    It is read from a rendering, as the end-of-sequence token of tokenizer or generation config is often another one.

    Args:
        tokenizer: A tokenizer with a chat template.

    Example:
        >>> import geomkit as gk
        >>> tokenizer = gk.load_organism()[1]
        >>> tokenizer.decode([end_of_turn(tokenizer)])
        '<|end|>'
    """
    turns = [{"role": "user", "content": _TURN}, {"role": "assistant", "content": _TURN}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception:  # templates raise what they like; a conversation that they refuse is named elsewhere
        return None
    before, found, after = text.rpartition(_TURN)
    if not found or _TURN not in before:  # the answer is not in the text
        return None
    ids: list[int] = tokenizer(after.lstrip(), add_special_tokens=False)["input_ids"]
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder} - {tokenizer.unk_token_id}
    return ids[0] if ids and ids[0] in special else None


def end_of_turn_text(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the plain text with which the chat template ends a turn; empty if it has none, or a special token.

    A word or a single sign, which an answer may hold, is no end.

    Args:
        tokenizer: A tokenizer with a chat template.

    Example:
        >>> import geomkit as gk
        >>> tokenizer = gk.load_organism()[1]
        >>> end_of_turn_text(tokenizer)
        ''
        >>> tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }} ## {% endfor %}"
        >>> end_of_turn_text(tokenizer)
        ' ##'
    """
    if end_of_turn(tokenizer) is not None:
        return ""
    try:
        text = turn_marks(ChatTemplate(tokenizer)).end
    except DataError:  # conversations that a template refuses are named elsewhere
        return ""
    mark = text.strip()
    return "" if len(mark) < 2 or mark.isalnum() else text


def response_ends(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the tokens after which a response in a chat ends: the ends of a sequence, and the end of a turn."""
    ends = _ends_of_sequence(model, tokenizer)
    turn = end_of_turn(tokenizer)
    return ends if turn is None or turn in ends else [*ends, turn]


def _ends_of_sequence(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the end-of-sequence tokens of the model's generation config, or of the tokenizer without one."""
    own = getattr(model.generation_config, "eos_token_id", None)
    own = tokenizer.eos_token_id if own is None else own
    return [end for end in (own if isinstance(own, list) else [own]) if end is not None]


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
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    rows: list[list[int]],
    pad: int,
    ends: list[int],
    max_new_tokens: int,
    stop: str = "",
) -> list[str]:
    """Return the responses to encoded prompts, padded on the left to the longest prompt."""
    from transformers import GenerationConfig

    length, device = max(len(row) for row in rows), input_device(model)
    ids = torch.tensor([[pad] * (length - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=device)
    config = GenerationConfig(max_new_tokens=max_new_tokens, pad_token_id=pad, eos_token_id=ends or None, **_GREEDY)
    # Without blanks: a word's token may have a blank at its beginning, or not.
    criteria = {"stopping_criteria": [_has_text(tokenizer, length, stop.strip())]} if stop.strip() else {}
    with torch.no_grad():
        sequences = model.generate(input_ids=ids, attention_mask=mask, generation_config=config, **criteria)
    # The end of a turn and the padding behind it need not be special tokens, which decoding would skip.
    answers = [_until(row, ends) for row in sequences[:, length:].tolist()]
    responses: list[str] = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return [_before(response, stop) for response in responses] if criteria else responses


def _has_text(tokenizer: "PreTrainedTokenizerBase", start: int, text: str) -> Callable[..., torch.Tensor]:
    """Return a criterion of transformers that stops each row once its last tokens, behind ``start``, have a text.

    The criterion of transformers itself, ``stop_strings``, fails for tokenizers that do not know every letter.
    """

    def criterion(ids: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        tails = tokenizer.batch_decode(ids[:, max(start, ids.shape[1] - 2 * len(text)) :], skip_special_tokens=True)
        return torch.tensor([text in tail for tail in tails], device=ids.device)

    return criterion


def _before(response: str, stop: str) -> str:
    """Return the text before the first end of a turn, without the blanks that belong to the end."""
    before, end, _ = response.partition(stop.strip())
    blanks = stop[: len(stop) - len(stop.lstrip())]
    return before.removesuffix(blanks) if end else before


def _until(ids: list[int], ends: Sequence[int]) -> list[int]:
    """Return the tokens before the first of the ends."""
    return ids[: next((place for place, token in enumerate(ids) if token in ends), len(ids))]
