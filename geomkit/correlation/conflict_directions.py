"""Which singular directions of the mean safety gradient carry the conflict.

With the SVD of a parameter's mean safety gradient, G_s = Σ σ_i u_i v_iᵀ, the inner product with another gradient G
falls into parts that add up: ⟨G_s, G⟩ = Σ σ_i u_iᵀ G v_i. A projection that removes the leading directions removes
their parts and leaves the others, so what they hold says what it can do at best.

*What to compare a part with.* Not with zero alone: G_s has most of its energy in its first directions, and even a
utility gradient that is a multiple of G_s plus something unrelated to it meets each direction by its share of the
energy, σ_i²/‖G_s‖². That is the null here: ``expected`` is the whole cosine times the share of the energy, and the
p-value is that of a part equal to it. Random directions would be no null: k of them in an m × n matrix hold k/(mn) of
any inner product on average. The direction of u_i v_iᵀ was chosen on safety examples only, so the intervals, which
are over utility examples with the safety directions given, are not biased by the choice.
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
from geomkit.gradients.gradient_set import GradientSet, shared_layers
from geomkit.gradients.layer_gradient import LayerGradient
from geomkit.inputs.parameters import kind_of, layer_index
from geomkit.stats.jackknife import jackknife_interval, means_without_each
from geomkit.stats.multiple_testing import benjamini_hochberg
from geomkit.stats.ratio import Ratio
from geomkit.svd.singular_vectors import Side
from geomkit.svd.subspaces import layer_subspace
from geomkit.utils.arguments import check_confidence, check_finite, check_rank
from geomkit.utils.display import counted, html_table, signed
from geomkit.utils.figures import draw

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

_FEWEST = 3
_NOTHING = 1e-9  # a share of the energy that is rounding: there is nothing to test


@dataclass(frozen=True, eq=False)
class DirectionParts:
    """The inner products of utility examples with a safety gradient, direction by direction.

    Attributes:
        energy: (k,) share of the safety gradient's squared norm in each direction, descending for one matrix.
        parts: (k, M) what each direction adds to the cosine, for each utility example: they are divided by the norms of
            the two mean gradients over all matrices, so that the mean over examples, summed over directions and
            parameters, is the cosine of the mean gradients.
        whole: (M,) the same of all directions together, those beyond k included.
        weight: Share of the safety gradient's squared norm over all matrices that is this matrix's; 1 for all of them.
        confidence: Of the intervals.
    """

    energy: np.ndarray
    parts: np.ndarray = field(repr=False)
    whole: np.ndarray = field(repr=False)
    weight: float
    confidence: float = 0.95

    def table(self) -> dict[str, np.ndarray]:
        """Return columns with a row per direction, 1 to k, and a last one, ``direction`` 0, for all beyond.

        ``contribution`` with ``low`` and ``high`` is in units of the cosine, ``expected`` what it would be in
        proportion to ``energy``, ``p_value`` that of this expectation (two-sided, Student's t over utility examples;
        NaN where there is no energy).
        The ``cumulative_`` columns sum from the first direction on.
        """
        energy = np.append(self.energy, max(1 - self.energy.sum(), 0.0))
        parts = np.vstack([self.parts, self.whole - self.parts.sum(0)])
        contribution, low, high = _mean_interval(parts, self.confidence)
        together, together_low, together_high = _mean_interval(parts.cumsum(0), self.confidence)
        return {
            "direction": np.append(np.arange(1, len(energy)), 0),
            "energy": energy,
            "contribution": contribution,
            "low": low,
            "high": high,
            "expected": energy * self.whole.mean(),
            "p_value": np.where(energy > _NOTHING, _p_values(parts - energy[:, None] * self.whole), np.nan),
            "cumulative_energy": energy.cumsum().clip(max=1.0),
            "cumulative_contribution": together,
            "cumulative_low": together_low,
            "cumulative_high": together_high,
        }


@dataclass(frozen=True, eq=False)
class ConflictDirections:
    """Which singular directions of the mean safety gradient carry the conflict.

    Attributes:
        rank: k, how many directions of each matrix are told apart, where it has as many.
        layers: The parts in each matrix.
        confidence: Of the intervals.
    """

    rank: int
    layers: Mapping[str, DirectionParts] = field(repr=False)
    confidence: float = 0.95

    @cached_property
    def total(self) -> DirectionParts:
        """The parts of all matrices, added up by the place of a direction among those of its matrix."""
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
        """Share of the cosine that the first k directions of each matrix hold; it may lie outside of 0 and 1."""
        return self._share.estimate

    @property
    def share_interval(self) -> tuple[float, float]:
        """Fieller's interval of the share, over utility examples; endless where the cosine may be zero."""
        return self._share.interval(self.confidence, float("inf"))

    @property
    def _share(self) -> Ratio:
        head, whole = self.total.parts.sum(0), self.total.whole
        return Ratio(float(head.mean()), float(whole.mean()), (means_without_each(head),), (means_without_each(whole),))

    def by_index(self) -> "pd.DataFrame":
        """Return a row per place of a direction, over all matrices; see :meth:`DirectionParts.table`."""
        import pandas as pd

        return pd.DataFrame(self.total.table())

    def to_frame(self) -> "pd.DataFrame":
        """Return a row per matrix and direction; see :meth:`DirectionParts.table`.

        ``energy`` is the share within the matrix. ``q_value`` is the p-value after Benjamini and Hochberg (1995).
        """
        import pandas as pd

        frames = [
            pd.DataFrame({"parameter": name, "kind": kind_of(name), "layer": layer_index(name), **layer.table()})
            for name, layer in self.layers.items()
        ]
        frame = pd.concat(frames, ignore_index=True)
        return frame.assign(q_value=benjamini_hochberg(frame["p_value"].to_numpy()))

    def plot(self) -> "go.Figure":
        """Draw it, see :func:`geomkit.plots.directions.plot_conflict_directions`."""
        return draw("plot_conflict_directions", self)

    def __str__(self) -> str:
        """Say what the first directions hold of the energy and of the conflict."""
        _, (low,), (high,) = _mean_interval(self.total.whole[None], self.confidence)
        cosine = f"{self.cosine:+.3f} {signed((low, high))}"
        said = f"cosine of the mean gradients over {counted(len(self.layers), 'matrix', 'matrices')} {cosine}"
        first, last = self.share_interval
        kept = min(self.rank, max(len(layer.energy) for layer in self.layers.values()))
        first_ones = "the first direction holds" if kept == 1 else f"the first {kept} directions hold"
        held = f"{first_ones} {self.energy:.1%} of the safety energy"
        if np.isinf([first, last]).any():
            return f"{said}; {held}; the cosine may be zero and has no shares"
        return f"{said}; {held} and {self.share:.1%} [{first:.1%}, {last:.1%}] of the cosine"

    def _repr_html_(self) -> str:
        return html_table(str(self), self.by_index())


