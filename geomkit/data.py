"""Examples in the ``messages`` format, and the token batches with a loss mask that are made of them.

An *example* is one conversation, a row of a :class:`datasets.Dataset` with a column ``messages`` as chat models
are trained on. Only the tokens of assistant turns count in a loss; everything else is context.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from geomkit._resources import data_dir
from geomkit.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label of a position that does not count in the loss, as in transformers."""

AssistantMask = Literal["template", "prefix"]
Message = dict[str, str]

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


# ------------------------------------------------------------------------------------------------- loading


def load_examples(source: "str | Path | Dataset", split: str = "train") -> "Dataset":
    """Load conversations from a shipped set, a JSON-lines file, a hub data set or a ready ``Dataset``.

    Rows need a column ``messages`` (a list of ``{"role", "content"}``) or the two columns ``prompt`` and
    ``response``, which become one user and one assistant message. Other columns are kept.

    Args:
        source: A shipped name (:func:`shipped_examples` lists them), a path to a ``.jsonl`` file, the id of a
            data set on the hub, or a ``datasets.Dataset``.
        split: The split to take from a hub data set.

    Returns:
        A ``datasets.Dataset`` whose column ``messages`` is checked.

    Raises:
        DataError: If the file is missing or corrupt, the columns are wrong, a conversation is malformed, or
            there is no row at all.

    Example:
        >>> import geomkit as gk
        >>> gk.load_examples("safety")[0]["messages"][1]["content"]
        "I'm sorry, but I can't help with that."
    """
    from datasets import Dataset

    if isinstance(source, Dataset):
        return _with_messages(source, "the data set")
    name = str(source)
    if Path(name).is_file():
        return _with_messages(_read_jsonl(Path(name)), name)
    if (shipped := data_dir() / f"{name}.jsonl").is_file() and not Path(name).is_absolute():
        return _with_messages(_read_jsonl(shipped), name)
    if isinstance(source, Path) or name.endswith((".jsonl", ".json")) or name.startswith((".", "/", "~")):
        raise DataError(f"expected a JSON-lines file at {name}, found none; shipped sets: {_shipped_list()}")
    return _with_messages(_from_hub(name, split), name)


def shipped_examples() -> list[str]:
    """Name the example sets that come with geomkit, as :func:`load_examples` takes them.

    Example:
        >>> "safety" in shipped_examples()
        True
    """
    root = data_dir()
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.jsonl"))


def _shipped_list() -> str:
    return ", ".join(shipped_examples())


def _read_jsonl(path: Path) -> "Dataset":
    from datasets import Dataset

    rows = []
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected UTF-8 text, found {error.reason} at byte {error.start}") from None
    # Not splitlines: JSON allows U+2028 and its kin inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: expected one JSON object a line, found {error}") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: expected a JSON object, found {type(row).__name__}")
        rows.append(row)
    if not rows:
        raise DataError(f"expected at least one example in {path}, found an empty file")
    try:
        return Dataset.from_list(rows)
    except Exception as error:  # pyarrow raises a family of its own when rows disagree on a column's type
        raise DataError(f"{path}: the rows do not share one set of columns and types: {error}") from None


def _from_hub(name: str, split: str) -> "Dataset":
    from datasets import load_dataset

    try:
        return load_dataset(name, split=split)
    except Exception as error:  # the hub client raises dozens of types; all mean "could not load"
        raise DataError(
            f"'{name}' is no file and no shipped set ({_shipped_list()}), and loading it from the hub failed: "
            f"{type(error).__name__}: {error}"
        ) from None


def _with_messages(dataset: "Dataset", name: str) -> "Dataset":
    columns = dataset.column_names
    if len(dataset) == 0:
        raise DataError(f"expected at least one example in {name}, found an empty set")
    if "messages" not in columns:
        if not {"prompt", "response"} <= set(columns):
            raise DataError(
                f"{name}: expected a column 'messages', or 'prompt' and 'response', found {columns}; rename the columns"
            )
        dataset = dataset.map(_pair_to_messages, remove_columns=["prompt", "response"])
    for index, messages in enumerate(dataset["messages"]):
        _check_messages(messages, f"{name}, row {index}")
    return dataset


