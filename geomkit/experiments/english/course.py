"""The gradients along the alignment: one probe at several states of the training."""

from pathlib import Path
from typing import TYPE_CHECKING

from geomkit.analysis.probe import Probe
from geomkit.analysis.tracking import Tracker
from geomkit.errors import DataError
from geomkit.experiments.english.alignment import model_at
from geomkit.experiments.english.load import load_base

if TYPE_CHECKING:
    from geomkit.analysis.tracking import Trajectory


def measure_course(
    states: Path, probe: Probe, *, base: str | Path | None = None, progress: bool = True
) -> "Trajectory":
    """Return the results of a probe at the states of an alignment, by the number of steps.

    Args:
        states: The folder that :func:`.build.build_english` kept states in.
        probe: The probe.
        base: The base model; when left out, see :func:`.sources.base_model`.
        progress: Show a bar.

    Raises:
        DataError: If the folder has no state, a state is damaged, or the base model cannot be read.
    """
    from tqdm.auto import tqdm

    steps = steps_in(states)
    tracker = Tracker(probe)
    for step in tqdm(steps, desc="states of the alignment", unit="state", disable=not progress):
        model, tokenizer = load_base(base)
        tracker.measure_at(step, model_at(model, states / f"{step}.pt"), tokenizer)
    return tracker.trajectory


def steps_in(states: Path) -> list[int]:
    """Return the steps at which states of an alignment were kept in a folder, ascending.

    Raises:
        DataError: If there is none.
    """
    steps = sorted(int(path.stem) for path in states.glob("*.pt") if path.stem.isdigit())
    if not steps:
        raise DataError(f"expected states of an alignment in {states}, found none; keep them when you build")
    return steps
