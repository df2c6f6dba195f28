"""Loading and checking of examples, from files, the hub or the shipped sets.

An *example* is a conversation: a row of a :class:`datasets.Dataset` with a column ``messages``, the usual format for
the training of chat models.
"""

import json
from collections.abc import Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geomkit.errors import DataError
from geomkit.inputs.benchmark_rows import load_benchmark
from geomkit.inputs.benchmarks import BENCHMARKS
from geomkit.utils.files import data_dir

if TYPE_CHECKING:
    from datasets import Dataset

Message = dict[str, str]
"""A message of a conversation, with a ``role`` (such as ``"user"``) and a ``content``."""


def load_examples(
    source: "str | Path | Dataset", split: str | None = None, *, path: "str | Path | None" = None
) -> "Dataset":
    """Return conversations from a shipped set, a JSON-lines file, a data set of the hub or a ``Dataset``.

    Rows need a column ``messages`` (a list of ``{"role", "content"}``), or the columns ``prompt`` and ``response``,
    which become a user message and an assistant message. Other columns are kept.

    Args:
        source: Name of a shipped set (:func:`shipped_examples` lists them), path to a ``.jsonl`` file, id of a data set
            on the hub, a benchmark (:func:`geomkit.inputs.benchmarks.benchmarks` lists them), or a
            ``datasets.Dataset``.
        split: Split of a benchmark, or of a data set on the hub; ``"train"`` of the latter when left out.
        path: Local copy of a benchmark that ``source`` names.

    Returns:
        The rows, with a checked column ``messages``.

    Raises:
        DataError: If the file is missing or damaged, columns are missing, a conversation is malformed, or there is no
            row.

    Example:
        >>> import geomkit as gk
        >>> gk.load_examples("safety")[0]["messages"][1]["content"]
        "I'm sorry, but I can't help with that."
    """
    from datasets import Dataset

    if isinstance(source, str) and (source in BENCHMARKS or path is not None):
        return load_benchmark(source, path, split)
    if isinstance(source, Dataset):
        return _with_messages(source, "the data set")
    name = str(source)
    if Path(name).is_file():
        return _with_messages(_read_jsonl(Path(name)), name)
    if (shipped := data_dir() / f"{name}.jsonl").is_file() and not Path(name).is_absolute():
        return _with_messages(_read_jsonl(shipped), name)
    if isinstance(source, Path) or name.endswith((".jsonl", ".json")) or name.startswith((".", "/", "~")):
        raise DataError(f"expected a JSON-lines file at {name}, found none; shipped sets: {_shipped_list()}")
    return _with_messages(_from_hub(name, split or "train"), name)


def check_examples(examples: object) -> None:
    """Check that examples are a ``Dataset`` of conversations with at least one row.

    Raises:
        DataError: If they are not a ``Dataset``, have no column ``messages``, or have no row.
    """
    columns = getattr(examples, "column_names", None)
    if not isinstance(columns, list) or not isinstance(examples, Sized):
        raise DataError(
            f"expected a datasets.Dataset, found {type(examples).__name__}; make one with geomkit.load_examples or "
            "Dataset.from_list"
        )
    if len(examples) == 0:
        raise DataError("expected at least one example, found an empty set; give a set with rows")
    if "messages" not in columns:
        raise DataError(f"expected a column 'messages', found {columns}; load the set with geomkit.load_examples")


def shipped_examples() -> list[str]:
    """Return the names of the example sets that are shipped with geomkit, for :func:`load_examples`.

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
        raise DataError(
            f"{path}: expected UTF-8 text, found {error.reason} at byte {error.start}; save the file as UTF-8"
        ) from None
    # Not str.splitlines, which also splits at U+2028 and similar characters; JSON allows these inside a string.
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
        raise DataError(f"expected at least one example in {path}, found an empty file; write one JSON object a line")
    try:
        return Dataset.from_list(rows)
    except Exception as error:  # pyarrow has exception types of its own for rows that differ in a column's type
        raise DataError(f"{path}: the rows do not share one set of columns and types: {error}") from None


def _from_hub(name: str, split: str) -> "Dataset":
    from datasets import load_dataset

    try:
        return load_dataset(name, split=split)
    except Exception as error:  # the client of the hub raises dozens of types; all mean that loading failed
        raise DataError(
            f"'{name}' is no file and no shipped set ({_shipped_list()}), and loading it from the hub failed: "
            f"{type(error).__name__}: {error}"
        ) from None


def _with_messages(dataset: "Dataset", name: str) -> "Dataset":
    columns = dataset.column_names
    if len(dataset) == 0:
        raise DataError(f"expected at least one example in {name}, found an empty set; give a set with rows")
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
        raise DataError(f"{where}: expected an assistant message to take the loss on, found none; drop the row")
    if not response_of(messages).strip():  # the end marker would still be a loss token: the model would learn silence
        raise DataError(
            f"{where}: expected words in the last assistant message, found {response_of(messages)!r:.80}; drop the row"
        )


def prompt_of(messages: Sequence[Message]) -> list[Message]:
    """Return the messages of a conversation before its last assistant message.

    Example:
        >>> prompt_of([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}])
        [{'role': 'user', 'content': 'Hi'}]
    """
    last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
    return list(messages[:last])


def response_of(messages: Sequence[Message]) -> str:
    """Return the text of the last assistant message of a conversation.

    Example:
        >>> response_of([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}])
        'Hello'
    """
    return next(message["content"] for message in reversed(messages) if message["role"] == "assistant")
