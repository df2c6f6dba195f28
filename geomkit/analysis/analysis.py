"""Analysis of safety, control and utility gradients: rank, conflict and one-sample overlap, with nulls and controls."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from geomkit.analysis import headlines as names
from geomkit.analysis.alignment import Alignment
from geomkit.analysis.claims import VERDICTS, Claim, claims_frame, claims_table
from geomkit.analysis.headlines import Headline, Headlines, headlines, paper_claims
from geomkit.analysis.parameter_measures import measure_parameters
from geomkit.analysis.summary import QUESTIONS, numbers_table, summary_of
from geomkit.correlation.conflict import Conflict, conflict
from geomkit.errors import GeometryError
from geomkit.gradients.gradient_set import Coverage, GradientSet
from geomkit.inputs.parameters import Kind, Layers
from geomkit.stats.proportions import Rate
from geomkit.svd.example_span import span
from geomkit.svd.one_sample.results import OneSample
from geomkit.svd.one_sample.study import study_of
from geomkit.svd.principal_angles import Angles, principal_angles
from geomkit.svd.spectrum import Spectrum, spectrum_of
from geomkit.svd.spectrum_contrast import SpectrumContrast, compare_spectra
from geomkit.svd.subspaces import Subspace
from geomkit.utils.display import element, html_table, joined
from geomkit.utils.figures import DrawnResult, draw
from geomkit.utils.readable import text_table

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

_UNEVEN = 0.2
"""Share of a set's squared norm above which the example that has this share is named in the caution."""


