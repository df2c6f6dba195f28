"""A file or folder that the disk does not let geomkit write or read is one line of error that says what to do."""

import errno
import os

import pandas as pd
import pytest

import geomkit as gk
from geomkit.errors import DataError, SPFError
from geomkit.experiments.grid import load_grid
from geomkit.experiments.insights import load_insights, measure_insights, read_numbers
from geomkit.experiments.results import load_results
from geomkit.experiments.running import run_experiments
from geomkit.experiments.screening.results import load_screening_study
from geomkit.plots.report_pages import write_result
from geomkit.screening.screening import load_screening
from geomkit.spf.step_record import Log
from geomkit.stats.proportions import Rate
from geomkit.svd.subspaces import load_subspace
from geomkit.training import checkpoints
from geomkit.training.evaluation import Evaluation, load_evaluation
from geomkit.training.result import FineTuneResult, new_or_empty_folder
from geomkit.utils import files
from tests.helpers.figures import certificate, experiment
from tests.helpers.saves import every_form
from tests.helpers.tiny import tiny_llama, tiny_tokenizer

TOO_LONG = 300 * "x"
"""A name that no file can have: refused to every user, also to root, as a folder without permission is to others."""


def evaluation():
    half = Rate(1, 2)
    return Evaluation(half, half, {}, pd.DataFrame({"set": ["forbidden"]}))


def fine_tuned():
    return FineTuneResult(tiny_llama(), pd.DataFrame({"step": [1], "loss": [1.0]}), None, 1.0)


WRITERS = {
    "figure": lambda place: certificate().save(place.with_suffix(".html")),
    "report": lambda place: write_result(certificate(), place.with_suffix(".html")),
    "evaluation": lambda place: evaluation().save(place),
    "results": lambda place: experiment().save(place),
    "study": lambda place: load_screening_study().save(place),
    "fine-tune": lambda place: fine_tuned().save(place, tiny_tokenizer()),
    "experiment": lambda place: run_experiments("smoke", place),
    "insights": lambda place: measure_insights("small", place, examples=4),
    "certificate": Log.begun,
}

READERS = {
    "examples": gk.load_examples,
    "benchmark": lambda place: gk.load_examples("xstest", path=place),
    "model": gk.load_model,
    "grid": load_grid,
    "results": load_results,
    "gradients": gk.load_gradients,
    "subspace": load_subspace,
    "screening": load_screening,
    "insights": lambda place: load_insights("small", place),
    "certificate": lambda place: Log.resumed(place, 1),
    "new certificate": Log.begun,
    "new checkpoint": new_or_empty_folder,
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_place_below_a_file_is_one_line(tmp_path, write):
    (tmp_path / "file").touch()
    place = tmp_path / "file" / "x"
    with pytest.raises(
        DataError, match=r"^expected to write .*x.*, found a file, or a link .*, where a folder .*; choose another"
    ):
        write(place)
    assert (tmp_path / "file").is_file()


def test_a_folder_in_place_of_a_file_is_one_line(tmp_path):
    with pytest.raises(DataError, match=r"^expected to write .*, found Is a directory; choose another place$"):
        evaluation().save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_gradients_cannot_be_saved_to_is_one_line(tmp_path):
    with pytest.raises(DataError, match=r"^expected to write .*, found File name too long; choose another place$"):
        every_form().save(tmp_path / TOO_LONG)


def test_of_a_full_disk_is_said_that_it_needs_space(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.Draft, "write", full)
    with pytest.raises(DataError, match=r"No space left on device; free some space, or choose another place$"):
        evaluation().save(tmp_path / "x")


def test_a_certificate_whose_folder_is_gone_is_one_line(tmp_path):
    log = Log.begun(tmp_path / "folder" / "spf.jsonl")
    (tmp_path / "folder" / "spf.jsonl").unlink()
    (tmp_path / "folder").rmdir()
    with pytest.raises(DataError, match=r"^expected to write .*spf.jsonl, found No such file or directory; choose"):
        log.write(certificate().records[0])


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_a_path_that_cannot_be_read_is_one_line(tmp_path, read):
    with pytest.raises(DataError, match=r"^expected to read .*, found File name too long; check the path and its perm"):
        read(tmp_path / TOO_LONG)


def test_a_folder_for_checkpoints_that_cannot_be_looked_at_is_one_line(tmp_path, monkeypatch):
    def refused(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    wanted = r"^expected a folder for checkpoints at .*, found {}; choose another$"
    with (
        pytest.raises(DataError, match=wanted.format("File name too long")),
        checkpoints.run_folder(tmp_path / TOO_LONG),
    ):
        pass
    monkeypatch.setattr(checkpoints, "locked", refused)
    with pytest.raises(DataError, match=wanted.format("Permission denied")), checkpoints.run_folder(tmp_path):
        pass


def test_a_certificate_that_is_no_text_is_one_line(tmp_path):
    (tmp_path / "spf.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(
        SPFError, match=r"expected a certificate at .*, found UnicodeDecodeError: .*; put the file back"
    ):
        Log.resumed(tmp_path / "spf.jsonl", 1)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"a,b\n1,2,3\n4,5,6,7\n"])
@pytest.mark.parametrize("name", ["insights.csv", "insights.csv.gz"])
def test_stored_numbers_that_are_damaged_are_one_line(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=r"found a damaged file .*; delete it and run `geomkit organism insights`"):
        read_numbers(tmp_path / name)


def test_json_that_is_missing_says_what_to_give(tmp_path):
    with pytest.raises(
        DataError, match=r"found No such file or directory; give a file that geomkit evaluate --json or"
    ):
        load_evaluation(tmp_path / "x.json")
