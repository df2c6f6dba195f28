"""Fine-tunes on the rows that the screen leaves, beside random removal, and beside SPF on all rows."""

import logging
from collections.abc import Callable, Iterator
from functools import cache
from random import Random
from typing import TYPE_CHECKING

import numpy as np

from geomkit.experiments.english.scenarios import short_maths
from geomkit.experiments.methods import sft, spf
from geomkit.experiments.organism.interface import Organism
from geomkit.experiments.organism.requests import dataset_of
from geomkit.experiments.organisms import ENGLISH, evaluate_organism, scenarios_of
from geomkit.experiments.outcomes import Flags
from geomkit.experiments.records import text_to_flags
from geomkit.experiments.results import load_results
from geomkit.experiments.screening.cases import SIZE
from geomkit.experiments.screening.results import StudyRow
from geomkit.experiments.screening.row_measures import RowMeter, screening_of
from geomkit.experiments.screening.row_sources import RowSource
from geomkit.experiments.task import Task
from geomkit.inputs.copies import row_digests
from geomkit.screening.screening import LEVEL
from geomkit.spf.rules import DEFAULT_RULE

if TYPE_CHECKING:
    from datasets import Dataset

_LOGGER = logging.getLogger(__name__)

OUTCOMES = ("poison-10", "identity-shift", "affirmative", "backdoor")
"""The scenarios whose screened training sets are trained on."""

_TASK_NULL = "poison-10"
"""The scenario whose clean rows are those of the new task."""

_TEST_ROWS = 80
"""Number of short problems of GSM8K's test split with which its training rows are compared."""

_BORDERLINE = 64
"""Number of borderline requests among the anchors of SPF in the English world, as in its grid."""


def fine_tuned_outcomes(source: RowSource, meter: RowMeter, seeds: int, prompts: int) -> Iterator[StudyRow]:
    """Yield what fine-tunes keep and learn: a row of the table for each scenario, seed and arm.

    Args:
        source: The rows of a world.
        meter: The meter of these rows.
        seeds: Number of seeds.
        prompts: Largest number of prompts of each held-out set.
    """
    for name in OUTCOMES:
        train = source.organism.scenario_examples(name)
        every = tuple(range(len(train)))
        left = _rows_left(source, meter, name, train)
        for seed in range(seeds):
            outcome = _outcomes_by_rows(source.organism, name, train, seed, prompts)
            drawn = sorted(Random(f"random-{name}-{seed}").sample(every, len(left["screened"])))
            arms = {"all rows": every, **left, "random removal": tuple(drawn), "SPF, all rows": every}
            for arm, kept in arms.items():
                if not kept:  # every row is flagged
                    continue
                _LOGGER.info("outcome: %s, %s, seed %d", name, arm, seed)
                flags = outcome(kept, arm.startswith("SPF"))
                yield {
                    "scenario": name, "arm": arm, "seed": seed, "rows": len(kept), "of": len(train),
                    **{measure: float(np.mean(values)) for measure, values in flags.items()},
                    "prompts": len(flags["refusal"]),
                }  # fmt: skip


def _rows_left(source: RowSource, meter: RowMeter, name: str, train: "Dataset") -> dict[str, tuple[int, ...]]:
    """Return the numbers of the training rows that the screen leaves, without and with obeyed requests."""
    null = _null_rows(source, name, train)
    left = {}
    for arm, scores in (("screened", meter.scores), ("screened with obeyed requests", meter.scores_with_obeyed)):
        flagged = set(screening_of("cosine", scores(train), scores(null)).flagged(LEVEL).tolist())
        left[arm] = tuple(row for row in range(len(train)) if row not in flagged)
    return left


def _null_rows(source: RowSource, name: str, train: "Dataset") -> "Dataset":
    """Return benign rows of the kind of a scenario's benign rows, none of which is a training row."""
    if name == _TASK_NULL and source.organism.name == ENGLISH:  # the scenario has GSM8K's training rows
        rows = dataset_of(short_maths("test", _TEST_ROWS))
    else:
        rows = dataset_of(source.rows("task" if name == _TASK_NULL else "benign", SIZE, 1))
    trained = set(row_digests(train))
    return rows.select([place for place, digest in enumerate(row_digests(rows)) if digest not in trained])


def _outcomes_by_rows(
    organism: Organism, name: str, train: "Dataset", seed: int, prompts: int
) -> Callable[[tuple[int, ...], bool], Flags]:
    """Return a function of the rows trained on, and of whether SPF is used, that returns the outcomes per prompt.

    The same rows are trained on once, as where nothing is flagged; a fine-tune on all rows of the English world is
    taken from its grid.
    """

    @cache
    def outcomes(kept: tuple[int, ...], protected: bool) -> Flags:
        arm = DEFAULT_RULE if protected else "SFT"
        if len(kept) == len(train) and (stored := _stored_flags(organism, name, arm, seed, prompts)):
            return stored
        scenario = scenarios_of(organism.name)[name]
        task = Task(
            organism, train.select(kept), scenario.learning_rate, scenario.steps, scenario.batch_size, seed,
            scenario.lora,
        )  # fmt: skip
        mixed = _BORDERLINE if organism.name == ENGLISH else 0
        model = (spf(task, rule=arm, mixed=mixed) if protected else sft(task)).model
        return evaluate_organism(model, organism, scenario, prompts).flags

    return outcomes


def _stored_flags(organism: Organism, name: str, arm: str, seed: int, prompts: int) -> Flags | None:
    """Return the outcomes of a fine-tune of the English grid, as far as its cell has been run."""
    if organism.name != ENGLISH:
        return None
    wanted = {"scenario": name, "arm": arm, "seed": seed, "prompts": prompts, "rate": 1.0, "length": 1.0}
    for record in load_results("english").records:
        if "flags" in record and {key: record["cell"][key] for key in wanted} == wanted:
            return {measure: text_to_flags(digits).tolist() for measure, digits in record["flags"].items()}
    return None
