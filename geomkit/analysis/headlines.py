"""The table of headline numbers of an analysis, the source of its data frame, its JSON and the paper's claims."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from geomkit.analysis.claims import Claim
from geomkit.correlation.conflict import Conflict
from geomkit.svd.one_sample.results import OneSample
from geomkit.svd.spectrum import Spectrum
from geomkit.svd.spectrum_contrast import compare_spectra

_NAN = float("nan")
_UNKNOWN = (_NAN, _NAN)

_REPORTED_OVERLAP = 0.8
"""Typical overlap, as the paper reports it, of a safety example with the mean of the other safety examples."""

_OVER_CONTROL = "safety − control"
_OVER_UTILITY = "safety − utility"

LOSS = "loss, nats per token"
RANK = "effective rank"
CER = "CER(10)"
SPAN = "effective rank of the span"
MEAN_COSINE = "cosine of the mean gradients"
COSINE = "cosine with utility"
EQUAL_WEIGHTS = "cosine, equal weights"
NEGATIVE = "share of examples against"
OVERLAP = "overlap of one example"
ONE_COSINE = "cosine of one example"
OVERLAP_DIFFERENCE = "overlap, difference"
_COSINE_DIFFERENCE = "cosine, difference"
_ONE_COSINE_DIFFERENCE = "cosine of one, difference"


class Headline(NamedTuple):
    """One headline number with its interval over examples and its null: the number if there were nothing to find."""

    question: str
    measure: str
    of: str
    value: float
    low: float = _NAN
    high: float = _NAN
    null: float = _NAN
    null_low: float = _NAN
    null_high: float = _NAN

    @property
    def interval(self) -> tuple[float, float]:
        """The interval over examples; NaN if there is none."""
        return self.low, self.high

    @property
    def null_interval(self) -> tuple[float, float]:
        """The central interval of the null; NaN if there is none."""
        return self.null_low, self.null_high


Headlines = Mapping[tuple[str, str], Headline]
"""Headline numbers by measure and by the gradients that they are measured on, in the order of the table."""


def headlines(
    losses: Mapping[str, float],
    spectra: Mapping[str, Spectrum],
    spans: Mapping[str, Spectrum],
    conflict: Conflict,
    one_sample: OneSample,
) -> Headlines:
    """Return all headline numbers of an analysis; each argument is the field of the analysis with the same name."""
    rows = [Headline("loss", LOSS, name, loss) for name, loss in losses.items()]
    rows += _ranks("effective_rank", RANK, spectra)
    rows += _ranks("cer10", CER, spectra)
    rows += _ranks("effective_rank", SPAN, spans)
    rows += _conflict(conflict)
    rows += _one_sample(one_sample)
    return {(row.measure, row.of): row for row in rows}


def _ranks(statistic: str, measure: str, spectra: Mapping[str, Spectrum]) -> Iterator[Headline]:
    question = "low rank?"
    for name, spectrum in spectra.items():
        interval, null = spectrum.interval(statistic), spectrum.null_mean(statistic)
        yield Headline(question, measure, name, spectrum.mean(statistic), *interval, null)
    for other in ("control", "utility"):
        contrast = compare_spectra(spectra["safety"], spectra[other], names=("safety", other))
        difference, interval = contrast.mean(statistic)
        yield Headline(question, f"{measure}, difference", " − ".join(contrast.names), difference, *interval, 0.0)


def _conflict(conflict: Conflict) -> Iterator[Headline]:
    question = "conflict?"
    yield Headline(question, MEAN_COSINE, "safety", conflict.cosine, *_UNKNOWN, _NAN, *conflict.null_interval)
    for part, measure, difference in (
        (conflict, COSINE, _COSINE_DIFFERENCE),
        (conflict.equal_weights, EQUAL_WEIGHTS, f"{EQUAL_WEIGHTS}, difference"),
    ):
        yield Headline(question, measure, "safety", part.corrected, *part.interval, 0.0)
        if contrast := part.contrast:
            yield Headline(question, measure, "control", contrast.control, *contrast.control_interval, 0.0)
            yield Headline(question, difference, _OVER_CONTROL, contrast.value, *contrast.interval, 0.0)
    share = conflict.negative
    yield Headline(question, NEGATIVE, "safety", share.value, *share.interval, 0.5)


def _one_sample(study: OneSample) -> Iterator[Headline]:
    question = "one sample?"
    yield Headline(question, OVERLAP, "safety", study.overlap, *study.interval, study.expected)
    yield Headline(question, OVERLAP, "control", study.control_overlap, *study.control_interval, study.expected)
    yield Headline(question, OVERLAP_DIFFERENCE, _OVER_CONTROL, study.contrast, *study.contrast_interval, 0.0)
    for name, group in study.groups.items():
        yield Headline(question, ONE_COSINE, name, group.cosine.value, *group.cosine.interval, 0.0)
    cosine = study.groups["control"].cosine
    yield Headline(question, _ONE_COSINE_DIFFERENCE, _OVER_CONTROL, cosine.contrast, *cosine.contrast_interval, 0.0)


class _Bound(NamedTuple):
    """A claim in words, with the word that its opposite has instead, as a bound on one headline number."""

    measure: str
    of: str
    words: str
    instead: tuple[str, str]
    number: str
    bound: float = 0.0
    above: bool = False


_CLAIMS = (
    _Bound(
        f"{RANK}, difference",
        _OVER_UTILITY,
        "The mean safety gradient has a lower effective rank than the mean utility gradient.",
        ("lower", "higher"),
        f"effective rank, {_OVER_UTILITY}",
    ),
    _Bound(
        f"{RANK}, difference",
        _OVER_CONTROL,
        "The mean safety gradient has a lower effective rank than the mean gradient of the control set.",
        ("lower", "higher"),
        f"effective rank, {_OVER_CONTROL}",
    ),
    _Bound(
        f"{SPAN}, difference",
        _OVER_UTILITY,
        "The gradients of the safety examples span fewer dimensions than those of the utility examples.",
        ("fewer", "more"),
        f"dimensions, {_OVER_UTILITY}",
    ),
    _Bound(
        f"{SPAN}, difference",
        _OVER_CONTROL,
        "The gradients of the safety examples span fewer dimensions than those of the control set.",
        ("fewer", "more"),
        f"dimensions, {_OVER_CONTROL}",
    ),
    _Bound(
        COSINE,
        "safety",
        "The safety gradient and the utility gradient point in opposing directions.",
        ("opposing", "similar"),
        "cosine",
    ),
    _Bound(
        EQUAL_WEIGHTS,
        "safety",
        "Safety and utility gradients point in opposing directions also if all examples and parameters count the same.",
        ("opposing", "similar"),
        "cosine at equal weights",
    ),
    _Bound(
        _COSINE_DIFFERENCE,
        _OVER_CONTROL,
        "The safety gradient opposes the utility gradient more than the control gradient does.",
        ("more", "less"),
        f"cosine with utility, {_OVER_CONTROL}",
    ),
    _Bound(
        _ONE_COSINE_DIFFERENCE,
        _OVER_CONTROL,
        "The gradient of one safety example points along the mean of the other safety examples, more than that of one "
        "control example does.",
        ("more", "less"),
        f"cosine, {_OVER_CONTROL}",
        above=True,
    ),
    _Bound(
        OVERLAP_DIFFERENCE,
        _OVER_CONTROL,
        "The leading directions of one safety example overlap with those of the other safety examples, more than those "
        "of one control example do.",
        ("more", "less"),
        f"overlap, {_OVER_CONTROL}",
        above=True,
    ),
    _Bound(
        OVERLAP,
        "safety",
        "The leading directions of one safety example overlap with those of the other safety examples by more than "
        f"{_REPORTED_OVERLAP}, as the paper reports.",
        ("more", "less"),
        "overlap",
        _REPORTED_OVERLAP,
        above=True,
    ),
)
"""The paper's claims on gradients, each with a claim on the difference to the control."""


def paper_claims(table: Headlines, caveat: str = "") -> list[Claim]:
    """Return the paper's claims with the numbers that decide the claims; a claim without a number is left out.

    Args:
        table: The headline numbers.
        caveat: Caveat of every claim, see :attr:`Claim.caveat`.
    """
    decided = [(table[claim.measure, claim.of], claim) for claim in _CLAIMS if (claim.measure, claim.of) in table]
    return [
        Claim(
            row.question,
            claim.words,
            claim.words.replace(*claim.instead),
            claim.number,
            row.value,
            row.interval,
            claim.bound,
            above=claim.above,
            against_control=claim.of == _OVER_CONTROL,
            caveat=caveat,
        )
        for row, claim in decided
    ]
