"""The conflict in one parameter, or over all parameters, from inner products between examples."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from geomkit.correlation.cosine import PairGrams, contrast_ratio, expected_cosine, permutation_test, permuted_cosines
from geomkit.errors import GeometryError
from geomkit.gradients.checks import check_sets
from geomkit.gradients.copies import check_different_grams, check_different_samples
from geomkit.gradients.gradient_set import GradientSet, layer_grams
from geomkit.utils.arguments import check_finite
from geomkit.utils.display import signed

LayerGrams = Mapping[str, Tensor]
"""Inner products between examples by parameter, as returned by :func:`geomkit.sample_grams`."""

_MIN_EXAMPLES = 3  # leaving one example out must leave a pair


@dataclass(frozen=True)
class ControlDifference:
    """Difference between the safety set's and the control set's cosine with the utility gradient.

    Attributes:
        value: Cosine of the expected safety and utility gradients minus the cosine of the expected control and utility
            gradients; negative where safety conflicts more. NaN if a mean gradient is no larger than its noise.
        interval: Confidence interval of the difference, over the examples of all three sets.
        p_value: Two-sided p-value of the hypothesis of no difference; its measured false-positive rate is in
            tests/benchmarks/README.md.
        control: Estimate of the cosine of the expected control and utility gradients.
        control_interval: Confidence interval of the control's cosine.
    """

    value: float
    interval: tuple[float, float]
    p_value: float
    control: float
    control_interval: tuple[float, float]

    def __str__(self) -> str:
        """Return the difference and the control's cosine, with intervals, as text."""
        if np.isnan(self.value):
            return "safety minus control unknown, a mean is no larger than its noise"
        return (
            f"safety minus control {self.value:+.3f} {signed(self.interval)}, p = {self.p_value:.3g} "
            f"(control {self.control:+.3f} {signed(self.control_interval)})"
        )


