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
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from geomkit.errors import GeometryError
from geomkit.gradients.arithmetic import gram
from geomkit.gradients.checks import check_enough, sample_counts, with_controls
from geomkit.gradients.copies import check_different_samples
from geomkit.gradients.gradient_set import GradientSet
from geomkit.gradients.layer_gradient import LayerGradient
from geomkit.svd.leave_one_out_bases import example_bases, leave_one_out_bases
from geomkit.svd.one_sample.leave_one_out import (
    LeaveOneOut,
    group_means,
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
from geomkit.svd.singular_vectors import Side, check_side
from geomkit.svd.weighted_sums import without_unused_rows
from geomkit.utils.arguments import check_confidence, check_rank
from geomkit.utils.progress import with_bar

_LOGGER = logging.getLogger(__name__)
_MIN_EXAMPLES = 3  # examples: the mean of the other anchors must be over at least two


def one_sample_study(
    safety: GradientSet,
    control: GradientSet | Mapping[str, GradientSet],
    *,
    rank: int = 10,
    side: Side = "left",
    confidence: float = 0.95,
    progress: bool = True,
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
        progress: Show a bar, in parameters, once the work has taken five seconds.

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
    check_side(side)
    if len(sets) == 1:
        raise GeometryError("expected a control at least, found none; give e.g. benign requests with the same refusals")
    check_enough(sample_counts(sets), _MIN_EXAMPLES)
    check_different_samples(sets, _MIN_EXAMPLES)
    gradients, places = pooled_gradients(sets), pooled_places(sample_counts(sets))
    tables = {
        name: parameter_table(layer, len(safety.samples), rank, side, gram(layer[places["safety"]], layer))
        for name, layer in with_bar(gradients.items(), "one sample", "parameter", progress)
    }
    return study_of(tables, places, rank, side, confidence)


@dataclass(frozen=True, eq=False)
class ParameterTable:
    """What the study needs of one parameter, for N anchors followed by M controls.

    Attributes:
        products: (N, N + M) inner products of the anchors with all examples.
        squared_norms: (N + M,) squared norms of all examples.
        overlaps: (N + M, N + 1) overlaps of all examples with the means without each anchor and the mean of all.
        rank: Common rank of all subspaces; 0 for a vector, or if an example has no gradient.
        dimension: Dimension of the space of the singular vectors.
        is_matrix: Whether the parameter has subspaces at all.
    """

    products: np.ndarray
    squared_norms: np.ndarray
    overlaps: np.ndarray
    rank: int
    dimension: int
    is_matrix: bool


def parameter_table(
    gradients: Sequence[LayerGradient],
    anchors: int,
    rank: int,
    side: Side,
    products: Tensor,
    squared_norms: Tensor | None = None,
) -> ParameterTable:
    """Return the inner products and overlaps of one parameter.

    Args:
        gradients: Gradients of N anchors, then of M controls.
        anchors: N.
        rank: Largest number of directions to compare.
        side: Side of the singular vectors.
        products: (N, N + M) inner products of the anchors with all examples.
        squared_norms: (N + M,) squared norms of all examples; computed when left out.

    Raises:
        GeometryError: If a gradient is not finite.
    """
    if squared_norms is None:
        squared_norms = torch.tensor([gradient.norm**2 for gradient in gradients])
    overlaps, common_rank = np.zeros((len(gradients), anchors + 1)), 0
    if is_matrix(gradients[0]):
        # An embedding's rows that no example looks up change no overlap.
        used = without_unused_rows(gradients)
        overlaps, common_rank = common_rank_overlaps(
            example_bases(used, side, rank), leave_one_out_bases(used[:anchors], side, rank)
        )
    return ParameterTable(
        products.cpu().numpy(),
        squared_norms.cpu().numpy(),
        overlaps,
        common_rank,
        space_dimension(gradients[0], side),
        is_matrix(gradients[0]),
    )


def study_of(
    tables: Mapping[str, ParameterTable], places: Mapping[str, slice], rank: int, side: Side, confidence: float = 0.95
) -> OneSample:
    """Return the study of tables that were made parameter by parameter, see :func:`one_sample_study`.

    Args:
        tables: The table of every parameter.
        places: Places of the anchors, called ``"safety"``, and of each control among the examples.
        rank: The requested rank.
        side: Side of the singular vectors.
        confidence: Nominal coverage of all intervals.

    Raises:
        GeometryError: If no parameter has a gradient in every example.
    """
    for name, table in tables.items():
        if table.is_matrix and not table.rank:
            _LOGGER.warning("left %s out of the one-sample study: an example has no gradient there", name)
    studied = {name: table for name, table in tables.items() if table.rank}
    if not studied:
        raise no_subspaces()
    # 1. The whole model is treated as a further parameter: its overlaps are means over parameters, its inner products
    #    sums.
    overlaps = [table.overlaps for table in studied.values()]
    summed = (
        np.sum([table.products for table in tables.values()], axis=0),
        np.sum([table.squared_norms for table in tables.values()], axis=0),
    )
    by_parameter = [summed, *((table.products, table.squared_norms) for table in studied.values())]
    # 2. Means, intervals and contrasts of every group, for the whole model and every parameter at once.
    whole, *groups_by_layer = _groups(
        np.stack([np.mean(overlaps, axis=0), *overlaps], axis=-1),
        tuple(np.stack(parts, axis=-1) for parts in zip(*by_parameter, strict=True)),
        places,
        confidence,
    )
    layers = {
        name: LayerOneSample(name, table.rank, table.dimension, groups)
        for (name, table), groups in zip(studied.items(), groups_by_layer, strict=True)
    }
    return OneSample(side, rank, whole, layers, confidence)


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
        overlap_estimates = group_means(safety_tables[0], group_overlaps, confidence)
        cosine_estimates = group_means(safety_tables[1], group_cosines, confidence)
        by_group[name] = [
            Group(group_overlaps.values[:, column], group_cosines.values[:, column], overlap, cosine)
            for column, (overlap, cosine) in enumerate(zip(overlap_estimates, cosine_estimates, strict=True))
        ]
    return [{name: groups[column] for name, groups in by_group.items()} for column in range(overlaps.shape[-1])]
