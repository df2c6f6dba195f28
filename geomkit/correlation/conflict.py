"""Conflict between safety and utility gradients: their cosine with an interval, a permutation null and a control.

A :class:`Conflict` answers three separate questions:

- *Is there a conflict?* Is the cosine of the expected gradients below zero? Read :attr:`Conflict.interval`.
- *Does the conflict concern safety?* Is the cosine lower than the cosine of a control set, such as benign prompts with
  the same refusals? Read :attr:`Conflict.contrast`. Untrained models, in which there is no safety to find, often have
  a cosine significantly below or above zero, but seldom a significant contrast (tests/benchmarks/README.md).
- *Do the two sets differ at all?* Would a random division of the same examples show a cosine as low? Read
  :attr:`Conflict.p_value`.

Half of all random directions have a negative inner product, so the sign of the cosine answers none of these questions.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from typing import TYPE_CHECKING

import numpy as np

from geomkit.correlation.cosine import PairGrams
from geomkit.correlation.layer_conflict import (
    ControlDifference,
    LayerConflict,
    LayerGrams,
    grams_with_utility,
    layer_conflict,
)
from geomkit.correlation.negative_share import Share, negative_share
from geomkit.gradients.gradient_set import GradientSet
from geomkit.inputs.parameters import kind_of, layer_index
from geomkit.stats.multiple_testing import benjamini_hochberg
from geomkit.stats.permutation import permuted_labels
from geomkit.stats.proportions import Rate
from geomkit.utils.arguments import check_confidence, check_draws, check_seed
from geomkit.utils.display import signed
from geomkit.utils.figures import DrawnResult, draw

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False)
class Conflict(DrawnResult):
    """Conflict between the safety and the utility gradient of a model, over all parameters and in each parameter.

    Attributes:
        cosine: Cosine of the two mean gradients over all parameters, as an optimizer step on these examples sees it.
            Sampling noise in the means draws the cosine towards zero.
        corrected: Estimate of the cosine of the *expected* gradients, without that bias; NaN if a mean gradient is no
            larger than its noise.
        interval: Confidence interval of the cosine of the expected gradients, over the examples of both sets. The
            interval belongs to ``corrected``; with few and noisy examples, ``cosine`` may lie outside.
        null_interval: Central interval of ``cosine`` when the pooled examples are divided at random into sets of these
            sizes: the cosines of two sets from the *same* source. Two unrelated sets lie below this interval as well
            as two conflicting sets, so the null tests whether the sets differ, not how. Gradients are not rescaled
            for it, because a scale that depends on the labels would make the labels matter where they do not.
        p_value: One-sided permutation p-value: the share of random divisions whose cosine is as low as the observed
            one. A small value means that safety and utility examples are not exchangeable, which is possible at a
            positive cosine as well.
        negative: Number of utility examples whose gradient has a negative inner product with the mean safety gradient,
            with the Wilson interval over utility examples, given the safety examples. Half of all unrelated gradients
            have a negative inner product.
        negative_parameters: Share of the parameters with a negative cosine, each parameter counted once. Parameters
            are not independent draws, so the interval is over examples, see
            :func:`geomkit.correlation.negative_share.negative_share`.
        equal_weights: The conflict over all parameters after scaling every example's gradient in every parameter to
            norm one. One tensor with large gradients, such as the head, can dominate ``cosine``, and one example with
            large gradients as well; here all tensors and all examples have equal weight (the coverage of both
            intervals: tests/benchmarks/README.md).
        contrast: Difference between the safety set's cosine and the control's, if there is a control.
        layers: The conflict in each parameter.
        per_example: (M,) cosine of each utility example with the mean safety gradient.
        control_per_example: (M,) cosine of each utility example with the mean control gradient, if there is a control.
        confidence: Nominal coverage of all intervals except the interval of ``negative``, whose coverage is 95 %.
    """

    cosine: float
    corrected: float
    interval: tuple[float, float]
    null_interval: tuple[float, float]
    p_value: float
    negative: Rate
    negative_parameters: Share
    equal_weights: LayerConflict
    layers: Mapping[str, LayerConflict] = field(repr=False)
    per_example: np.ndarray = field(repr=False)
    contrast: ControlDifference | None = None
    control_per_example: np.ndarray | None = field(default=None, repr=False)
    confidence: float = 0.95

    def to_frame(self) -> "pd.DataFrame":
        """Return a data frame with one row per parameter: the cosine with interval, null interval and p-value.

        ``weight`` is the parameter's share of ‖ḡ_s‖·‖ḡ_u‖: the sum of weight times cosine is the cosine over all
        parameters. ``q_value`` and, with a control, ``contrast_q_value`` are the p-values adjusted over the parameters
        after Benjamini and Hochberg (1995): at most 5 % of the parameters below .05 are expected to be false.
        """
        import pandas as pd

        frame = pd.DataFrame([_row(layer) for layer in self.layers.values()])
        frame = frame.assign(q_value=benjamini_hochberg(frame["p_value"].to_numpy()))
        if self.contrast is not None:
            frame = frame.assign(contrast_q_value=benjamini_hochberg(frame["contrast_p_value"].to_numpy()))
        return frame

    def shown_frame(self) -> "pd.DataFrame":
        """Return a data frame of the numbers over all parameters, with those of the control and the differences."""
        import pandas as pd

        rows: list[dict[str, object]] = [
            {
                "over all parameters": "cosine of the mean gradients",
                "value": self.cosine,
                "null_low": self.null_interval[0],
                "null_high": self.null_interval[1],
            }
        ]
        for words, part in (("expected gradients", self), ("expected gradients, equal weights", self.equal_weights)):
            rows.append(_shown(f"cosine of the {words}", part.corrected, part.interval, part.contrast))
        for words, share in (
            ("utility examples that oppose safety", self.negative),
            ("parameters with a negative cosine", self.negative_parameters),
        ):
            rows.append(_shown(f"share of {words}", share.value, share.interval, None))
        columns = ["over all parameters", "value", "low", "high", "null_low", "null_high", "control"]
        columns += [f"control_{end}" for end in ("low", "high")]
        return pd.DataFrame(rows, columns=[*columns, "difference", "difference_low", "difference_high"])

    def plot(self) -> "go.Figure":
        """Draw the cosine of every parameter, see :func:`geomkit.plots.conflict.plot_conflict`."""
        return draw("plot_conflict", self)

    def __str__(self) -> str:
        """Return the cosines with their intervals and null, the contrast to the control, and the negative shares."""
        expected, equal = (_cosine_text(part.corrected, part.interval) for part in (self, self.equal_weights))
        parts = [
            f"cosine of the mean gradients {self.cosine:+.3f} (shuffled {signed(self.null_interval)}, "
            f"p = {self.p_value:.3g})",
            f"of the expected gradients {expected}",
            f"at equal weights of examples and parameters {equal}",
            *([str(self.contrast)] if self.contrast else []),
            f"against safety: utility examples {self.negative}, parameters {self.negative_parameters}",
        ]
        return "; ".join(parts)


def _shown(
    words: str, value: float, interval: tuple[float, float], contrast: ControlDifference | None
) -> dict[str, object]:
    row: dict[str, object] = {"over all parameters": words, "value": value, "low": interval[0], "high": interval[1]}
    if contrast is None:
        return row
    return row | {
        "control": contrast.control,
        "control_low": contrast.control_interval[0],
        "control_high": contrast.control_interval[1],
        "difference": contrast.value,
        "difference_low": contrast.interval[0],
        "difference_high": contrast.interval[1],
    }


def _cosine_text(value: float, interval: tuple[float, float]) -> str:
    return "unknown, a mean is no larger than its noise" if np.isnan(value) else f"{value:+.3f} {signed(interval)}"


def _row(layer: LayerConflict) -> dict[str, object]:
    row: dict[str, object] = {
        "parameter": layer.parameter,
        "kind": kind_of(layer.parameter),
        "layer": layer_index(layer.parameter),
        "weight": layer.weight,
        "cosine": layer.cosine,
        "corrected": layer.corrected,
        "low": layer.interval[0],
        "high": layer.interval[1],
        "null_low": layer.null_interval[0],
        "null_high": layer.null_interval[1],
        "p_value": layer.p_value,
    }
    if layer.contrast is not None:
        row |= {
            "control": layer.contrast.control,
            "contrast": layer.contrast.value,
            "contrast_low": layer.contrast.interval[0],
            "contrast_high": layer.contrast.interval[1],
            "contrast_p_value": layer.contrast.p_value,
        }
    return row


def conflict(
    safety: GradientSet | LayerGrams,
    utility: GradientSet | LayerGrams,
    control: GradientSet | LayerGrams | None = None,
    *,
    across: LayerGrams | None = None,
    control_across: LayerGrams | None = None,
    draws: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Conflict:
    """Measure the conflict of two sets of examples' gradients, and compare it with a control's.

    Only the inner products between examples are needed, and every example has the same
    weight, whatever its length. Sets whose gradients do not fit into memory are given by
    their inner products instead: each set by the inner products within it, and ``across=``
    (with a control also ``control_across=``) by the inner products with the utility set, all
    from :func:`geomkit.sample_grams`.

    The interval is a jackknife interval (:func:`geomkit.correlation.cosine.expected_cosine`)
    and not a bootstrap: a resampled mean contains its sampling noise twice, so percentiles of
    the bootstrapped cosine miss the truth. If a few of many examples have most of the squared
    norm, a sample without them has a narrow interval around the wrong cosine;
    :attr:`Conflict.equal_weights`, in which all examples have equal weight, is not affected.
    Measured coverage and power: tests/benchmarks/README.md.

    Args:
        safety: Safety gradients, collected with ``per_sample=True`` from at least three
            examples; with ``across=`` the (N, N) inner products between safety examples, by
            parameter.
        utility: Utility gradients, collected with ``per_sample=True`` from at least three
            examples; with ``across=`` the (M, M) inner products between utility examples.
        control: Gradients of examples like the safety examples in everything but safety, such
            as benign requests with the same refusals (:func:`geomkit.with_responses`),
            collected in the same way; with ``across=`` the (C, C) inner products between
            control examples.
        across: (N, M) inner products between safety and utility examples, where the sets are
            given by inner products.
        control_across: (C, M) inner products between control and utility examples, likewise.
        draws: Number of random divisions of the pooled examples; the smallest possible
            p-value is 1/(draws + 1).
        seed: Seed of the random divisions, which all parameters share.
        confidence: Nominal coverage of the intervals, between 0 and 1.

    Returns:
        The conflict over all parameters and in each parameter.

    Raises:
        GeometryError: If a set lacks per-sample gradients, has fewer than three examples or a
            value that is not finite; if the sets have different parameters, or inner products
            do not fit together; if the inner products of the control are incomplete; or if
            ``draws`` or the confidence is out of range.

    Example:
        >>> import geomkit as gk
        >>> model, tokenizer = gk.load_organism()
        >>> options = {"per_sample": True, "layers": "lm_head*", "progress": False}
        >>> sets = ("safety", "scenarios/new-skill")
        >>> rows = [gk.load_examples(name).select(range(4)) for name in sets]
        >>> safety, utility = (
        ...     gk.collect_gradients(model, tokenizer, one, **options) for one in rows
        ... )
        >>> measured = conflict(safety, utility, draws=99)
        >>> list(measured.layers)
        ['lm_head.weight']
    """
    check_draws(draws, 1)
    check_confidence(confidence)
    check_seed(seed)
    # 1. Inner products of safety and control examples with the utility examples, by parameter and over all parameters.
    grams, control_grams = grams_with_utility(safety, utility, control, across, control_across)
    total = reduce(add, grams.values())
    control_total = reduce(add, control_grams.values()) if control_grams else None

    # 2. The same random divisions of the pooled examples for all parameters.
    safety_size, utility_size = total.across.shape
    divisions = permuted_labels(safety_size, utility_size, draws, np.random.default_rng(seed))

    def conflict_in(name: str, gram: PairGrams, control_gram: PairGrams | None, norms: float) -> LayerConflict:
        return layer_conflict(name, gram, control_gram, divisions, confidence, norms=norms)

    # 3. The conflict over all parameters, also with equal weights, and the conflict in each parameter.
    whole = conflict_in("", total, control_total, total.norms)
    equal = _normalised_total(grams)
    equal_weights = conflict_in("", equal, _normalised_total(control_grams) if control_grams else None, equal.norms)
    layers = {
        name: conflict_in(name, gram, control_grams[name] if control_grams else None, total.norms)
        for name, gram in grams.items()
    }
    # 4. The shares of utility examples and of parameters with a negative inner product.
    with_mean_safety = total.across.mean(0)
    by_parameter = negative_share(list(grams.values()), np.random.default_rng(seed), confidence)
    return Conflict(
        cosine=whole.cosine,
        corrected=whole.corrected,
        interval=whole.interval,
        null_interval=whole.null_interval,
        p_value=whole.p_value,
        negative=Rate(int((with_mean_safety < 0).sum()), len(with_mean_safety)),
        negative_parameters=by_parameter,
        equal_weights=equal_weights,
        layers=layers,
        per_example=_example_cosines(total),
        contrast=whole.contrast,
        control_per_example=_example_cosines(control_total) if control_total else None,
        confidence=confidence,
    )


def _normalised_total(grams: Mapping[str, PairGrams]) -> PairGrams:
    """Return the inner products over all parameters, each example's gradient in each parameter scaled to norm one."""
    return reduce(add, (gram.normalised() for gram in grams.values()))


def _example_cosines(grams: PairGrams) -> np.ndarray:
    """Return the (M,) cosine of each utility example with the mean safety gradient; zero where a gradient is zero."""
    scale = np.sqrt((grams.utility.diagonal() * grams.safety.mean()).clip(0))
    cosines: np.ndarray = np.zeros(len(scale))
    np.divide(grams.across.mean(0), scale, out=cosines, where=scale > 0)
    return cosines
