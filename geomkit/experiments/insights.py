"""The three claims on gradients, measured on the stages of a world: aligned, before alignment, and untrained."""

import gzip
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from geomkit.analysis.headlines import SPAN
from geomkit.analysis.probe import Probe
from geomkit.errors import DataError
from geomkit.experiments.english.course import measure_course
from geomkit.experiments.organisms import ENGLISH, load_organism
from geomkit.inputs.examples import load_examples
from geomkit.inputs.models import untrained
from geomkit.inputs.parameters import ALL_PARAMETERS
from geomkit.utils.files import data_dir, locked, reading, write_atomically, writing

if TYPE_CHECKING:
    import pandas as pd
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

    from geomkit.analysis.analysis import Analysis

WORLDS = ("small", ENGLISH)
"""The worlds: the small organism, and an aligned SmolLM2."""

STAGES = ("aligned", "base", "untrained")
"""The stages of a world; ``"untrained"`` has random weights and the architecture of the others."""

_SETS = {
    "small": ("safety", "controls/benign-refused", "scenarios/new-skill"),
    ENGLISH: (f"{ENGLISH}/safety", f"{ENGLISH}/controls/benign-refused", f"{ENGLISH}/utility"),
}
"""The sets ``safety``, ``control`` and ``utility`` of a world."""

_ALIGNMENT = f"alignment-{ENGLISH}.csv.gz"

_COLUMNS = ["parameter", "kind", "layer", "measure", "of", "value", "low", "high", "null", "null_low", "null_high"]
"""Columns of a frame, besides the stage and the number of examples."""

_PER_LAYER = ("effective_rank", "cer10")


def measure_insights(
    world: str, out: Path, *, examples: int = 32, stages: Sequence[str] = STAGES, progress: bool = True
) -> "pd.DataFrame":
    """Return the claims' numbers on each stage of a world, for the whole model and for each of its matrices.

    Each stage's numbers are written to the folder as soon as they are measured, and are not measured again.

    Args:
        world: ``"small"`` or ``"english"``.
        out: The folder.
        examples: Examples of each set: forbidden requests with the aligned stage's refusals, benign requests with the
            same refusals (the control), and benign requests with answers: a new skill in the small world, everyday
            requests with the base model's answers in the English one.
        stages: Stages to be measured, of :data:`STAGES`.
        progress: Show bars.

    Returns:
        The frame of :func:`load_insights`.

    Raises:
        DataError: If there is no such world or stage, a set has fewer examples, or the base model of the English world
            cannot be read.
    """
    _check(world, stages)
    with ExitStack() as held:
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(out))
        for path, stage in ((out / _file(world, stage), stage) for stage in stages):
            if not path.exists():
                frame = insights_frame(_analysis(world, stage, examples, progress))
                write_numbers(frame.assign(examples=examples), path)
            elif (stored := int(read_numbers(path)["examples"].iloc[0])) != examples:
                raise DataError(
                    f"expected the numbers of {examples} examples in {path}, found {stored}; take another folder"
                )
    return load_insights(world, out, stages)


def load_insights(world: str = "small", folder: Path | None = None, stages: Sequence[str] = STAGES) -> "pd.DataFrame":
    """Return the stored numbers of the claims on the stages of a world.

    Args:
        world: ``"small"`` or ``"english"``.
        folder: Folder of the files; the shipped ones when left out.
        stages: Stages, of :data:`STAGES`.

    Returns:
        One row per stage, parameter, measure and set of examples: ``stage``, ``parameter`` (``"all parameters"`` for
        the whole model, ``"layers.0"`` for a decoder layer of kind ``"layer"``, and ``"embedding"``, ``"norm"`` and
        ``"head"`` outside them), ``kind``, ``layer``, ``measure``, ``of``, ``value`` with its interval ``low`` to
        ``high`` over examples, ``null`` with ``null_low`` to ``null_high``, and ``examples``, the number of examples of
        each set.

    Raises:
        DataError: If there is no such world or stage, or a file is missing.
    """
    import pandas as pd

    _check(world, stages)
    folder = data_dir() / "experiments" if folder is None else folder
    frames = [read_numbers(folder / _file(world, stage)).assign(stage=stage) for stage in stages]
    return pd.concat(frames, ignore_index=True)[["stage", *_COLUMNS, "examples"]]


def read_numbers(path: Path) -> "pd.DataFrame":
    """Return a frame that :func:`write_numbers` wrote.

    Raises:
        DataError: If there is none, or it cannot be read.
    """
    import pandas as pd

    with reading(path):
        if not path.is_file():
            raise DataError(f"expected stored numbers at {path}, found none; run `geomkit organism insights`")
        try:
            return pd.read_csv(path)
        except (ValueError, EOFError, zlib.error, gzip.BadGzipFile) as error:  # those of pandas are ValueErrors
            raise DataError(
                f"expected stored numbers at {path}, found a damaged file ({' '.join(str(error).split()):.120}); "
                "delete it and run `geomkit organism insights`"
            ) from None


