"""The examples of several sets pooled in one sequence, set after set, and the overlaps between their subspaces."""

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from geomkit.errors import GeometryError
from geomkit.gradients.gradient_set import GradientSet, shared_layers
from geomkit.gradients.layer_gradient import LayerGradient
from geomkit.svd.common_basis import overlaps_between
from geomkit.svd.singular_vectors import Side


def pooled_gradients(sets: Mapping[str, GradientSet]) -> dict[str, list[LayerGradient]]:
    """Return the per-sample gradients of all examples, set after set, by parameter.

    Raises:
        GeometryError: If the examples cover different parameters, or a parameter has different shapes.
    """
    samples = [sample for gradients in sets.values() for sample in gradients.samples]
    return {name: [sample[name] for sample in samples] for name in shared_layers(*samples)}


def pooled_places(counts: Mapping[str, int]) -> dict[str, slice]:
    """Return the places of each set among the pooled examples.

    Example:
        >>> pooled_places({"safety": 3, "control": 2})
        {'safety': slice(0, 3, None), 'control': slice(3, 5, None)}
    """
    ends = np.cumsum(list(counts.values())).tolist()
    return {name: slice(end - count, end) for (name, count), end in zip(counts.items(), ends, strict=True)}


def is_matrix(gradient: LayerGradient) -> bool:
    """Return whether a gradient has more than one row and more than one column, and so a subspace."""
    return min(gradient.matrix_shape) > 1


def space_dimension(gradient: LayerGradient, side: Side) -> int:
    """Return the dimension of the space of a gradient's left or right singular vectors."""
    return gradient.matrix_shape[0 if side == "left" else 1]


def common_rank_overlaps(a: Sequence[Tensor], b: Sequence[Tensor]) -> tuple[np.ndarray, int]:
    """Return the overlaps between every two subspaces, at the largest rank that all subspaces have.

    Overlaps at different ranks do not compare.

    Args:
        a: N bases with orthonormal columns.
        b: M bases of the same space.

    Returns:
        (N, M) overlaps ‖UᵀV‖_F²/k, and k; zeros and 0 if a subspace is empty because the example has no gradient.
    """
    rank = min(basis.shape[1] for basis in (*a, *b))
    return (overlaps_between(a, b, rank).numpy() if rank else np.zeros((len(a), len(b)))), rank


def no_subspaces() -> GeometryError:
    """Return the error for sets of examples that have no matrix in which every example has a gradient."""
    return GeometryError("expected a matrix with a gradient in every example, found none; check the loss masks")
