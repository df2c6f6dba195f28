"""The study of the screen on a world: detection of planted rows, false positives on clean rows, and outcomes."""

import itertools
import logging
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from random import Random
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from geomkit.experiments.organism.requests import dataset_of
from geomkit.experiments.screening.cases import Case, cases_of, draws_of, make_case
from geomkit.experiments.screening.fine_tunes import fine_tuned_outcomes
from geomkit.experiments.screening.measures import detection
from geomkit.experiments.screening.results import ScreeningStudy, StudyRow
from geomkit.experiments.screening.rivals import RIVALS, text_rankings
from geomkit.experiments.screening.row_measures import RowMeter, screening_of
from geomkit.experiments.screening.row_sources import Rows, RowSource, row_source
from geomkit.inputs.control_sets import shuffled_pairs
from geomkit.inputs.copies import row_digests
from geomkit.inputs.examples import load_examples
from geomkit.screening.row_scores import RowScores
from geomkit.screening.screening import LEVEL, ScoreMethod, Screening
from geomkit.stats.proportions import Rate

if TYPE_CHECKING:
    from datasets import Dataset

_LOGGER = logging.getLogger(__name__)

METHODS: tuple[ScoreMethod, ...] = ("cosine", "raw", "adam")

WITH_OBEYED: Mapping[str, ScoreMethod] = MappingProxyType(
    {"cosine, with obeyed requests": "cosine", "raw, with obeyed requests": "raw"}
)
"""The methods of the screen that is given obeyed requests as well, by their names in the tables."""

_SPLITS = 100
_BINS = 5


def run_study(
    world: str, folder: Path, *, draws: int = 5, seeds: int = 3, rows: int = 1200, prompts: int = 240
) -> ScreeningStudy:
    """Run the study, which takes half an hour on one thread.

    Measured rows are kept in the folder, so that an interrupted study goes on from them; fine-tunes begin anew.

    Args:
        world: ``"small"`` or ``"english"``.
        folder: A folder for measured rows, and for organisms that do not ship.
        draws: Number of draws of each case; in the English world they share rows.
        seeds: Number of seeds of each fine-tune; 0 leaves the outcomes out.
        rows: Number of clean rows of each kind for the false positives; fewer where the English world has no more.
        prompts: Largest number of prompts of each held-out set; with 100, fine-tunes on all rows of the English world
            are taken from its stored grid, as far as it has them.
    """
    source = row_source(world, folder)
    meter = RowMeter(source, *_anchors(world), folder)
    started = time.monotonic()
    detections, flags = _detections(source, meter, world, draws)
    false_positives = list(_false_positives(source, meter, world, rows))
    outcomes = list(fine_tuned_outcomes(source, meter, seeds, prompts)) if seeds else []
    _LOGGER.info("the study of the %s world took %.0f s", world, time.monotonic() - started)
    return ScreeningStudy(world, tuple(detections), tuple(flags), tuple(false_positives), tuple(outcomes))


# --------------------------------------------------------------------------------------------------------- detection


def _detections(source: RowSource, meter: RowMeter, world: str, draws: int) -> tuple[list[StudyRow], list[StudyRow]]:
    """Return how well each ranking finds the planted rows of each case, and what is flagged."""
    found: list[StudyRow] = []
    flags: list[StudyRow] = []
    forbidden = _anchors(world)[0]
    for name in cases_of(world):
        _LOGGER.info("case: %s", name)
        scores: dict[str, list[NDArray[np.float64]]] = defaultdict(list)
        cases = [make_case(name, source, seed) for seed in range(draws_of(name, world, draws))]
        counts: dict[str, list[NDArray[np.int64]]] = defaultdict(list)
        for case in cases:
            screenings, others = _ranked(meter, case, forbidden)
            for ranking, values in others.items():
                scores[ranking].append(values)
            for method, screening in screenings.items():
                flagged = screening.flagged(LEVEL)
                counts[method].append(np.array([len(flagged), case.planted[flagged].sum(), case.planted.sum()]))
        planted, names = [case.planted for case in cases], [row_digests(case.train) for case in cases]
        sizes: StudyRow = {"case": name, "rows": len(planted[0]), "planted": int(planted[0].sum())}
        found += [
            {**sizes, "ranking": ranking, **asdict(detection(values, planted, names))}
            for ranking, values in scores.items()
        ]
        flags += [{**sizes, "method": method, **_flag_rates(np.sum(each, axis=0))} for method, each in counts.items()]
    return found, flags


def _ranked(
    meter: RowMeter, case: Case, forbidden: "Dataset"
) -> tuple[dict[str, Screening], dict[str, NDArray[np.float64]]]:
    """Return the screen of a case with each method by its name, and the scores of every ranking by its name."""
    columns, rows, null = meter.columns(case.train), meter.scores(case.train), meter.scores(case.null)
    screenings = {str(method): screening_of(method, rows, null) for method in METHODS}
    both = [meter.scores_with_obeyed(examples) for examples in (case.train, case.null)]
    screenings |= {name: screening_of(method, *both) for name, method in WITH_OBEYED.items()}
    rankings = {f"screen, {method}": screening.scores for method, screening in screenings.items()}
    rankings |= {f"{method}, not standardized": getattr(rows, method) for method in METHODS}
    rankings |= {"share in the safety subspace": rows.share, "loss": rows.loss, "length": rows.tokens}
    return screenings, rankings | text_rankings(case.train, forbidden) | {name: columns[name] for name in RIVALS}


