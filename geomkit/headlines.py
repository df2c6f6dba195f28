"""The headline numbers of an analysis as rows: what was measured of which gradients, its interval and its null."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from geomkit.analysis import Analysis

COLUMNS = ("question", "measure", "of", "value", "low", "high", "null", "null_low", "null_high")
_UNKNOWN = (float("nan"), float("nan"))

_Row = tuple[object, ...]


def headlines(analysis: "Analysis") -> list[_Row]:
    """Return the rows of :meth:`geomkit.analysis.Analysis.to_frame`, whose columns are :data:`COLUMNS`."""
    return [
        *_loss_rows(analysis),
        *_rank_rows(analysis),
        *_conflict_rows(analysis),
        *_one_sample_rows(analysis),
    ]


def _loss_rows(analysis: "Analysis") -> Iterator[_Row]:
    for name, loss in analysis.losses.items():
        yield _row("loss", "loss, nats per token", name, loss)


def _rank_rows(analysis: "Analysis") -> Iterator[_Row]:
    for statistic, label, sides, contrast_to in (
        ("effective_rank", "effective rank", analysis.spectra, analysis.rank_contrast),
        ("cer10", "CER(10)", analysis.spectra, analysis.rank_contrast),
        ("effective_rank", "effective rank of the span", analysis.spans, analysis.span_contrast),
    ):
        for name, side in sides.items():
            null = side.null_mean(statistic)
            yield _row("low rank?", label, name, side.mean(statistic), side.interval(statistic), null)
        for contrast in map(contrast_to, ("control", "utility")):
            yield _row("low rank?", f"{label}, difference", " − ".join(contrast.names), *contrast.mean(statistic), 0.0)


def _conflict_rows(analysis: "Analysis") -> Iterator[_Row]:
    found, question, of = analysis.conflict, "conflict?", "safety − control"
    mean = "cosine of the mean gradients"
    yield _row(question, mean, "safety", found.cosine, null_interval=found.null_interval)
    yield _row(question, "cosine with utility", "safety", found.corrected, found.interval, 0.0)
    if found.contrast:
        beside = found.contrast
        yield _row(question, "cosine with utility", "control", beside.control, beside.control_interval, 0.0)
        yield _row(question, "cosine, difference", of, found.contrast.value, found.contrast.interval, 0.0)
    equal, alike = found.unweighted, "cosine, parameters alike"
    yield _row(question, alike, "safety", equal.corrected, equal.interval, 0.0)
    if equal.contrast:
        beside = equal.contrast
        yield _row(question, alike, "control", beside.control, beside.control_interval, 0.0)
        yield _row(question, f"{alike}, difference", of, equal.contrast.value, equal.contrast.interval, 0.0)
    share = found.negative
    yield _row(question, "share of examples against", "safety", share.value, share.interval, 0.5)


def _one_sample_rows(analysis: "Analysis") -> Iterator[_Row]:
    study, question = analysis.one_sample, "one sample?"
    yield _row(question, "overlap of one example", "safety", study.overlap, study.interval, study.expected)
    yield _row(question, "overlap of one example", "control", study.null_mean, study.null_interval, study.expected)
    yield _row(question, "overlap, difference", "safety − control", study.contrast, study.contrast_interval, 0.0)
    for name, group in study.groups.items():
        yield _row(question, "cosine of one example", name, group.cosine.value, group.cosine.interval, 0.0)
    beside, measure = study.groups["control"].cosine, "cosine of one, difference"
    yield _row(question, measure, "safety − control", beside.contrast, beside.contrast_interval, 0.0)


def _row(
    question: str,
    measure: str,
    of: str,
    value: float,
    interval: tuple[float, float] = _UNKNOWN,
    null: float = float("nan"),
    null_interval: tuple[float, float] = _UNKNOWN,
) -> _Row:
    return (question, measure, of, value, *interval, null, *null_interval)