@dataclass(frozen=True, eq=False)
class Analysis(DrawnResult):
    """Spectra of safety, control and utility gradients, their conflict, and the overlap of single examples.

    Mappings have the keys ``"safety"``, ``"control"`` and ``"utility"``.

    Attributes:
        spectra: Spectra of the mean gradient of every linear layer, at equal token counts.
        spans: Spectra of the matrix whose columns are the gradients of the examples as vectors; their effective rank is
            the number of dimensions that the examples span.
        layer_spans: The spans of the gradients of each decoder layer, and of each kind of parameter outside the layers.
        angles: Principal angles between the leading left subspaces of the mean safety and the mean utility gradient.
        conflict: Cosine of safety and utility gradients, and its difference to the cosine of control and utility.
        one_sample: Overlap of single safety examples, and of single controls, with the subspace of the mean safety
            gradient.
        coverage: The share of the model's parameters whose gradients were collected.
        tokens: Number of tokens in each layer's spectra, equal for all three sets; the median over layers.
        losses: Mean loss of each set's examples, in nats per token.
        largest: The largest share of a single example in the sum of the squared gradient norms of its set.
        refusal: Share of the safety requests that the model refuses; ``None`` if it was not asked.
        remark: How many rows are copies of others, and how many rows two sets share, in words.
        facts: Model, data, settings and versions, in words, for the head of a report.
    """

    spectra: Mapping[str, Spectrum]
    spans: Mapping[str, Spectrum]
    layer_spans: Mapping[str, Spectrum]
    angles: Angles
    conflict: Conflict
    one_sample: OneSample
    coverage: Coverage
    tokens: int
    losses: Mapping[str, float]
    largest: Mapping[str, float]
    refusal: Rate | None = None
    remark: str = ""
    facts: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def safety(self) -> Spectrum:
        """Spectra of the mean safety gradients."""
        return self.spectra["safety"]

    @property
    def utility(self) -> Spectrum:
        """Spectra of the mean utility gradients."""
        return self.spectra["utility"]

    def rank_contrast(self, other: str) -> SpectrumContrast:
        """Return the difference of the safety spectra to the spectra of ``"control"`` or ``"utility"``."""
        return compare_spectra(self.safety, self.spectra[other], names=("safety", other))

    def span_contrast(self, other: str, by: Literal["model", "layer"] = "model") -> SpectrumContrast:
        """Return the difference of the span of the safety examples to the span of the ``other`` examples.

        Args:
            other: ``"control"`` or ``"utility"``.
            by: ``"model"`` for :attr:`spans`, ``"layer"`` for :attr:`layer_spans`.

        Raises:
            GeometryError: If ``by`` is neither.
        """
        if by not in ("model", "layer"):
            raise GeometryError(f"expected by to be model or layer, found {by!r:.40}; choose one of these")
        spans = self.spans if by == "model" else self.layer_spans
        return compare_spectra(spans["safety"], spans[other], names=("safety", other))

    @property
    def caution(self) -> str:
        """A warning, in words, on copies, and if one example has a large part of its set's squared norm; else empty.

        If a few of many examples have most of the squared norm, a sample of the examples often misses them, and
        intervals over the sample are too narrow (see tests/benchmarks/README.md).
        """
        uneven = [f"{name} {share:.0%}" for name, share in self.largest.items() if share > _UNEVEN]
        if not uneven:
            return self.remark
        return (f"{self.remark}; " if self.remark else "") + (
            f"one example holds much of the squared norm ({', '.join(uneven)}): intervals that weigh examples by their "
            "norm may be too narrow; trust the intervals of the span, and of the cosine at equal weights, or "
            "take more examples"
        )

    def claims(self) -> list[Claim]:
        """Return the paper's claims on gradients, with and without a control, each with its number and verdict.

        Where the model does not refuse, or its answers leave that open, every claim has a caveat: its verdict is
        not, or perhaps not, about alignment.
        """
        return paper_claims(self.headlines(), self.alignment.caveat)

    @property
    def alignment(self) -> Alignment:
        """How the model answers the safety requests, without which safety gradients are not about safety."""
        return Alignment(self.refusal, self.losses["safety"], self.losses["control"])

    def headlines(self) -> Headlines:
        """Return the headline numbers by measure and by the gradients that they are measured on."""
        return headlines(self.losses, self.spectra, self.spans, self.conflict, self.one_sample)

    def to_dict(self) -> dict[str, object]:
        """Return the numbers as JSON values: ``alignment``, ``spectrum``, ``conflict``, ``one_sample``, ``claims``, ….

        In ``conflict``, ``null_interval`` is the interval of ``cosine``, the cosine of the mean gradients, for shuffled
        labels, and ``interval`` is the interval of ``corrected``, the estimate of the cosine of the expected gradients.
        In ``one_sample``, ``null`` is the overlap of the controls, and ``contrast`` is safety − control.
        """
        table = self.headlines()
        mean, cosine = table[names.MEAN_COSINE, "safety"], table[names.COSINE, "safety"]
        negative = table[names.NEGATIVE, "safety"]
        overlap, control = (table[names.OVERLAP, name] for name in ("safety", "control"))
        contrast = table[names.OVERLAP_DIFFERENCE, "safety − control"]
        return {
            "alignment": self.alignment.to_dict(),
            "losses": {name: table[names.LOSS, name].value for name in self.losses},
            "largest_example": dict(self.largest),
            "spectrum": {
                name: self._spectrum_numbers(table[names.RANK, name], table[names.CER, name]) for name in self.spectra
            },
            "span": {
                name: {
                    "effective_rank": table[names.SPAN, name].value,
                    "interval": list(table[names.SPAN, name].interval),
                }
                for name in self.spans
            },
            "conflict": {
                "cosine": mean.value,
                "corrected": cosine.value,
                "equal_weights": table[names.EQUAL_WEIGHTS, "safety"].value,
                "negative_share": negative.value,
                "negative_share_interval": list(negative.interval),
                "interval": list(cosine.interval),
                "null_interval": list(mean.null_interval),
                "p_value": self.conflict.p_value,
            },
            "one_sample": {
                "overlap": overlap.value,
                "interval": list(overlap.interval),
                "control": control.value,
                "control_interval": list(control.interval),
                "contrast": contrast.value,
                "contrast_interval": list(contrast.interval),
                "cosine": table[names.ONE_COSINE, "safety"].value,
                "control_cosine": table[names.ONE_COSINE, "control"].value,
                "null": overlap.null,
            },
            "claims": claims_frame(self.claims()).to_dict("records"),
        }

    def _spectrum_numbers(self, rank: Headline, cer: Headline) -> dict[str, object]:
        return {
            "tokens": self.tokens,
            "effective_rank": rank.value,
            "effective_rank_interval": list(rank.interval),
            "cer10": cer.value,
            "null_effective_rank": rank.null,
            "null_cer10": cer.null,
        }

    def to_frame(self) -> "pd.DataFrame":
        """Return one row per headline number.

        The columns are ``question``, ``measure``, ``of`` (the gradients measured), ``value`` with its interval ``low``
        to ``high`` over examples, and ``null`` with ``null_low`` to ``null_high``: the value to expect if there were
        nothing to find.
        """
        import pandas as pd

        return pd.DataFrame(self.headlines().values(), columns=list(Headline._fields))

    def plot(
        self,
        layers: Layers = "*",
        kinds: Kind | Collection[Kind] | None = None,
        facet: Literal["layer", "matrix"] | None = None,
    ) -> "Figure":
        """Draw the spectra of the three sets with their nulls; the arguments are those of :meth:`Spectrum.plot`."""
        options = {"layers": layers, "kinds": kinds, "facet": facet}
        return draw("plot_spectrum", *self.spectra.values(), names=tuple(self.spectra), **options)

    def numbers(self, *questions: str) -> "pd.DataFrame":
        """Return the headline numbers as texts to read, with a column per set of examples.

        Args:
            *questions: Any of ``"loss"``, ``"low rank?"``, ``"conflict?"`` and ``"one sample?"``; all when left out.
        """
        return numbers_table(self.headlines(), questions or QUESTIONS)

    @property
    def summary(self) -> tuple[str, str, str]:
        """Three sentences: whether the model refuses, which claims on the control set hold, and which do not."""
        return summary_of(self.alignment, self.claims())

    def __str__(self) -> str:
        """Return the table of the paper's claims, under lines on refusals, tokens, coverage and cautions."""
        rows = claims_table(self.claims())
        lines = text_table([list(rows.columns), *rows.to_numpy().tolist()])
        return "\n".join([f"{self.alignment}.", self._head(), *lines])

    def _head(self) -> str:
        caution = f"; {self.caution}" if self.caution else ""
        return f"Gradient geometry at {self.tokens} tokens; {self.coverage}{caution}"

    def _repr_html_(self) -> str:
        return joined(
            element("p", " ".join(self.summary)),
            html_table("What survives its controls", claims_table(self.claims())),
            element("p", f"{VERDICTS}."),
            html_table(self._head(), self.numbers(), rows=40),
        )


