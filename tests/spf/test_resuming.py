"""A run that was interrupted goes on to the weights it would have had, to the bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from geomkit.errors import DataError, SPFError
from geomkit.inputs.tokens import encode
from geomkit.spf.callback import SPFCallback
from geomkit.spf.checkpoint_state import STATE_FILE, load_state
from geomkit.spf.settings import SPF
from geomkit.training.finetune import finetune
from tests.helpers.spf_training import TOKENIZER
from tests.helpers.tiny import CONTROL, SAFETY, UTILITY, tiny_llama

SETTINGS = {"learning_rate": 1e-2, "steps": 6, "batch_size": 2, "save_steps": 2, "progress": False}


def protection(**settings):
    return SPF(SAFETY, anchors_per_step=2, **settings)


class Stop(TrainerCallback):
    """Break off after a step, as a pulled plug would."""

    def __init__(self, after):
        self.after = after

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.after:
            raise KeyboardInterrupt


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rule": "left", "rank": 2, "refresh_energy": 0.5},
        {"rule": "null-space", "rank": 2},
        {"rule": "safegrad"},
        {"rule": "cone", "benign": CONTROL, "refresh_every": 3},
    ],
    ids=["rank1", "kept subspace", "null-space", "safegrad", "cone with fence"],
)
def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(tmp_path, settings):
    model = tiny_llama(attention_dropout=0.1)
    whole = finetune(model, TOKENIZER, UTILITY, protection(**settings), checkpoints=tmp_path / "a", **SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        finetune(
            model, TOKENIZER, UTILITY, protection(**settings), checkpoints=tmp_path / "b", callbacks=[Stop(5)],
            **SETTINGS,
        )  # fmt: skip
    resumed = finetune(model, TOKENIZER, UTILITY, protection(**settings), checkpoints=tmp_path / "b", **SETTINGS)
    assert same(whole.model, resumed.model)
    assert resumed.history["step"].tolist() == [1, 2, 3, 4, 5, 6]
    assert resumed.certificate.steps == 6
    assert (tmp_path / "a" / "spf.jsonl").read_text() == (tmp_path / "b" / "spf.jsonl").read_text()
    assert resumed.certificate.records[5].first_order == whole.certificate.records[5].first_order


KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from transformers import Trainer
from tests.spf.test_resuming import *
save = Trainer._save_optimizer_and_scheduler
def die(self, folder):
    if self.state.global_step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, folder)
Trainer._save_optimizer_and_scheduler = die
finetune(tiny_llama(), TOKENIZER, UTILITY, protection(), checkpoints=sys.argv[1], **SETTINGS)
"""


def test_a_finished_run_that_is_started_again_takes_no_step_and_is_the_same(tmp_path):
    settings = {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "save_steps": 1, "checkpoints": tmp_path}
    told = []

    class Told(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            told.append(state.global_step)

    first, again = (
        finetune(
            tiny_llama(), TOKENIZER, UTILITY, SPF(SAFETY, rule="left", rank=rank), steps=2, batch_size=2,
            progress=False, callbacks=[Told()], **settings,
        )
        for rank in (np.int64(2), 2)
    )  # fmt: skip
    assert told == [2, 2]
    assert (first.steps, again.steps) == (2, 2)
    assert again.history["loss"].tolist() == first.history["loss"].tolist()
    for measure in ("step", "anchor_loss", "first_order_raw", "update_norm"):
        assert again.certificate.to_frame()[measure].tolist() == first.certificate.to_frame()[measure].tolist()
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True))
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


def test_a_run_that_was_killed_in_the_middle_of_a_save_goes_on_from_the_one_before(tmp_path):
    folder = tmp_path / "run"
    done = subprocess.run(  # noqa: S603 - our own code
        [sys.executable, "-c", KILLED, str(folder)], cwd=Path(__file__).parents[2], env={**os.environ}, check=False,
        capture_output=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoint-2",
        "checkpoint-4",
        "geomkit.json",
        "spf.jsonl",
    ]
    assert not (folder / "checkpoint-4" / STATE_FILE).exists()
    resumed = finetune(tiny_llama(), TOKENIZER, UTILITY, protection(), checkpoints=folder, **SETTINGS)
    whole = finetune(tiny_llama(), TOKENIZER, UTILITY, protection(), checkpoints=tmp_path / "whole", **SETTINGS)
    assert same(whole.model, resumed.model)
    assert [json.loads(line)["step"] for line in (folder / "spf.jsonl").read_text().splitlines()] == [1, 2, 3, 4, 5, 6]


def test_a_run_with_other_settings_is_refused_and_nothing_is_lost(tmp_path):
    finetune(tiny_llama(), TOKENIZER, UTILITY, protection(), checkpoints=tmp_path, **SETTINGS)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    for changed in ({"learning_rate": 1e-3}, {"steps": 8}):
        with pytest.raises(DataError, match=f"to go on with {next(iter(changed))}="):
            finetune(tiny_llama(), TOKENIZER, UTILITY, protection(), checkpoints=tmp_path, **SETTINGS | changed)
    with pytest.raises(DataError, match="to go on with spf="):
        finetune(tiny_llama(), TOKENIZER, UTILITY, protection(rule="left"), checkpoints=tmp_path, **SETTINGS)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_another_model_and_what_others_left_in_the_folder_are_refused(tmp_path):
    finetune(tiny_llama(), TOKENIZER, UTILITY, protection(), checkpoints=tmp_path / "run", **SETTINGS)
    with pytest.raises(DataError, match="to go on with model="):
        finetune(tiny_llama(seed=5), TOKENIZER, UTILITY, protection(), checkpoints=tmp_path / "run", **SETTINGS)
    others = tmp_path / "others"
    (others / "checkpoint-500").mkdir(parents=True)
    (others / "checkpoint-500" / "model.safetensors").write_text("theirs")
    (others / "spf.jsonl").write_text("theirs")
    with pytest.raises(DataError, match="expected a new or empty folder for checkpoints"):
        finetune(tiny_llama(), TOKENIZER, UTILITY, protection(), checkpoints=others, **SETTINGS)
    assert (others / "checkpoint-500" / "model.safetensors").read_text() == "theirs"
    assert (others / "spf.jsonl").read_text() == "theirs"