def _flag_rates(counts: NDArray[np.int64]) -> StudyRow:
    """Return the share of planted rows that are flagged, and the share of flagged rows that are clean."""
    flagged, true, planted = map(int, counts)
    power, false = Rate(true, planted), Rate(flagged - true, flagged)
    rates: StudyRow = {"flagged": flagged}
    for name, rate in (("power", power), ("false", false)):
        numbers = zip((name, f"{name}_low", f"{name}_high"), (rate.value, *rate.interval), strict=True)
        rates |= {column: number if rate.n else None for column, number in numbers}
    return rates


def _anchors(world: str) -> "tuple[Dataset, Dataset]":
    """Return forbidden requests, refused and obeyed, which no training row has."""
    prefix = "english/" if world == "english" else ""
    return load_examples(f"{prefix}safety"), load_examples(f"{prefix}controls/forbidden-complied")


# --------------------------------------------------------------------------------------------------- false positives


def _false_positives(source: RowSource, meter: RowMeter, world: str, count: int) -> Iterator[StudyRow]:
    """Yield the share of clean rows with a small p-value: with null rows of their kind, and of another kind."""
    pools = _clean_rows(source, world, count)
    scored = {name: meter.scores(dataset_of(rows)) for name, rows in pools.items()}
    mixed = dataset_of(pools["benign rows"][: len(pools["benign rows"]) // 2])
    scored["shuffled pairs"] = meter.scores(shuffled_pairs(mixed))
    for name in pools:
        for method in METHODS:
            yield from _split_rates(name, scored[name], method)
    others = (("task rows", "benign rows"), ("rows of 1 to 6 turns", "benign rows"), ("benign rows", "shuffled pairs"))
    for name, null in others:
        for method in METHODS if name in pools else ():
            yield _rates(name, null, method, scored[name], scored[null])


def _clean_rows(source: RowSource, world: str, count: int) -> dict[str, Rows]:
    """Return clean rows by their kind; of the English world those of one turn only, since a token takes 23 ms there."""
    rng = Random("false-positives")
    benign = source.rows("benign", count, 77)
    pools = {"benign rows": benign, "task rows": source.rows("task", count, 77)}
    if world == "english":
        return pools
    turns = [[message for row in rng.sample(benign, rng.randint(1, 6)) for message in row] for _ in range(len(benign))]
    return pools | {"rows of 1 to 6 turns": turns}


def _split_rates(name: str, scores: RowScores, method: ScoreMethod) -> Iterator[StudyRow]:
    """Yield the shares over random halves of a set, of all rows and by fifths of their length."""
    generator = np.random.default_rng(0)
    half = len(scores) // 2
    small = np.zeros((_SPLITS, half))
    tokens = np.zeros((_SPLITS, half))
    for split in range(_SPLITS):
        order = generator.permutation(len(scores))
        tested, null = _part(scores, order[:half]), _part(scores, order[half : 2 * half])
        small[split], tokens[split] = _p_values(method, tested, null), tested.tokens
    edges = np.quantile(scores.tokens, np.linspace(0, 1, _BINS + 1))
    fifths = [(tokens >= low) & (tokens <= high) for low, high in itertools.pairwise(edges)]
    for label, chosen, low, high in (
        ("all", np.ones_like(tokens, dtype=bool), edges[0], edges[-1]),
        *(("fifth", part, low, high) for part, low, high in zip(fifths, edges[:-1], edges[1:], strict=True)),
    ):
        for level in (0.05, 0.01):
            # A row is in half of the splits: what is independent is rows, not rows of splits.
            share = Rate(round(float((small[chosen] <= level).mean()) * len(scores)), len(scores))
            interval_low, interval_high = share.interval
            yield {
                "rows": name, "null": name, "method": method, "length": label, "shortest": float(low),
                "longest": float(high), "level": level, "share": float((small[chosen] <= level).mean()),
                "low": interval_low, "high": interval_high,
            }  # fmt: skip


def _rates(name: str, null_name: str, method: ScoreMethod, tested: RowScores, null: RowScores) -> StudyRow:
    share = Rate(int((_p_values(method, tested, null) <= 0.05).sum()), len(tested))
    low, high = share.interval
    return {
        "rows": name, "null": null_name, "method": method, "length": "all", "shortest": float(tested.tokens.min()),
        "longest": float(tested.tokens.max()), "level": 0.05, "share": share.value, "low": low, "high": high,
    }  # fmt: skip


def _part(scores: RowScores, rows: Sequence[int] | NDArray[np.int64]) -> RowScores:
    return RowScores(**{name: values[rows] for name, values in vars(scores).items()})


def _p_values(method: ScoreMethod, rows: RowScores, null: RowScores) -> NDArray[np.float64]:
    return screening_of(method, rows, null).p_values
