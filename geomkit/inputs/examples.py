"""Loading and checking of examples, from files, the hub or the shipped sets.

An *example* is a conversation: a row of a :class:`datasets.Dataset` with a column ``messages``, the usual format for
the training of chat models.
"""

import re
from collections.abc import Mapping, Sequence, Sized
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geomkit.errors import DataError
from geomkit.inputs.adapters import KNOWN_COLUMNS, Columns, MissingColumnsError, RowReader
from geomkit.inputs.benchmark_rows import load_benchmark
from geomkit.inputs.benchmarks import BENCHMARKS
from geomkit.inputs.files import read_rows
from geomkit.inputs.messages import Message
from geomkit.utils.files import data_dir, reading
from geomkit.utils.progress import with_bar

if TYPE_CHECKING:
    from datasets import Dataset


Source = Any
"""What :func:`load_examples` reads: a path, a name, a ``Dataset``, a ``DatasetDict``, a stream, a list or a frame."""

STREAM_ROWS = 10_000
"""Largest number of rows that are read from a stream; no function of geomkit works on a stream itself."""

_HUB_NAME = re.compile(r"(?P<id>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[\w.-]+))?(?:\[(?P<split>.+)\])?")


def load_examples(
    source: Source,
    split: str | None = None,
    *,
    path: str | Path | None = None,
    config: str | None = None,
    columns: Columns | None = None,
    progress: bool = True,
) -> "Dataset":
    """Return conversations from a shipped set, a file, a benchmark, a data set of the hub, or rows in memory.

    A row is a conversation in one of the row formats: ``messages``; ShareGPT's ``conversations``; ``instruction``,
    ``input`` and ``output``; ``instruction``, ``context`` and ``response``; ``prompt`` and ``completion`` or
    ``response``; ``question`` and ``answer``; preference pairs, of which ``chosen`` is taken; or requests without
    answers in ``prompt``, ``question``, ``instruction``, ``goal`` or ``behavior``. Columns ``system``, ``history`` and
    ``tools`` belong to the conversation; other columns are kept.

    Args:
        source: Name of a shipped set (:func:`shipped_examples` lists them), path to a file (JSON lines, a JSON array,
            CSV, TSV, Parquet, text with a request a line, each also ``.gz``) or to a folder of
            ``Dataset.save_to_disk``, id of a data set on the hub (``"name"``, ``"name:config"``,
            ``"name:config[split]"``), a benchmark (:func:`geomkit.inputs.benchmarks.benchmarks` lists them), a
            ``datasets.Dataset`` or ``DatasetDict``, an ``IterableDataset`` of at most 10,000 rows, a list of dicts, or
            a data frame.
        split: Split of a benchmark, of a data set on the hub (``"train"`` when left out; slices such as
            ``"train[:100]"`` are taken too) or of a ``DatasetDict``.
        path: Local copy of the benchmark that ``source`` names.
        config: Configuration of a data set on the hub.
        columns: Which column is what, for columns with other names: ``{"prompt": "goal", "response": "target"}``. Other
            keys are ``messages``, ``context``, ``system``, ``history`` and ``tools``. In a CSV file without header,
            columns have numbers from 0.
        progress: Show bars, in lines of a file and in rows, if these take longer than five seconds.

    Returns:
        The rows, with a checked column ``messages`` and, where rows have tools, ``tools``.

    Raises:
        DataError: If the source is missing or damaged, columns are missing or do not agree, a conversation is
            malformed, or there is no row.

    Example:
        >>> import geomkit as gk
        >>> gk.load_examples("safety")[0]["messages"][1]["content"]
        "I'm sorry, but I can't help with that."
        >>> gk.load_examples([{"q": "Hi", "a": "Hello"}], columns={"prompt": "q", "response": "a"})[0]["messages"][1]
        {'role': 'assistant', 'content': 'Hello'}
    """
    from datasets import Dataset

    if columns is not None and not isinstance(columns, Mapping):
        raise DataError(f"expected columns as a mapping, found {columns!r:.80}; give e.g. columns={{'prompt': 'goal'}}")
    if isinstance(source, str) and (source in BENCHMARKS or path is not None):
        _check_benchmark_options(source, config, columns)
        return load_benchmark(source, path, split)
    if path is not None:
        raise DataError(
            f"expected path= with the name of a benchmark, found it with a {type(source).__name__}; leave path= out"
        )
    rows, name = _rows(source, split, config, columns, progress)
    if len(rows) == 0:
        raise DataError(f"expected at least one example in {name}, found an empty set; give a set with rows")
    padded = isinstance(rows, Dataset)
    names = rows.column_names if isinstance(rows, Dataset) else list(dict.fromkeys(key for row in rows for key in row))
    reader = RowReader(names, name, columns)
    conversations = []
    for index, row in enumerate(with_bar(rows, "load", "row", progress, total=len(rows))):
        try:
            conversations.append(reader(row, padded=padded))
        except DataError as error:
            raise DataError(f"{name}, row {index}: {error}") from None
    if isinstance(rows, Dataset) and reader.consumed == ["messages"]:
        made = [row["messages"] for row in conversations]
        if made == list(rows["messages"]):  # in the normal form already
            return rows
    return _with_conversations(rows, names, reader, conversations, name)


