"""A build, at a tiny size: the same files twice, parts replaced, the rest left."""

import hashlib
from pathlib import Path

import torch

from geomkit.experiments.organism.build import build
from geomkit.experiments.organism.recipe import Recipe
from geomkit.experiments.organism.sets import all_sets
from geomkit.experiments.organism.training import StageSettings

TINY = Recipe(
    vocab_size=320,
    tokenizer_texts=60,
    hidden_size=16,
    intermediate_size=16,
    layers=1,
    heads=2,
    base=StageSettings(steps=3, batch_size=4, learning_rate=1e-3),
    align=StageSettings(steps=2, batch_size=4, learning_rate=1e-3),
    damage_seeds=0,
)


def test_two_builds_with_one_seed_give_the_same_files(tmp_path, monkeypatch):
    monkeypatch.setattr("geomkit.experiments.organism.build.all_sets", small_sets)
    before, threads = torch.random.get_rng_state(), torch.get_num_threads()
    for name in ("first", "second"):
        report = build(tmp_path / name, seed=3, progress=False, recipe=TINY)
    assert [stage.stage for stage in report.stages] == ["base", "aligned"]
    assert digests(tmp_path / "first") == digests(tmp_path / "second")
    assert "organism/aligned/model.safetensors" in digests(tmp_path / "first")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]
    assert torch.equal(before, torch.random.get_rng_state())
    assert threads == torch.get_num_threads()


def test_a_build_replaces_its_parts_and_leaves_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr("geomkit.experiments.organism.build.all_sets", small_sets)
    out = tmp_path / "data"
    (out / "organism").mkdir(parents=True)
    (out / "organism" / "stale").touch()
    (out / "mine.txt").touch()
    build(out, seed=1, progress=False, recipe=TINY)
    assert not (out / "organism" / "stale").exists()
    assert (out / "mine.txt").exists()


def small_sets(world, seed, tokenizer):
    return {name: rows[:2] for name, rows in all_sets(world, seed, tokenizer).items()}


def digests(folder: Path):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
