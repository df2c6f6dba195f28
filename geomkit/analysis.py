"""The three insights in one result: low rank, conflict, one sample — each beside what could have refuted it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from geomkit._display import html_table
from geomkit.angles import Angles, principal_angles
from geomkit.correlation import Conflict, conflict
from geomkit.gradients import Coverage, GradientSet
from geomkit.onesample import OneSample, one_sample_study
from geomkit.spectra import Spectrum, spectrum
from geomkit.subspaces import subspace
from geomkit.token_matching import match_tokens

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

_COLUMNS = ("question", "measure", "of", "value", "low", "high", "null", "null_low", "null_high")
_NAN = float("nan")
_UNKNOWN = (_NAN, _NAN)


@dataclass(frozen=True, eq=False)
class Analysis:
    """What safety and utility gradients look like, and how they lie to each other.

    Attributes:
        safety: Spectra of the mean safety gradient of every linear layer.
        utility: The same of the mean utility gradient, at the same number of tokens.
        angles: Principal angles between their leading left subspaces.
        conflict: Cosines between the two.
        one_sample: What single safety examples find of the mean safety subspace, beside what single controls find.
        coverage: What share of the model was seen.
        tokens: Number of tokens in each layer's spectra, the same on all sides; the median over layers.
        losses: Mean loss of the safety, utility and control examples, in nats per token.
    """

    safety: Spectrum
    utility: Spectrum
    angles: Angles
    conflict: Conflict
    one_sample: OneSample
    coverage: Coverage
    tokens: int
    losses: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        """Return the headline numbers: ``spectrum``, ``conflict``, ``one_sample``.

        ``null_interval`` is where ``cosine``, that of the mean gradients, lies for shuffled labels; ``interval``
        belongs to ``corrected``, the estimate of the cosine of the expected gradients.
        """
        return {
            "spectrum": {
                "safety": _headline(self.safety, self.tokens),
                "utility": _headline(self.utility, self.tokens),
            },
            "conflict": {
                "cosine": self.conflict.cosine,
                "corrected": self.conflict.corrected,
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
                "expected": self.one_sample.expected,
            },
        }

    def to_frame(self) -> "pd.DataFrame":
        """Return one row per headline number.

        The columns are ``question``, ``measure``, ``of`` (which gradients), ``value`` with its interval ``low`` to
        ``high`` over examples, and ``null`` with ``null_low`` to ``null_high``: what it would be if there were nothing
        to find.
        """
        import pandas as pd

        rows = [*self._loss_rows(), *self._rank_rows(), *self._conflict_rows(), *self._one_sample_rows()]
        return pd.DataFrame(rows, columns=list(_COLUMNS))

    def _loss_rows(self) -> "list[tuple[object, ...]]":
        return [_row("loss", "nats per token", name, loss) for name, loss in self.losses.items()]

    def _rank_rows(self) -> "list[tuple[object, ...]]":
        return [
            _row("low rank?", label, name, side.mean(statistic), null=side.null_mean(statistic))
            for statistic, label in (("effective_rank", "effective rank"), ("cer10", "CER(10)"))
            for name, side in (("safety", self.safety), ("utility", self.utility))
        ]

    def _conflict_rows(self) -> "list[tuple[object, ...]]":
        found, question = self.conflict, "conflict?"
        return [
            _row(question, "cosine of the mean gradients", "safety", found.cosine, null_interval=found.null_interval),
            _row(question, "cosine", "safety", found.corrected, found.interval, 0.0),
            _row(question, "share of examples against", "safety", found.negative.value, found.negative.interval, 0.5),
        ]

    def _one_sample_rows(self) -> "list[tuple[object, ...]]":
        study, question = self.one_sample, "one sample?"
        return [
            _row(question, "overlap", "safety", study.overlap, study.interval, study.expected),
            _row(question, "overlap", "control", study.null_mean, study.null_interval, study.expected),
        ]

    def plot(self) -> "Figure":
        """Draw the normalised spectra with their nulls."""
        from geomkit.plots import plot_spectrum

        return plot_spectrum(self.safety, self.utility, names=("safety", "utility"))

    def _repr_html_(self) -> str:
        return html_table(f"Gradient geometry at {self.tokens} tokens; {self.coverage}", self.to_frame(), rows=40)


def _row(
    question: str,
    measure: str,
    of: str,
    value: float,
    interval: tuple[float, float] = _UNKNOWN,
    null: float = _NAN,
    null_interval: tuple[float, float] = _UNKNOWN,
) -> tuple[object, ...]:
    return (question, measure, of, value, *interval, null, *null_interval)


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
    matched_safety, matched_utility = match_tokens(safety, utility, seed=seed)
    return Analysis(
        safety=spectrum(matched_safety, null_draws=null_draws, seed=seed),
        utility=spectrum(matched_utility, null_draws=null_draws, seed=seed),
        angles=principal_angles(subspace(matched_safety, rank=rank), subspace(matched_utility, rank=rank)),
        conflict=conflict(safety, utility, seed=seed),
        one_sample=one_sample_study(safety, control, rank=rank, seed=seed),
        coverage=safety.coverage,
        tokens=int(np.median([gradient.tokens for gradient in matched_safety.values()])),
        losses={"safety": safety.loss, "utility": utility.loss, "control": control.loss},
    )


def _headline(side: Spectrum, tokens: int) -> dict[str, object]:
    return {
        "tokens": tokens,
        "effective_rank": side.mean("effective_rank"),
        "cer10": side.mean("cer10"),
        "null_effective_rank": side.null_mean("effective_rank"),
        "null_cer10": side.null_mean("cer10"),
    }
