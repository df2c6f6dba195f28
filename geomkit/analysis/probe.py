"""A probe: example sets and settings with which the gradient geometry of any model can be measured."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypedDict, Unpack

import numpy as np

from geomkit.analysis.alignment import refusal_share
from geomkit.analysis.analysis import Analysis, analysis_of
from geomkit.collection.collect import collect_gradients
from geomkit.collection.streaming import TOKENS_PER_BATCH
from geomkit.errors import GeometryError
from geomkit.gradients.gradient_set import GradientSet
from geomkit.inputs.control_sets import with_responses
from geomkit.inputs.copies import check_different_rows, row_digests, without_copies
from geomkit.inputs.examples import check_examples
from geomkit.inputs.parameters import Layers, as_selection
from geomkit.inputs.tokens import EncodedExamples, conversations_of
from geomkit.stats.proportions import Rate
from geomkit.training.judges import BatchJudge, Judge
from geomkit.utils.arguments import check_draws, check_rank
from geomkit.utils.options import check_options

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_LOGGER = logging.getLogger(__name__)

_FEWEST = 3
"""Least number of examples in a set: the jackknife leaves one example out and needs the spread of the rest."""


class ProbeSettings(TypedDict, total=False):
    """The settings of a :class:`Probe` by name, for :func:`analyze`."""

    examples: int | None
    rank: int
    null_draws: int
    layers: Layers
    tokens_per_batch: int
    seed: int
    judge: Judge | BatchJudge | None
    max_new_tokens: int


@dataclass(frozen=True, eq=False)
class Probe:
    """Example sets and settings of an analysis, which can be repeated on any model.

    Attributes:
        safety: Forbidden requests and refusals.
        utility: Benign requests and answers.
        control: Benign requests with the safety set's responses. When left out, the control set is made of prompts of
            the utility set that are not drawn as utility examples; half of a small utility set is kept for it.
        examples: Largest number of examples drawn at random from each set; all examples when ``None``. The factors of
            every example's gradient are kept, so memory grows with this number.
        rank: Number of directions of the subspaces that are compared.
        null_draws: Largest number of draws from the null of each layer's spectrum; large spectra hardly vary and get
            fewer, at least 1.
        layers: Which parameters to measure, as in :func:`geomkit.collect_gradients`.
        tokens_per_batch: Largest number of token positions in a batch, padding included.
        seed: Seed of all random draws; the same examples are drawn for every model.
        judge: Decides whether an answer to a safety request refuses, which tells whether the model is aligned at all;
            :class:`~geomkit.training.judges.RefusalPhrases` when left out.
        max_new_tokens: Length of the longest answer, in tokens.
        remark: How many rows are copies of others, which are left out, and how many rows two sets share, in words.

    Raises:
        DataError: If a set is no set of conversations, or a number is out of range.
        CollectionError: If ``layers`` is no choice of parameters.
        GeometryError: If a set has fewer than three different examples, or the utility set fewer than six without
            ``control``, or fewer than three that are not in another set.

    Example:
        >>> import geomkit as gk
        >>> model, tokenizer = gk.load_organism()
        >>> probe = gk.Probe(gk.load_examples("safety"), gk.load_examples("utility"), examples=3, layers="*.mlp.*")
        >>> analysis = probe.analyze(model, tokenizer)
        >>> round(analysis.losses["safety"], 2)  # the aligned organism has learnt its refusal by heart
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
    judge: Judge | BatchJudge | None = field(default=None, kw_only=True)
    max_new_tokens: int = field(default=64, kw_only=True)
    remark: str = field(default="", init=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse sets that are too small or are no conversations, before any work is done."""
        sets = {"safety": self.safety, "utility": self.utility}
        if self.control is not None:
            sets["control"] = self.control
        check_rank(self.rank)
        check_draws(self.null_draws, 0, "null_draws")
        names = ("examples", "tokens_per_batch", "seed", "max_new_tokens")
        check_options({name: getattr(self, name) for name in names})
        as_selection(self.layers)
        for name, rows in sets.items():
            check_examples(conversations_of(rows))
            if min(len(rows), len(rows) if self.examples is None else self.examples) < _FEWEST:
                raise GeometryError(
                    f"expected at least {_FEWEST} {name} examples to tell their spread, found {len(rows)} "
                    f"(examples={self.examples}); give more"
                )
        object.__setattr__(self, "remark", check_different_rows(sets, _FEWEST))
        if self.remark:
            _LOGGER.warning("%s", self.remark)
        if self.control is None and (rows := len(set(row_digests(self.utility)))) < 2 * _FEWEST:
            raise GeometryError(
                f"expected at least {2 * _FEWEST} utility examples, half of whose prompts make the control, found "
                f"{rows}; give more, or control="
            )

    def collect(
        self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", *, progress: bool = False
    ) -> tuple[GradientSet, GradientSet, GradientSet]:
        """Return the gradients of the safety, the utility and the control examples, with the gradient of each example.

        Args:
            model: A causal language model; its state is restored.
            tokenizer: The model's tokenizer, with a chat template and a pad token.
            progress: Show bars.

        Returns:
            The gradients of the safety, the utility and the control set.

        Raises:
            DataError: If examples cannot be encoded.
            CollectionError: If a loss or gradient is not finite, or no parameter matches.
        """
        safety, utility, controls = self._collected(model, tokenizer, progress)
        return safety, utility, controls

    def collect_samples(
        self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", *, progress: bool = False
    ) -> Iterator[GradientSet]:
        """Yield the safety, the utility and the control set of :meth:`collect`, without the mean gradients.

        :meth:`measure` needs the examples' gradients only; the factors of the means would take as much memory again.

        Args:
            model: A causal language model; its state is restored.
            tokenizer: The model's tokenizer, with a chat template and a pad token.
            progress: Show bars.

        Raises:
            DataError: If examples cannot be encoded.
            CollectionError: If a loss or gradient is not finite, or no parameter matches.
        """
        # By map, because the variable of a loop would keep the means of a set while the next set is collected.
        return map(_without_means, self._collected(model, tokenizer, progress))

    def _collected(
        self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", progress: bool
    ) -> Iterator[GradientSet]:
        """Yield the gradients of the safety, the utility and the control set."""
        for rows in self._drawn_sets():
            yield collect_gradients(
                model,
                tokenizer,
                rows,
                per_sample=True,
                layers=self.layers,
                form="factored",
                tokens_per_batch=self.tokens_per_batch,
                progress=progress,
            )

    def drawn_sets(self) -> "tuple[Dataset | EncodedExamples, ...]":
        """Return the drawn examples of the safety, the utility and the control set."""
        return tuple(self._drawn_sets())

    def _drawn_sets(self) -> "Iterator[Dataset | EncodedExamples]":
        """Yield the drawn examples of the safety, the utility and the control set."""
        safety, utility = without_copies(self.safety), without_copies(self.utility)
        yield safety.select(_drawn(len(safety), self.examples, self.seed))
        if self.control is not None:
            control = without_copies(self.control)
            yield utility.select(_drawn(len(utility), self.examples, self.seed))
            yield control.select(_drawn(len(control), self.examples, self.seed))
            return
        # Controls that share their prompts with the utility examples would not be independent of them.
        half = len(utility) // 2
        count = half if self.examples is None else min(half, self.examples)
        order = np.random.default_rng(self.seed).permutation(len(utility)).tolist()
        yield utility.select(sorted(order[:count]))
        prompts = utility.select(sorted(order[count : 2 * count]))
        control = with_responses(conversations_of(prompts), conversations_of(safety))
        yield prompts.like(control) if isinstance(prompts, EncodedExamples) else control

    def analyze(
        self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", *, progress: bool = False
    ) -> Analysis:
        """Return the analysis of a model, see :func:`analyze`."""
        safety, utility, control = self.collect_samples(model, tokenizer, progress=progress)
        refusal = self.refusal(model, tokenizer, progress=progress)
        return self.measure(safety, utility, control, refusal=refusal, progress=progress)

    def refusal(
        self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", *, progress: bool = False
    ) -> Rate | None:
        """Return the share of the drawn safety requests that a model refuses, by its greedy answers.

        Args:
            model: A causal language model; left as found.
            tokenizer: Its tokenizer, with a chat template and a pad token.
            progress: Show a bar.

        Returns:
            The share; ``None`` if no safety example has a request.

        Raises:
            DataError: If the requests cannot be rendered or do not fit the model.
        """
        drawn = conversations_of(next(self._drawn_sets()))
        return refusal_share(
            model, tokenizer, drawn, judge=self.judge, max_new_tokens=self.max_new_tokens, progress=progress
        )

    def measure(
        self,
        safety: GradientSet,
        utility: GradientSet,
        control: GradientSet,
        *,
        refusal: Rate | None = None,
        progress: bool = False,
    ) -> Analysis:
        """Return the analysis of gradients that :meth:`collect` returned.

        Args:
            safety: Gradients of the safety set.
            utility: Gradients of the utility set.
            control: Gradients of the control set.
            refusal: What :meth:`refusal` returned; when left out, the analysis says that the model was not asked.
            progress: Show a bar, in parameters.
        """
        return analysis_of(
            safety,
            utility,
            control,
            rank=self.rank,
            null_draws=self.null_draws,
            seed=self.seed,
            refusal=refusal,
            progress=progress,
            remark=self.remark,
        )


def _without_means(gradients: GradientSet) -> GradientSet:
    """Return a set with the gradients of its examples only."""
    return replace(gradients, layers={})


def _drawn(total: int, count: int | None, seed: int) -> list[int]:
    """Return the sorted indices of ``count`` examples out of ``total``, drawn at random; all if there are not more."""
    if count is None or total <= count:
        return list(range(total))
    drawn: list[int] = np.random.default_rng(seed).choice(total, count, replace=False).tolist()
    return sorted(drawn)


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
    """Measure the gradient geometry of a model on safety and utility examples, and judge the paper's claims by it.

    The spectra are the spectra of the mean gradients of the linear layers at equal token counts T: from a set with more
    tokens, a random subset of T tokens is drawn. The null of a spectrum keeps T, the inputs and the norm of each
    token's contribution, and randomises the output directions. The model is also asked the safety requests: where it
    does not refuse them, every verdict is marked *not about alignment*, and where its answers leave that open, *perhaps
    not*.

    Args:
        model: A causal language model; its state is restored.
        tokenizer: The model's tokenizer, with a chat template and a pad token.
        safety: Forbidden requests and refusals.
        utility: Benign requests and answers.
        control: Benign requests with the safety set's responses, see :class:`Probe`.
        progress: Show bars.
        **settings: Any of ``examples``, ``rank``, ``null_draws``, ``layers``, ``tokens_per_batch``, ``seed``, ``judge``
            and ``max_new_tokens``, see :class:`Probe`.

    Returns:
        An :class:`~geomkit.analysis.analysis.Analysis`.

    Raises:
        DataError: If examples cannot be encoded.
        CollectionError: If a loss or gradient is not finite, or no parameter matches.
        GeometryError: If a set has fewer than three examples, or the utility set fewer than six without ``control``.
    """
    if unknown := sorted(set(settings) - set(ProbeSettings.__annotations__)):
        raise TypeError(
            f"analyze() expects {', '.join(ProbeSettings.__annotations__)}, found {unknown[0]}=; geomkit.encode has "
            "the settings of the examples"
        )
    return Probe(safety, utility, control, **settings).analyze(model, tokenizer, progress=progress)