def _check_benchmark_options(name: str, config: str | None, columns: Columns | None) -> None:
    """Refuse the options that a benchmark has no use for: its configuration and its columns are known."""
    if config is not None:
        raise DataError(f"expected no config with the benchmark '{name}', found '{config}'; leave it out")
    if columns is not None:
        raise MissingColumnsError(
            f"expected no columns with the benchmark '{name}', found {dict(columns)}; leave them out, or give the file "
            "as source"
        )


def _with_conversations(
    rows: "Dataset | list[dict[str, Any]]",
    names: Sequence[str],
    reader: RowReader,
    conversations: Sequence[dict[str, Any]],
    name: str,
) -> "Dataset":
    """Return the columns that are no part of the conversations, and the conversations."""
    from datasets import Dataset

    made = {"messages": [row["messages"] for row in conversations]}
    if any("tools" in row for row in conversations):
        made["tools"] = [row.get("tools") for row in conversations]
    others = [column for column in names if column not in (*reader.consumed, *made)]
    try:
        if isinstance(rows, Dataset):
            table = rows.select_columns(others) if others else Dataset.from_dict({})
            for column, values in made.items():
                table = table.add_column(column, values) if table.column_names else Dataset.from_dict({column: values})
            return table
        # Arrow takes the columns of all rows together; a column that a row does not have is null in it.
        kept = {
            column: made[column] if column in made else [row.get(column) for row in rows]
            for column in dict.fromkeys([*(column for column in names if column in (*others, *made)), *made])
        }
        return Dataset.from_dict(kept)
    except Exception as error:  # pyarrow has exception types of its own for rows that differ in a column's type
        raise DataError(
            f"{name}: the rows do not share one set of columns and types: {error}; give each column one type"
        ) from None


def _rows(
    source: Source, split: str | None, config: str | None, columns: Columns | None, progress: bool
) -> "tuple[Dataset | list[dict[str, Any]], str]":
    """Return the rows of a source as they are, and the name of the source for messages."""
    import pandas as pd
    from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

    if isinstance(source, DatasetDict | IterableDatasetDict):
        source, split = _split_of(source, split), None
    if isinstance(source, IterableDataset):
        source = _of_stream(source)
    if isinstance(source, str | Path):
        with reading(source):
            return _named_rows(source, split, config, columns, progress)
    if split is not None or config is not None:
        raise DataError(
            f"expected split and config with a data set of the hub only, found a {type(source).__name__}; leave them "
            "out"
        )
    if isinstance(source, Dataset):
        return in_python(source), "the data set"
    if isinstance(source, pd.DataFrame):
        return [_plain(row) for row in source.to_dict("records")], "the data frame"
    if isinstance(source, list | tuple) and all(isinstance(row, Mapping) for row in source):
        return [dict(row) for row in source], "the list"
    raise DataError(
        f"expected a path, a name, a datasets.Dataset, a list of dicts or a data frame, found {type(source).__name__}; "
        "give rows as a list of dicts"
    )


