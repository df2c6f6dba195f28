"""Runs that cannot be spoiled: a folder has one run at a time, and only sound checkpoints are resumed."""

import json
import subprocess
import sys
import time

import pytest
import torch
from transformers import TrainerCallback

import geomkit as gk
from geomkit.cli.main import main
from geomkit.errors import DataError, GeomkitError
from geomkit.experiments import cells
from geomkit.experiments.grid import load_grid
from geomkit.spf.settings import SPF
from geomkit.training.checkpoints import MARK, run_folder
from tests.helpers.spf_training import weights_of
from tests.helpers.tiny import SAFETY, UTILITY, tiny_llama, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def finetune(folder, *callbacks, **changes):
    settings = {"steps": 4, "save_steps": 1, "learning_rate": 1e-2, "batch_size": 2} | changes
    spf = SPF(SAFETY, rule="rank1", anchors_per_step=2)
    return gk.finetune(
        tiny_llama(), TOKENIZER, UTILITY, spf=spf, checkpoints=folder, callbacks=callbacks, progress=False, **settings
    )


class Stops(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step > self.step:
            raise KeyboardInterrupt


def interrupted(folder, step=2):
    with pytest.raises(KeyboardInterrupt):
        finetune(folder, Stops(step))
    return folder / f"checkpoint-{step}"


def same(a, b):
    a, b = weights_of(a.model), weights_of(b.model)
    return all(torch.equal(a[name], b[name]) for name in a)


HOLDS = """
import sys, time, pathlib
from geomkit.training.checkpoints import run_folder
with run_folder(pathlib.Path(sys.argv[1])):
    pathlib.Path(sys.argv[1], "held").touch()
    time.sleep(60)
"""


def test_a_second_run_on_a_folder_in_use_is_refused_and_changes_nothing(tmp_path):
    folder = tmp_path / "run"
    other = subprocess.Popen([sys.executable, "-c", HOLDS, str(folder)])  # noqa: S603
    try:
        while not (folder / "held").exists():
            assert other.poll() is None
            time.sleep(0.05)
        with pytest.raises(DataError, match=r"no other run is writing to, found .*run in use"):
            finetune(folder)
        assert [path.name for path in folder.iterdir()] == ["held"]
    finally:
        other.kill()
        other.wait()
    (folder / "held").unlink()
    assert finetune(folder).certificate.steps == 4  # the lock ended with the process


def test_a_run_that_never_began_leaves_no_folder(tmp_path):
    with run_folder(tmp_path / "a" / "run"):
        pass
    assert list((tmp_path / "a").iterdir()) == []


def test_a_folder_that_cannot_be_made_is_refused_in_one_line(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(DataError, match=r"expected a folder for checkpoints at .*loop"):
        finetune(tmp_path / "loop")


class Spoils(TrainerCallback):
    """Writes a NaN into a weight after a step, just before it is saved."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                kwargs["model"].lm_head.weight[0, 0] = torch.nan


def test_a_checkpoint_of_weights_that_are_not_finite_is_not_resumed(tmp_path):
    whole = gk.finetune(
        tiny_llama(), TOKENIZER, UTILITY, checkpoints=tmp_path / "whole", steps=4, save_steps=1, progress=False
    )
    with pytest.raises(GeomkitError):
        gk.finetune(
            tiny_llama(), TOKENIZER, UTILITY, checkpoints=tmp_path / "run", steps=4, save_steps=1, progress=False,
            callbacks=[Spoils(3)],
        )  # fmt: skip
    assert not (tmp_path / "run" / "checkpoint-3" / MARK).exists()
    again = gk.finetune(
        tiny_llama(), TOKENIZER, UTILITY, checkpoints=tmp_path / "run", steps=4, save_steps=1, progress=False
    )
    assert same(whole, again)


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "model.safetensors", "trainer_state.json", "spf.safetensors"]
)
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_damaged_checkpoint_is_kept_aside_and_the_one_before_is_resumed(name, damage, tmp_path, caplog):
    checkpoint = interrupted(tmp_path / "run")
    file = checkpoint / name
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-7])
    result = finetune(tmp_path / "run")
    assert f"expected {name} of" in caplog.text
    assert (tmp_path / "run" / "damaged-checkpoint-2").is_dir()
    assert result.certificate.steps == 4
    assert same(result, finetune(tmp_path / "whole"))


@pytest.mark.parametrize("content", [b"", b"null", b"[]", b"{", b"\xff\xfe", b"[" * 100_000, b'{"files": 3}'])
def test_a_damaged_mark_is_no_mark_of_a_sound_checkpoint(content, tmp_path):
    checkpoint = interrupted(tmp_path / "run")
    (checkpoint / MARK).write_bytes(content)
    result = finetune(tmp_path / "run")
    assert [record.step for record in result.certificate.records] == [1, 2, 3, 4]


@pytest.mark.parametrize("content", [b"", b"null", b"[]", b"{", b"\xff\xfe", b"[" * 100_000])
def test_damaged_settings_of_a_run_are_refused_in_one_line(content, tmp_path):
    interrupted(tmp_path / "run")
    (tmp_path / "run" / MARK).write_bytes(content)
    with pytest.raises(DataError, match="expected the settings of a run"):
        finetune(tmp_path / "run")


def test_the_mark_lists_every_file_with_its_size(tmp_path):
    finetune(tmp_path)
    checkpoint = tmp_path / "checkpoint-4"
    listed = json.loads((checkpoint / MARK).read_text())["files"]
    assert listed == {path.name: path.stat().st_size for path in checkpoint.iterdir() if path.name != MARK}
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json", "spf.safetensors"} <= set(listed)


# ------------------------------------------------------------------------------------------------ cells of a grid

GRID = """
prompts = 4
[arms]
untouched = { method = "untouched" }
[[block]]
scenarios = ["identity-shift"]
arms = ["untouched"]
"""


@pytest.fixture
def cell(tmp_path):
    (tmp_path / "one.toml").write_text(GRID)
    (only,) = load_grid(tmp_path / "one.toml").cells
    return only


def stored(cell, folder, content):
    path = folder / "cells" / cell.file_name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


def counted(monkeypatch, result):
    """Let cells give a result at once, and count how many are run."""
    ran = []
    monkeypatch.setattr(cells, "_cached_organism", lambda *_: None)

    def run(cell, organism):
        ran.append(cell)
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(cells, "_run", run)
    return ran


RESULT = {"numbers": {}, "flags": {"refusal": "11"}, "attacks": {}, "along": []}


@pytest.mark.parametrize(
    "content",
    [b"", b"null", b"[]", b"{}", b"\xff", b"[" * 100_000, b'{"cell": {"seed": 9}, "flags": {}}', b'{"cell": 1}'],
)
def test_a_stored_cell_that_is_not_the_cells_record_is_run_again(content, cell, tmp_path, monkeypatch, caplog):
    ran = counted(monkeypatch, RESULT)
    path = stored(cell, tmp_path, content)
    assert cells.run_cell(cell, tmp_path)["flags"] == RESULT["flags"]
    assert ran == [cell]
    assert "is run again" in caplog.text
    assert json.loads(path.read_text())["cell"] == cell.describe()
    cells.run_cell(cell, tmp_path)
    assert len(ran) == 1  # a sound record is kept


def test_a_cell_that_failed_is_run_again(cell, tmp_path, monkeypatch):
    counted(monkeypatch, GeomkitError("the loss is NaN"))
    assert cells.run_cell(cell, tmp_path)["error"] == "the loss is NaN"
    ran = counted(monkeypatch, RESULT)
    assert "error" not in cells.run_cell(cell, tmp_path)
    assert len(ran) == 1


def test_a_folder_in_place_of_a_cell_is_refused_in_one_line(cell, tmp_path):
    (tmp_path / "cells" / cell.file_name).mkdir(parents=True)
    with pytest.raises(DataError, match=r"expected a file at .*found a folder"):
        cells.run_cell(cell, tmp_path)


def test_a_grid_with_failures_names_them_and_exits_with_an_error(cell, tmp_path, monkeypatch, capsys):
    counted(monkeypatch, GeomkitError("the loss is NaN"))
    monkeypatch.setattr(
        sys, "argv",
        ["geomkit", "bench", "--grid", str(tmp_path / "one.toml"), "--out", str(tmp_path), "--processes", "1"],
    )  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    words = " ".join(capsys.readouterr().err.split())
    assert "1 of 1 cells failed" in words
    assert "scenario=identity-shift" in words
    assert "the loss is NaN" in words
    assert (tmp_path / "results.jsonl.gz").is_file()