@dataclass(frozen=True)
class LayerConflict:
    """The conflict in one parameter; the fields are explained in :class:`geomkit.correlation.conflict.Conflict`.

    Attributes:
        parameter: Name of the parameter.
        cosine: Cosine of the two mean gradients; NaN if a mean gradient is zero.
        corrected: Estimate of the cosine of the expected gradients.
        interval: Confidence interval of the cosine of the expected gradients.
        null_interval: Central interval of ``cosine`` under random divisions of the pooled examples.
        p_value: One-sided permutation p-value.
        weight: The parameter's share of ‖ḡ_s‖·‖ḡ_u‖ over all parameters; weight times cosine is the parameter's
            contribution to the cosine over all parameters.
        contrast: Safety set against control set, if there is a control.
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
    name: str, grams: PairGrams, control: PairGrams | None, divisions: np.ndarray, confidence: float, *, norms: float
) -> LayerConflict:
    """Return the conflict in one parameter, from inner products between examples.

    Args:
        name: Name of the parameter.
        grams: Inner products of N safety and M utility examples.
        control: Inner products of control examples and the same utility examples, if there is a control.
        divisions: (draws, N + M) booleans: random divisions of the pooled examples into two sets, true for the first.
        confidence: Nominal coverage of the intervals, between 0 and 1.
        norms: Product of the norms of both mean gradients over all parameters.
    """
    corrected, interval = expected_cosine(grams, confidence)
    p_value, null_interval = permutation_test(grams.cosine, permuted_cosines(grams, divisions), confidence)
    weight = grams.norms / norms if norms > 0 else 0.0
    contrast = None if control is None else control_difference(grams, control, confidence)
    return LayerConflict(name, grams.cosine, corrected, interval, null_interval, p_value, weight, contrast)


def control_difference(grams: PairGrams, control: PairGrams, confidence: float) -> ControlDifference:
    """Return the difference between the safety set's and the control set's cosine with the utility set.

    Args:
        grams: Inner products of safety and utility examples.
        control: Inner products of control examples and the same utility examples.
        confidence: Nominal coverage of the intervals, over the examples of all three sets.
    """
    ratio = contrast_ratio(grams, control)
    control_cosine, control_interval = expected_cosine(control, confidence)
    if ratio is None:
        return ControlDifference(float("nan"), (-2.0, 2.0), 1.0, control_cosine, control_interval)
    value = float(np.clip(ratio.estimate, -2, 2))
    interval = ratio.interval(confidence, 2.0)
    return ControlDifference(value, interval, ratio.p_value, control_cosine, control_interval)


def grams_with_utility(
    safety: GradientSet | LayerGrams,
    utility: GradientSet | LayerGrams,
    control: GradientSet | LayerGrams | None,
    across: LayerGrams | None,
    control_across: LayerGrams | None,
) -> tuple[dict[str, PairGrams], dict[str, PairGrams] | None]:
    """Return the inner products within and between safety and utility set, and control and utility set, by parameter.

    Args:
        safety: Safety gradients, or with ``across`` the (N, N) inner products within the safety set.
        utility: Utility gradients, or with ``across`` the (M, M) inner products within the utility set.
        control: Control gradients, or with ``across`` the (C, C) inner products within the control set, or ``None``.
        across: (N, M) inner products between safety and utility set; ``None`` if the sets are given by gradients.
        control_across: (C, M) inner products between control and utility set.

    Returns:
        Inner products of safety and utility set, and of control and utility set if there is a control.

    Raises:
        GeometryError: If a set lacks per-sample gradients, has fewer than three examples or a value that is not finite,
            if parameters differ, inner products do not fit together, or the inner products of the control are
            incomplete.
    """
    sides = {"safety": safety, "utility": utility} | ({} if control is None else {"control": control})
    if across is None:
        if control_across is not None:
            raise GeometryError("expected across= beside control_across=, found none; give both")
        check_sets(sides)
        sets = {name: side for name, side in sides.items() if isinstance(side, GradientSet)}
        check_different_samples(sets, _MIN_EXAMPLES)
        within: dict[str, LayerGrams] = {name: layer_grams(side, side) for name, side in sets.items()}
        between: dict[str, LayerGrams] = {
            name: layer_grams(side, sets["utility"]) for name, side in sets.items() if name != "utility"
        }
    else:
        if (control is None) != (control_across is None):
            raise GeometryError(
                "expected control= and control_across= together, found one of them; give both or neither"
            )
        within = {name: _checked_grams(name, side) for name, side in sides.items()}
        between = {"safety": across} | ({} if control_across is None else {"control": control_across})
        for products in between.values():
            for name, gram in products.items():
                check_finite(gram, name)
    pairs = {name: _pair_grams(within[name], between[name], within["utility"], name) for name in between}
    for name, pair in pairs.items():
        check_different_grams(name, np.sum([gram.safety for gram in pair.values()], axis=0), _MIN_EXAMPLES)
    utility_gram = np.sum([gram.utility for gram in pairs["safety"].values()], axis=0)
    check_different_grams("utility", utility_gram, _MIN_EXAMPLES)
    if "control" in pairs:
        _check_same_parameters(pairs["safety"], pairs["control"])
    return pairs["safety"], pairs.get("control")


def _checked_grams(name: str, grams: GradientSet | LayerGrams) -> LayerGrams:
    """Return the inner products within a set; refuse gradients where across= says that inner products are given."""
    if isinstance(grams, GradientSet):
        raise GeometryError(
            f"expected inner products within the {name} set beside across=, found gradients; leave across= out, or "
            "give the set's layer_grams"
        )
    return grams


def _pair_grams(within: LayerGrams, across: LayerGrams, utility: LayerGrams, name: str) -> dict[str, PairGrams]:
    """Return the inner products within and between a set and the utility set, by parameter.

    Args:
        within: (N, N) inner products within the set called ``name``.
        across: (N, M) inner products between this set and the utility set.
        utility: (M, M) inner products within the utility set.
        name: Name of the first set in error messages.

    Raises:
        GeometryError: If a set has fewer than three examples, shapes do not fit, or parameters differ.
    """
    _check_same_parameters(across, within)
    _check_same_parameters(across, utility)
    grams = {
        layer: PairGrams(*(part[layer].double().cpu().numpy() for part in (within, across, utility)))
        for layer in across
    }
    if not grams:
        raise GeometryError("expected inner products of at least one parameter, found none; collect some")
    for layer, gram in grams.items():
        n, m = gram.across.shape
        if gram.safety.shape != (n, n) or gram.utility.shape != (m, m):
            raise GeometryError(
                f"expected inner products of the same examples in {layer}, found {gram.safety.shape} within {name}, "
                f"{(n, m)} across and {gram.utility.shape} within utility; take all from the same sets"
            )
        for side, size in ((name, n), ("utility", m)):
            if size < _MIN_EXAMPLES:
                raise GeometryError(f"expected at least {_MIN_EXAMPLES} {side} examples, found {size}; collect more")
    return grams


def _check_same_parameters(a: Mapping[str, object], b: Mapping[str, object]) -> None:
    """Check that two mappings by parameter have the same parameters.

    Raises:
        GeometryError: If a parameter is in one mapping only; the message names up to four of them.
    """
    if difference := set(a).symmetric_difference(b):
        raise GeometryError(
            f"expected inner products of the same parameters, found {len(difference)} on one side only "
            f"({', '.join(sorted(difference)[:4])}); collect all with the same layers="
        )
