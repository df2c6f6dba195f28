"""Reading of files into rows: JSON lines, JSON array, CSV, TSV, Parquet, text with a request a line; each also .gz."""

import csv
import gzip
import io
import zlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from geomkit.errors import DataError
from geomkit.utils.files import parse_json
from geomkit.utils.progress import with_bar

Row = dict[str, Any]


def read_rows(path: Path, known: Collection[str] = (), *, progress: bool = False) -> list[Row]:
    """Return the rows of a file, whose format is that of its ending; a file with another ending has JSON lines.

    Args:
        path: A file; ``.gz`` behind the ending says that it is compressed.
        known: Names of columns, in lower case, by which the header of a CSV file is told from its first row. The
            columns of a file without header are named ``"0"``, ``"1"``, ….
        progress: Show a bar, in lines, if a file of JSON lines takes longer than five seconds.

    Returns:
        One mapping of column to value for each row.

    Raises:
        DataError: If the file cannot be read in its format or has no row.
    """
    name = path.name.lower()
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path}: expected a whole .gz file, found {error}; copy it again") from None
    ending = Path(name.removesuffix(".gz")).suffix
    if ending == ".parquet":
        rows = _read_parquet(content, path)
    else:
        text = _decoded(content, path)
        reader = _READERS.get(ending)
        rows = _read_json_lines(text, path, known, progress) if reader is None else reader(text, path, known)
    if not rows:
        raise DataError(f"expected at least one example in {path}, found an empty file; write a row a line")
    return rows


def _decoded(content: bytes, path: Path) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: expected UTF-8 text, found {error.reason} at byte {error.start}; save it as UTF-8"
        ) from None


def _read_parquet(content: bytes, path: Path) -> list[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows: list[Row] = pq.read_table(io.BytesIO(content)).to_pylist()
    except pa.ArrowException as error:
        raise DataError(
            f"{path}: expected a Parquet file, found {error!s:.200}; copy it again, or give it the ending of its format"
        ) from None
    return rows


def _parsed(text: str, where: str, expected: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise DataError(
            f"{where}: expected {expected}, found {error}; correct it, or give the file the ending of its format"
        ) from None


def _read_json_lines(text: str, path: Path, known: Collection[str], progress: bool = False) -> list[Row]:
    if text.lstrip().startswith("["):
        return _read_json(text, path, known)
    rows = []
    # Not str.splitlines, which also splits at U+2028 and similar characters; JSON allows these inside a string.
    for number, line in enumerate(with_bar(text.split("\n"), "read", "line", progress), start=1):
        if not line.strip():
            continue
        row = _parsed(line, f"{path}, line {number}", "one JSON object a line")
        if not isinstance(row, dict):
            raise DataError(
                f"{path}, line {number}: expected a JSON object, found {type(row).__name__}; write e.g. "
                '{"prompt": …, "response": …}'
            )
        rows.append(row)
    return rows


def _read_json(text: str, path: Path, known: Collection[str]) -> list[Row]:
    if not text.strip():
        return []
    try:
        content = parse_json(text)
    except ValueError:
        if text.lstrip().startswith("{"):  # JSON lines under another ending
            return _read_json_lines(text, path, known)
        content = _parsed(text, str(path), "a JSON array of objects")
    rows = content if isinstance(content, list) else [content]
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(
                f"{path}, row {index}: expected a JSON object, found {type(row).__name__}; write e.g. "
                '{"prompt": …, "response": …}'
            )
    return rows


def _read_lines(text: str, path: Path, known: Collection[str]) -> list[Row]:  # noqa: ARG001
    return [{"prompt": line.strip()} for line in text.split("\n") if line.strip()]


def _read_separated(text: str, path: Path, known: Collection[str], delimiter: str = ",") -> list[Row]:
    """Return the rows of a CSV file, with or without header."""
    head = text.split("\n", 1)[0]
    if delimiter == "," and "," not in head and ";" in head and _names(head.split(";")) & set(known):
        delimiter = ";"
    try:
        table = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        lines = [(table.line_num, cells) for cells in table if any(cell.strip() for cell in cells)]
    except csv.Error as error:
        raise DataError(
            f"{path}: expected a CSV file, found {error} in line {table.line_num}; close each quoted cell, and double "
            "a quote in it"
        ) from None
    if not lines:
        return []
    header = [cell.strip() for cell in lines[0][1]]
    if _names(header) & set(known):
        lines = lines[1:]
    elif len(header) == 1 and not any(" " in cells[0] for _, cells in lines[:1]):
        raise DataError(
            f"{path}: expected a header or a request in the first row, found '{header[0]:.40}'; name the column of the "
            f'requests, as columns={{"prompt": "{header[0]:.40}"}}, or its number, columns={{"prompt": 0}}'
        )
    elif len(header) == 1:
        header = ["prompt"]
    else:
        header = [str(index) for index in range(len(header))]
    if twice := [name for place, name in enumerate(header) if name and name in header[:place]]:
        raise DataError(f"{path}: expected columns with different names, found '{twice[0]}' twice; rename one of them")
    for number, cells in lines:
        if len(cells) != len(header):
            raise DataError(f"{path}, line {number}: expected {len(header)} cells, found {len(cells)}; quote commas")
    return [dict(zip(header, cells, strict=True)) for _, cells in lines]


def _names(cells: list[str]) -> set[str]:
    return {cell.strip().strip('"').lower() for cell in cells}


def _read_tabs(text: str, path: Path, known: Collection[str]) -> list[Row]:
    return _read_separated(text, path, known, "\t")


_READERS: Mapping[str, Callable[[str, Path, Collection[str]], list[Row]]] = {
    ".json": _read_json, ".csv": _read_separated, ".tsv": _read_tabs, ".txt": _read_lines,
}  # fmt: skip
