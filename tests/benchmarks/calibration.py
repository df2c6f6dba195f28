"""How often geomkit's tests and intervals are wrong, and how often they see what is there: a simulation of experiments.

    python -m tests.benchmarks.calibration                # 400 experiments of each kind, some minutes on one thread

Each row is one measure on sets of examples drawn from populations that are known. *Covers* is the share of nominal 95 %
intervals that hold the truth; *false* is how often a difference is claimed (p ≤ .05, or an interval that excludes
zero) where safety and control come from one population; *power* is how often it is claimed where they do not.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table

from geomkit.correlation.conflict import conflict
from geomkit.gradients.gradient_set import GradientSet
from geomkit.svd.example_span import span
from geomkit.svd.noise_floor import noise_floor
from geomkit.svd.one_sample.overlaps import overlaps
from geomkit.svd.one_sample.study import one_sample_study
from geomkit.svd.spectrum import spectrum
from geomkit.svd.spectrum_contrast import compare_spectra
from tests.correlation.test_conflict import from_rows
from tests.correlation.test_layer_conflict import means, sample
from tests.helpers.example_sets import Drawing, drawn_set, heavy, low_rank

Interval = tuple[float, float]
_TOKENS = 6


@dataclass(frozen=True)
class Found:
    """What one experiment says: a number, its interval, and whether it claims a difference."""

    value: float
    interval: Interval
    claims: bool


Experiment = Callable[[np.random.Generator, int], Found]
"""From a generator and a number of examples a side to what is found."""


@dataclass(frozen=True)
class Row:
    """One measure: how an experiment without and with a difference is drawn, and what the truth is if it is known.

    Attributes:
        measure: What is measured.
        planted: What the difference is, in words.
        null: An experiment in which there is nothing to find.
        real: An experiment in which there is.
        truth: What the intervals of ``real`` should hold; the mean over the experiments when left out.
    """

    measure: str
    planted: str
    null: Experiment
    real: Experiment
    truth: float | None = None


def _excludes(interval: Interval) -> bool:
    return not interval[0] <= 0 <= interval[1]


def _cosines(safety: float, control: float) -> Callable[[np.random.Generator, int], list[GradientSet]]:
    """Safety, control and utility examples whose expected gradients have these cosines with utility's."""

    def draw(generator: np.random.Generator, examples: int) -> list[GradientSet]:
        expected = means(generator, safety, control, 0.5)
        return [from_rows(sample(generator, mean, examples)[:, :96]) for mean in expected]

    return draw


def _conflict(safety: float) -> Experiment:
    def experiment(generator: np.random.Generator, examples: int) -> Found:
        first, _, utility = _cosines(safety, 0.0)(generator, examples)
        found = conflict(first, utility, draws=19)
        return Found(found.corrected, found.interval, _excludes(found.interval))

    return experiment


def _shuffled(safety: float | None) -> Experiment:
    """The permutation test; without a cosine, both sets are drawn from one population."""

    def experiment(generator: np.random.Generator, examples: int) -> Found:
        first, _, utility = _cosines(0.0 if safety is None else safety, 0.0)(generator, examples)
        if safety is None:
            mean = means(generator, 0.0, 0.0, 0.5)[0]
            first, utility = (from_rows(sample(generator, mean, examples)[:, :96]) for _ in range(2))
        found = conflict(first, utility, draws=199, seed=int(generator.integers(2**31)))
        return Found(found.cosine, found.interval, found.p_value <= 0.05)

    return experiment


def _contrast(safety: float, control: float) -> Experiment:
    def experiment(generator: np.random.Generator, examples: int) -> Found:
        sides = _cosines(safety, control)(generator, examples)
        contrast = conflict(sides[0], sides[2], sides[1], draws=19).contrast
        if contrast is None:
            raise ValueError("expected a contrast, found none; give a control")
        return Found(contrast.value, contrast.interval, contrast.p_value <= 0.05)

    return experiment


def _ranks(a: Drawing, b: Drawing) -> Experiment:
    def experiment(generator: np.random.Generator, examples: int) -> Found:
        sides = (drawn_set(draw, generator, [_TOKENS] * examples) for draw in (a, b))
        seed = int(generator.integers(2**31))
        first, second = (spectrum(side, null_draws=0, seed=seed) for side in sides)
        value, interval = compare_spectra(first, second).mean("effective_rank")
        return Found(value, interval, _excludes(interval))

    return experiment


