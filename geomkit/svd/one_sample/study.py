"""Comparison of single safety examples with the mean safety gradient, in leading directions and in cosine.

The gradient of each safety example (anchor) is compared with the mean gradient of the *other* anchors; a mean that
includes the anchor would agree with it by construction. Control examples are compared with the same means, the control
at place i with the mean without anchor i, so that a prompt is never compared with another wording of itself.

The choice of controls decides what the comparison shows. Against unrelated examples, an overlap may come from the
wording of the refusals alone; against benign requests answered with the same refusals, the remaining contrast comes
from the forbidden request.
"""

import logging
from collections.abc import Mapping, Sequence

import numpy as np

from geomkit.errors import GeometryError
from geomkit.gradients.arithmetic import gram
from geomkit.gradients.checks import check_enough, sample_counts, with_controls
from geomkit.gradients.gradient_set import GradientSet
from geomkit.gradients.layer_gradient import LayerGradient
from geomkit.svd.common_basis import CommonBasis, to_common_basis
from geomkit.svd.one_sample.leave_one_out import (
    LeaveOneOut,
    estimates,
    leave_one_out_cosines,
    leave_one_out_overlaps,
)
from geomkit.svd.one_sample.pooled import (
    common_rank_overlaps,
    is_matrix,
    no_subspaces,
    pooled_gradients,
    pooled_places,
    space_dimension,
)
from geomkit.svd.one_sample.results import Group, LayerOneSample, OneSample
from geomkit.svd.singular_vectors import Side
from geomkit.utils.arguments import check_confidence, check_rank

_LOGGER = logging.getLogger(__name__)
_MIN_EXAMPLES = 3  # examples: the mean of the other anchors must be over at least two


def one_sample_study(
    safety: GradientSet,
    control: GradientSet | Mapping[str, GradientSet],
    *,
    rank: int = 10,
    side: Side = "left",
    confidence: float = 0.95,
) -> OneSample:
    """Compare every single safety example with the mean of the others, and control examples with the same means.

    The rank in a parameter is the smallest of ``rank`` and the numeric ranks of all its gradients here; anchors, means
    and controls have the same rank, because overlaps at different ranks do not compare. Controls should have a similar
    number of tokens, see :func:`geomkit.svd.token_matching.match_tokens`. A parameter in which an example has no
    gradient is left out of the overlaps.

    All intervals are jackknife intervals over examples (:func:`geomkit.stats.jackknife.jackknife_interval`), in which
    leaving out an anchor changes the means as well. Example i of a control with as many examples as there are anchors
    is left out together with anchor i, which is valid whether the two share a prompt or not. Measured coverage:
    tests/benchmarks/README.md.

    Args:
        safety: N ≥ 3 anchors, collected with ``per_sample=True``.
        control: M ≥ 3 other examples, collected with ``per_sample=True``, or several such sets by name. Benign
            requests with the same refusals (:func:`geomkit.inputs.control_sets.with_responses`) are the strict choice.
        rank: Largest number of directions to compare.
        side: ``"left"`` for the output space, ``"right"`` for the input space.
        confidence: Nominal coverage of all intervals, between 0 and 1.

    Returns:
        Overlaps, cosines and contrasts of the anchors and of each control.

    Raises:
        GeometryError: If there is no control or a control is called ``"safety"``; if a set lacks per-sample gradients,
            has fewer than three examples, covers other parameters or has a value that is not finite; if no parameter
            has a gradient in every example; or if ``rank`` or the confidence is out of range.

    Example:
        >>> import geomkit as gk
        >>> model, tokenizer = gk.load_organism()
        >>> def head(name):
        ...     rows = gk.load_examples(name).select(range(4))
        ...     return gk.collect_gradients(model, tokenizer, rows, per_sample=True, layers="lm_head*", progress=False)
        >>> print(one_sample_study(head("safety"), {"refused": head("controls/benign-refused")}))
        one of 4 anchors against the mean of the others, left-10: overlap ...; refused ..., contrast ...
    """
    sets = with_controls(safety, control)
    check_rank(rank)
    check_confidence(confidence)
    if len(sets) == 1:
        raise GeometryError("expected a control at least, found none; give e.g. benign requests with the same refusals")
    check_enough(sample_counts(sets), _MIN_EXAMPLES)
    gradients, places = pooled_gradients(sets), pooled_places(sample_counts(sets))
    # 1. In every parameter: inner products of the anchors with all examples, and overlaps of all examples with the
    #    means without each anchor.
    products, overlaps, ranks = {}, {}, {}
    for name, layer in gradients.items():
        common = to_common_basis(layer, side)
        products[name] = _products(common, layer, places["safety"])
        if is_matrix(layer[0]):
            anchors = len(safety.samples)
            overlaps[name], ranks[name] = common_rank_overlaps(
                common.bases_of_gradients(rank), common.leave_one_out_bases(anchors, rank)
            )
            if not ranks[name]:
                _LOGGER.warning("left %s out of the one-sample study: an example has no gradient there", name)
    studied = [name for name in ranks if ranks[name]]
    if not studied:
        raise no_subspaces()
    # 2. The whole model is treated as a further parameter: its overlaps are means over parameters, its inner products
    #    sums.
    mean_overlaps = np.mean([overlaps[name] for name in studied], axis=0)
    summed_products = tuple(np.sum(parts, axis=0) for parts in zip(*products.values(), strict=True))
    by_parameter = [summed_products, *(products[name] for name in studied)]
    # 3. Means, intervals and contrasts of every group, for the whole model and every parameter at once.
    whole, *groups_by_layer = _groups(
        np.stack([mean_overlaps, *(overlaps[name] for name in studied)], axis=-1),
        tuple(np.stack(parts, axis=-1) for parts in zip(*by_parameter, strict=True)),
        places,
        confidence,
    )
    layers = {
        name: LayerOneSample(name, ranks[name], space_dimension(gradients[name][0], side), groups)
        for name, groups in zip(studied, groups_by_layer, strict=True)
    }
    return OneSample(side, rank, whole, layers, confidence)


