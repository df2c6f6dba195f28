"""Map of single gradients in the plane, with the separation of the sets and a permutation test of the separation.

The map shows two dimensions of many and is only a picture. The separation, the mean silhouette, is computed from the
distances between the gradients themselves.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from geomkit.errors import GeometryError
from geomkit.gradients.arithmetic import gram
from geomkit.gradients.checks import check_enough, check_sets, sample_counts
from geomkit.gradients.copies import check_different_samples
from geomkit.gradients.gradient_set import GradientSet
from geomkit.svd.common_basis import to_common_basis
from geomkit.svd.one_sample.pooled import pooled_gradients
from geomkit.utils.arguments import check_draws, check_finite, check_seed
from geomkit.utils.figures import DrawnResult, draw
from geomkit.utils.seeding import random_state_kept

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

MapMethod = Literal["pca", "mds"]
_MIN_EXAMPLES = 2  # examples of a set
_AT_ONCE = 2**24  # largest number of entries in the sums of distances of the permutations that are computed together


@dataclass(frozen=True, eq=False)
class GradientMap(DrawnResult):
    """Map of single gradients in the plane.

    Attributes:
        method: ``"pca"``, the two directions of largest variance, or ``"mds"``, the plane that preserves distances
            best.
        normalised: Whether gradients were scaled to norm one, so that the distances compare directions only.
        names: Names of the sets.
        labels: (N,) set of each example, as an index into ``names``.
        coordinates: (N, 2) position of each example on the map.
        quality: With PCA the share of the variance on the map; with MDS the normalised stress (Kruskal 1964), 0 if the
            distances on the map are the true distances, above .2 poor.
        silhouettes: (N,) silhouette of each example (Rousseeuw 1987): 1 if the other examples of its set are far nearer
            than the nearest other set, 0 between two sets, negative if another set is nearer.
        p_value: One-sided p-value of the mean silhouette, under exchangeable labels.
    """

    method: MapMethod
    normalised: bool
    names: tuple[str, ...]
    labels: np.ndarray = field(repr=False)
    coordinates: np.ndarray = field(repr=False)
    quality: float
    silhouettes: np.ndarray = field(repr=False)
    p_value: float

    @property
    def separation(self) -> float:
        """Mean silhouette over examples."""
        return float(self.silhouettes.mean())

    def to_frame(self) -> "pd.DataFrame":
        """Return a data frame with one row per example: ``set``, ``example``, ``x``, ``y`` and ``silhouette``."""
        import pandas as pd

        return pd.DataFrame(
            {
                "set": [self.names[label] for label in self.labels],
                "example": _index_in_set(self.labels),
                "x": self.coordinates[:, 0],
                "y": self.coordinates[:, 1],
                "silhouette": self.silhouettes,
            }
        )

    def plot(self) -> "go.Figure":
        """Draw the map, see :func:`geomkit.plots.one_sample.plot_gradient_map`."""
        return draw("plot_gradient_map", self)

    def __str__(self) -> str:
        """Return the quality of the map and the separation of the sets as text."""
        quality = f"{self.quality:.0%} of the variance" if self.method == "pca" else f"stress {self.quality:.3f}"
        return (
            f"map of {len(self.labels)} gradients of {len(self.names)} sets by {self.method.upper()}, {quality}; "
            f"mean silhouette {self.separation:+.3f}, p = {self.p_value:.2g}"
        )


def gradient_map(
    sets: Mapping[str, GradientSet] | Mapping[str, int],
    grams: Tensor | Mapping[str, Tensor] | None = None,
    *,
    method: MapMethod = "pca",
    normalise: bool = True,
    draws: int = 999,
    seed: int = 0,
) -> GradientMap:
    """Return a map of single examples' gradients in the plane, from their inner products over all parameters.

    The p-value is (1 + #{permuted ≥ observed}) / (1 + draws), over permutations of the labels. If all sets have the
    same size, labels are permuted among the examples at the same place of their sets, because these may belong
    together; the restriction is valid for independent examples as well.

    Args:
        sets: Two sets or more by name, of at least two examples each, collected with ``per_sample=True``; or the number
            of examples of each set, with ``grams``.
        grams: (N, N) inner products of all examples, set after set, or such matrices by parameter, which are summed;
            for large sets from :func:`geomkit.collection.sample_grams.sample_grams`.
        method: ``"pca"`` (kernel PCA of the inner products) or ``"mds"`` (metric scaling of the distances).
        normalise: Scale all gradients to norm one; otherwise gradients of large norm dominate the map.
        draws: Number of permutations of the labels.
        seed: Seed of the permutations.

    Returns:
        The map with its quality and the separation of the sets.

    Raises:
        GeometryError: If there are fewer than two sets or a set has fewer than two per-sample gradients; if the inner
            products are of other examples or not finite, or an example has no gradient; or if the method is unknown or
            ``draws`` negative.

    Example:
        >>> import torch
        >>> gradients = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
        >>> plane = gradient_map({"safety": 2, "utility": 2}, gradients @ gradients.T)
        >>> round(plane.quality, 3), round(plane.separation, 2)
        (1.0, 0.93)
    """
    if method not in get_args(MapMethod):
        raise GeometryError(
            f"expected the method {' or '.join(get_args(MapMethod))}, found {method!r}; give one of these"
        )
    check_draws(draws, 0)
    check_seed(seed)
    counts = _counts(sets)
    if len(counts) < 2:
        raise GeometryError(
            f"expected two sets or more to tell apart, found {len(counts)}; give e.g. a control as well"
        )
    check_enough(counts, _MIN_EXAMPLES)
    check_different_samples({name: part for name, part in sets.items() if isinstance(part, GradientSet)}, _MIN_EXAMPLES)
    # 1. Distances from inner products: ‖a − b‖² = ‖a‖² + ‖b‖² − 2⟨a, b⟩.
    products = _products(sets, grams, sum(counts.values()))
    if normalise:
        norms = np.sqrt(products.diagonal())
        products = products / np.outer(norms, norms)
    squared = products.diagonal()
    distances = np.sqrt(np.maximum(squared[:, None] + squared - 2 * products, 0))
    np.fill_diagonal(distances, 0.0)
    # 2. Positions on the map.
    labels = np.repeat(np.arange(len(counts)), list(counts.values()))
    coordinates, quality = _pca(products) if method == "pca" else _mds(products, distances)
    # 3. Silhouettes from the distances, and the mean silhouettes of permuted labels, a few permutations at a time.
    permuted = _permuted(labels, draws, np.random.default_rng(seed))
    step = max(1, _AT_ONCE // (len(labels) * len(counts)))
    silhouettes = silhouettes_of(distances, labels[None])[0]
    null = [silhouettes_of(distances, permuted[start : start + step]).mean(1) for start in range(0, draws, step)]
    # Permutations that repeat the observed labels have the observed mean up to its last bits.
    at_least_as_high = sum(int((means >= silhouettes.mean() - 1e-12).sum()) for means in null)
    p_value = (1 + at_least_as_high) / (1 + draws)
    return GradientMap(method, normalise, tuple(counts), labels, coordinates, quality, silhouettes, p_value)


def silhouettes_of(distances: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the silhouette (b − a) / max(a, b) of every example, for several labellings at once.

    a is the mean distance of the example to the other examples of its set, and b the mean distance to the nearest other
    set. The silhouette is 0 where a and b are zero.

    Args:
        distances: (N, N) distances between examples.
        labels: (D, N) set of every example, numbered from 0; every set has at least two examples.

    Returns:
        (D, N) silhouettes.
    """
    # 1. Sum of every example's distances to each set, (D, N, sets).
    member = labels[..., None] == np.arange(labels.max() + 1)
    counts = member.sum(1, keepdims=True)
    sums = np.einsum("ij,djs->dis", distances, member.astype(np.float64), optimize=True)
    # 2. a: the distance to itself is zero, so the sum over the example's set has one term less than the set.
    within = np.where(member, sums, 0).sum(2) / (np.where(member, counts, 0).sum(2) - 1)
    # 3. b: the smallest mean distance to a set that does not include the example.
    nearest = np.where(member, np.inf, sums / counts).min(2)
    largest = np.maximum(within, nearest)
    return np.asarray(np.divide(nearest - within, largest, out=np.zeros_like(within), where=largest > 0))


def _counts(sets: Mapping[str, GradientSet] | Mapping[str, int]) -> dict[str, int]:
    """Return the number of examples of each set."""
    if not isinstance(sets, Mapping) or not all(isinstance(examples, int) for examples in sets.values()):
        check_sets(sets)
    return {name: examples if isinstance(examples, int) else len(examples.samples) for name, examples in sets.items()}


def _products(
    sets: Mapping[str, GradientSet] | Mapping[str, int], grams: Tensor | Mapping[str, Tensor] | None, examples: int
) -> np.ndarray:
    """Return (N, N) inner products of all examples over all parameters, checked."""
    if grams is None:
        total = _products_of_sets({name: part for name, part in sets.items() if isinstance(part, GradientSet)})
    else:
        total = grams if isinstance(grams, Tensor) else torch.stack([part.cpu() for part in grams.values()]).sum(0)
    if total.shape != (examples, examples):
        raise GeometryError(
            f"expected inner products of {examples} examples with each other, found {tuple(total.shape)}; give grams "
            "of all sets, one after the other, with the number of examples of each"
        )
    check_finite(total, "the inner products")
    if bool((total.diagonal() <= 0).any()):
        raise GeometryError("expected a gradient in every example, found one of length zero; check the loss masks")
    return np.asarray(total.detach().cpu().double().numpy())


def _products_of_sets(sets: Mapping[str, GradientSet]) -> Tensor:
    examples = sum(sample_counts(sets).values())
    total = torch.zeros(examples, examples, dtype=torch.float64)
    for gradients in pooled_gradients(sets).values() if examples else ():
        products = to_common_basis(gradients, "left").gram()
        total += (gram(gradients, gradients) if products is None else products).cpu()
    return total


def _pca(products: np.ndarray) -> tuple[np.ndarray, float]:
    """Return (N, 2) principal coordinates from inner products, and their share of the variance."""
    with random_state_kept():  # the first import of sklearn draws random numbers
        from sklearn.decomposition import KernelPCA

    pca = KernelPCA(n_components=2, kernel="precomputed", eigen_solver="dense")
    coordinates = pca.fit_transform(products)
    variance = products.trace() - products.mean() * len(products)
    return coordinates, float(pca.eigenvalues_.sum() / variance)


def _mds(products: np.ndarray, distances: np.ndarray) -> tuple[np.ndarray, float]:
    """Return (N, 2) coordinates whose distances fit the given distances best, and the normalised stress."""
    with random_state_kept():
        from sklearn.manifold import smacof

    start, _ = _pca(products)
    coordinates, stress = smacof(distances, n_components=2, init=start, n_init=1, normalized_stress=True)
    return coordinates, float(stress)


def _permuted(labels: np.ndarray, draws: int, generator: np.random.Generator) -> np.ndarray:
    """Return (draws, N) permuted labels: within each place if all sets have the same size, else among all examples."""
    repeated = np.tile(labels, (draws, 1))
    counts = np.bincount(labels)
    if len(set(counts.tolist())) > 1:
        return np.asarray(generator.permuted(repeated, axis=1))
    by_place = repeated.reshape(draws, len(counts), counts[0])
    return np.asarray(generator.permuted(by_place, axis=1).reshape(draws, -1))


def _index_in_set(labels: np.ndarray) -> np.ndarray:
    """Return (N,) index of each example within its set."""
    return np.concatenate([np.arange(count) for count in np.bincount(labels)])
