"""Building the English world: the adapter that aligns the base model, the example sets and the model card."""

import copy
import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from geomkit.experiments.english.alignment import AdapterTraining
from geomkit.experiments.english.alignment_rows import Recipe, Requests, training_requests, training_rows
from geomkit.experiments.english.answers import OwnAnswer, own_answers
from geomkit.experiments.english.card import model_card
from geomkit.experiments.english.load import FINGERPRINT, FOLDER, load_base, with_adapter
from geomkit.experiments.english.quality import StageReport, held_out_benchmarks, measure_stage, write_quality
from geomkit.experiments.english.sets import all_sets
from geomkit.experiments.organism.build import move_into
from geomkit.experiments.organism.sets import write_sets
from geomkit.experiments.organism.training import one_thread
from geomkit.gradients.provenance import weights_fingerprint
from geomkit.utils.files import locked, read_json, write_atomically

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

_UNFINISHED = ".english-build"
"""Folder for what an interrupted build goes on from: the base model's answers, and the state of the training."""

_STEPS_BETWEEN = 25

STATES = (0, 25, 50, 100, 200)
"""Steps at which the state of the training is kept if wanted, to measure the gradients along it."""


def build_english(
    out: Path,
    base: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
    recipe: Recipe | None = None,
    states: Path | None = None,
) -> tuple[StageReport, ...]:
    """Align the base model, and write the adapter, the example sets and the model card to a folder.

    The base model's answers and, every 25 steps, the state of the training are kept in the folder; an interrupted build
    goes on from there when it is called again with the same arguments. AdvBench, XSTest and GSM8K are needed to measure
    the stages, see :mod:`.sources`.

    Args:
        out: The data folder; ``english/`` in it is replaced.
        base: The base model: a folder, a GGUF file or an id on the hub; when left out, see :func:`.sources.base_model`.
        seed: Seed of the requests, the initial adapter and the order of the rows.
        progress: Show bars.
        recipe: The training settings; those of the shipped adapter when left out.
        states: Folder in which the states at the steps :data:`STATES` and at the end are kept, for
            :func:`.course.measure_course`; not kept when left out.

    Returns:
        The evaluation of the base and of the aligned stage, as the model card states them.

    Raises:
        DataError: If the base model or a benchmark cannot be read.
        GeomkitError: If the aligned stage refuses too few requests to make the set ``safety``.
    """
    recipe = recipe or Recipe()
    out = Path(out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_base(base)
    tested = held_out_benchmarks()  # first, since a benchmark that cannot be read would be noticed after an hour
    with locked(out), one_thread(), tempfile.TemporaryDirectory(dir=out, prefix=".english-") as scratch:
        folder = Path(scratch) / FOLDER
        alignment = _train(copy.deepcopy(model), tokenizer, recipe, seed, out / _UNFINISHED, progress, states)
        alignment.export(folder / "adapter")
        (folder / "adapter" / FINGERPRINT).write_text(json.dumps(weights_fingerprint(model)))
        aligned = with_adapter(copy.deepcopy(model), folder / "adapter")
        sets = all_sets(model, aligned, tokenizer, seed)
        write_sets(sets, folder)
        stages = tuple(
            measure_stage(name, stage, tokenizer, sets, tested, progress=progress)
            for name, stage in (("base", model), ("aligned", aligned))
        )
        write_quality(stages, folder)
        (folder / "README.md").write_text(model_card(stages, recipe, seed), encoding="utf-8")
        move_into(Path(scratch), out)
    shutil.rmtree(out / _UNFINISHED)
    return stages


def _train(
    model: "LlamaForCausalLM",
    tokenizer: "PreTrainedTokenizerBase",
    recipe: Recipe,
    seed: int,
    kept: Path,
    progress: bool,
    states: Path | None,
) -> AdapterTraining:
    """Train the adapter, from what is kept of an earlier build if there is something."""
    from tqdm.auto import tqdm

    requests = training_requests(recipe, seed)
    answers = _answers(model, tokenizer, requests, recipe, kept / "answers.json", progress)
    alignment = AdapterTraining(model, tokenizer, list(training_rows(requests, answers, recipe, seed)), recipe, seed)
    state = kept / "state.pt"
    if state.exists():
        alignment.load(state)
    if states is not None:
        states.mkdir(parents=True, exist_ok=True)
    with tqdm(total=recipe.steps, initial=alignment.steps, desc="align", unit="step", disable=not progress) as bar:
        while alignment.steps < recipe.steps:
            if states is not None and alignment.steps in STATES:
                alignment.save(states / f"{alignment.steps}.pt")
            loss = alignment.take()
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            if alignment.steps % _STEPS_BETWEEN == 0 or alignment.steps == recipe.steps:
                alignment.save(state)
    if states is not None:
        alignment.save(states / f"{alignment.steps}.pt")
    return alignment


def _answers(
    model: "LlamaForCausalLM",
    tokenizer: "PreTrainedTokenizerBase",
    requests: Requests,
    recipe: Recipe,
    path: Path,
    progress: bool,
) -> list[OwnAnswer]:
    """Return the base model's answers, which are kept in a file for as long as the requests and the model are these."""
    short, long = recipe.answer_tokens
    wanted = [(requests.close_to_harm, short), (list(requests.everyday), long)]
    key = json.loads(json.dumps([weights_fingerprint(model), wanted]))
    if path.exists():
        kept = read_json(path, "the answers of the base model", "delete it, and build again")
        if isinstance(kept, dict) and kept.get("key") == key:
            return [OwnAnswer(*answer) for answer in kept["answers"]]
    answers = [
        answer
        for prompts, tokens in wanted
        for answer in own_answers(model, tokenizer, prompts, tokens=tokens, progress=progress)
    ]
    write_atomically(path, json.dumps({"key": key, "answers": [(answer.prompt, answer.text) for answer in answers]}))
    return answers
