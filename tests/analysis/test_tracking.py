import math

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

import geomkit as gk
from geomkit import plots
from geomkit.analysis.tracking import Tracker, Trajectory, track
from geomkit.errors import GeometryError
from tests.helpers.tiny import CONTROL, SAFETY, UTILITY, tiny_llama, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


@pytest.fixture(scope="module")
def probe() -> gk.Probe:
    return gk.Probe(SAFETY, UTILITY, CONTROL, rank=2, null_draws=1)


@pytest.fixture(scope="module")
def watched(probe: gk.Probe) -> tuple[gk.GeometryCallback, object]:
    watch = gk.GeometryCallback(probe, every=2)
    recipe = {"steps": 5, "learning_rate": 1e-2, "batch_size": 2, "progress": False}
    return watch, gk.finetune(tiny_llama(), TOKENIZER, UTILITY, callbacks=[watch], **recipe)


def test_measures_at_the_start_at_each_interval_and_at_the_end(watched) -> None:
    assert list(watched[0].trajectory.moments) == [0, 2, 4, 5]


def test_the_run_is_the_same_without_it(watched) -> None:
    recipe = {"steps": 5, "learning_rate": 1e-2, "batch_size": 2, "progress": False}
    alone = gk.finetune(tiny_llama(), TOKENIZER, UTILITY, **recipe)
    for ours, theirs in zip(watched[1].model.parameters(), alone.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_moment_is_what_the_probe_says_of_that_model(watched, probe: gk.Probe) -> None:
    last = watched[0].trajectory.moments[5]
    alone = probe.analyze(watched[1].model, TOKENIZER)
    assert repr(last.analysis.to_dict()) == repr(alone.to_dict())


def test_how_far_safety_moved_is_measured_from_the_first_moment(watched, probe: gk.Probe) -> None:
    moments = watched[0].trajectory.moments
    assert (moments[0].cosine, moments[0].overlap) == pytest.approx((1, 1), abs=1e-6)
    means = [
        np.concatenate([gradient.dense().flatten().numpy() for gradient in probe.collect(model, TOKENIZER)[0].values()])
        for model in (tiny_llama(), watched[1].model)
    ]
    cosine = means[0] @ means[1] / np.linalg.norm(means[0]) / np.linalg.norm(means[1])
    assert moments[5].cosine == pytest.approx(cosine, rel=1e-4)
    assert moments[5].expected < moments[5].overlap < 1


def test_its_frame_has_every_measure_at_every_moment(watched) -> None:
    found = watched[0].trajectory
    frame = found.to_frame()
    assert not frame.duplicated(["at", "question", "measure", "of"]).any()
    assert frame.groupby("at").size().nunique() == 1
    assert {"loss", "low rank?", "conflict?", "one sample?", "has it moved?"} == set(frame["question"])
    assert "4 moments from 0 to 5" in found._repr_html_()


def test_its_figure_has_a_panel_for_every_measure_and_a_line_for_every_side(watched) -> None:
    found = watched[0].trajectory
    frame = found.to_frame()
    figure = found.plot()
    panels = {note.text.replace("<br>", " ") for note in figure.layout.annotations}
    known = frame[frame.groupby("measure")["value"].transform("count") > 0]
    assert {name.replace("Δ ", "") for name in panels} == set(known["measure"].str.removesuffix(", difference"))
    lines = [trace for trace in figure.data if trace.mode == "lines+markers"]
    assert len(lines) == len(known.drop_duplicates(["question", "measure", "of"]))
    start = frame[frame["at"] == 0].set_index(["measure", "of"])["value"]
    first = start["loss, nats per token", "safety"]
    assert first in {trace.y[0] for trace in lines}
    named = [trace.name for trace in figure.data if trace.showlegend]
    assert sum(trace.name == "null of the same colour" for trace in figure.data) == 1
    assert len(named) == len(set(named))
    moved = plots.plot_trajectory(found, questions=["has it moved?"])
    assert [note.text for note in moved.layout.annotations] == ["cosine with the start", "overlap with the start"]
    with pytest.raises(GeometryError, match="found why"):
        plots.plot_trajectory(found, questions=["why"])


def test_works_in_a_trainer_of_ones_own(probe: gk.Probe, tmp_path) -> None:
    watch = gk.GeometryCallback(probe, every=10, tokenizer=TOKENIZER)
    rows = [{key: [5, 6, 7, 8] for key in ("input_ids", "labels")}] * 4
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    model = tiny_llama().train()
    Trainer(model, arguments, train_dataset=rows, callbacks=[watch]).train()
    assert list(watch.trajectory.moments) == [0, 1]
    assert model.training


def test_what_broke_off_is_kept(probe: gk.Probe) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            if state.global_step == 3:
                raise KeyboardInterrupt

    watch = gk.GeometryCallback(probe, every=1)
    with pytest.raises(KeyboardInterrupt):
        gk.finetune(tiny_llama(), TOKENIZER, UTILITY, steps=5, callbacks=[watch, Stop()], progress=False)
    assert list(watch.trajectory.moments) == [0, 1, 2, 3]


def test_checkpoints_are_loaded_one_at_a_time(probe: gk.Probe, tmp_path) -> None:
    for seed, name in enumerate(("first", "second")):
        tiny_llama(seed=seed).save_pretrained(tmp_path / name)
        TOKENIZER.save_pretrained(tmp_path / name)
    paths = {"first": tmp_path / "first", "second": str(tmp_path / "second"), "third": tiny_llama(seed=2)}
    found = track(paths, TOKENIZER, probe, progress=False)
    again = track({"second": tiny_llama(seed=1)}, TOKENIZER, probe, progress=False)
    assert list(found.moments) == ["first", "second", "third"]
    here, there = found.moments["second"].analysis, again.moments["second"].analysis
    assert repr(here.to_dict()) == repr(there.to_dict())
    assert abs(found.moments["second"].cosine) < 0.5  # two random models have nothing to do with each other
    assert list(found.plot().data[0].x) == ["first", "second", "third"]


def test_wrong_use_is_told(probe: gk.Probe) -> None:
    with pytest.raises(GeometryError, match="every=0"):
        gk.GeometryCallback(probe, every=0)
    with pytest.raises(GeometryError, match="train with this callback first"):
        _ = gk.GeometryCallback(probe).trajectory
    with pytest.raises(GeometryError, match="found none"):
        track({}, TOKENIZER, probe, progress=False)
    tracker = Tracker(probe)
    tracker.measure_at(0, tiny_llama(), TOKENIZER)
    with pytest.raises(GeometryError, match="same parameters"):
        tracker.measure_at(1, tiny_llama(num_hidden_layers=1), TOKENIZER)
    assert isinstance(tracker.trajectory, Trajectory)
    assert not math.isnan(tracker.trajectory.moments[0].overlap)


@pytest.mark.parametrize("found", [None, "safety", {}], ids=["None", "str", "dict"])
def test_what_is_no_probe_is_refused(found: object) -> None:
    for use in (lambda: gk.GeometryCallback(found), lambda: track({}, TOKENIZER, found, progress=False)):
        with pytest.raises(GeometryError, match="expected a probe, found"):
            use()


def test_checkpoints_need_names(probe: gk.Probe) -> None:
    with pytest.raises(GeometryError, match="by step or name, found a list"):
        track([tiny_llama()], TOKENIZER, probe, progress=False)