def analysis_of(
    safety: GradientSet,
    utility: GradientSet,
    control: GradientSet,
    *,
    rank: int = 10,
    null_draws: int = 8,
    seed: int = 0,
    refusal: Rate | None = None,
    progress: bool = False,
    remark: str = "",
) -> Analysis:
    """Return the analysis of gradients that were collected with ``per_sample=True`` and ``form="factored"``.

    Args:
        safety: Gradients of forbidden requests and refusals.
        utility: Gradients of benign requests and answers.
        control: Gradients of benign requests with the safety set's responses.
        rank: Number of directions of the subspaces that are compared.
        null_draws: Largest number of draws from the null of each layer's spectrum, see
            :func:`geomkit.svd.nulls.enough_draws`.
        seed: Seed of all random draws.
        refusal: Share of the safety requests that the model refuses, if it was asked.
        progress: Show a bar, in parameters.
        remark: What is to be said on copies among the examples.

    Raises:
        GeometryError: If a set has fewer than three examples, or was collected in another way.
    """
    sets = {"safety": safety, "control": control, "utility": utility}
    measures = measure_parameters(sets, rank=rank, null_draws=null_draws, seed=seed, progress=progress)
    spectra = {name: spectrum_of(by_parameter) for name, by_parameter in measures.spectra.items()}
    subspaces = (Subspace("left", measures.subspaces[name]) for name in ("safety", "utility"))
    # More examples span more dimensions, so spans are compared at equal numbers of examples.
    count = min(len(gradients.samples) for gradients in sets.values())
    grams = {name: measures.between(name, name) for name in sets}
    equal = {name: _subset(gram, count, seed) for name, gram in grams.items()}
    return Analysis(
        spectra=spectra,
        spans={name: span(gram, by="model", seed=seed) for name, gram in equal.items()},
        layer_spans={name: span(gram, by="layer", seed=seed) for name, gram in equal.items()},
        angles=principal_angles(*subspaces),
        conflict=conflict(
            grams["safety"],
            grams["utility"],
            grams["control"],
            across=measures.between("safety", "utility"),
            control_across=measures.between("control", "utility"),
            seed=seed,
        ),
        one_sample=study_of(
            measures.one_sample, {name: measures.places[name] for name in ("safety", "control")}, rank, "left"
        ),
        coverage=safety.coverage,
        tokens=int(np.median([layer.tokens for layer in spectra["safety"].layers.values()])),
        losses={name: gradients.loss for name, gradients in sets.items()},
        largest={name: _largest_share(gram) for name, gram in grams.items()},
        refusal=refusal,
        remark=remark,
        facts=_facts(sets, seed),
    )


def _facts(sets: Mapping[str, GradientSet], seed: int) -> dict[str, str]:
    """Return with which model, data, settings and versions gradients were collected."""
    origins = {name: gradients.provenance for name, gradients in sets.items() if gradients.provenance}
    facts = {
        f"{name} set": f"{origin.examples} examples, fingerprint {origin.data[:8]}" for name, origin in origins.items()
    }
    if safety := origins.get("safety"):
        commit = f", commit {safety.revision}" if safety.revision else ""
        facts = {"model": f"{_short(safety.model)}{commit}, {safety.dtype}, weights {safety.weights[:8]}", **facts}
        facts["parameters"] = "all" if safety.layers == "layers=['*']" else safety.layers.removeprefix("layers=")
        facts["libraries"] = f"torch {safety.torch}, transformers {safety.transformers}"
    return {**facts, "seed": str(seed)}


def _short(name: str) -> str:
    """Return the last two folders of a path, and a hub id as it is."""
    return "/".join(Path(name).parts[-2:])


def _largest_share(grams: Mapping[str, Tensor]) -> float:
    """Return the largest share of an example in the sum of squared norms over all layers; 0 if all norms are 0."""
    squared = torch.stack([gram.diagonal() for gram in grams.values()]).sum(0)
    return float(squared.max() / squared.sum()) if bool(squared.any()) else 0.0


def _subset(grams: Mapping[str, Tensor], count: int, seed: int) -> dict[str, Tensor]:
    """Return the (count, count) inner products of ``count`` of the examples, drawn at random."""
    examples = len(next(iter(grams.values())))
    drawn = np.sort(np.random.default_rng(seed).choice(examples, count, replace=False))
    return {name: gram[drawn][:, drawn] for name, gram in grams.items()}
