"""The run of a single cell, stored when it is complete."""

import json
import logging
import math
import time
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from geomkit.errors import DataError, GeomkitError
from geomkit.experiments.attacks import attack
from geomkit.experiments.grid import Cell
from geomkit.experiments.methods import METHODS
from geomkit.experiments.organism.interface import Organism
from geomkit.experiments.organisms import evaluate_organism, organism_of
from geomkit.experiments.outcomes import greedy_answers, refused_by_keywords
from geomkit.experiments.records import Record, check_record, flags_to_text
from geomkit.experiments.task import Task
from geomkit.spf.certificate import Certificate
from geomkit.utils.files import parse_json, reading, write_atomically

_LOGGER = logging.getLogger(__name__)

PROMPTS_DURING_TRAINING = 60
"""Number of held-out forbidden requests on which refusal is measured during training."""

_CURVE_POINTS = 25
"""Largest number of steps at which sums along training are kept."""


def run_cell(cell: Cell, folder: Path) -> Record:
    """Run a cell and store its record; return the stored record if the cell was run before, and did not fail.

    A fine-tune that stops with a :class:`~geomkit.errors.GeomkitError`, as where the loss becomes NaN, has the error as
    its record, and is run again when the grid is.

    Args:
        cell: The cell.
        folder: The folder of the experiment, for cells and organisms.

    Returns:
        The record.
    """
    stored = completed_record(cell, folder)
    if stored is not None:
        return stored
    organism = _cached_organism(cell.organism, folder)
    try:
        result = _run(cell, organism)
    except GeomkitError as error:
        result = {"error": str(error)}
    record = {"cell": cell.describe(), "digest": cell.digest, **result}
    store_record(record, cell, folder)
    return record


def store_record(record: Record, cell: Cell, folder: Path) -> None:
    """Write the record of a cell into the folder of an experiment."""
    write_atomically(_path(cell, folder), json.dumps(record, ensure_ascii=False))


def completed_record(cell: Cell, folder: Path) -> Record | None:
    """Return the stored record of a cell that did not fail; ``None`` if there is none, see :func:`stored_record`."""
    stored = stored_record(cell, folder)
    return None if stored is None or "error" in stored else stored


def stored_record(cell: Cell, folder: Path) -> Record | None:
    """Return the record of a cell that was run before, by this or another process; ``None`` if there is none.

    A file that is no record, or the record of another cell, is no result: the cell will be run, and the file replaced.

    Raises:
        DataError: If the place of the record is taken by a folder, or it cannot be read.
    """
    path = _path(cell, folder)
    with reading(path):
        if path.is_dir():
            raise DataError(f"expected a file at {path}, found a folder; move it away")
        if not path.exists():
            return None
        content = path.read_bytes()
    with suppress(ValueError):  # damaged, or no record
        stored: Record = parse_json(content.decode())
        check_record(stored)
        if stored["cell"] == cell.describe() and {"error", "flags"} & stored.keys():
            return stored
    _LOGGER.warning("%s is not the record of its cell, which is run again", path)
    return None


def _path(cell: Cell, folder: Path) -> Path:
    return folder / "cells" / cell.file_name


@lru_cache(maxsize=2)
def _cached_organism(name: int | str, folder: Path) -> Organism:
    return organism_of(name, folder)


def _run(cell: Cell, organism: Organism) -> Record:
    """Fine-tune, evaluate and attack; return the record without its cell."""
    scenario = cell.scenario_definition
    refusal = RefusalDuringTraining(organism, cell.steps, cell.along) if cell.along else None
    task = Task(
        organism,
        organism.scenario_examples(cell.scenario),
        cell.learning_rate,
        cell.steps,
        scenario.batch_size,
        cell.seed,
        scenario.lora,
        cell.curvature,
        [refusal] if refusal else [],
    )
    memory_before = _reset_peak_memory()
    started = time.perf_counter()
    result = METHODS[cell.arm.method](task, **cell.arm.options)
    seconds = time.perf_counter() - started - (refusal.seconds if refusal else 0.0)
    peak = max(0.0, _peak_memory() - memory_before)  # the system may have taken pages back in between
    outcomes = evaluate_organism(result.model, organism, scenario, cell.prompts)
    attacked = {
        jailbreak: refused
        for name in cell.attacks
        for jailbreak, refused in attack(name, result.model, organism, cell.prompts, cell.seed).items()
    }
    numbers = dict(outcomes.numbers)
    if len(result.history):
        numbers |= {"seconds": seconds, "steps_per_second": cell.steps / seconds, "peak_mb": peak}
        numbers["task_loss"] = float(result.history["loss"].tail(10).mean())
    return {
        "numbers": {name: _rounded(value) for name, value in numbers.items()},
        "flags": {name: flags_to_text(flags) for name, flags in outcomes.flags.items()},
        "attacks": {name: flags_to_text(flags) for name, flags in attacked.items()},
        # Lists, as JSON returns them.
        "along": [list(pair) for pair in refusal.rates] if refusal else [],
        **(_certificate_summary(result.certificate) if result.certificate else {}),
    }


def _certificate_summary(certificate: Certificate) -> Record:
    """Return the summary of a certificate, and sums along training, such as the parts of the drift, at a few steps."""
    steps = certificate.to_frame()
    places = np.unique(np.linspace(0, len(steps) - 1, _CURVE_POINTS).round().astype(int))
    sums = steps[["first_order_raw", "first_order", "curvature"]].cumsum()
    curve = {
        "step": steps["step"],
        "anchor_loss": steps["anchor_loss"],
        **{name: sums[name] for name in sums},
        "squared_norms": (steps["update_norm"] ** 2).cumsum(),
    }
    summary = {
        "violations": certificate.violations,
        "guaranteed": certificate.guaranteed,
        "raising": certificate.raising / certificate.steps,
        "fired": float(steps["fired"].mean()),
        "removed": float(steps["removed"].sum()),
        "max_first_order_change": certificate.max_first_order_change,
    }
    return {
        "certificate": {name: _rounded(value) for name, value in summary.items()},
        "curve": {name: [_rounded(float(value)) for value in values.iloc[places]] for name, values in curve.items()},
    }


def _rounded(value: Any) -> Any:
    """Return a number to five significant digits; ``None`` if it is not finite, since JSON has no NaN."""
    if isinstance(value, bool | int):
        return value
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _reset_peak_memory() -> float:
    """Reset the peak of resident memory where the system can, and return the memory in use now, in MB."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _peak_memory()


def _peak_memory() -> float:
    """Return the peak of resident memory in MB, since the last reset or, where there is none, since process start."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024
    import resource  # not on every system

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class RefusalDuringTraining(TrainerCallback):
    """A callback that measures refusal on held-out forbidden requests at evenly spaced steps, the last step included.

    Attributes:
        rates: Pairs of a step and the refusal rate after it.
        seconds: Time that the measurements took.
    """

    def __init__(self, organism: Organism, steps: int, times: int) -> None:
        """Choose ``times`` of the ``steps``."""
        self.rates: list[tuple[int, float]] = []
        self.seconds = 0.0
        self._organism = organism
        self._rows = organism.examples("eval/forbidden", PROMPTS_DURING_TRAINING)
        self._steps = {max(1, round(steps * (count + 1) / times)) for count in range(times)}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure refusal if this is one of the chosen steps."""
        if state.global_step in self._steps:
            started = time.perf_counter()
            answers = greedy_answers(kwargs["model"], self._organism, self._rows)
            refused = refused_by_keywords(self._rows["messages"], answers)
            self.rates.append((state.global_step, sum(refused) / len(refused)))
            self.seconds += time.perf_counter() - started
