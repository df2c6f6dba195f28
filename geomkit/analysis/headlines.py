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
UNWEIGHTED = "cosine, parameters alike"
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
        (conflict.unweighted, UNWEIGHTED, f"{UNWEIGHTED}, difference"),
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
    yield Headline(question, OVERLAP, "control", study.null_mean, *study.null_interval, study.expected)
    yield Headline(question, OVERLAP_DIFFERENCE, _OVER_CONTROL, study.contrast, *study.contrast_interval, 0.0)
    for name, group in study.groups.items():
        yield Headline(question, ONE_COSINE, name, group.cosine.value, *group.cosine.interval, 0.0)
    cosine = study.groups["control"].cosine
    yield Headline(question, _ONE_COSINE_DIFFERENCE, _OVER_CONTROL, cosine.contrast, *cosine.contrast_interval, 0.0)


class _Bound(NamedTuple):
    """A claim in words, as a bound on one headline number."""

    measure: str
    of: str
    words: str
    bound: float = 0.0
    above: bool = False


_CLAIMS = (
    _Bound(
        f"{RANK}, difference",
        _OVER_UTILITY,
        "effective rank of the mean gradient at equal tokens: safety is below utility",
    ),
    _Bound(
        f"{RANK}, difference",
        _OVER_CONTROL,
        "effective rank of the mean gradient at equal tokens: safety is below control",
    ),
    _Bound(f"{SPAN}, difference", _OVER_UTILITY, "effective rank of the examples' span: safety is below utility"),
    _Bound(f"{SPAN}, difference", _OVER_CONTROL, "effective rank of the examples' span: safety is below control"),
    _Bound(COSINE, "safety", "cosine of safety and utility is below 0"),
    _Bound(UNWEIGHTED, "safety", "it is below 0 with all examples and parameters alike"),
    _Bound(_COSINE_DIFFERENCE, _OVER_CONTROL, "it is below that of control and utility"),
    _Bound(
        _ONE_COSINE_DIFFERENCE,
        _OVER_CONTROL,
        "a safety example's cosine with the others' mean is above a control's",
        above=True,
    ),
    _Bound(
        OVERLAP_DIFFERENCE,
        _OVER_CONTROL,
        "a safety example's overlap with the others is above a control's",
        above=True,
    ),
    _Bound(
        OVERLAP,
        "safety",
        f"that overlap is above {_REPORTED_OVERLAP}, as reported",
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
        Claim(row.question, claim.words, row.value, row.interval, claim.bound, above=claim.above, caveat=caveat)
        for row, claim in decided
    ]
