"""Figures in files: every kind of file, and one line where it cannot be written."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from geomkit.errors import DataError
from geomkit.plots.saving import save_figure
from geomkit.stats.proportions import Rate
from geomkit.training.evaluation import Evaluation
from geomkit.training.result import FineTuneResult
from geomkit.utils.figures import FIGURE_SUFFIXES, DrawnResult
from tests.helpers.every_result import result_classes
from tests.helpers.figures import certificate, conflict

BROWSER = any(map(shutil.which, ("chromium", "google-chrome", "chrome")))
BEGINNINGS = {".png": b"\x89PNG", ".svg": b"<svg", ".pdf": b"%PDF"}


@pytest.mark.skipif(not BROWSER, reason="no Chromium")
@pytest.mark.parametrize("suffix", BEGINNINGS)
def test_a_picture_is_written(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("kaleido")
    path = conflict().save(tmp_path / "new" / f"x{suffix}")
    assert path.read_bytes().startswith(BEGINNINGS[suffix])
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_page_holds_the_figure_and_what_draws_it(tmp_path: Path) -> None:
    page = certificate().save(tmp_path / "x.HTML").read_text("utf-8")
    assert "What each update does to the safety loss" in page
    assert "<script src" not in page
    assert len(page) > 2_000_000  # plotly.js is inside


@pytest.mark.parametrize("name", ["x.gif", "x", ".png"])
def test_other_files_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"ends in .png, .svg, .pdf, .html, found '.*'; rename it") as error:
        conflict().save(tmp_path / name)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_without_kaleido_or_a_browser_one_line_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_browser(*_: object, **__: object) -> bytes:
        raise RuntimeError("\n\nKaleido requires Google Chrome to be installed.\nRun this:\n")

    figure = SimpleNamespace(to_image=no_browser)
    with monkeypatch.context() as patch:
        patch.setattr("geomkit.plots.saving.find_spec", lambda _: None)
        with pytest.raises(
            DataError, match=r"expected kaleido to draw x.png, found none; pip install 'geomkit\[figures\]'"
        ):
            save_figure(figure, tmp_path / "x.png")
    monkeypatch.setattr("geomkit.plots.saving.find_spec", lambda _: sys)
    with pytest.raises(DataError, match=r"expected Chrome or Chromium to draw x.png, found none; install one") as error:
        save_figure(figure, tmp_path / "x.png")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"expected to write .*x.html, found .*; choose another place"):
        certificate().save(tmp_path / "file" / "x.html")


def test_results_that_save_something_else_tell_a_figure_by_its_name(tmp_path: Path) -> None:
    history = pd.DataFrame({"step": [1, 2], "loss": [2.0, 1.0]})
    run = FineTuneResult(None, history, None, 1.0)
    assert "Training loss" in run.save(tmp_path / "h.html").read_text("utf-8")
    with pytest.raises(DataError, match=r"expected a tokenizer for the checkpoint in '.*'"):
        run.save(tmp_path / "model")
    evaluation = Evaluation(Rate(9, 10), Rate(0, 10), {}, pd.DataFrame({"set": ["forbidden"]}))
    assert "Refusal, over-refusal" in evaluation.save(tmp_path / "e.html").read_text("utf-8")
    assert json.loads(evaluation.save(tmp_path / "e.json").read_text("utf-8"))["measures"]


def test_every_result_with_a_figure_can_be_saved() -> None:
    drawn = {cls.__name__ for cls in result_classes() if hasattr(cls, "plot")}
    assert len(drawn) >= 18
    assert all(issubclass(cls, DrawnResult) for cls in result_classes() if cls.__name__ in drawn)
    assert len(FIGURE_SUFFIXES) == 4
