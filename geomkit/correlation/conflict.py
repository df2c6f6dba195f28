"""Whether the safety and the utility gradient conflict: their cosine with an interval, a null and a control.

Three questions are kept apart. *Is there a conflict?* asks whether the cosine of the expected gradients is below zero:
read :attr:`Conflict.interval`. *Does it concern safety?* asks whether it is lower than that of benign prompts with the
same refusals: read :attr:`Conflict.contrast`. Of 30 untrained models of the organism's shape, in which there is no
safety to find, 23 % had a cosine significantly below zero and 60 % above; the contrast was significant in 7 % (with one
voice for each parameter in 17 %, none beyond ±.03: prompts differ in more than what they ask for). *Do the two sets
differ at all?* asks whether a random division of the same examples would show as low a cosine: read
:attr:`Conflict.p_value`. Random directions have a negative inner product half of the time, so no question is answered
by a sign.
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
    joined,
    layer_conflict,
    refuse_other_parameters,
)
from geomkit.correlation.negative_shares import Share, negative_shares
from geomkit.errors import GeometryError
from geomkit.gradients.checks import check_sets
from geomkit.gradients.gradient_set import GradientSet, layer_grams
from geomkit.inputs.parameters import kind_of, layer_index
from geomkit.stats.multiple_testing import benjamini_hochberg
from geomkit.stats.permutation import permuted_labels
from geomkit.stats.proportions import Rate
from geomkit.utils.arguments import check_confidence, check_draws, check_finite
from geomkit.utils.display import html_table, signed
from geomkit.utils.figures import draw

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

__all__ = ["Conflict", "ControlDifference", "LayerConflict", "conflict", "conflict_of_grams"]


@dataclass(frozen=True, eq=False)
class Conflict:
    """How far the safety and the utility gradient of a model point against each other.

    Attributes:
        cosine: Cosine of the two mean gradients over all parameters: what an optimizer step on these examples sees.
            Sampling noise in the means draws it towards zero.
        corrected: Estimate of the cosine of the *expected* gradients, without that bias; NaN if one of the mean
            gradients is no larger than its noise.
        interval: Confidence interval of the cosine of the expected gradients, over examples of both sets. It belongs
            to ``corrected``; where examples are few and noisy, ``cosine`` may lie outside.
        null_interval: Where ``cosine`` lies when the pooled examples are divided at random into sets of these sizes:
            what two sets from the *same* source show. Two sides that have nothing in common lie below it as well as
            two that conflict: it tests whether they differ, not how. Nothing is scaled, as a scale that depends on the
            labels would make them matter where they do not.
        p_value: One-sided permutation p-value, the share of random divisions with a cosine as low. Small means that
            safety and utility examples are not exchangeable, which they may be at a positive cosine.
        negative: Utility examples whose gradient has a negative inner product with the mean safety gradient, with the
            Wilson interval over utility examples, the safety examples given. Half of unrelated gradients have.
        negative_parameters: Share of the parameters with a negative cosine, each counted once. Its interval is over
            examples, see :func:`geomkit.correlation.negative_shares.negative_shares`: parameters are no independent
        draws.
        negative_weight: The same, each parameter counted by the product of its two mean gradients' norms.
        unweighted: The same measures with the gradient of every example in every parameter scaled to a norm of one. One
            tensor with large gradients, such as the head, can own ``cosine``; here all have one voice. So have all
            examples: with parameters scaled as a whole, one example of the organism held a fifth of the sum, and
            76 % of nominal 95 % intervals covered; this way 96 to 98 %.
        contrast: How much lower the cosine is than the control's, if there is a control.
        layers: The same for each parameter.
        per_example: (M,) cosine of each utility example with the mean safety gradient.
        control_per_example: (M,) cosine of each utility example with the mean control gradient, if there is one.
        confidence: Of all intervals but that of ``negative``, which is of 95 %.
    """

    cosine: float
    corrected: float
    interval: tuple[float, float]
    null_interval: tuple[float, float]
    p_value: float
    negative: Rate
    negative_parameters: Share
    negative_weight: Share
    unweighted: LayerConflict
    layers: Mapping[str, LayerConflict] = field(repr=False)
    per_example: np.ndarray = field(repr=False)
    contrast: ControlDifference | None = None
    control_per_example: np.ndarray | None = field(default=None, repr=False)
    confidence: float = 0.95

    def to_frame(self) -> "pd.DataFrame":
        """Return a row per parameter: its cosine and the interval, null and p-value that belong to it.

        ``weight`` is the parameter's share of ‖ḡ_s‖·‖ḡ_u‖: weights times cosines sum to the cosine over all parameters.
        ``q_value`` and, with a control, ``contrast_q_value`` are the p-values after Benjamini and Hochberg (1995) over
        the parameters: among those below .05, at most 5 % are expected to be false.
        """
        import pandas as pd

        frame = pd.DataFrame([_row(layer) for layer in self.layers.values()])
        frame = frame.assign(q_value=benjamini_hochberg(frame["p_value"].to_numpy()))
        if self.contrast is not None:
            frame = frame.assign(contrast_q_value=benjamini_hochberg(frame["contrast_p_value"].to_numpy()))
        return frame

    def plot(self) -> "go.Figure":
        """Draw it, see :func:`geomkit.plots.conflict.plot_conflict`."""
        return draw("plot_conflict", self)

    def __str__(self) -> str:
        """Say the cosine, its interval, its null, what the control shows, and the shares."""
        expected, alike = (_said(found.corrected, found.interval) for found in (self, self.unweighted))
        said = [
            f"cosine of the mean gradients {self.cosine:+.3f} (shuffled {signed(self.null_interval)}, "
            f"p = {self.p_value:.3g})",
            f"of the expected gradients {expected}",
            f"with one voice for each parameter {alike}",
            *([str(self.contrast)] if self.contrast else []),
            f"against safety: utility examples {self.negative}, parameters {self.negative_parameters}",
        ]
        return "; ".join(said)

    def _repr_html_(self) -> str:
        return html_table(str(self), self.to_frame())


def _said(value: float, interval: tuple[float, float]) -> str:
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
    safety: GradientSet,
    utility: GradientSet,
    control: GradientSet | None = None,
    *,
    draws: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Conflict:
    """Measure the conflict between the gradients of two sets of examples, and how much of it a control shows as well.

    Everything is computed from the inner products between examples; every example counts the same, whatever its
    length. For sets whose gradients do not fit into memory, see :func:`conflict_of_grams`. The interval is a jackknife
    one (see :func:`geomkit.correlation.cosine.expected_cosine`) and not a bootstrap: a resampled mean carries its
    sampling noise twice, so percentiles of the bootstrapped cosine miss the truth.

    Where few of many examples have most of the squared norm, a sample that misses them is sure of the wrong cosine (of
    the organism's held-out requests, with half of it in 2 of 240, 82 to 89 % of the intervals held the truth);
    :attr:`Conflict.unweighted`, in which every example has one voice, is not moved (94 to 97 %).

    Power, in simulations with ‖E g‖² at .3 of tr Cov(g): with 32 examples a side, an interval below zero was found in
    52 % of experiments at a cosine of −.2 and in 97 % at −.4 (27 and 74 % with 16), a contrast with p ≤ .05 to a
    control at zero in 38 and 89 % (17 and 59 %).

    Args:
        safety: Collected with ``per_sample=True``, at least three examples.
        utility: Collected with ``per_sample=True``, at least three examples.
        control: The same of examples that share with the safety set what its gradient should not be about, such as
            benign requests with the same refusals (:func:`geomkit.with_responses`).
        draws: Number of random divisions of the pooled examples; the smallest possible p-value is 1/(draws + 1).
        seed: Seed of the divisions, which all parameters share.
        confidence: Of the intervals.

    Returns:
        The conflict over all parameters and in each.

    Raises:
        GeometryError: If a set lacks per-sample gradients, has fewer than three or one that is not finite, they cover
            different parameters, or ``draws`` or the confidence is out of range.
    """
    check_sets({"safety": safety, "utility": utility} | ({} if control is None else {"control": control}))
    against = None if control is None else layer_grams(control, utility)
    return conflict_of_grams(
        layer_grams(safety, safety),
        layer_grams(safety, utility),
        layer_grams(utility, utility),
        control=None if control is None else layer_grams(control, control),
        control_across=against,
        draws=draws,
        seed=seed,
        confidence=confidence,
    )


def conflict_of_grams(
    safety: LayerGrams,
    across: LayerGrams,
    utility: LayerGrams,
    *,
    control: LayerGrams | None = None,
    control_across: LayerGrams | None = None,
    draws: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Conflict:
    """Measure the conflict from inner products, so that sets of any size fit; see :func:`conflict`.

    Args:
        safety: (N, N) inner products within the safety set, by parameter.
        across: (N, M) between safety and utility examples.
        utility: (M, M) within the utility set.
        control: (C, C) within the control set, if there is one.
        control_across: (C, M) between control and utility examples.
        draws: See :func:`conflict`.
        seed: See :func:`conflict`.
        confidence: See :func:`conflict`.

    Returns:
        What :func:`conflict` returns from the gradients themselves.

    Raises:
        GeometryError: If a set has fewer than three examples, shapes do not fit, parameters differ, or only one of
            the two mappings of the control is given, inner products are not finite, or ``draws`` or the confidence is
            out of range.

    Example:
        >>> import geomkit as gk
        >>> model, tokenizer = gk.load_organism()
        >>> sets = gk.load_examples("safety").select(range(4)), gk.load_examples("scenarios/new-skill").select(range(4))
        >>> within, beside = (gk.sample_grams(model, tokenizer, one, kinds="head", progress=False) for one in sets)
        >>> across = gk.sample_grams(model, tokenizer, *sets, kinds="head", progress=False)
        >>> list(conflict_of_grams(within, across, beside, draws=99).layers)
        ['lm_head.weight']
    """
    check_draws(draws, 1)
    check_confidence(confidence)
    if (control is None) != (control_across is None):
        raise GeometryError("expected control= and control_across= together, found one of them; give both or neither")
    for name, gram in [*across.items(), *(control_across or {}).items()]:
        check_finite(gram, name)
    grams = joined(safety, across, utility, "safety")
    other = None
    if control is not None and control_across is not None:
        other = joined(control, control_across, utility, "control")
        refuse_other_parameters(grams, other)
    total = reduce(add, grams.values())
    safety_size, utility_size = total.across.shape
    shuffled = permuted_labels(safety_size, utility_size, draws, np.random.default_rng(seed))

    def measured(name: str, one: PairGrams, beside: PairGrams | None, norms: float) -> LayerConflict:
        return layer_conflict(name, one, beside, shuffled, confidence, norms=norms)

    whole_control = reduce(add, other.values()) if other else None
    whole = measured("", total, whole_control, total.norms)
    equal, equal_control = _one_voice(grams), _one_voice(other) if other else None
    shares = negative_shares(list(grams.values()), np.random.default_rng(seed), confidence)
    inner = total.across.mean(0)
    return Conflict(
        cosine=whole.cosine,
        corrected=whole.corrected,
        interval=whole.interval,
        null_interval=whole.null_interval,
        p_value=whole.p_value,
        negative=Rate(int((inner < 0).sum()), len(inner)),
        negative_parameters=shares[0],
        negative_weight=shares[1],
        unweighted=measured("", equal, equal_control, equal.norms),
        layers={name: measured(name, one, other[name] if other else None, total.norms) for name, one in grams.items()},
        per_example=_example_cosines(total),
        contrast=whole.contrast,
        control_per_example=_example_cosines(whole_control) if whole_control else None,
        confidence=confidence,
    )


def _one_voice(grams: Mapping[str, PairGrams]) -> PairGrams:
    return reduce(add, (one.directions() for one in grams.values()))


def _example_cosines(grams: PairGrams) -> np.ndarray:
    scale = np.sqrt((grams.utility.diagonal() * grams.safety.mean()).clip(0))
    cosines: np.ndarray = np.zeros(len(scale))
    np.divide(grams.across.mean(0), scale, out=cosines, where=scale > 0)
    return cosines
