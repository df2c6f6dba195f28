"""The rows of a benchmark as conversations, from its source on the network or from a local copy of its file."""

import gzip
import logging
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geomkit.errors import DataError
from geomkit.inputs.benchmarks import BENCHMARKS, Benchmark
from geomkit.utils.files import parse_json, reading

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset

_LOG = logging.getLogger(__name__)


def load_benchmark(name: str, path: str | Path | None = None, split: str | None = None) -> "Dataset":
    """Return the rows of a benchmark as conversations, from its source or from a local copy.

    Args:
        name: Name of the benchmark, see :func:`~geomkit.inputs.benchmarks.benchmarks`.
        path: A local copy of the benchmark's file (CSV, TSV, JSON, JSON lines or Parquet, also with ``.gz``), or a
            folder of such files; the source on the network when left out.
        split: Split; the benchmark's default when left out.

    Returns:
        Rows with a column ``messages``, which ends in the reference answer where the benchmark has answers, and the
        columns of the benchmark that are not in the conversation.

    Raises:
        DataError: If there is no such benchmark, split or file, the source cannot be reached, or a column is missing.
    """
    from datasets import Dataset

    if name not in BENCHMARKS:
        raise DataError(f"expected a benchmark, {', '.join(BENCHMARKS)}, found '{name}'; choose one of these")
    entry = BENCHMARKS[name]
    if path is not None and split is not None and not entry.part:
        raise DataError(f"expected no split for the local copy {path} of '{name}', found '{split}'; give its file")
    if split is not None and entry.splits and split not in entry.splits:
        raise DataError(f"expected a split of '{name}', {', '.join(entry.splits)}, found '{split}'")
    where = str(path) if path is not None else f"'{name}'"
    with reading(where):
        table = _named(_read(Path(path)) if path is not None else _fetch(entry, split), entry, where)
    if entry.part and split is not None:
        if entry.part not in table:
            raise DataError(
                f"{where}: expected a column '{entry.part}' for the split '{split}', found {list(table)}; add it, or "
                "leave split= out"
            )
        table = table[table[entry.part] == split]
    used = [*entry.prompt, *filter(None, [entry.response])]
    rows, empty = [], []
    for index, cells in enumerate(table.to_dict("records")):
        row = {str(name): value for name, value in cells.items()}
        messages = _messages(entry, row)
        if messages is None:
            empty.append(index)
        else:
            rows.append({"messages": messages} | {key: value for key, value in row.items() if key not in used})
    if not rows:
        raise DataError(f"expected at least one example in {where}, found none; give another file or split")
    if empty:  # alpaca and samsum have such rows
        _LOG.warning(
            "%s: left out %d of %d rows without a request or an answer, the first is row %d",
            where, len(empty), len(table), empty[0],
        )  # fmt: skip
    return Dataset.from_list(rows)


def _messages(entry: Benchmark, row: Mapping[str, Any]) -> list[dict[str, str]] | None:
    """Return the conversation of a row, with the reference answer if there is one; ``None`` of an empty row."""
    texts = {column: str(row[column] or "") for column in entry.prompt}
    answer = str(row[entry.response] or "") if entry.response else None
    if not texts[entry.main or entry.prompt[0]].strip() or (answer is not None and not answer.strip()):
        return None
    request = entry.between.join(text for text in texts.values() if text.strip())
    messages = [{"role": "user", "content": entry.instruction + request}]
    return messages if answer is None else [*messages, {"role": "assistant", "content": answer}]


def _named(table: "pd.DataFrame", entry: Benchmark, where: str) -> "pd.DataFrame":
    """Return a table with the benchmark's columns, under the names in the entry.

    A table of a single column under another name has no header: the name is its first request.
    """
    import pandas as pd

    columns = list(table.columns)
    names = {column: _present(column, columns) for column in (*entry.prompt, *filter(None, [entry.response]))}
    missing = [column for column, present in names.items() if present is None]
    if missing and len(columns) == 1 and len(names) == 1:
        return pd.DataFrame({entry.prompt[0]: [str(columns[0]), *table.iloc[:, 0]]})
    if missing:
        expected = ", ".join(column.replace("|", " or ") for column in names)
        raise DataError(
            f"{where}: expected the columns {expected} of '{entry.name}', found {columns!r:.300}; rename the columns, "
            "or load the file itself: load_examples(FILE, columns=…)"
        )
    renamed = table.rename(columns={str(present): column for column, present in names.items()}).astype(object)
    return renamed.where(renamed.notna(), None)  # no NaN, which would become the word nan


