"""The three insights in one result: low rank, conflict, one sample — each beside what could have refuted it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from geomkit.analysis.claims import Claim, claims_frame, claims_table
from geomkit.correlation.conflict import Conflict, conflict
from geomkit.gradients.gradient_set import Coverage, GradientSet, layer_grams
from geomkit.svd.example_span import span
from geomkit.svd.one_sample.results import OneSample
from geomkit.svd.one_sample.study import one_sample_study
from geomkit.svd.principal_angles import Angles, principal_angles
from geomkit.svd.spectrum import Spectrum, spectrum
from geomkit.svd.spectrum_contrast import SpectrumContrast, compare_spectra
from geomkit.svd.subspaces import subspace
from geomkit.svd.token_matching import match_tokens
from geomkit.utils.display import html_table, text_table
from geomkit.utils.figures import draw

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

_UNEVEN = 0.2
_REPORTED = 0.8
"""The overlap of one sample with the mean that the paper reports as typical."""


@dataclass(frozen=True, eq=False)
class Analysis:
    """What safety, control and utility gradients look like, and how they lie to each other.

    Attributes:
        spectra: Of the mean gradient of every linear layer, at equal token counts, as ``"safety"``, ``"control"`` and
            ``"utility"``.
        spans: Of the examples' own gradients as vectors, one beside another: how many dimensions many of them span.
        angles: Principal angles between the leading left subspaces of safety and utility.
        conflict: Cosines between the two, and by how much they are below the control's.
        one_sample: What single safety examples find of the mean safety subspace, beside what single controls find.
        coverage: What share of the model was seen.
        tokens: Number of tokens in each layer's spectra, the same on all sides; the median over layers.
        losses: Mean loss of the safety, control and utility examples, in nats per token.
        largest: Share of the examples' squared norms that the largest one holds, of each set.
    """

    spectra: Mapping[str, Spectrum]
    spans: Mapping[str, Spectrum]
    angles: Angles
    conflict: Conflict
    one_sample: OneSample
    coverage: Coverage
    tokens: int
    losses: Mapping[str, float]
    largest: Mapping[str, float]

    @property
    def safety(self) -> Spectrum:
        """Spectra of the mean safety gradients."""
        return self.spectra["safety"]

    @property
    def utility(self) -> Spectrum:
        """Spectra of the mean utility gradients."""
        return self.spectra["utility"]

    def rank_contrast(self, other: str) -> SpectrumContrast:
        """Return by how much the safety spectra differ from those of ``"control"`` or ``"utility"``."""
        return compare_spectra(self.safety, self.spectra[other], names=("safety", other))

    def span_contrast(self, other: str) -> SpectrumContrast:
        """Return by how much the span of the safety examples differs from that of the others."""
        return compare_spectra(self.spans["safety"], self.spans[other], names=("safety", other))

    @property
    def caution(self) -> str:
        """What to be careful about; empty where there is nothing.

        Where a few of many examples hold most of the squared norm, a sample says little of the others, and its
        intervals do not know what it has missed: with half of it in 2 of 240 examples, nominal 95 % intervals of the
        cosine, the mean gradient's rank and the one-sample overlap held the truth in 70 to 90 % of samples of 16 or 32.
        """
        uneven = [f"{name} {share:.0%}" for name, share in self.largest.items() if share > _UNEVEN]
        if not uneven:
            return ""
        return (
            f"one example holds much of the squared norm ({', '.join(uneven)}): intervals that weigh examples by their "
            "norm may miss the truth; trust those of the span and of the cosine with all alike, or take more examples"
        )

    def claims(self) -> list[Claim]:
        """Return what the paper claims of gradients, each claim with and without a control, and what became of it."""
        study, direction = self.one_sample, self.one_sample.groups["control"].cosine
        return [
            *(
                Claim("low rank?", f"{what}: safety is below {other}", *contrast(other).mean("effective_rank"))
                for what, contrast in (
                    ("effective rank of the mean gradient at equal tokens", self.rank_contrast),
                    ("effective rank of the examples' span", self.span_contrast),
                )
                for other in ("utility", "control")
            ),
            Claim(
                "conflict?", "cosine of safety and utility is below 0", self.conflict.corrected, self.conflict.interval
            ),
            Claim(
                "conflict?",
                "it is below 0 with all examples and parameters alike",
                self.conflict.unweighted.corrected,
                self.conflict.unweighted.interval,
            ),
            *(
                [Claim("conflict?", "it is below that of control and utility", contrast.value, contrast.interval)]
                if (contrast := self.conflict.contrast)
                else []
            ),
            Claim(
                "one sample?",
                "a safety example's cosine with the others' mean is above a control's",
                direction.contrast,
                direction.contrast_interval,
                above=True,
            ),
            Claim(
                "one sample?",
                "a safety example's overlap with the others is above a control's",
                study.contrast,
                study.contrast_interval,
                above=True,
            ),
            Claim(
                "one sample?",
                f"that overlap is above {_REPORTED}, as reported",
                study.overlap,
                study.interval,
                _REPORTED,
                above=True,
            ),
        ]

    def to_dict(self) -> dict[str, object]:
        """Return the headline numbers: ``spectrum``, ``conflict``, ``one_sample``, and the ``claims``.

        ``null_interval`` is where ``cosine``, that of the mean gradients, lies for shuffled labels; ``interval``
        belongs to ``corrected``, the estimate of the cosine of the expected gradients. ``contrast`` is
        safety − control.
        """
        return {
            "losses": dict(self.losses),
            "largest_example": dict(self.largest),
            "spectrum": {name: _headline(side, self.tokens) for name, side in self.spectra.items()},
            "span": {
                name: {"effective_rank": side.mean("effective_rank"), "interval": list(side.interval("effective_rank"))}
                for name, side in self.spans.items()
            },
            "conflict": {
                "cosine": self.conflict.cosine,
                "corrected": self.conflict.corrected,
                "unweighted": self.conflict.unweighted.corrected,
                "negative_share": self.conflict.negative.value,
                "negative_share_interval": list(self.conflict.negative.interval),
                "interval": list(self.conflict.interval),
                "null_interval": list(self.conflict.null_interval),
                "p_value": self.conflict.p_value,
            },
            "one_sample": {
                "overlap": self.one_sample.overlap,
                "interval": list(self.one_sample.interval),
                "null": self.one_sample.null_mean,
                "null_interval": list(self.one_sample.null_interval),
                "contrast": self.one_sample.contrast,
                "contrast_interval": list(self.one_sample.contrast_interval),
                "cosine": self.one_sample.groups["safety"].cosine.value,
                "control_cosine": self.one_sample.groups["control"].cosine.value,
                "expected": self.one_sample.expected,
            },
            "claims": claims_frame(self.claims()).to_dict("records"),
        }

    def to_frame(self) -> "pd.DataFrame":
        """Return one row per headline number.

        The columns are ``question``, ``measure``, ``of`` (which gradients), ``value`` with its interval ``low`` to
        ``high`` over examples, and ``null`` with ``null_low`` to ``null_high``: what it would be if there were nothing
        to find.
        """
        import pandas as pd

        return pd.DataFrame(headlines(self), columns=list(COLUMNS))

    def plot(self) -> "Figure":
        """Draw the normalised spectra with their nulls."""
        return draw("plot_spectrum", *self.spectra.values(), names=tuple(self.spectra))

    def __str__(self) -> str:
        """Say what became of each claim."""
        rows = claims_table(self.claims())
        lines = text_table([list(rows.columns), *rows.to_numpy().tolist()])
        return "\n".join([self._head(), *lines])

    def _head(self) -> str:
        caution = f"; {self.caution}" if self.caution else ""
        return f"Gradient geometry at {self.tokens} tokens; {self.coverage}{caution}"

    def _repr_html_(self) -> str:
        head = self._head()
        return html_table(head, self.to_frame(), rows=40) + html_table("What survives", claims_table(self.claims()))


def analysis_of(
    safety: GradientSet,
    utility: GradientSet,
    control: GradientSet,
    *,
    rank: int = 10,
    null_draws: int = 8,
    seed: int = 0,
) -> Analysis:
    """Measure gradients that were collected with ``per_sample=True`` and ``form="factored"``.

    Args:
        safety: Of forbidden requests and refusals.
        utility: Of benign requests and answers.
        control: Of benign requests with the safety set's responses.
        rank: Number of directions compared between subspaces.
        null_draws: Draws from the null of each layer's spectrum.
        seed: Seed of all random draws.

    Returns:
        The three questions, answered.

    Raises:
        GeometryError: If a set has fewer than three examples, or was not collected so.
    """
    sides = {"safety": safety, "control": control, "utility": utility}
    matched = match_tokens(*sides.values(), seed=seed)
    spectra = {
        name: spectrum(side, null_draws=null_draws, seed=seed) for name, side in zip(sides, matched, strict=True)
    }
    count = min(len(side.samples) for side in sides.values())  # more examples span more dimensions
    within = {name: layer_grams(side, side) for name, side in sides.items()}
    return Analysis(
        spectra=spectra,
        spans={name: span(_some(grams, count, seed), together=True, seed=seed) for name, grams in within.items()},
        angles=principal_angles(*(subspace(side, rank=rank) for side in (matched[0], matched[2]))),
        conflict=conflict(
            within["safety"],
            within["utility"],
            within["control"],
            across=layer_grams(safety, utility),
            control_across=layer_grams(control, utility),
            seed=seed,
        ),
        one_sample=one_sample_study(safety, control, rank=rank),
        coverage=safety.coverage,
        tokens=int(np.median([layer.tokens for layer in spectra["safety"].layers.values()])),
        losses={name: side.loss for name, side in sides.items()},
        largest={name: _largest(grams) for name, grams in within.items()},
    )


def _largest(grams: Mapping[str, Tensor]) -> float:
    squared = torch.stack([gram.diagonal() for gram in grams.values()]).sum(0)
    return float(squared.max() / squared.sum()) if bool(squared.any()) else 0.0


def _some(grams: Mapping[str, Tensor], count: int, seed: int) -> dict[str, Tensor]:
    """Keep so many examples, drawn at random."""
    examples = len(next(iter(grams.values())))
    kept = np.sort(np.random.default_rng(seed).choice(examples, count, replace=False))
    return {name: gram[kept][:, kept] for name, gram in grams.items()}


def _headline(side: Spectrum, tokens: int) -> dict[str, object]:
    return {
        "tokens": tokens,
        "effective_rank": side.mean("effective_rank"),
        "effective_rank_interval": list(side.interval("effective_rank")),
        "cer10": side.mean("cer10"),
        "null_effective_rank": side.null_mean("effective_rank"),
        "null_cer10": side.null_mean("cer10"),
    }


COLUMNS = ("question", "measure", "of", "value", "low", "high", "null", "null_low", "null_high")
_UNKNOWN = (float("nan"), float("nan"))

_Row = tuple[object, ...]


def headlines(analysis: "Analysis") -> list[_Row]:
    """Return the rows of :meth:`geomkit.analysis.analysis.Analysis.to_frame`, whose columns are :data:`COLUMNS`."""
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
