"""One conflict, of a parameter or of all, from the inner products between examples."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from geomkit.correlation.cosine import PairGrams, contrast_ratio, expected_cosine, permutation_test, permuted_cosines
from geomkit.errors import GeometryError
from geomkit.utils.display import signed

LayerGrams = Mapping[str, Tensor]
"""Inner products between examples by parameter, as :func:`geomkit.sample_grams` makes them."""

_FEWEST = 3  # leaving one example out must leave a pair


@dataclass(frozen=True)
class ControlDifference:
    """How much more safety than a control conflicts with utility.

    Attributes:
        value: Cosine of the expected safety and utility gradients minus that of the expected control and utility
            gradients; negative where safety conflicts more. NaN if a mean gradient is no larger than its noise.
        interval: Confidence interval, over the examples of all three sets.
        p_value: Two-sided p-value of no difference; in simulations with control and safety examples of one population,
            2.5 to 5 % were below .05 (16 or 32 a side, Gaussian and heavy-tailed), 1 to 3 % with very uneven sizes.
        control: Estimate of the cosine of the expected control and utility gradients.
        control_interval: Confidence interval of that cosine.
    """

    value: float
    interval: tuple[float, float]
    p_value: float
    control: float
    control_interval: tuple[float, float]

    def __str__(self) -> str:
        """Say the difference and the control's own cosine."""
        if np.isnan(self.value):
            return "safety minus control unknown, a mean is no larger than its noise"
        return (
            f"safety minus control {self.value:+.3f} {signed(self.interval)}, p = {self.p_value:.3g} "
            f"(control {self.control:+.3f} {signed(self.control_interval)})"
        )


@dataclass(frozen=True)
class LayerConflict:
    """The conflict in one parameter; the fields mean what they mean in :class:`geomkit.correlation.conflict.Conflict`.

    Attributes:
        parameter: Name of the parameter.
        cosine: Cosine of the two mean gradients; NaN if one is zero.
        corrected: Estimate of the cosine of the expected gradients.
        interval: Confidence interval of the cosine of the expected gradients.
        null_interval: Where ``cosine`` lies when the examples are divided at random.
        p_value: One-sided permutation p-value.
        weight: The parameter's share of ‖ḡ_s‖·‖ḡ_u‖ over all parameters; weight times cosine is what it adds to the
            cosine over all parameters.
        contrast: Safety against control, if there is one.
    """

    parameter: str
    cosine: float
    corrected: float
    interval: tuple[float, float]
    null_interval: tuple[float, float]
    p_value: float
    weight: float = float("nan")
    contrast: ControlDifference | None = None


def layer_conflict(
    name: str, grams: PairGrams, control: PairGrams | None, shuffled: np.ndarray, confidence: float, *, norms: float
) -> LayerConflict:
    """Measure one conflict.

    Args:
        name: Of the parameter.
        grams: Inner products of safety and utility examples.
        control: Those of control and the same utility examples, if there is a control.
        shuffled: (draws, N + M) random divisions of the pooled safety and utility examples.
        confidence: Of the intervals.
        norms: The product of the norms of both mean gradients over all parameters.
    """
    corrected, interval = expected_cosine(grams, confidence)
    p_value, null_interval = permutation_test(grams.cosine, permuted_cosines(grams, shuffled), confidence)
    weight = grams.norms / norms if norms > 0 else 0.0
    contrast = None if control is None else contrast_of(grams, control, confidence)
    return LayerConflict(name, grams.cosine, corrected, interval, null_interval, p_value, weight, contrast)


def contrast_of(grams: PairGrams, control: PairGrams, confidence: float) -> ControlDifference:
    """Compare the cosines of two sets with one utility set, with an interval over the examples of all three."""
    ratio = contrast_ratio(grams, control)
    own, own_interval = expected_cosine(control, confidence)
    if ratio is None:
        return ControlDifference(float("nan"), (-2.0, 2.0), 1.0, own, own_interval)
    value = float(np.clip(ratio.estimate, -2, 2))
    return ControlDifference(value, ratio.interval(confidence, 2.0), ratio.p_value, own, own_interval)


def joined(own: LayerGrams, across: LayerGrams, utility: LayerGrams, name: str) -> dict[str, PairGrams]:
    """Put the three kinds of inner products of each parameter together.

    Args:
        own: (N, N) within the set called ``name``.
        across: (N, M) between it and the utility set.
        utility: (M, M) within the utility set.
        name: What to call the first set in errors.

    Raises:
        GeometryError: If a set has fewer than three examples, shapes do not fit, or parameters differ.
    """
    refuse_other_parameters(across, own)
    refuse_other_parameters(across, utility)
    grams = {
        layer: PairGrams(*(one[layer].double().cpu().numpy() for one in (own, across, utility))) for layer in across
    }
    if not grams:
        raise GeometryError("expected inner products of at least one parameter, found none; collect some")
    for layer, found in grams.items():
        n, m = found.across.shape
        if found.safety.shape != (n, n) or found.utility.shape != (m, m):
            raise GeometryError(
                f"expected inner products of the same examples in {layer}, found {found.safety.shape} within {name}, "
                f"{(n, m)} across and {found.utility.shape} within utility; take all from the same sets"
            )
        for side, size in ((name, n), ("utility", m)):
            if size < _FEWEST:
                raise GeometryError(f"expected at least {_FEWEST} {side} examples, found {size}; collect more")
    return grams


def refuse_other_parameters(a: Mapping[str, object], b: Mapping[str, object]) -> None:
    """Refuse mappings that have different parameters.

    Raises:
        GeometryError: If they do; the message names some.
    """
    if difference := set(a).symmetric_difference(b):
        raise GeometryError(
            f"expected inner products of the same parameters, found {len(difference)} on one side only "
            f"({', '.join(sorted(difference)[:4])}); collect all with the same layers="
        )
