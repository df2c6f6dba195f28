"""A folder for checkpoints belongs to one run of one version of geomkit; runs that never began claim none."""

import json

import pytest
import torch

from geomkit.errors import DataError
from geomkit.spf.settings import SPF
from geomkit.training.checkpoints import MARK, MarkBegun, last_checkpoint
from geomkit.training.finetune import finetune
from geomkit.version import __version__
from tests.helpers.tiny import SAFETY, UTILITY, tiny_llama, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
QUICK = {"steps": 2, "learning_rate": 1e-2, "batch_size": 4, "save_steps": 1, "progress": False}


def begin(folder, settings):
    MarkBegun(folder, settings).on_train_begin(None, None, None)


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_last_complete_checkpoint_is_returned_and_incomplete_ones_are_removed(tmp_path):
    begin(tmp_path, {"steps": 9})
    for step in (2, 10, 11):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}" / MARK).write_text('{"files": {}}')
    (tmp_path / "runs").mkdir()  # of tensorboard
    assert last_checkpoint(tmp_path, {"steps": 9}) == tmp_path / "checkpoint-10"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-2", MARK, "runs"]
    assert last_checkpoint(tmp_path / "new", {"steps": 9}) is None
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("version", "found"), [(None, "an earlier version"), ("0.0.1", "version 0.0.1")], ids=["none", "other"]
)
def test_a_run_of_another_version_is_refused_before_its_settings_are_compared(tmp_path, version, found):
    old = {"learning_rate": 1e-4, "warmup_steps": 0, "scheduler": "linear", "optimizer": "adamw_torch"}
    (tmp_path / MARK).write_text(json.dumps(old if version is None else {"geomkit": version, **old}))
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "spf.jsonl").write_text("{}\n")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError) as caught:
        finetune(tiny_llama(), TOKENIZER, UTILITY, SPF(SAFETY), checkpoints=tmp_path, **QUICK)
    message = str(caught.value)
    assert f"begun by version {__version__} of geomkit, found {found}; finish it with that version" in message
    assert "\n" not in message
    assert sorted(tmp_path.rglob("*")) == before


def test_the_version_and_all_settings_are_in_the_folder(tmp_path):
    finetune(tiny_llama(), TOKENIZER, UTILITY, checkpoints=tmp_path / "run", weight_decay=0.1, **QUICK)
    saved = json.loads((tmp_path / "run" / MARK).read_text())
    assert next(iter(saved.items())) == ("geomkit", __version__)
    assert saved["weight_decay"] == 0.1
    assert {"learning_rate", "steps", "epochs", "batch_size", "seed", "optim", "train", "model", "spf"} <= set(saved)


def test_a_default_may_be_written_out_when_a_run_is_resumed(tmp_path):
    first = finetune(tiny_llama(), TOKENIZER, UTILITY, checkpoints=tmp_path / "run", **QUICK)
    again = finetune(tiny_llama(), TOKENIZER, UTILITY, checkpoints=tmp_path / "run", seed=0, report_to="none", **QUICK)
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True))
    for changed in ({"seed": 1}, {"weight_decay": 0.1}):
        with pytest.raises(DataError, match=f"to go on with {next(iter(changed))}="):
            finetune(tiny_llama(), TOKENIZER, UTILITY, checkpoints=tmp_path / "run", **QUICK | changed)


@pytest.mark.parametrize(
    "refused",
    [{"lr_scheduler_type": "nope"}, {"optim": "adamw_bnb_8bit"}, {"report_to": "nope"}, {"warmup_steps": -1}],
    ids=str,
)
def test_a_run_whose_arguments_are_refused_claims_no_folder(tmp_path, refused):
    with pytest.raises(DataError):
        finetune(tiny_llama(), TOKENIZER, UTILITY, SPF(SAFETY), checkpoints=tmp_path / "run", **QUICK | refused)
    assert not content(tmp_path)
    result = finetune(tiny_llama(), TOKENIZER, UTILITY, SPF(SAFETY), checkpoints=tmp_path / "run", **QUICK)
    assert result.certificate.steps == 2
