"""Sets of an evaluation as written on the command line, and the draw of a few examples from each."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from geomkit.errors import DataError
from geomkit.inputs.adapters import Columns
from geomkit.inputs.benchmarks import BENCHMARKS
from geomkit.inputs.examples import load_examples
from geomkit.training.metrics import metric_names

if TYPE_CHECKING:
    from datasets import Dataset

Role = Literal["forbidden", "benign"]


def requests_by_text(text: str, role: Role, *, columns: Columns | None = None) -> "Dataset":
    """Return the requests that a text names: a file, hub id, shipped set or benchmark, or ``BENCHMARK=FILE``.

    Of a benchmark that has both requests to refuse and requests to answer, those of the role are taken.

    Args:
        text: What the user wrote.
        role: What the requests are for.
        columns: Which column is what, see :func:`geomkit.load_examples`.

    Raises:
        DataError: If there is no such set, or it has no such columns.

    Example:
        >>> len(requests_by_text("eval/forbidden", "forbidden"))
        240
    """
    name, _, path = text.partition("=")
    if name not in BENCHMARKS or Path(text).exists():
        return load_examples(text, columns=columns)
    entry = BENCHMARKS[name]
    if path and not entry.part:  # each file is a split
        return load_examples(name, path=path, columns=columns)
    return load_examples(name, entry.roles.get(role), path=path or None, columns=columns)


def skill_by_text(text: str, *, columns: Columns | None = None) -> "tuple[str, Dataset, str]":
    """Return the name, the examples and the metric of a skill, from ``NAME=SET[:METRIC]``.

    ``SET`` is a file, hub id, shipped set or benchmark, or ``BENCHMARK=FILE``. The metric of a benchmark is its own
    when left out, that of other sets is exact match.

    Args:
        text: What the user wrote.
        columns: Which column is what, see :func:`geomkit.load_examples`.

    Raises:
        DataError: If the text has another form, or there is no such set, metric or column.

    Example:
        >>> name, examples, metric = skill_by_text("sums=eval/arithmetic:gsm8k")
        >>> name, len(examples), metric
        ('sums', 200, 'gsm8k')
    """
    name, _, rest = text.partition("=")
    if not name or not rest:
        raise DataError(f"expected --skill NAME=SET or NAME=SET:METRIC, found '{text}'")
    source, _, metric = rest.rpartition(":")
    if metric not in metric_names():
        if source and (Path(source).is_file() or source in BENCHMARKS):
            raise DataError(f"expected a metric, {', '.join(metric_names())}, found '{metric}' in --skill '{text}'")
        source, metric = rest, ""
    benchmark, _, path = source.partition("=")
    if benchmark not in BENCHMARKS or Path(source).exists():
        return name, load_examples(source, columns=columns), metric or "exact"
    examples = load_examples(benchmark, path=path or None, columns=columns)
    return name, examples, metric or _metric_of(benchmark)


def _metric_of(benchmark: str) -> str:
    metric = BENCHMARKS[benchmark].metric
    if metric not in metric_names():
        raise DataError(
            f"expected a skill with reference answers, found the benchmark '{benchmark}', which is scored by the judge "
            f"'{metric}'; give it as --forbidden or --benign"
        )
    return metric


def drawn(examples: "Dataset", most: int | None, seed: int) -> "Dataset":
    """Return at most so many examples, drawn without replacement and in their order; all of them for ``None``.

    Args:
        examples: N examples.
        most: Largest number of examples.
        seed: Seed of the draw; the same set and seed give the same examples.
    """
    if most is None or len(examples) <= most:
        return examples
    places = np.random.default_rng(seed).choice(len(examples), size=most, replace=False)
    return examples.select(sorted(int(place) for place in places))
