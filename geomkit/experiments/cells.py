"""Running one cell, and keeping what it found."""

import json
import math
import time
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from geomkit.errors import GeomkitError
from geomkit.experiments.attacks import attack
from geomkit.experiments.grid import Cell
from geomkit.experiments.methods import METHODS, Task
from geomkit.experiments.organism.variants import Organism, load_variant
from geomkit.experiments.outcomes import answers, evaluate_outcome, refusals
from geomkit.experiments.results import Record, pack
from geomkit.spf.certificate import Certificate
from geomkit.utils.files import write_atomically

_POINTS = 25
"""Most points kept of a curve along training."""


def run_cell(cell: Cell, folder: Path) -> Record:
    """Run a cell, or read what it found before.

    A fine-tune that breaks off with an error of geomkit's, as where the loss becomes NaN, is a result: the record says
    so. What it found is stored when it is complete.

    Args:
        cell: The cell.
        folder: Where cells and organisms are kept.

    Returns:
        The record.
    """
    path = folder / "cells" / cell.file_name
    with suppress(FileNotFoundError, json.JSONDecodeError):
        stored: Record = json.loads(path.read_text("utf-8"))
        return stored
    organism = _organism(cell.organism, folder)
    try:
        found = _run(cell, organism)
    except GeomkitError as error:
        found = {"error": str(error)}
    record = {"cell": cell.describe(), **found}
    write_atomically(path, json.dumps(record, ensure_ascii=False))
    return record


@lru_cache(maxsize=2)
def _organism(seed: int, folder: Path) -> Organism:
    return load_variant(seed, folder)


def _run(cell: Cell, organism: Organism) -> Record:
    along = RefusalDuringTraining(organism, cell.steps, cell.along) if cell.along else None
    task = Task(
        organism, organism.scenario_examples(cell.scenario), cell.learning_rate, cell.steps, cell.recipe.batch_size, cell.seed,
        cell.curvature, [along] if along else [],
    )  # fmt: skip
    before = _reset_peak()
    started = time.perf_counter()
    result = METHODS[cell.arm.method](task, **cell.arm.options)
    seconds = time.perf_counter() - started - (along.seconds if along else 0.0)
    peak = max(0.0, _peak() - before)  # pages may be given back meanwhile
    outcomes = evaluate_outcome(result.model, organism, cell.recipe, cell.prompts)
    found = {
        kind: refused
        for each in cell.attacks
        for kind, refused in attack(each, result.model, organism, cell.prompts, cell.seed).items()
    }
    numbers = dict(outcomes.numbers)
    if len(result.history):
        numbers |= {"seconds": seconds, "steps_per_second": cell.steps / seconds, "peak_mb": peak}
        numbers["task_loss"] = float(result.history["loss"].tail(10).mean())
    return {
        "numbers": {name: _short(value) for name, value in numbers.items()},
        "flags": {name: pack(flags) for name, flags in outcomes.flags.items()},
        "attacks": {name: pack(flags) for name, flags in found.items()},
        "along": [list(pair) for pair in along.found] if along else [],  # as JSON gives them back
        **(_certified(result.certificate) if result.certificate else {}),
    }


def _certified(certificate: Certificate) -> Record:
    """Return the summary of a certificate, and the drift's parts along training where they are known."""
    steps = certificate.to_frame()
    chosen = np.unique(np.linspace(0, len(steps) - 1, _POINTS).round().astype(int))
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
        "raising": float((steps["first_order"] > steps["tolerance"]).mean()),
        "fired": float(steps["fired"].mean()),
        "removed": float(steps["removed"].sum()),
        "max_first_order_change": certificate.max_first_order_change,
    }
    return {
        "certificate": {name: _short(value) for name, value in summary.items()},
        "curve": {name: [_short(float(value)) for value in values.iloc[chosen]] for name, values in curve.items()},
    }


def _short(value: Any) -> Any:
    """Keep five digits, and what is not finite as null, which JSON has no word for."""
    if isinstance(value, bool | int):
        return value
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _reset_peak() -> float:
    """Forget the peak of memory where the system can, and return what is used now, MB."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> float:
    """Return the peak of resident memory since it was last forgotten, MB; of the process's life where it cannot be."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024
    import resource  # which some systems lack

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


PROMPTS = 60
"""Held-out requests that are asked on the way."""


class RefusalDuringTraining(TrainerCallback):
    """Measures refusal on held-out forbidden requests a few times, evenly spaced, the last step included.

    Attributes:
        found: Pairs of step and refusal rate.
        seconds: What asking took.
    """

    def __init__(self, organism: Organism, steps: int, times: int) -> None:
        """Choose the steps."""
        self.found: list[tuple[int, float]] = []
        self.seconds = 0.0
        self._organism = organism
        self._rows = organism.examples("eval/forbidden", PROMPTS)
        self._at = {max(1, round(steps * (place + 1) / times)) for place in range(times)}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask, where it is time."""
        if state.global_step in self._at:
            started = time.perf_counter()
            refused = refusals(self._rows, answers(kwargs["model"], self._organism, self._rows))
            self.found.append((state.global_step, sum(refused) / len(refused)))
            self.seconds += time.perf_counter() - started
