"""Faults around the command line: full disks, links in a circle, too little memory, damaged folders; one line each."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from geomkit.cli.main import main
from geomkit.errors import DataError
from geomkit.experiments.cells import run_cell
from geomkit.experiments.grid import load_grid
from geomkit.experiments.records import check_record
from geomkit.training.checkpoints import last_checkpoint
from geomkit.utils import files
from tests.helpers.tiny import CONTROL, SAFETY, UTILITY, tiny_llama, tiny_tokenizer


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    root = tmp_path_factory.mktemp("given")
    tiny_llama().save_pretrained(root / "model")
    tiny_tokenizer().save_pretrained(root / "model")
    for name, rows in (("safety", SAFETY), ("utility", UTILITY), ("control", CONTROL)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def refusal(monkeypatch, capfd, *arguments):
    """Run the command line, which must end with one line on stderr and status 1; return the line."""
    monkeypatch.setattr("sys.argv", ["geomkit", *map(str, arguments)])
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        main()
    err = capfd.readouterr().err
    line = err.splitlines()[-1]
    assert ended.value.code == 1
    assert line.startswith("geomkit: ")
    assert "Traceback" not in err
    assert len(line) < 1000
    return line


def finetuning(given):
    return ["finetune", "--model", given / "model", "--train", given / "utility.jsonl", "--steps", 1, "--out", "run"]


def analysis(given):
    sets = ("safety", "utility", "control")
    return [
        "analyze",
        "--model",
        given / "model",
        *(part for name in sets for part in (f"--{name}", given / f"{name}.jsonl")),
    ]


@pytest.mark.parametrize("place", ["a", "a/inside", "nowhere", "nowhere/inside"])
def test_links_in_a_circle_or_to_nowhere_are_one_line_before_the_work(given, monkeypatch, capfd, place):
    Path("a").symlink_to("b")
    Path("b").symlink_to("a")
    Path("nowhere").symlink_to("missing")
    message = "found a link that leads nowhere, or in a circle"
    for option in ("--out", "--checkpoints"):
        assert message in refusal(monkeypatch, capfd, *finetuning(given), option, place)
    assert message in refusal(monkeypatch, capfd, *analysis(given), "--out", place)
    assert message in refusal(monkeypatch, capfd, "bench", "--out", place)
    for option in ("--model", "--train"):
        line = refusal(monkeypatch, capfd, *finetuning(given), option, Path("a").absolute())
        assert "expected a" in line
    assert sorted(path.name for path in Path().iterdir()) == ["a", "b", "nowhere"]


@pytest.mark.parametrize("command", [analysis, finetuning])
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(given, monkeypatch, capfd, command):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.Draft, "write", full)
    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    assert "No space left on device" in refusal(monkeypatch, capfd, *command(given))
    assert [path for path in Path().rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: not enough memory"),
    ],
)
def test_too_little_memory_says_what_to_lower(given, monkeypatch, capfd, error):
    def out_of_memory(*_, **__):
        raise error

    monkeypatch.setattr("geomkit.collection.streaming.run_pass", out_of_memory)
    assert "lower --tokens-per-batch or --batch-size" in refusal(monkeypatch, capfd, *analysis(given))


def test_an_error_of_geomkits_own_is_not_hidden(given, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("a defect")

    monkeypatch.setattr("geomkit.collection.streaming.run_pass", broken)
    monkeypatch.setattr("sys.argv", ["geomkit", *map(str, analysis(given))])
    with pytest.raises(RuntimeError, match="a defect"):
        main()


# ------------------------------------------------------------------------------------------------ damaged folders

DAMAGED = [b"", b"{", b"null", b"[]", b"3", b"\xff\xfe\x00", b"[" * 100_000, b"9" * 5000]


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_mark_of_a_run_is_one_line_and_nothing_is_removed(tmp_path, content):
    (tmp_path / "geomkit.json").write_bytes(content)
    (tmp_path / "checkpoint-1").mkdir()
    with pytest.raises(DataError, match=r"expected the settings of a run in .*geomkit\.json, found a damaged file"):
        last_checkpoint(tmp_path, {})
    assert (tmp_path / "checkpoint-1").is_dir()


def test_a_folder_in_place_of_the_mark_and_a_foreign_mark_are_one_line(tmp_path):
    (tmp_path / "geomkit.json").mkdir()
    with pytest.raises(DataError, match="expected a new or empty folder"):
        last_checkpoint(tmp_path, {})
    (tmp_path / "geomkit.json").rmdir()
    for content in ("{}", '{"geomkit": 3}', '{"geomkit": ["x"], "train": null}'):
        (tmp_path / "geomkit.json").write_text(content)
        with pytest.raises(DataError, match=r"to be begun by version|found a damaged file"):
            last_checkpoint(tmp_path, {})


GRID = '[arms]\nuntouched = { method = "untouched" }\n[[block]]\nscenarios = ["new-skill"]\nseeds = [0, 1]\n'


@pytest.fixture(scope="module")
def cell(tmp_path_factory):
    """A cell, its folder, its record, and the record of another cell."""
    folder = tmp_path_factory.mktemp("cells")
    (folder / "grid.toml").write_text("prompts = 1\n" + GRID)
    cells = load_grid(folder / "grid.toml").cells
    return cells[0], folder, *(run_cell(each, folder) for each in cells)


def test_a_damaged_or_foreign_record_of_a_cell_is_run_again(cell, monkeypatch):
    one, folder, record, other = cell
    check_record(record)
    path = folder / "cells" / one.file_name
    foreign = [other, {**record, "cell": {}}, {**record, "flags": None}, {**record, "numbers": []}, {**record, "x": 1}]
    runs = []
    monkeypatch.setattr("geomkit.experiments.cells._run", lambda *_: runs.append(1) or {"error": "run again"})
    for content in (*DAMAGED, b"{}", *(json.dumps(part).encode() for part in foreign)):
        path.write_bytes(content)
        assert run_cell(one, folder)["error"] == "run again"
    assert len(runs) == len(DAMAGED) + 1 + len(foreign)
    path.write_text(json.dumps(record))
    assert run_cell(one, folder) == record


def test_a_folder_in_place_of_a_cell_is_one_line(cell, monkeypatch):
    one, folder, *_ = cell
    path = folder / "cells" / one.file_name
    path.unlink(missing_ok=True)
    path.mkdir()
    monkeypatch.setattr("geomkit.experiments.cells._run", lambda *_: {"error": "run again"})
    try:
        with pytest.raises(DataError, match="found a folder; move it away"):
            run_cell(one, folder)
    finally:
        path.rmdir()


def test_a_grid_that_is_a_folder_names_the_shipped_grids(tmp_path):
    with pytest.raises(DataError, match=r"a shipped grid \(default, english, limits, smoke\), found"):
        load_grid(tmp_path)
