"""A map of single gradients in the plane, and whether the sets lie apart on more than the map.

The map is only a picture: it shows two dimensions of many. The separation number beside it is made from the distances
themselves, with its permutation test.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from geomkit.errors import GeometryError
from geomkit.gradients.arithmetic import gram
from geomkit.gradients.checks import check_enough, check_sets
from geomkit.gradients.gradient_set import GradientSet, shared_layers
from geomkit.svd.common_basis import to_common_basis
from geomkit.utils.arguments import check_draws, check_finite
from geomkit.utils.display import html_table
from geomkit.utils.figures import draw

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

Method = Literal["pca", "mds"]
_FEWEST = 2
_AT_ONCE = 2**24  # numbers of permuted sums held at a time


@dataclass(frozen=True, eq=False)
class GradientMap:
    """Single gradients in the plane.

    Attributes:
        method: ``"pca"``: the two directions of largest variance; ``"mds"``: the plane that keeps distances best.
        normalised: Whether gradients were scaled to one length, so that the distances are those of directions.
        names: Of the sets.
        labels: (N,) which set an example is of, as an index into ``names``.
        coordinates: (N, 2).
        quality: For PCA the share of the variance on the map; for MDS the normalised stress (Kruskal 1964), 0 if the
            distances on the map are the true ones, above .2 poor.
        silhouettes: (N,) of the examples (Rousseeuw 1987): 1 if all others of the set are far nearer than the nearest
            other set, 0 between two sets, negative on another's side.
        p_value: Of a mean silhouette as high as this if the labels meant nothing.
    """

    method: Method
    normalised: bool
    names: tuple[str, ...]
    labels: np.ndarray = field(repr=False)
    coordinates: np.ndarray = field(repr=False)
    quality: float
    silhouettes: np.ndarray = field(repr=False)
    p_value: float

    @property
    def separation(self) -> float:
        """The mean silhouette over examples."""
        return float(self.silhouettes.mean())

    def to_frame(self) -> "pd.DataFrame":
        """Return a row per example: ``set``, ``example``, ``x``, ``y`` and ``silhouette``."""
        import pandas as pd

        return pd.DataFrame(
            {
                "set": [self.names[label] for label in self.labels],
                "example": _numbers(self.labels),
                "x": self.coordinates[:, 0],
                "y": self.coordinates[:, 1],
                "silhouette": self.silhouettes,
            }
        )

    def plot(self) -> "go.Figure":
        """Draw it, see :func:`geomkit.plots.one_sample.plot_gradient_map`."""
        return draw("plot_gradient_map", self)

    def __str__(self) -> str:
        """Say how far apart the sets lie, and how much of it the map can show."""
        shown = f"{self.quality:.0%} of the variance" if self.method == "pca" else f"stress {self.quality:.3f}"
        return (
            f"map of {len(self.labels)} gradients of {len(self.names)} sets by {self.method.upper()}, {shown}; "
            f"mean silhouette {self.separation:+.3f}, p = {self.p_value:.2g}"
        )

    def _repr_html_(self) -> str:
        return html_table(str(self), self.to_frame())


def gradient_map(
    sets: Mapping[str, GradientSet] | Mapping[str, int],
    grams: Tensor | Mapping[str, Tensor] | None = None,
    *,
    method: Method = "pca",
    normalise: bool = True,
    draws: int = 999,
    seed: int = 0,
) -> GradientMap:
    """Draw the gradients of single examples in the plane, from their inner products over all parameters.

    The p-value is that of a permutation of the labels, within each place where all sets have one size (whose rows may
    belong together; for independent rows it is right as well), (1 + #{permuted ≥ observed}) / (1 + draws).

    Args:
        sets: Two sets or more by name, of at least two examples each, collected with ``per_sample=True``; or the number
            of examples of each, with ``grams``.
        grams: (N, N) inner products of all examples, set after set, or such matrices by parameter, which are summed:
            :func:`geomkit.collection.sample_grams.sample_grams` makes them for large sets.
        method: ``"pca"`` (kernel PCA of the inner products) or ``"mds"`` (metric scaling of the distances).
        normalise: Scale all gradients to one length; otherwise long ones dominate the map.
        draws: Permutations of the labels.
        seed: Seed of the permutations.

    Returns:
        The map with its quality and the separation of the sets.

    Raises:
        GeometryError: If there are fewer than two sets, one has fewer than two per-sample gradients, the inner products
            are not of these examples or not finite, an example has no gradient, there is no such method, or ``draws``
            is negative.

    Example:
        >>> import torch
        >>> gradients = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
        >>> found = gradient_map({"safety": 2, "utility": 2}, gradients @ gradients.T)
        >>> round(found.quality, 3), round(found.separation, 2)
        (1.0, 0.93)
    """
    if method not in get_args(Method):
        raise GeometryError(f"expected the method {' or '.join(get_args(Method))}, found {method!r}")
    check_draws(draws, 0)
    counts = _counts(sets)
    if len(counts) < 2:
        raise GeometryError(
            f"expected two sets or more to tell apart, found {len(counts)}; give e.g. a control as well"
        )
    check_enough(counts, _FEWEST)
    products = _products(sets, grams, sum(counts.values()))
    if normalise:
        lengths = np.sqrt(products.diagonal())
        products = products / np.outer(lengths, lengths)
    squared = products.diagonal()
    distances = np.sqrt(np.maximum(squared[:, None] + squared - 2 * products, 0))
    np.fill_diagonal(distances, 0.0)
    labels = np.repeat(np.arange(len(counts)), list(counts.values()))
    coordinates, quality = _pca(products) if method == "pca" else _mds(products, distances)
    permuted = _permuted(labels, draws, np.random.default_rng(seed))
    step = max(1, _AT_ONCE // (len(labels) * len(counts)))
    silhouettes = silhouettes_of(distances, labels[None])[0]
    others = [silhouettes_of(distances, permuted[at : at + step]).mean(1) for at in range(0, draws, step)]
    as_high = sum(int((found >= silhouettes.mean() - 1e-12).sum()) for found in others)
    return GradientMap(
        method, normalise, tuple(counts), labels, coordinates, quality, silhouettes, (1 + as_high) / (1 + draws)
    )


def silhouettes_of(distances: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the silhouette (b − a) / max(a, b) of every example for several labellings at once.

    With a the mean distance to the others of its set and b that to the nearest other set; 0 where both are zero.

    Args:
        distances: (N, N) between examples.
        labels: (D, N) which set an example is of, from 0 on; every set has two examples or more.

    Returns:
        (D, N) silhouettes.
    """
    member = labels[..., None] == np.arange(labels.max() + 1)
    counts = member.sum(1, keepdims=True)
    sums = np.einsum("ij,djs->dis", distances, member.astype(np.float64), optimize=True)
    own = np.where(member, sums, 0).sum(2) / (np.where(member, counts, 0).sum(2) - 1)
    other = np.where(member, np.inf, sums / counts).min(2)
    largest = np.maximum(own, other)
    return np.asarray(np.divide(other - own, largest, out=np.zeros_like(own), where=largest > 0))


def _counts(sets: Mapping[str, GradientSet] | Mapping[str, int]) -> dict[str, int]:
    """Return the number of examples of each set."""
    if not isinstance(sets, Mapping) or not all(isinstance(found, int) for found in sets.values()):
        check_sets(sets)
    return {name: found if isinstance(found, int) else len(found.samples) for name, found in sets.items()}


def _products(
    sets: Mapping[str, GradientSet] | Mapping[str, int], grams: Tensor | Mapping[str, Tensor] | None, examples: int
) -> np.ndarray:
    if grams is None:
        total = _products_of_sets([found for found in sets.values() if isinstance(found, GradientSet)])
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


def _products_of_sets(sets: list[GradientSet]) -> Tensor:
    samples = [sample for found in sets for sample in found.samples]
    total = torch.zeros(len(samples), len(samples), dtype=torch.float64)
    for name in shared_layers(*samples) if samples else ():
        gradients = [sample[name] for sample in samples]
        products = to_common_basis(gradients, "left").gram()
        total += (gram(gradients, gradients) if products is None else products).cpu()
    return total


def _pca(products: np.ndarray) -> tuple[np.ndarray, float]:
    from sklearn.decomposition import KernelPCA

    found = KernelPCA(n_components=2, kernel="precomputed", eigen_solver="dense")
    coordinates = found.fit_transform(products)
    variance = products.trace() - products.mean() * len(products)
    return coordinates, float(found.eigenvalues_.sum() / variance)


def _mds(products: np.ndarray, distances: np.ndarray) -> tuple[np.ndarray, float]:
    from sklearn.manifold import smacof

    start, _ = _pca(products)
    coordinates, stress = smacof(distances, n_components=2, init=start, n_init=1, normalized_stress=True)
    return coordinates, float(stress)


def _permuted(labels: np.ndarray, draws: int, generator: np.random.Generator) -> np.ndarray:
    """Return (draws, N) labels dealt anew: within each place where all sets have one size, else among all."""
    repeated = np.tile(labels, (draws, 1))
    counts = np.bincount(labels)
    if len(set(counts.tolist())) > 1:
        return np.asarray(generator.permuted(repeated, axis=1))
    by_place = repeated.reshape(draws, len(counts), counts[0])
    return np.asarray(generator.permuted(by_place, axis=1).reshape(draws, -1))


def _numbers(labels: np.ndarray) -> np.ndarray:
    """Return each example's number within its set."""
    return np.concatenate([np.arange(count) for count in np.bincount(labels)])