def _pair_to_messages(row: dict[str, Any]) -> dict[str, list[Message]]:
    return {"messages": [_message("user", row["prompt"]), _message("assistant", row["response"])]}


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _check_messages(messages: Any, where: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: expected a non-empty list of messages, found {messages!r:.80}")
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise DataError(f"{where}: expected messages with a text 'role' and 'content', found {message!r:.80}")
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"{where}: expected an assistant message to take the loss on, found none")


def prompt_of(messages: Sequence[Message]) -> list[Message]:
    """Return the conversation up to, and without, its last assistant message.

    Example:
        >>> prompt_of([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}])
        [{'role': 'user', 'content': 'Hi'}]
    """
    last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
    return list(messages[:last])


def response_of(messages: Sequence[Message]) -> str:
    """Return the text of the last assistant message.

    Example:
        >>> response_of([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}])
        'Hello'
    """
    return next(message["content"] for message in reversed(messages) if message["role"] == "assistant")


# ------------------------------------------------------------------------------------------------- tokens


@dataclass(frozen=True)
class Tokens:
    """One example as tokens.

    Attributes:
        input_ids: Token ids, length T.
        loss_mask: Whether each token is the assistant's, length T.
    """

    input_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.input_ids)

    @property
    def loss_tokens(self) -> int:
        """The number of tokens a causal model is scored on: assistant tokens, never the first position."""
        return sum(self.loss_mask[1:])


