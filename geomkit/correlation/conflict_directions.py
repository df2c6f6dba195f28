"""Contributions of the singular directions of the mean safety gradient to the conflict.

With the SVD of a parameter's mean safety gradient, G_s = Σ σ_i u_i v_iᵀ, the inner product with another gradient G is a
sum over directions: ⟨G_s, G⟩ = Σ σ_i u_iᵀ G v_i. A projection that removes the leading directions removes their terms
and leaves the others, so the terms of these directions bound the effect of the projection.

*Null of a term.* Zero is not the right null: G_s has most of its energy in its first directions, so the terms of a
multiple of G_s plus an unrelated gradient are on average proportional to the energy of their directions, σ_i²/‖G_s‖².
This proportion is the null here: ``expected`` is the whole cosine times the share of the energy, and the p-value tests
whether a term equals ``expected``. Random directions would be no null either: k random directions in an m × n matrix
hold k/(mn) of any inner product on average. The directions u_i v_iᵀ are chosen on safety examples only, so the
intervals, which are over utility examples given the safety directions, are not biased by the choice.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from geomkit.errors import GeometryError
from geomkit.gradients.arithmetic import gram
from geomkit.gradients.checks import check_enough, check_gradients, check_sets
from geomkit.gradients.copies import check_different_samples
from geomkit.gradients.gradient_set import GradientSet, shared_layers
from geomkit.gradients.layer_gradient import LayerGradient
from geomkit.inputs.parameters import kind_of, layer_index
from geomkit.stats.jackknife import jackknife_interval, leave_one_out_means
from geomkit.stats.multiple_testing import benjamini_hochberg
from geomkit.stats.ratio import Ratio
from geomkit.svd.singular_vectors import Side
from geomkit.svd.subspaces import layer_subspace
from geomkit.utils.arguments import check_confidence, check_finite, check_rank
from geomkit.utils.display import counted, html_table, signed
from geomkit.utils.figures import DrawnResult, draw

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

_MIN_EXAMPLES = 3
_NO_ENERGY = 1e-9  # shares of the energy below this are rounding errors, and not tested


@dataclass(frozen=True, eq=False)
class DirectionParts:
    """The inner products of M utility examples with a safety gradient, split by singular direction.

    Attributes:
        energy: (k,) share of the safety gradient's squared norm in each direction, descending for a single matrix.
        parts: (k, M) contribution of each direction to the cosine, for each utility example. Inner products are divided
            by the norms of the two mean gradients over all matrices, so that the mean over examples, summed over
            directions and parameters, is the cosine of the mean gradients.
        whole: (M,) contribution of all directions together, directions beyond k included.
        weight: This matrix's share of the safety gradient's squared norm over all matrices; 1 for all matrices.
        confidence: Nominal coverage of the intervals.
    """

    energy: np.ndarray
    parts: np.ndarray = field(repr=False)
    whole: np.ndarray = field(repr=False)
    weight: float
    confidence: float = 0.95

    def table(self) -> dict[str, np.ndarray]:
        """Return the columns of a table: one row per direction, 1 to k, and one row, ``direction`` 0, for all others.

        ``contribution`` with its interval ``low`` to ``high`` is in units of the cosine; ``expected`` is the
        contribution in proportion to ``energy``, and ``p_value`` tests whether the contribution equals ``expected``
        (two-sided, Student's t over utility examples; NaN where there is no energy). The ``cumulative_`` columns sum
        from the first direction on.
        """
        energy = np.append(self.energy, max(1 - self.energy.sum(), 0.0))
        parts = np.vstack([self.parts, self.whole - self.parts.sum(0)])
        contribution, low, high = _mean_interval(parts, self.confidence)
        cumulative, cumulative_low, cumulative_high = _mean_interval(parts.cumsum(0), self.confidence)
        return {
            "direction": np.append(np.arange(1, len(energy)), 0),
            "energy": energy,
            "contribution": contribution,
            "low": low,
            "high": high,
            "expected": energy * self.whole.mean(),
            "p_value": np.where(energy > _NO_ENERGY, _p_values(parts - energy[:, None] * self.whole), np.nan),
            "cumulative_energy": energy.cumsum().clip(max=1.0),
            "cumulative_contribution": cumulative,
            "cumulative_low": cumulative_low,
            "cumulative_high": cumulative_high,
        }


@dataclass(frozen=True, eq=False)
class ConflictDirections(DrawnResult):
    """Contributions of the singular directions of the mean safety gradient to the conflict.

    Attributes:
        rank: k, the number of directions of each matrix that are listed singly, where the matrix has as many.
        layers: The contributions in each matrix.
        confidence: Nominal coverage of the intervals.
    """

    rank: int
    layers: Mapping[str, DirectionParts] = field(repr=False)
    confidence: float = 0.95

    @cached_property
    def total(self) -> DirectionParts:
        """The contributions over all matrices; contributions of the i-th direction of every matrix are added up."""
        layers = self.layers.values()
        energy = sum(layer.weight * _padded(layer.energy, self.rank) for layer in layers)
        parts = sum(_padded(layer.parts, self.rank) for layer in layers)
        whole = sum(layer.whole for layer in layers)
        return DirectionParts(np.asarray(energy), np.asarray(parts), np.asarray(whole), 1.0, self.confidence)

    @property
    def cosine(self) -> float:
        """Cosine of the two mean gradients over all matrices."""
        return float(self.total.whole.mean())

    @property
    def energy(self) -> float:
        """Share of the mean safety gradient's squared norm in the first k directions of each matrix."""
        return float(self.total.energy.sum())

    @property
    def share(self) -> float:
        """Share of the cosine that comes from the first k directions of each matrix; possibly outside of 0 and 1."""
        return self._share.estimate

    @property
    def share_interval(self) -> tuple[float, float]:
        """Fieller's interval of ``share``, over utility examples; infinite where the cosine may be zero."""
        return self._share.interval(self.confidence, float("inf"))

    @property
    def _share(self) -> Ratio:
        head, whole = self.total.parts.sum(0), self.total.whole
        return Ratio(
            float(head.mean()), float(whole.mean()), (leave_one_out_means(head),), (leave_one_out_means(whole),)
        )

    def by_index(self) -> "pd.DataFrame":
        """Return a data frame with one row per direction index, over all matrices; see :meth:`DirectionParts.table`."""
        import pandas as pd

        return pd.DataFrame(self.total.table())

    def to_frame(self) -> "pd.DataFrame":
        """Return a data frame with one row per matrix and direction; see :meth:`DirectionParts.table`.

        ``energy`` is the share within the matrix. ``q_value`` is the p-value adjusted after Benjamini and Hochberg
        (1995).
        """
        import pandas as pd

        frames = [
            pd.DataFrame({"parameter": name, "kind": kind_of(name), "layer": layer_index(name), **layer.table()})
            for name, layer in self.layers.items()
        ]
        frame = pd.concat(frames, ignore_index=True)
        return frame.assign(q_value=benjamini_hochberg(frame["p_value"].to_numpy()))

    def plot(self) -> "go.Figure":
        """Draw the contributions, see :func:`geomkit.plots.directions.plot_conflict_directions`."""
        return draw("plot_conflict_directions", self)

    def __str__(self) -> str:
        """Return the cosine, and the shares of the energy and of the cosine in the first directions."""
        _, (low,), (high,) = _mean_interval(self.total.whole[None], self.confidence)
        cosine = f"{self.cosine:+.3f} {signed((low, high))}"
        whole = f"cosine of the mean gradients over {counted(len(self.layers), 'matrix', 'matrices')} {cosine}"
        share_low, share_high = self.share_interval
        count = min(self.rank, max(len(layer.energy) for layer in self.layers.values()))
        directions = "the first direction holds" if count == 1 else f"the first {count} directions hold"
        energy = f"{directions} {self.energy:.1%} of the safety energy"
        if np.isinf([share_low, share_high]).any():
            return f"{whole}; {energy}; the cosine may be zero and has no shares"
        return f"{whole}; {energy} and {self.share:.1%} [{share_low:.1%}, {share_high:.1%}] of the cosine"

    def _repr_html_(self) -> str:
        return html_table(str(self), self.by_index())


def conflict_directions(
    safety: Mapping[str, LayerGradient], utility: GradientSet, *, rank: int = 20, confidence: float = 0.95
) -> ConflictDirections:
    """Split the conflict exactly into contributions of the singular directions of the mean safety gradient.

    Args:
        safety: The mean safety gradient by parameter, such as a :class:`~geomkit.gradients.gradient_set.GradientSet`.
        utility: Utility gradients, collected with ``per_sample=True`` from at least three examples.
        rank: Number of directions of each matrix to list singly; the further directions are taken together.
        confidence: Nominal coverage of the intervals, which are over utility examples, given the safety gradient and
            the norms.

    Returns:
        The contributions in every matrix; vectors (norms and biases) have a single direction and are left out.

    Raises:
        GeometryError: If the utility set lacks per-sample gradients or has fewer than three, the sets cover different
            parameters, there is no matrix, ``rank`` is not a whole number of at least 1, or the confidence is not
            between 0 and 1.

    Example:
        >>> import geomkit as gk
        >>> model, tokenizer = gk.load_organism()
        >>> safety, utility = (
        ...     gk.collect_gradients(model, tokenizer, gk.load_examples(name).select(range(4)), True, progress=False)
        ...     for name in ("safety", "scenarios/new-skill")
        ... )
        >>> directions = conflict_directions(safety, utility, rank=5)
        >>> directions.total.parts.shape, bool(directions.energy > 0.5)
        ((5, 4), True)
    """
    check_gradients("safety", safety)
    check_sets({"utility": utility})
    check_rank(rank)
    check_confidence(confidence)
    check_enough({"utility": len(utility.samples)}, _MIN_EXAMPLES)
    check_different_samples({"utility": utility}, _MIN_EXAMPLES)
    names = [name for name in shared_layers(safety, *utility.samples) if min(safety[name].matrix_shape) > 1]
    if not names:
        raise GeometryError("expected a matrix to find directions in, found vectors only; collect more parameters")
    samples = {name: [sample[name] for sample in utility.samples] for name in names}
    # 1. Norms of the two mean gradients over all matrices: ‖G_s‖² by matrix, ‖G_u‖² = Σ_ij w_i w_j ⟨G_i, G_j⟩.
    weights = torch.from_numpy(utility.weights)
    squared = sum(safety[name].norm ** 2 for name in names)
    means = (float(weights @ gram(samples[name], samples[name]).double().cpu() @ weights) for name in names)
    scale = (squared * sum(means)) ** 0.5
    check_finite(torch.tensor(scale), "the mean gradients")
    if not scale:
        raise GeometryError("expected mean gradients other than zero, found one; check the loss masks")
    # 2. The inner products of every matrix, split by direction and divided by ‖G_s‖·‖G_u‖; N w_i, which is 1 for equal
    # weights, makes their mean that of the weighted examples.
    share = utility.weights * len(utility.samples) / scale
    layers = {
        name: _layer_parts(safety[name], samples[name], rank, share, safety[name].norm ** 2 / squared, confidence)
        for name in names
    }
    return ConflictDirections(rank, layers, confidence)


def _layer_parts(
    mean: LayerGradient,
    samples: Sequence[LayerGradient],
    rank: int,
    scale: np.ndarray,
    weight: float,
    confidence: float,
) -> DirectionParts:
    """Return the inner products of one matrix, split by direction and times (N,) ``scale``; only thin products."""
    # 1. Singular vectors of the smaller side only: σ_i u_i = G_s v_i, and σ_i v_i = G_sᵀ u_i.
    rows, columns = mean.matrix_shape
    side: Side = "right" if columns <= rows else "left"
    subspace = layer_subspace(mean, rank=rank, side=side)
    basis = subspace.basis.double()

    # 2. Images of the vectors, (k, rows) G v_i or (k, columns) Gᵀ u_i, under the mean and under every sample.
    def image(gradient: LayerGradient) -> Tensor:
        return gradient.matmul(basis).T if side == "right" else gradient.rmatmul(basis.T)

    # 3. σ_i u_iᵀ G v_i = (G_s v_i)·(G v_i), or (G_sᵀ u_i)·(Gᵀ u_i).
    mean_image = image(mean)
    parts = np.stack([(mean_image * image(sample)).sum(1).cpu().numpy() for sample in samples], axis=1)
    # 4. ⟨G_s, G⟩, which includes the directions beyond k, and σ_i² / ‖G_s‖².
    whole = gram([mean], samples)[0].cpu().numpy()
    energy = subspace.singular_values**2 / mean.norm**2 if mean.norm else subspace.singular_values
    return DirectionParts(energy, parts * scale, whole * scale, weight, confidence)


def _padded(values: np.ndarray, rank: int) -> np.ndarray:
    """Append zeros along the first axis up to ``rank``, for directions that a matrix does not have."""
    return np.concatenate([values, np.zeros((rank - len(values), *values.shape[1:]))])


def _mean_interval(values: np.ndarray, confidence: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the mean over the last axis and the ends of Student's interval of the mean."""
    mean = values.mean(-1)
    return mean, *jackknife_interval(mean, leave_one_out_means(np.moveaxis(values, -1, 0)), confidence=confidence)


def _p_values(values: np.ndarray) -> np.ndarray:
    """Return the two-sided p-value of Student's t-test of a zero mean over the last axis; 1 where nothing varies."""
    from scipy.stats import t as student

    count = values.shape[-1]
    error = values.std(-1, ddof=1) / count**0.5
    statistic = np.divide(abs(values.mean(-1)), error, out=np.zeros_like(error), where=error > 0)
    return np.asarray(2 * student.sf(statistic, count - 1))
