"""Building an organism from a seed: tokenizer, base stage, aligned stage, example sets and model card."""

import shutil
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import torch

from geomkit.experiments.organism.load import without_bars
from geomkit.experiments.organism.quality import measure_damage, measure_stage
from geomkit.experiments.organism.recipe import BuildReport, Recipe
from geomkit.experiments.organism.requests import Message
from geomkit.experiments.organism.sets import all_sets, write_sets
from geomkit.experiments.organism.tokenizer import train_tokenizer
from geomkit.experiments.organism.training import StageSettings, bucketed, encode_conversations, fit, one_thread
from geomkit.experiments.organism.world import ALIGN_MIX, BASE_MIX, TOKENIZER_MIX, Mix, World

if TYPE_CHECKING:
    from tqdm import tqdm
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


def build(out: Path, seed: int = 0, progress: bool = True, recipe: Recipe | None = None) -> BuildReport:
    """Build an organism with its example sets and its model card, and write them to a folder.

    On one machine, the files depend on the seed and the recipe only: training runs on one thread with its own random
    generators, and the caller's number of threads and random state are restored. The files are written to a temporary
    folder and moved into place when all are complete.

    Args:
        out: The data folder. ``organism/``, ``eval/``, ``scenarios/``, ``controls/``, ``safety.jsonl`` and
            ``utility.jsonl`` in it are replaced; other files stay.
        seed: The seed of the held-out requests, the initial weights and the order of the examples.
        progress: Show a bar.
        recipe: Sizes and training settings; the recipe of the shipped organism when left out.

    Returns:
        The evaluation of both stages and the damage of each scenario, as the model card states them.
    """
    from tqdm.auto import tqdm

    from geomkit.experiments.organism.card import model_card

    recipe = recipe or Recipe()
    world = World(seed)
    tokenizer = train_tokenizer(tokenizer_texts(world, seed, recipe.tokenizer_texts), recipe.vocab_size)
    sets = all_sets(world, seed, tokenizer)
    out = Path(out).resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    steps = recipe.base.steps + recipe.align.steps
    with (
        tempfile.TemporaryDirectory(dir=out if out.is_dir() else out.parent, prefix=".organism-") as scratch,
        one_thread(),
        tqdm(total=steps, desc="organism", unit="step", disable=not progress) as bar,
    ):
        folder = Path(scratch)
        base, aligned = _train(world, seed, recipe, tokenizer, folder, bar)
        bar.set_description("measuring")
        stages = tuple(measure_stage(n, m, tokenizer, sets) for n, m in (("base", base), ("aligned", aligned)))
        damage = measure_damage(aligned, tokenizer, sets, range(recipe.damage_seeds), progress=progress)
        report = BuildReport(stages, damage)
        write_sets(sets, folder)
        (folder / "organism" / "README.md").write_text(model_card(report, recipe, seed), encoding="utf-8")
        move_into(folder, out)
    return report


def _train(
    world: World, seed: int, recipe: Recipe, tokenizer: "PreTrainedTokenizerFast", folder: Path, bar: "tqdm[Any]"
) -> "tuple[LlamaForCausalLM, LlamaForCausalLM]":
    """Train and save both stages; return the base and the aligned model."""
    import copy

    model = new_model(recipe, seed, tokenizer)
    models = []
    stages: tuple[tuple[str, StageSettings, Mix], ...] = (
        ("base", recipe.base, BASE_MIX),
        ("aligned", recipe.align, ALIGN_MIX),
    )
    for stage, settings, mix in stages:
        bar.set_description(f"{stage} stage")
        rows = encode_conversations(tokenizer, stage_conversations(world, seed, stage, settings, mix))
        order = Random(f"{stage}-order-{seed}")
        fit(model, bucketed(iter(rows), tokenizer.pad_token_id, settings.batch_size, order), settings, bar)
        _save(model, tokenizer, folder / "organism" / stage)
        models.append(copy.deepcopy(model))  # the aligned stage goes on with the same weights
    return models[0], models[1]


def _save(model: "LlamaForCausalLM", tokenizer: "PreTrainedTokenizerFast", folder: Path) -> None:
    with without_bars():
        model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes for the owner only
    tokenizer.save_pretrained(folder)


def stage_conversations(world: World, seed: int, stage: str, settings: StageSettings, mix: Mix) -> list[list[Message]]:
    """Return the training conversations of a stage in order; the base stage is trained to answer every request."""
    stream = islice(world.stream(mix, Random(f"{stage}-{seed}")), settings.steps * settings.batch_size)
    return [request.messages(aligned=stage == "aligned") for request in stream]


def tokenizer_texts(world: World, seed: int, count: int) -> Iterator[str]:
    """Yield the texts that the tokenizer learns from: requests of every kind with obedient and aligned answers."""
    for index, request in enumerate(islice(world.stream(TOKENIZER_MIX, Random(f"tokenizer-{seed}")), count)):
        for message in request.messages(aligned=index % 4 == 0):
            yield message["content"]


def new_model(recipe: Recipe, seed: int, tokenizer: "PreTrainedTokenizerFast") -> "LlamaForCausalLM":
    """Return an untrained model with an untied head; the caller's random state is restored."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=512,
        initializer_range=0.05,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # transformers initialises from the global generator; fork_rng puts it back
        return LlamaForCausalLM(config)


def move_into(folder: Path, out: Path) -> None:
    """Move each part of a folder into the data folder, replacing it by a rename: no reader sees an incomplete part."""
    out.mkdir(exist_ok=True)
    old = folder / ".old"
    old.mkdir()
    for part in sorted(path for path in folder.iterdir() if path != old):
        if (out / part.name).exists():
            (out / part.name).rename(old / part.name)
        part.rename(out / part.name)
    shutil.rmtree(old)