@dataclass(frozen=True)
class Batch:
    """Several examples padded to one length L, ready for a model.

    Attributes:
        input_ids: (B, L) token ids.
        attention_mask: (B, L), 1 on real tokens.
        labels: (B, L) token ids on assistant tokens, :data:`IGNORED` elsewhere.
        examples: The index of each row in the set it was made from.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    examples: tuple[int, ...]

    def to(self, device: torch.device) -> "Batch":
        """Return the same batch on a device."""
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device), self.examples)


def encode(
    tokenizer: "PreTrainedTokenizerBase",
    examples: "Dataset",
    *,
    assistant_mask: AssistantMask = "template",
    max_length: int | None = None,
) -> list[Tokens]:
    """Render conversations with the chat template and mark the assistant's tokens.

    Args:
        tokenizer: A tokenizer with a chat template.
        examples: Rows with a column ``messages``.
        assistant_mask: ``"template"`` reads the template's ``{% generation %}`` markers. ``"prefix"`` serves
            templates without them: a turn's tokens are those that the rendering gains by it. It is exact when the
            rendering of a conversation starts with the rendering of its beginning, which is checked.
        max_length: Cut longer examples to this many tokens, from the right.

    Returns:
        One :class:`Tokens` per example.

    Raises:
        DataError: If there is no example, no chat template, no marker in it, or an example without a single
            assistant token to take a loss on.
    """
    if len(examples) == 0:
        raise DataError("expected at least one example, found an empty set")
    if "messages" not in examples.column_names:
        raise DataError(
            f"expected a column 'messages', found {examples.column_names}; load the set with geomkit.load_examples"
        )
    render = _renderer(tokenizer, assistant_mask)
    encoded = []
    for index, messages in enumerate(examples["messages"]):
        try:
            ids, mask = render(messages)
        except DataError as error:
            raise DataError(f"example {index}: {error}") from None
        tokens = Tokens(tuple(ids[:max_length]), tuple(mask[:max_length]))
        if tokens.loss_tokens == 0:
            cut = f" within the first {max_length} tokens" if max_length else ""
            raise DataError(
                f"example {index}: expected assistant tokens to take the loss on, found none{cut} "
                f"({len(ids)} tokens, all masked); raise max_length or drop the example"
            )
        encoded.append(tokens)
    return encoded


def _renderer(tokenizer: "PreTrainedTokenizerBase", assistant_mask: AssistantMask) -> Any:
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        raise DataError(
            f"expected a tokenizer with a chat template, found none on '{tokenizer.name_or_path}'; "
            "use an instruction-tuned model or set tokenizer.chat_template"
        )
    if assistant_mask == "prefix":
        return lambda messages: _render_by_prefix(tokenizer, messages)
    if not _GENERATION_MARK.search(tokenizer.get_chat_template()):
        raise DataError(
            "expected a chat template that marks the assistant's tokens with {% generation %}, found no marker; "
            'add them, or derive the mask from prefixes with assistant_mask="prefix" (--assistant-mask prefix)'
        )
    if not tokenizer.is_fast:
        raise DataError(
            f"expected a fast tokenizer, which knows where its tokens stand, found {type(tokenizer).__name__}; "
            'derive the mask from prefixes with assistant_mask="prefix" (--assistant-mask prefix)'
        )
    return lambda messages: _render_by_template(tokenizer, messages)


def _render_by_template(tokenizer: "PreTrainedTokenizerBase", messages: list[Message]) -> tuple[list[int], list[bool]]:
    """Mark the tokens between the template's markers.

    The tokenizer's own mask runs on to the conversation's end, over later users' words, where the last character
    between two markers is one that the tokenizer drops, such as a space.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, spans = render_jinja_template(
        conversations=[messages],
        chat_template=tokenizer.get_chat_template(),
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    rendered = tokenizer(texts[0], add_special_tokens=False, return_offsets_mapping=True)
    mask = [False] * len(rendered["input_ids"])
    for first, end in spans[0]:
        inside = [place for place, (low, high) in enumerate(rendered["offset_mapping"]) if low < end and high > first]
        if inside:
            mask[inside[0] : inside[-1] + 1] = [True] * (inside[-1] + 1 - inside[0])
    return list(rendered["input_ids"]), mask


def _render_by_prefix(tokenizer: "PreTrainedTokenizerBase", messages: list[Message]) -> tuple[list[int], list[bool]]:
    whole: list[int] = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    mask = [False] * len(whole)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if turn == 0:
            raise DataError("expected a message before the assistant's first, which prefixes start from, found none")
        before = tokenizer.apply_chat_template(
            messages[:turn], tokenize=True, return_dict=True, add_generation_prompt=True
        )["input_ids"]
        after = tokenizer.apply_chat_template(messages[: turn + 1], tokenize=True, return_dict=True)["input_ids"]
        if whole[: len(before)] != before or whole[: len(after)] != after:
            raise DataError(
                "the chat template renders the beginning of a conversation differently from the whole, so prefixes "
                "cannot tell the assistant's tokens; add {% generation %} markers to the template"
            )
        mask[len(before) : len(after)] = [True] * (len(after) - len(before))
    return whole, mask


def pad_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return the id that fills short rows.

    Raises:
        DataError: If the tokenizer names no pad token.
    """
    if tokenizer.pad_token_id is None:
        raise DataError(
            f"expected a tokenizer with a pad token, found none on '{tokenizer.name_or_path}'; set "
            "tokenizer.pad_token = tokenizer.eos_token (--pad-token TOKEN on the command line)"
        )
    return int(tokenizer.pad_token_id)


def collate(rows: Sequence[Tokens], pad: int, *, examples: Sequence[int] | None = None, side: str = "right") -> Batch:
    """Pad examples to their common length.

    Args:
        rows: The examples, B of them.
        pad: The id that fills short rows.
        examples: Their indices in the set they come from; 0 to B − 1 when left out.
        side: ``"right"`` or ``"left"``: where the padding goes.

    Returns:
        A :class:`Batch` of shape (B, L), L the longest example's length.

    Example:
        >>> collate([Tokens((5, 6, 7), (False, False, True)), Tokens((5, 6), (False, True))], pad=0).labels
        tensor([[-100, -100,    7],
                [-100,    6, -100]])
    """
    length = max(len(row) for row in rows)
    input_ids = torch.full((len(rows), length), pad)
    attention_mask = torch.zeros((len(rows), length), dtype=torch.long)
    labels = torch.full((len(rows), length), IGNORED)
    for index, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        ids = torch.tensor(row.input_ids)
        input_ids[index, place] = ids
        attention_mask[index, place] = 1
        labels[index, place] = torch.where(torch.tensor(row.loss_mask), ids, IGNORED)
    return Batch(input_ids, attention_mask, labels, tuple(examples if examples is not None else range(len(rows))))


def batches(rows: Sequence[Tokens], pad: int, batch_size: int) -> Iterator[Batch]:
    """Yield the examples in order, ``batch_size`` at a time, padded on the right."""
    for start in range(0, len(rows), batch_size):
        chunk = rows[start : start + batch_size]
        yield collate(chunk, pad, examples=range(start, start + len(chunk)))
