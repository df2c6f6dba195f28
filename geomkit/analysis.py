"""The three insights in one call: low rank, conflict, one sample — each beside what could have refuted it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from geomkit._display import html_table
from geomkit.angles import Angles, principal_angles
from geomkit.collect import collect_gradients
from geomkit.collection.streaming import TOKENS_PER_BATCH
from geomkit.control_sets import with_responses
from geomkit.correlation import Conflict, conflict
from geomkit.errors import GeometryError
from geomkit.gradients import Coverage, GradientSet
from geomkit.onesample import OneSample, one_sample_study
from geomkit.spectra import Spectrum, spectrum
from geomkit.subspaces import subspace
from geomkit.token_matching import match_tokens
from geomkit.tokens import AssistantMask

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset
    from plotly.graph_objects import Figure
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_FEWEST = 3


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
        tokens: Number of tokens in each layer's spectra, the same on both sides; the median over layers.
    """

    safety: Spectrum
    utility: Spectrum
    angles: Angles
    conflict: Conflict
    one_sample: OneSample
    coverage: Coverage
    tokens: int

    def to_dict(self) -> dict[str, dict[str, object]]:
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
        """Return one row per headline number: ``question``, ``measure``, ``value``, ``interval``, ``null``."""
        import pandas as pd

        rows = [
            ("low rank?", f"{statistic.replace('_', ' ')}, {name} gradient", side.mean(statistic), "", _number(null))
            for name, side in (("safety", self.safety), ("utility", self.utility))
            for statistic in ("effective_rank", "cer10")
            for null in [side.null_mean(statistic)]
        ]
        found, study = self.conflict, self.one_sample
        rows += [
            ("conflict?", "cosine of the mean gradients", found.cosine, "", _span(found.null_interval)),
            ("conflict?", "cosine of the expected gradients", found.corrected, _span(found.interval), "0"),
            (
                "conflict?",
                "utility examples against safety",
                found.negative.value,
                _span(found.negative.interval),
                "0.5",
            ),
            (
                "one sample?",
                "overlap of one safety example",
                study.overlap,
                _span(study.interval),
                _span(study.null_interval),
            ),
        ]
        return pd.DataFrame(rows, columns=["question", "measure", "value", "interval", "null"])

    def plot(self) -> "Figure":
        """Draw the normalised spectra with their nulls."""
        from geomkit.plots import plot_spectrum

        return plot_spectrum(self.safety, self.utility, names=("safety", "utility"))

    def _repr_html_(self) -> str:
        return html_table(f"Gradient geometry at {self.tokens} tokens; {self.coverage}", self.to_frame())


def analyze(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    safety: "Dataset",
    utility: "Dataset",
    *,
    control: "Dataset | None" = None,
    examples: int | None = 32,
    rank: int = 10,
    null_draws: int = 8,
    layers: str = "*",
    tokens_per_batch: int = TOKENS_PER_BATCH,
    assistant_mask: AssistantMask = "template",
    max_length: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Analysis:
    """Measure the paper's three insights on a model and two sets of examples.

    Spectra are those of the mean gradients of the linear layers, after a random subset of tokens has been drawn on
    the side that has more, so that both have the same T; the null of each keeps its T, its inputs and the size of
    each token's share, and randomises the output directions.

    Args:
        model: A causal language model; left as found.
        tokenizer: Its tokenizer, with a chat template and a pad token.
        safety: Forbidden requests and refusals.
        utility: Benign requests and answers.
        control: Benign requests with the safety set's responses, the null of the one-sample overlap; made of the
            utility set's prompts when left out.
        examples: Use no more than this many of each, drawn at random; all when ``None``. Factors of every example
            are kept, so memory grows with it.
        rank: Number of directions compared between subspaces.
        null_draws: Draws from the null of each layer's spectrum.
        layers: Glob pattern on parameter names.
        tokens_per_batch: Most token positions run at a time, padding included.
        assistant_mask: How assistant tokens are found, see :func:`geomkit.tokens.encode`.
        max_length: Cut longer examples to this many tokens.
        seed: Seed of all random draws.
        progress: Show bars.

    Returns:
        An :class:`Analysis`.

    Raises:
        DataError: If examples cannot be encoded.
        CollectionError: If a loss or gradient is not finite, or no parameter matches.
        GeometryError: If a set has fewer than three examples.
    """
    for name, side in (("safety", safety), ("utility", utility)):
        if min(len(side), examples or len(side)) < _FEWEST:
            raise GeometryError(
                f"expected at least {_FEWEST} {name} examples to tell their spread, found {len(side)} "
                f"(examples={examples}); give more"
            )

    def collect(side: "Dataset") -> GradientSet:
        return collect_gradients(
            model,
            tokenizer,
            _drawn(side, examples, seed),
            per_sample=True,
            layers=layers,
            form="factored",
            tokens_per_batch=tokens_per_batch,
            assistant_mask=assistant_mask,
            max_length=max_length,
            progress=progress,
        )

    safe, useful = collect(safety), collect(utility)
    controls = collect(control if control is not None else with_responses(utility, safety))
    matched_safe, matched_useful = match_tokens(safe, useful, seed=seed)
    return Analysis(
        safety=spectrum(matched_safe, null_draws=null_draws, seed=seed),
        utility=spectrum(matched_useful, null_draws=null_draws, seed=seed),
        angles=principal_angles(subspace(matched_safe, rank=rank), subspace(matched_useful, rank=rank)),
        conflict=conflict(safe, useful, seed=seed),
        one_sample=one_sample_study(safe, controls, rank=rank, seed=seed),
        coverage=safe.coverage,
        tokens=int(np.median([gradient.tokens for gradient in matched_safe.values()])),
    )


def _drawn(examples: "Dataset", count: int | None, seed: int) -> "Dataset":
    if count is None or len(examples) <= count:
        return examples
    chosen = np.random.default_rng(seed).choice(len(examples), count, replace=False)
    return examples.select(sorted(chosen.tolist()))


def _headline(side: Spectrum, tokens: int) -> dict[str, object]:
    return {
        "tokens": tokens,
        "effective_rank": side.mean("effective_rank"),
        "cer10": side.mean("cer10"),
        "null_effective_rank": side.null_mean("effective_rank"),
        "null_cer10": side.null_mean("cer10"),
    }


def _number(value: float) -> str:
    return f"{value:.3g}"


def _span(interval: tuple[float, float]) -> str:
    return f"[{interval[0]:.3g}, {interval[1]:.3g}]"