def _products(common: CommonBasis, gradients: Sequence[LayerGradient], anchors: slice) -> tuple[np.ndarray, np.ndarray]:
    """Return (N, N + M) inner products of the anchors with all examples, and (N + M,) squared norms of all examples."""
    products = common.gram()
    if products is None:
        squared_norms = np.array([gradient.norm**2 for gradient in gradients])
        return gram(gradients[anchors], gradients).cpu().numpy(), squared_norms
    return products[anchors].cpu().numpy(), products.diagonal().cpu().numpy()


def _groups(
    overlaps: np.ndarray,
    products: tuple[np.ndarray, ...],
    places: Mapping[str, slice],
    confidence: float,
) -> list[dict[str, Group]]:
    """Return the groups of the whole model and of each parameter, P in all.

    Args:
        overlaps: (N + M, N + 1, P) overlaps of all examples with the means without each anchor and the mean of all.
        products: (N, N + M, P) inner products of the anchors with all examples, and (N + M, P) squared norms.
        places: Places of each group among the examples; the anchors are the group ``"safety"``.
        confidence: Nominal coverage of the intervals.
    """
    across, squared_norms = products
    anchor_products = across[:, places["safety"]]

    def tables(place: slice) -> tuple[LeaveOneOut, LeaveOneOut]:
        cosines = leave_one_out_cosines(anchor_products, across[:, place], squared_norms[place])
        return leave_one_out_overlaps(overlaps[place]), cosines

    safety_tables = tables(places["safety"])
    by_group = {}
    for name, place in places.items():
        group_overlaps, group_cosines = safety_tables if name == "safety" else tables(place)
        overlap_estimates = estimates(safety_tables[0], group_overlaps, confidence)
        cosine_estimates = estimates(safety_tables[1], group_cosines, confidence)
        by_group[name] = [
            Group(group_overlaps.values[:, column], group_cosines.values[:, column], overlap, cosine)
            for column, (overlap, cosine) in enumerate(zip(overlap_estimates, cosine_estimates, strict=True))
        ]
    return [{name: groups[column] for name, groups in by_group.items()} for column in range(overlaps.shape[-1])]