def test_a_run_that_was_interrupted_before_its_first_checkpoint_starts_again(tmp_path):
    log = tmp_path / "mine.jsonl"
    settings = SETTINGS | {"checkpoints": tmp_path / "run"}
    with pytest.raises(KeyboardInterrupt):
        finetune(tiny_llama(), TOKENIZER, UTILITY, protection(log=log), callbacks=[Stop(1)], **settings)
    assert log.read_text()
    again = finetune(tiny_llama(), TOKENIZER, UTILITY, protection(log=log), **settings)
    assert len(log.read_text().splitlines()) == again.certificate.steps == 6


def test_a_loop_of_ones_own_saves_and_resumes(tmp_path):
    """Null-space: its basis is of the weights before training, which a resumed run has no more."""
    from tests.helpers.spf_training import task_loss

    def steps(model, guard, optimizer, count):
        for _ in range(count):
            optimizer.zero_grad()
            task_loss(model).backward()
            optimizer.step()
        return guard

    spf = SPF(SAFETY, rule="null-space", rank=2, tokenizer=TOKENIZER)
    whole, half = tiny_llama(), tiny_llama()
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (whole, half)]
    with spf.attach(whole, optimizers[0]) as guard:
        steps(whole, guard, optimizers[0], 2)
        guard.save(tmp_path)
        steps(whole, guard, optimizers[0], 2)
    with spf.attach(half, optimizers[1]) as guard:
        steps(half, guard, optimizers[1], 2)
    with spf.attach(half, optimizers[1], resume=tmp_path) as guard:
        assert guard.steps == 2
        steps(half, guard, optimizers[1], 2)
    assert same(whole, half)
    with pytest.raises(SPFError, match="expected a run that goes on with rank=2, found 4"):
        SPF(SAFETY, rule="null-space", rank=4, tokenizer=TOKENIZER).attach(half, optimizers[1], resume=tmp_path)


def trainer(folder, callback, steps, **settings):
    rows = [
        {"input_ids": list(row.input_ids), "attention_mask": [1] * len(row), "labels": list(row.input_ids)}
        for row in encode(TOKENIZER, UTILITY)
    ]
    arguments = TrainingArguments(
        output_dir=folder, max_steps=4, per_device_train_batch_size=1, learning_rate=1e-2, save_steps=2,
        report_to="none", disable_tqdm=True, dataloader_pin_memory=False, lr_scheduler_type="constant", **settings,
    )  # fmt: skip
    return Trainer(tiny_llama(), arguments, train_dataset=rows, processing_class=TOKENIZER, callbacks=[callback])


def test_a_plain_trainer_resumes_from_its_checkpoint(tmp_path):
    whole = trainer(tmp_path, SPFCallback(protection()), 4)
    whole.train()
    resumed = trainer(tmp_path, SPFCallback(protection()), 4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(whole.model, resumed.model)


def test_a_checkpoint_without_the_state_of_spf_is_refused(tmp_path):
    trainer(tmp_path, SPFCallback(protection()), 4).train()
    state = tmp_path / "checkpoint-2" / STATE_FILE
    content = state.read_bytes()
    with pytest.raises(SPFError, match="expected a run that goes on with "):
        trainer(tmp_path, SPFCallback(protection(rule="left")), 4).train(str(state.parent))
    state.write_bytes(content[: len(content) // 2])
    with pytest.raises(SPFError, match="found a corrupt file"):
        load_state(state.parent, {})
    state.unlink()
    with pytest.raises(SPFError, match="the safety loss before training is not known any more"):
        trainer(tmp_path, SPFCallback(protection()), 4).train(str(state.parent))
    state.write_bytes(content)
    with pytest.raises(SPFError, match=r"found one with other settings \(rule\.always, rule\.rank\)"):
        load_state(state.parent, _renamed(protection().describe()))
    few = SAFETY.select(range(2))
    state.write_bytes(content)
    with pytest.raises(SPFError, match="expected a run that goes on with anchors="):
        trainer(tmp_path, SPFCallback(SPF(few)), 4).train(str(state.parent))


def _renamed(description):
    """The settings as another version would name them."""
    rule = {"always" if name == "rank" else name: value for name, value in description["rule"].items()}
    return description | {"rule": rule}


def test_a_checkpoint_that_was_moved_is_found_where_the_callback_is_told(tmp_path):
    whole = trainer(tmp_path / "whole", SPFCallback(protection()), 4)
    whole.train()
    (tmp_path / "moved").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "moved" / "checkpoint-2")
    moved = str(tmp_path / "moved" / "checkpoint-2")
    with pytest.raises(SPFError, match=r"found none: .*that was moved, .* SPFCallback\(spf, resume=folder\)"):
        trainer(tmp_path / "other", SPFCallback(protection()), 4).train(resume_from_checkpoint=moved)
    resumed = trainer(tmp_path / "other", SPFCallback(protection(), resume=moved), 4)
    resumed.train(resume_from_checkpoint=moved)
    assert same(whole.model, resumed.model)