def _present(column: str, columns: Sequence[str]) -> str | None:
    return next((name for name in column.split("|") if name in columns), None)


def _read(path: Path) -> "pd.DataFrame":
    """Return the table of a file, or of all files of a folder, with all cells of CSV as text."""
    import pandas as pd

    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
        if not files:
            raise DataError(
                f"expected files in {path}, found none; put the benchmark's files there, or give the path of one"
            )
        return _joined({file.name: _read(file) for file in files}, "file")
    if not path.is_file():
        raise DataError(
            f"expected a local copy of a benchmark at {path}, found no file; check path=, or leave it out to load "
            "from the network"
        )
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    kind = suffixes[-1] if suffixes else ""
    try:
        if kind in {".csv", ".tsv"}:
            separator = "," if kind == ".csv" else "\t"
            return pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False, encoding="utf-8-sig")
        if kind in {".json", ".jsonl"}:
            return _read_json(path)
        if kind == ".parquet":
            return pd.read_parquet(path)
    except (ValueError, gzip.BadGzipFile, EOFError, zlib.error) as error:  # those of pandas and Arrow are ValueErrors
        raise DataError(
            f"{path}: expected a readable {kind[1:]} file, found {' '.join(str(error).split()):.120}; copy it again"
        ) from None
    raise DataError(
        f"expected a file in .csv, .tsv, .json, .jsonl or .parquet, found {path.name}; convert it to one of these"
    )


def _read_json(path: Path) -> "pd.DataFrame":
    """Return the table of JSON lines, or of a JSON array."""
    import pandas as pd

    raw = path.read_bytes()
    text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8-sig")
    # Not str.splitlines, which also splits at U+2028 and similar characters; JSON allows these inside a string.
    lines = (line for line in text.split("\n") if line.strip())
    rows = parse_json(text) if text.lstrip().startswith("[") else [parse_json(line) for line in lines]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("rows that are no JSON objects")
    return pd.DataFrame(rows)


def _joined(tables: "Mapping[str, pd.DataFrame]", column: str) -> "pd.DataFrame":
    """Return several tables as one, with the name of its table in a column of each row.

    Tables without a header have one column each, whose name is a request.
    """
    import pandas as pd

    parts = []
    for name, table in tables.items():
        part = table
        if len(table.columns) == 1 and table.columns[0] not in {"prompt", "Instruction"}:
            part = pd.DataFrame({"prompt": [str(table.columns[0]), *table.iloc[:, 0]]})
        parts.append(part.assign(**{column: name}))
    return pd.concat(parts, ignore_index=True)


def _fetch(entry: Benchmark, split: str | None) -> "pd.DataFrame":
    """Return the table of a benchmark from its source."""
    import pandas as pd
    from datasets import Dataset, load_dataset
    from huggingface_hub.constants import HF_HUB_OFFLINE

    chosen = split or entry.split
    try:
        if entry.source.startswith("https:"):
            address = entry.source.format(split=chosen)
            if HF_HUB_OFFLINE:
                raise DataError("HF_HUB_OFFLINE=1")
            return pd.read_csv(address, dtype=str, keep_default_na=False)
        # Of hex-phi every category is a split.
        loaded = load_dataset(entry.source, entry.config, split=chosen or None)
        if isinstance(loaded, Dataset):
            return pd.DataFrame(loaded.to_pandas())
        return _joined({name: part.to_pandas() for name, part in loaded.items()}, "split")
    except Exception as error:  # the client of the hub raises dozens of types; all mean that loading failed
        raise DataError(
            f"expected '{entry.name}' at {entry.source} (licence: {entry.licence}), found {type(error).__name__}: "
            f"{' '.join(str(error).split()):.120}; log in there if it asks, or give a local copy, path=FILE"
        ) from None