def write_numbers(frame: "pd.DataFrame", path: Path) -> None:
    """Write a frame to a file, in five digits; the file is there when it is complete."""
    write_atomically(path, gzip.compress(frame.to_csv(index=False, float_format="%.5g").encode(), mtime=0))


def measure_alignment(states: Path, out: Path, *, examples: int = 32, progress: bool = True) -> "pd.DataFrame":
    """Return the claims' numbers along the alignment of the English world, and write them to a folder.

    Args:
        states: The folder in which the build kept states of the training.
        out: The folder for the numbers.
        examples: Examples of each set.
        progress: Show bars.

    Returns:
        The frame of :meth:`geomkit.analysis.tracking.Trajectory.to_frame`; ``at`` is the number of steps.

    Raises:
        DataError: If there is no state, or the base model cannot be read.
    """
    frame = measure_course(states, world_probe(ENGLISH, examples), progress=progress).to_frame()
    write_numbers(frame, out / _ALIGNMENT)
    return frame


def load_alignment(folder: Path | None = None) -> "pd.DataFrame":
    """Return the stored numbers along the alignment of the English world, see :func:`measure_alignment`.

    Args:
        folder: Folder of the file; the shipped one when left out.

    Raises:
        DataError: If there is none.
    """
    return read_numbers((data_dir() / "experiments" if folder is None else folder) / _ALIGNMENT)


def insights_frame(analysis: "Analysis") -> "pd.DataFrame":
    """Return an analysis as one frame: headline numbers, ranks, cosines and overlaps by matrix, spans by layer."""
    import pandas as pd

    headlines = analysis.to_frame().assign(parameter=ALL_PARAMETERS, kind="all")
    return pd.concat([headlines, *_per_layer(analysis)], ignore_index=True).reindex(columns=_COLUMNS)


def _per_layer(analysis: "Analysis") -> Iterator["pd.DataFrame"]:
    for name, spectrum in analysis.spectra.items():
        frame = spectrum.to_frame().rename(columns={"statistic": "measure"})
        yield frame[frame["measure"].isin(_PER_LAYER)].assign(of=name)
    for name, spectrum in analysis.layer_spans.items():
        yield _ranks_of(spectrum.to_frame()).assign(measure=SPAN, of=name)
    for other in ("control", "utility"):
        differences = _ranks_of(analysis.span_contrast(other, by="layer").to_frame())
        yield differences.assign(
            measure=f"{SPAN}, difference", of=f"safety − {other}", value=differences["difference"], null=0.0
        )
    cosines = analysis.conflict.to_frame().assign(measure="cosine with utility")
    yield cosines.assign(of="safety", value=cosines["corrected"])
    yield cosines.assign(of="control", value=cosines["control"])[
        ["parameter", "kind", "layer", "measure", "of", "value"]
    ]
    overlaps = analysis.one_sample.to_frame().rename(columns={"statistic": "measure", "group": "of"})
    yield overlaps[overlaps["parameter"] != ALL_PARAMETERS].assign(measure="one example's " + overlaps["measure"])


def _ranks_of(frame: "pd.DataFrame") -> "pd.DataFrame":
    """Return the rows of the effective rank, of kind ``"layer"`` in the decoder layers, with the null's mean only."""
    ranks = frame[frame["statistic"] == "effective_rank"]
    kinds = ranks["kind"].mask(ranks["layer"].notna(), "layer")
    return ranks.assign(kind=kinds).drop(columns=["null_low", "null_high"], errors="ignore")


def _analysis(world: str, stage: str, examples: int, progress: bool) -> "Analysis":
    model, tokenizer = _stage_model(world, stage)
    return world_probe(world, examples).analyze(model, tokenizer, progress=progress)


def world_probe(world: str, examples: int) -> Probe:
    """Return the probe of a world: the first safety and utility examples, and the last of the control set.

    Raises:
        DataError: If a set has fewer examples.
    """
    safety, control, utility = map(load_examples, _SETS[world])
    if examples > (most := min(map(len, (safety, control, utility)))):
        raise DataError(f"expected at most {most} examples of each set, found {examples}; give a smaller number")
    # The shipped controls go with the safety examples row by row; pairs would not be independent.
    others = control.select(range(len(control) - examples, len(control)))
    return Probe(safety.select(range(examples)), utility.select(range(examples)), others, examples=None)


def _stage_model(world: str, stage: str) -> "tuple[LlamaForCausalLM, PreTrainedTokenizerBase]":
    trained = "base" if stage == "base" else "aligned"
    model, tokenizer = load_organism(f"{ENGLISH}/{trained}" if world == ENGLISH else trained)
    return (untrained(model), tokenizer) if stage == "untrained" else (model, tokenizer)


def _file(world: str, stage: str) -> str:
    return f"insights-{world}-{stage}.csv.gz"


def _check(world: str, stages: Sequence[str]) -> None:
    if world not in WORLDS:
        raise DataError(f"expected a world, {' or '.join(map(repr, WORLDS))}, found {world!r}")
    if unknown := [stage for stage in stages if stage not in STAGES]:
        raise DataError(f"expected stages of {', '.join(map(repr, STAGES))}, found {unknown[0]!r}")
