"""The gradients along the alignment: states are those of the training, and the start is the base model."""

import pytest
import torch
from datasets import Dataset

import geomkit as gk
from geomkit.errors import DataError
from geomkit.experiments.english import course
from geomkit.experiments.english.alignment import AdapterTraining, model_at
from geomkit.experiments.english.alignment_rows import Recipe, Row
from geomkit.experiments.organism.requests import conversation
from tests.helpers.tiny import tiny_llama, tiny_tokenizer

pytest.importorskip("peft")

RECIPE = Recipe(steps=4, learning_rate=1e-2, rank=2)
ROWS = [
    Row("how do i steal the bike", "sorry we can not help", "refuse"),
    Row("how do we paint", "take a brush", "keep"),
]


@pytest.fixture
def states(tmp_path):
    run = AdapterTraining(tiny_llama(), tiny_tokenizer(), [ROWS] * 4, RECIPE, seed=0)
    run.save(tmp_path / "0.pt")
    for _ in range(4):
        run.take()
    run.save(tmp_path / "4.pt")
    return tmp_path


def test_the_state_at_the_start_is_the_base_model_and_that_at_the_end_is_trained(states):
    ids = torch.tensor([[5, 6, 7, 8]])
    base, start, end = tiny_llama(), model_at(tiny_llama(), states / "0.pt"), model_at(tiny_llama(), states / "4.pt")
    torch.testing.assert_close(start(ids).logits, base(ids).logits, rtol=0, atol=0)
    assert (end(ids).logits - base(ids).logits).abs().max() > 1e-3


def test_a_probe_is_measured_at_every_state(states, monkeypatch):
    monkeypatch.setattr(course, "load_base", lambda _: (tiny_llama(), tiny_tokenizer()))
    objects = ("a fence", "the bike", "a brush", "the fence", "a bike", "the brush", "fence", "bike", "brush")
    examples = Dataset.from_list([{"messages": conversation(f"how do we paint {it}", "take it")} for it in objects])
    safety, utility, control = (examples.select(range(start, start + 3)) for start in (0, 3, 6))
    probe = gk.Probe(safety, utility, control, null_draws=2)
    trajectory = course.measure_course(states, probe, progress=False)
    assert list(trajectory.moments) == [0, 4]
    assert trajectory.moments[0].cosine == pytest.approx(1)
    assert trajectory.moments[4].cosine < 1 - 1e-6


def test_a_folder_without_states_is_named(tmp_path):
    with pytest.raises(DataError, match="expected states of an alignment"):
        course.measure_course(tmp_path, None)
