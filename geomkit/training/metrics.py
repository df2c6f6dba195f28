"""Metrics of utility, which compare a response with a reference answer, and perplexity.

A metric is a function of a response and a reference. Where it returns booleans, their share is reported with Wilson's
interval, otherwise the mean with Student's. :data:`METRICS` has the metrics by name.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from typing import Any

from geomkit.errors import DataError

Metric = Callable[[str, str], bool | float]
"""Function of a response and a reference that returns whether, or how far, they agree."""

_NUMBER = re.compile(
    r"(?:(?<![\w).%])(?<!\d )[-−]\s?\$?|\$\s?[-−]?)?"  # 10 - 3 and 10-20 have no sign: the minus follows a number
    r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+)"
)


def exact_match(response: str, reference: str) -> bool:
    """Return whether a response is the reference, but for white space around it.

    Example:
        >>> exact_match(" 12 ", "12"), exact_match("12.", "12")
        (True, False)
    """
    return response.strip() == reference.strip()


def final_number_match(response: str, reference: str) -> bool:
    r"""Return whether a response ends in the number of the reference, as GSM8K is scored.

    Raises:
        DataError: If the reference has no number.

    Example:
        >>> final_number_match("So she has $1,050.00.", "10 * 105 = 1050\n#### 1050")
        True
    """
    expected = final_number(reference)
    if expected is None:
        raise DataError(
            f"expected a number in the answer of a GSM8K example, found {reference!r:.80}; end the answer in the "
            "number, as in '#### 42'"
        )
    return final_number(response) == expected


def final_number(text: str) -> Decimal | None:
    r"""Return the number after the last ``####`` of a text, or its last number where there is none; ``None`` without.

    Commas between thousands, signs, decimals and dollar signs are read.

    Example:
        >>> final_number("3 of 4\n#### -1,234.5"), final_number("5 - 3 leaves 2 eggs."), final_number("none")
        (Decimal('-1234.5'), Decimal('2'), None)
    """
    _, marker, after = text.rpartition("####")
    numbers = _NUMBER.findall(after if marker else text)
    if not numbers:
        return _last(text.replace("####", " ")) if marker else None
    return _decimal(numbers[0] if marker else numbers[-1])


def _last(text: str) -> Decimal | None:
    numbers = _NUMBER.findall(text)
    return _decimal(numbers[-1]) if numbers else None


def _decimal(number: str) -> Decimal:
    return Decimal(re.sub(r"[$,\s]", "", number.replace("−", "-")))


@dataclass(frozen=True)
class Rouge:
    """ROUGE (Lin 2004): F-measure of the n-grams or the longest subsequence that a response and a reference share.

    Computed by the package ``rouge-score``, with Porter's stemmer, as in the examples of transformers.

    Attributes:
        kind: ``"rouge1"``, ``"rouge2"``, ``"rougeL"``, or ``"rougeLsum"`` by lines.
    """

    kind: str

    def __call__(self, response: str, reference: str) -> float:
        """Return the F-measure, between 0 and 1."""
        return float(_scorer(self.kind).score(reference, response)[self.kind].fmeasure)


@cache
def _scorer(kind: str) -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise DataError(
            f"expected the package rouge-score for the metric '{kind}', found none; pip install 'geomkit[rouge]'"
        ) from None
    return RougeScorer([kind], use_stemmer=True)


PERPLEXITY = "perplexity"
"""Name of the one metric that is read off the losses of the reference answers; the model writes nothing for it."""

METRICS: dict[str, Metric] = {
    "exact": exact_match,
    "gsm8k": final_number_match,
    **{kind: Rouge(kind) for kind in ("rouge1", "rouge2", "rougeL", "rougeLsum")},
}
"""The metrics of a response and a reference, by name."""

_TITLES = {"exact": "exact match", "gsm8k": "final number"}


def find_metric(metric: str | Metric) -> tuple[str, Metric | None]:
    """Return the name of a metric in tables, and its function; ``None`` for perplexity.

    Raises:
        DataError: If there is no such metric, or its package is missing.

    Example:
        >>> find_metric("exact")[0]
        'exact match'
    """
    if not isinstance(metric, str):
        return getattr(metric, "__name__", type(metric).__name__), metric
    if metric == PERPLEXITY:
        return PERPLEXITY, None
    if metric not in METRICS:
        raise DataError(f"expected a metric, {', '.join(metric_names())}, found '{metric}'; choose one of these")
    function = METRICS[metric]
    if isinstance(function, Rouge):
        _scorer(function.kind)  # a package that is missing is named before anything runs
    return _TITLES.get(metric, metric), function


def metric_names() -> list[str]:
    """Return the names of all metrics.

    Example:
        >>> metric_names()
        ['exact', 'gsm8k', 'rouge1', 'rouge2', 'rougeL', 'rougeLsum', 'perplexity']
    """
    return [*METRICS, PERPLEXITY]