def _one_sample(a: Drawing, b: Drawing) -> Experiment:
    def experiment(generator: np.random.Generator, examples: int) -> Found:
        safety, control = (drawn_set(draw, generator, [_TOKENS] * examples) for draw in (a, b))
        study = one_sample_study(safety, control, rank=4)
        return Found(study.contrast, study.contrast_interval, _excludes(study.contrast_interval))

    return experiment


def _spans(a: Drawing, b: Drawing) -> Experiment:
    def experiment(generator: np.random.Generator, examples: int) -> Found:
        sides = [span(drawn_set(draw, generator, [_TOKENS] * examples), by="model") for draw in (a, b)]
        value, interval = compare_spectra(*sides).mean("effective_rank")
        return Found(value, interval, _excludes(interval))

    return experiment


def _overlaps(a: Drawing, b: Drawing) -> Experiment:
    def experiment(generator: np.random.Generator, examples: int) -> Found:
        sets = {name: drawn_set(draw, generator, [_TOKENS] * examples) for name, draw in (("a", a), ("b", b))}
        found = overlaps(sets, rank=4, draws=199, seed=int(generator.integers(2**31))).contrasts["a", "b"]
        return Found(found.value, found.interval, found.p_value <= 0.05)

    return experiment


def _floor(strength: float) -> Experiment:
    """Whether the mean gradient has a direction above the sampling noise."""

    def experiment(generator: np.random.Generator, examples: int) -> Found:
        shift = strength * np.outer(np.ones(48) / 48**0.5, np.ones(40) / 40**0.5)
        noise = generator.standard_normal((examples, 48, 40)) * np.arange(1, 41) ** -0.5
        found = noise_floor(
            from_rows((noise + shift).reshape(examples, -1)), draws=39, seed=int(generator.integers(2**31))
        )
        p_value = float(found.to_frame()["p_value"].iloc[0])
        return Found(p_value, (0.0, 1.0), p_value <= 0.05)

    return experiment


ROWS = (
    Row("conflict: cosine", "−.3", _conflict(0.0), _conflict(-0.3), -0.3),
    Row("conflict: safety − control", "−.3 − 0", _contrast(-0.2, -0.2), _contrast(-0.3, 0.0), -0.3),
    Row("conflict: shuffled labels", "cosine .8, not 1", _shuffled(None), _shuffled(0.8)),
    Row("effective rank: safety − control", "3 − 8 directions", _ranks(heavy, heavy), _ranks(low_rank(3), low_rank(8))),
    Row("span: safety − control", "4 − 8 directions", _spans(heavy, heavy), _spans(low_rank(4), low_rank(8))),
    Row(
        "one sample: safety − control",
        "5 − 6 directions",
        _one_sample(heavy, heavy),
        _one_sample(low_rank(5), low_rank(6)),
    ),
    Row("overlaps: within − between", "5 − 6 directions", _overlaps(heavy, heavy), _overlaps(low_rank(5), low_rank(6))),
    Row("noise floor: σ₁", "rank one", _floor(0.0), _floor(1.0)),
)


def measure(row: Row, examples: int, experiments: int) -> list[str]:
    """Run a row's experiments and return its cells."""
    generator = np.random.default_rng(0)
    null = [row.null(generator, examples) for _ in range(experiments)]
    real = [row.real(generator, examples) for _ in range(experiments)]
    truth = row.truth if row.truth is not None else float(np.mean([found.value for found in real]))
    covered = float(np.mean([found.interval[0] <= truth <= found.interval[1] for found in real]))
    false, power = (float(np.mean([found.claims for found in side])) for side in (null, real))
    tested_only = row.measure in ("noise floor: σ₁", "conflict: shuffled labels")
    held = "–" if tested_only else f"{covered:.1%}"
    return [row.measure, str(examples), held, f"{false:.1%}", f"{power:.0%}", row.planted]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experiments", type=int, default=400)
    parser.add_argument("--examples", type=int, nargs="+", default=[16, 32])
    options = parser.parse_args()
    table = Table("measure", "examples a side", "covers", "false", "power", "planted")
    for row in ROWS:
        for examples in options.examples:
            table.add_row(*measure(row, examples, options.experiments))
    Console().print(table)


if __name__ == "__main__":
    main()
