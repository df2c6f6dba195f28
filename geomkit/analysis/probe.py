"""What to measure a model's gradient geometry with: the examples, and how closely to look."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypedDict, Unpack

import numpy as np

from geomkit.analysis.analysis import Analysis, analysis_of
from geomkit.collection.collect import collect_gradients
from geomkit.collection.streaming import TOKENS_PER_BATCH
from geomkit.errors import GeometryError
from geomkit.gradients.gradient_set import GradientSet
from geomkit.inputs.control_sets import with_responses
from geomkit.inputs.examples import check_examples
from geomkit.inputs.parameters import Layers
from geomkit.inputs.tokens import EncodedExamples, conversations_of
from geomkit.utils.arguments import check_draws, check_rank

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_FEWEST = 3


class ProbeSettings(TypedDict, total=False):
    """The settings of a :class:`Probe` by name, for :func:`analyze`."""

    examples: int | None
    rank: int
    null_draws: int
    layers: Layers
    tokens_per_batch: int
    seed: int


@dataclass(frozen=True, eq=False)
class Probe:
    """The paper's three questions, ready to be put to any model, again and again.

    Attributes:
        safety: Forbidden requests and refusals.
        utility: Benign requests and answers.
        control: Benign requests with the safety set's responses. When left out, made of utility prompts that are not
            drawn as utility; of a small set, half are kept for it.
        examples: Use no more than this many of each, drawn at random; all when ``None``. Factors of every example are
            kept, so memory grows with it.
        rank: Number of directions compared between subspaces.
        null_draws: Draws from the null of each layer's spectrum.
        layers: Which parameters, as in :func:`geomkit.collect_gradients`.
        tokens_per_batch: Most token positions run at a time, padding included.
        seed: Seed of all random draws; the same examples are drawn every time.

    Raises:
        GeometryError: If a set has fewer than three examples, or utility fewer than six where it makes the control.

    Example:
        >>> import geomkit as gk
        >>> model, tokenizer = gk.load_organism()
        >>> probe = gk.Probe(gk.load_examples("safety"), gk.load_examples("utility"), examples=3, layers="*.mlp.*")
        >>> found = probe.analyze(model, tokenizer)
        >>> round(found.losses["safety"], 2)  # the aligned organism has learnt its refusal by heart
        0.0
    """

    safety: "Dataset | EncodedExamples"
    utility: "Dataset | EncodedExamples"
    control: "Dataset | EncodedExamples | None" = None
    examples: int | None = field(default=32, kw_only=True)
    rank: int = field(default=10, kw_only=True)
    null_draws: int = field(default=8, kw_only=True)
    layers: Layers = field(default="*", kw_only=True)
    tokens_per_batch: int = field(default=TOKENS_PER_BATCH, kw_only=True)
    seed: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        """Refuse sets that are too small or no examples before any work is done."""
        sides = {"safety": self.safety, "utility": self.utility}
        if self.control is not None:
            sides["control"] = self.control
        check_rank(self.rank)
        check_draws(self.null_draws, 0, "null_draws")
        for name, side in sides.items():
            check_examples(conversations_of(side))
            if min(len(side), len(side) if self.examples is None else self.examples) < _FEWEST:
                raise GeometryError(
                    f"expected at least {_FEWEST} {name} examples to tell their spread, found {len(side)} "
                    f"(examples={self.examples}); give more"
                )
        if self.control is None and len(self.utility) < 2 * _FEWEST:
            raise GeometryError(
                f"expected at least {2 * _FEWEST} utility examples, half of whose prompts make the control, found "
                f"{len(self.utility)}; give more, or control="
            )

    def collect(
        self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", *, progress: bool = False
    ) -> tuple[GradientSet, GradientSet, GradientSet]:
        """Collect the gradients of the safety, the utility and the control examples, each example its own.

        Args:
            model: A causal language model; left as found.
            tokenizer: Its tokenizer, with a chat template and a pad token.
            progress: Show bars.

        Returns:
            The three sets.

        Raises:
            DataError: If examples cannot be encoded.
            CollectionError: If a loss or gradient is not finite, or no parameter matches.
        """
        safety, utility, controls = (
            collect_gradients(
                model,
                tokenizer,
                side,
                per_sample=True,
                layers=self.layers,
                form="factored",
                tokens_per_batch=self.tokens_per_batch,
                progress=progress,
            )
            for side in self._sides()
        )
        return safety, utility, controls

    def _sides(self) -> "Iterator[Dataset | EncodedExamples]":
        """Draw the examples of the three sets."""
        yield self.safety.select(_drawn(len(self.safety), self.examples, self.seed))
        if self.control is not None:
            yield self.utility.select(_drawn(len(self.utility), self.examples, self.seed))
            yield self.control.select(_drawn(len(self.control), self.examples, self.seed))
            return
        # Controls with the very prompts of the utility examples would not be independent of them.
        half = len(self.utility) // 2
        count = half if self.examples is None else min(half, self.examples)
        order = np.random.default_rng(self.seed).permutation(len(self.utility)).tolist()
        yield self.utility.select(sorted(order[:count]))
        prompts = self.utility.select(sorted(order[count : 2 * count]))
        control = with_responses(conversations_of(prompts), conversations_of(self.safety))
        yield prompts.like(control) if isinstance(prompts, EncodedExamples) else control

    def analyze(
        self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", *, progress: bool = False
    ) -> Analysis:
        """Collect the gradients and measure them, see :func:`analyze`."""
        return self.measure(*self.collect(model, tokenizer, progress=progress))

    def measure(self, safety: GradientSet, utility: GradientSet, control: GradientSet) -> Analysis:
        """Measure gradients that :meth:`collect` gave."""
        return analysis_of(safety, utility, control, rank=self.rank, null_draws=self.null_draws, seed=self.seed)


def _drawn(found: int, count: int | None, seed: int) -> list[int]:
    """Return the places of the examples to use."""
    if count is None or found <= count:
        return list(range(found))
    chosen: list[int] = np.random.default_rng(seed).choice(found, count, replace=False).tolist()
    return sorted(chosen)


def analyze(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    safety: "Dataset | EncodedExamples",
    utility: "Dataset | EncodedExamples",
    *,
    control: "Dataset | EncodedExamples | None" = None,
    progress: bool = True,
    **settings: Unpack[ProbeSettings],
) -> Analysis:
    """Measure the paper's three claims on a model and two sets of examples.

    Spectra are those of the mean gradients of the linear layers, after a random subset of tokens has been drawn on
    the sides that have more, so that all have the same T; the null of each keeps its T, its inputs and the size of
    each token's share, and randomises the output directions.

    Args:
        model: A causal language model; left as found.
        tokenizer: Its tokenizer, with a chat template and a pad token.
        safety: Forbidden requests and refusals.
        utility: Benign requests and answers.
        control: Benign requests with the safety set's responses, see :class:`Probe`.
        progress: Show bars.
        **settings: ``examples``, ``rank``, ``null_draws``, ``layers``, ``tokens_per_batch`` and ``seed`` of
            :class:`Probe`.

    Returns:
        An :class:`~geomkit.analysis.analysis.Analysis`.

    Raises:
        DataError: If examples cannot be encoded.
        CollectionError: If a loss or gradient is not finite, or no parameter matches.
        GeometryError: If a set has fewer than three examples, or utility fewer than six where it makes the control.
    """
    return Probe(safety, utility, control, **settings).analyze(model, tokenizer, progress=progress)
