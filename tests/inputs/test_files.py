"""Every file format gives the same rows, as it is and compressed; what a file lacks is said with its place."""

import csv
import gzip
import io
import json

import pandas as pd
import pytest

from geomkit.errors import DataError
from geomkit.inputs.examples import load_examples
from geomkit.inputs.files import read_rows

ROWS = [{"prompt": "Hi, you", "response": 'He said "hello"\nand left'}, {"prompt": "Bye", "response": "Grüße 你好"}]


def separated(delimiter, *, header=True):
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=delimiter)
    writer.writerows([list(ROWS[0])] * header + [list(row.values()) for row in ROWS])
    return file.getvalue().encode()


def parquet():
    file = io.BytesIO()
    pd.DataFrame(ROWS).to_parquet(file)
    return file.getvalue()


LINES = "\n".join(json.dumps(row) for row in ROWS).encode()
FILES = {
    "rows.jsonl": LINES,
    "rows.ndjson": LINES,
    "rows.json": json.dumps(ROWS, indent=2).encode(),
    "lines.json": LINES,
    "array.jsonl": json.dumps(ROWS).encode(),
    "rows.csv": separated(","),
    "semicolons.csv": separated(";"),
    "rows.tsv": separated("\t"),
    "rows.parquet": parquet(),
}


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_the_same_rows(tmp_path, name, compressed):
    path = tmp_path / (name + ".gz" * compressed)
    path.write_bytes(gzip.compress(FILES[name]) if compressed else FILES[name])
    assert read_rows(path, {"prompt"}) == ROWS
    messages = load_examples(path)["messages"]
    assert [[message["content"] for message in row] for row in messages] == [list(row.values()) for row in ROWS]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.tsv"])
def test_a_byte_order_mark_and_carriage_returns_are_no_text(tmp_path, name):
    path = tmp_path / name
    content = FILES[name].replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    path.write_bytes(b"\xef\xbb\xbf" + content)
    rows = read_rows(path, {"prompt"})
    assert [row["prompt"] for row in rows] == ["Hi, you", "Bye"]
    assert list(rows[0]) == ["prompt", "response"]


def test_text_has_a_request_a_line(tmp_path):
    path = tmp_path / "requests.txt"
    path.write_bytes("How do I knit?\r\n\r\nWhat is 你好, please?\n".encode())
    assert read_rows(path) == [{"prompt": "How do I knit?"}, {"prompt": "What is 你好, please?"}]
    assert load_examples(path)[1]["messages"] == [{"role": "user", "content": "What is 你好, please?"}]


def test_a_csv_file_without_header_is_told_by_its_first_row(tmp_path):
    path = tmp_path / "requests.csv"
    path.write_text("Knit a hat for a dog\nPaint a fence\n")  # one column of requests
    assert [row["prompt"] for row in read_rows(path, {"prompt"})] == ["Knit a hat for a dog", "Paint a fence"]
    path.write_text("Knit\nPaint\n")
    with pytest.raises(
        DataError, match=r"expected a header or a request in the first row, found 'Knit'; .*\"prompt\": 0"
    ):
        load_examples(path)
    path.write_bytes(separated(",", header=False))
    named = load_examples(path, columns={"prompt": 0, "response": 1})
    assert [message["content"] for message in named[0]["messages"]] == list(ROWS[0].values())
    with pytest.raises(DataError, match=r"requests.csv: expected the columns .*found \['0', '1'\]; say which column"):
        load_examples(path)


def test_a_header_that_only_the_user_knows_is_a_header(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("frage,antwort\nHi,Hello\n")
    named = load_examples(path, columns={"prompt": "frage", "response": "antwort"})
    assert [message["content"] for message in named[0]["messages"]] == ["Hi", "Hello"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.csv", b"prompt,response\nHi,you,Hello\n", "rows.csv, line 2: expected 2 cells, found 3; quote commas"),
        ("rows.csv", b'prompt,response\n"Hi,Hello\n', "rows.csv: expected a CSV file, found unexpected end of data"),
        ("rows.csv", b"", "expected at least one example in .*rows.csv, found an empty file"),
        ("rows.csv", b"prompt\n", "expected at least one example in .*rows.csv, found an empty file"),
        ("rows.json", b"[1]", "rows.json, row 0: expected a JSON object, found int"),
        ("rows.json", b"[{]", "rows.json: expected a JSON array of objects, found Expecting property name"),
        (
            "rows.json",
            b"[" * 100_000,
            "rows.json: expected a JSON array of objects, found JSON that is nested too deeply",
        ),
        (
            "rows.jsonl",
            b'{"a": ' + b"1" * 5000 + b"}",
            "line 1: expected one JSON object a line, found Exceeds the limit",
        ),
        ("rows.parquet", b"PAR1", "rows.parquet: expected a Parquet file, found"),
        ("rows.jsonl.gz", gzip.compress(LINES, mtime=0)[:-20], "rows.jsonl.gz: expected a whole .gz file, found"),
        ("rows.csv", "prompt\nGrüße\n".encode("latin-1"), "rows.csv: expected UTF-8 text, found"),
    ],
)
def test_a_damaged_file_is_named_with_the_place(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_examples(path)