def _plain(value: Any) -> Any:
    """Return a value of a data frame as Python has it: lists for arrays, ``None`` for NaN."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):  # arrays and scalars of numpy
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if value != value or type(value).__name__ in ("NAType", "NaTType") else value


def _of_stream(stream: Any) -> "Dataset":
    """Return the rows of a stream, which examples are drawn from at random and read more than once.

    Raises:
        DataError: If the stream has too many rows, or they do not share one set of columns and types.
    """
    from datasets import Dataset

    rows = list(islice(iter(stream), STREAM_ROWS + 1))
    if len(rows) > STREAM_ROWS:
        raise DataError(
            f"expected a stream of at most {STREAM_ROWS:,} rows, which are kept in memory, found an IterableDataset "
            "with more; take some of it: load_examples(stream.take(1000))"
        )
    try:
        return Dataset.from_list(rows, features=stream.features)
    except Exception as error:  # pyarrow has exception types of its own for rows that differ in a column's type
        raise DataError(
            f"the stream: the rows do not share one set of columns and types: {error}; give each column one type"
        ) from None


def _split_of(splits: Any, split: str | None) -> "Dataset":
    if split is None and len(splits) == 1:
        split = next(iter(splits))
    if split not in splits:
        found = "none" if split is None else f"'{split}'"
        raise DataError(f"expected the split to take, one of {', '.join(map(str, splits))}, found {found}; give split=")
    return splits[split]


def _named_rows(
    source: str | Path, split: str | None, config: str | None, columns: Columns | None, progress: bool
) -> "tuple[Dataset | list[dict[str, Any]], str]":
    """Return the rows of a file, a folder, a shipped set or a data set of the hub."""
    from datasets import DatasetDict, load_from_disk

    name = str(source)
    path = Path(name).expanduser()
    shipped = data_dir() / f"{name}.jsonl"
    file = path if path.is_file() else shipped if shipped.is_file() and not path.is_absolute() else None
    if file is not None:
        if config is not None or split not in (None, "train"):
            raise DataError(
                f"{name}: expected no split and no config with a file, found {config or split}; leave it out"
            )
        known = {str(column).lower() for column in (columns or {}).values() if not str(column).isdecimal()}
        return read_rows(file, KNOWN_COLUMNS | known, progress=progress), name
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        saved = load_from_disk(str(path))
        return (_split_of(saved, split) if isinstance(saved, DatasetDict) else saved), name
    if path.is_dir() or isinstance(source, Path) or name.startswith((".", "/", "~")) or _ENDING.search(name.lower()):
        found = "a folder" if path.is_dir() else "none"
        raise DataError(f"expected a file at {name}, found {found}; shipped sets: {_shipped_list()}")
    return _from_hub(name, split, config), name


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


_ENDING = re.compile(r"\.(jsonl?|ndjson|csv|tsv|txt|parquet)(\.gz)?$")


def _from_hub(name: str, split: str | None, config: str | None) -> "Dataset":
    from datasets import load_dataset

    parts = _HUB_NAME.fullmatch(name)
    if parts is None:
        raise DataError(f"expected a file, a shipped set or 'name:config[split]' on the hub, found '{name:.80}'")
    for given, inside, what in ((split, parts["split"], "split"), (config, parts["config"], "config")):
        if given is not None and inside is not None and given != inside:
            raise DataError(
                f"expected one {what}, found '{inside}' in '{name}' and {what}='{given}'; leave one of them out"
            )
    try:
        return load_dataset(parts["id"], name=config or parts["config"], split=split or parts["split"] or "train")
    except Exception as error:  # the client of the hub raises dozens of types; all mean that loading failed
        reason = " ".join(str(error).split())
        raise DataError(
            f"expected a file, a shipped set ({_shipped_list()}) or a data set of the hub, found '{name}', which the "
            f"hub did not give ({type(error).__name__}: {reason:.300}); check the path, the name and the network"
        ) from None


def check_answers(examples: "Dataset", name: str) -> None:
    """Check that every conversation has an answer that the loss can be taken on.

    Raises:
        DataError: If a conversation has no message of the assistant.
    """
    for index, messages in enumerate(examples["messages"]):
        if not any(message["role"] == "assistant" for message in messages):
            raise DataError(
                f"{name}, row {index}: expected an assistant message to take the loss on, found none; give answers"
            )


def in_python(examples: "Dataset") -> "Dataset":
    """Return a data set whose values are Python's; formats such as ``"numpy"`` make arrays of the messages.

    A transform of the user (``with_transform``) makes other rows, and stays.
    """
    from datasets import Dataset

    arrays = isinstance(examples, Dataset) and examples.format["type"] not in (None, "custom")
    return examples.with_format(None) if arrays else examples


def tools_of(examples: "Dataset") -> Sequence[Any] | None:
    """Return the tools of each conversation, or ``None`` if no conversation has tools."""
    return examples["tools"] if "tools" in examples.column_names else None


def prompt_of(messages: Sequence[Message]) -> list[Message]:
    """Return the messages before the assistant's message that ends a conversation; all, if it ends otherwise.

    Example:
        >>> prompt_of([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}])
        [{'role': 'user', 'content': 'Hi'}]
        >>> prompt_of([{"role": "user", "content": "Hi"}])
        [{'role': 'user', 'content': 'Hi'}]
    """
    return list(messages[:-1] if messages[-1]["role"] == "assistant" else messages)


def final_answer(messages: Sequence[Message]) -> str | None:
    """Return the text of the assistant's message that ends a conversation, or ``None`` if it ends otherwise.

    Example:
        >>> final_answer([{"role": "user", "content": "Hi"}]) is None
        True
    """
    return str(messages[-1]["content"]) if messages[-1]["role"] == "assistant" else None


def required_final_answer(messages: Sequence[Message]) -> str:
    """Return the text of the assistant's message that ends a conversation.

    Raises:
        DataError: If the conversation ends in another message.

    Example:
        >>> required_final_answer([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}])
        'Hello'
    """
    answer = final_answer(messages)
    if answer is None:
        raise DataError(
            f"expected a conversation that ends in an answer, found the end {messages[-1]!r:.80}; add an answer, or "
            "drop the row"
        )
    return answer