def conflict_directions(
    safety: Mapping[str, LayerGradient], utility: GradientSet, *, rank: int = 20, confidence: float = 0.95
) -> ConflictDirections:
    """Divide the conflict among the singular directions of the mean safety gradient, exactly.

    Nothing but thin products is formed: with right vectors V, σ_i u_iᵀ G v_i = (G_s v_i)·(G v_i).

    Args:
        safety: The mean safety gradient by parameter, such as a :class:`~geomkit.gradients.gradient_set.GradientSet`.
        utility: Collected with ``per_sample=True``, at least three examples.
        rank: How many directions of each matrix to tell apart; the others are taken together.
        confidence: Of the intervals. They are over utility examples, the safety gradient and the norms given.

    Returns:
        The parts of every matrix; vectors (norms and biases) have no directions to tell apart and are left out.

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
        >>> found = conflict_directions(safety, utility, rank=5)
        >>> found.total.parts.shape, bool(found.energy > 0.5)
        ((5, 4), True)
    """
    check_gradients("safety", safety)
    check_sets({"utility": utility})
    check_rank(rank)
    check_confidence(confidence)
    check_enough({"utility": len(utility.samples)}, _FEWEST)
    names = [name for name in shared_layers(safety, *utility.samples) if min(safety[name].matrix_shape) > 1]
    if not names:
        raise GeometryError("expected a matrix to find directions in, found vectors only; collect more parameters")
    samples = {name: [sample[name] for sample in utility.samples] for name in names}
    squared = sum(safety[name].norm ** 2 for name in names)
    scale = (squared * sum(float(gram(samples[name], samples[name]).mean()) for name in names)) ** 0.5
    check_finite(torch.tensor(scale), "the mean gradients")
    if not scale:
        raise GeometryError("expected mean gradients other than zero, found one; check the loss masks")
    layers = {
        name: _divided(safety[name], samples[name], rank, scale, safety[name].norm ** 2 / squared, confidence)
        for name in names
    }
    return ConflictDirections(rank, layers, confidence)


def _divided(
    mean: LayerGradient, samples: Sequence[LayerGradient], rank: int, scale: float, weight: float, confidence: float
) -> DirectionParts:
    rows, columns = mean.matrix_shape
    side: Side = "right" if columns <= rows else "left"  # the smaller space: its vectors tell the others
    found = layer_subspace(mean, rank=rank, side=side)
    basis = found.basis.double()

    def image(gradient: LayerGradient) -> Tensor:
        return gradient.matmul(basis).T if side == "right" else gradient.rmatmul(basis.T)

    own = image(mean)
    parts = np.stack([(own * image(sample)).sum(1).cpu().numpy() for sample in samples], axis=1)
    whole = gram([mean], samples)[0].cpu().numpy()
    energy = found.singular_values**2 / mean.norm**2 if mean.norm else found.singular_values
    return DirectionParts(energy, parts / scale, whole / scale, weight, confidence)


def _padded(values: np.ndarray, rank: int) -> np.ndarray:
    """Add zeros for directions that a matrix does not have."""
    return np.concatenate([values, np.zeros((rank - len(values), *values.shape[1:]))])


def _mean_interval(values: np.ndarray, confidence: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the mean over the last axis and Student's interval."""
    mean = values.mean(-1)
    return mean, *jackknife_interval(mean, means_without_each(np.moveaxis(values, -1, 0)), confidence=confidence)


def _p_values(values: np.ndarray) -> np.ndarray:
    """Return the two-sided p-value of Student's test that the mean over the last axis is zero; 1 if none ever moves."""
    from scipy.stats import t as student

    count = values.shape[-1]
    error = values.std(-1, ddof=1) / count**0.5
    statistic = np.divide(abs(values.mean(-1)), error, out=np.zeros_like(error), where=error > 0)
    return np.asarray(2 * student.sf(statistic, count - 1))
