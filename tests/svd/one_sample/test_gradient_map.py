"""Maps of single gradients: against scikit-learn on the explicit vectors."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from sklearn.metrics import silhouette_samples

from geomkit.errors import GeometryError
from geomkit.gradients.gradient_set import GradientSet, layer_grams
from geomkit.svd.one_sample.gradient_map import gradient_map, silhouettes_of
from tests.helpers.forms import dense
from tests.svd.one_sample.test_study import FULL, NAME, drawn, gradient_set


def flat(*sides: GradientSet) -> np.ndarray:
    samples = [sample for side in sides for sample in side.samples]
    return np.stack([np.concatenate([dense(g).ravel() for g in sample.values()]) for sample in samples])


@pytest.mark.parametrize("normalise", [True, False])
def test_the_map_is_that_of_principal_components(normalise: bool) -> None:
    sides = {"a": drawn(5, 0, shared=2), "b": drawn(7, 1)}
    result = gradient_map(sides, normalise=normalise)
    vectors = flat(*sides.values())
    if normalise:
        vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    reference = PCA(2).fit(vectors)
    expected = reference.transform(vectors)
    signs = np.sign((expected * result.coordinates).sum(0))
    assert result.coordinates * signs == pytest.approx(expected, abs=1e-5 * abs(expected).max())
    assert result.quality == pytest.approx(reference.explained_variance_ratio_.sum(), abs=1e-6)
    assert result.silhouettes == pytest.approx(silhouette_samples(vectors, result.labels), abs=1e-5)


def test_gram_matrices_give_the_same_map() -> None:
    sides = {"a": drawn(4, 0, shared=2), "b": drawn(4, 1)}
    both = gradient_set([dict(sample) for side in sides.values() for sample in side.samples])
    grams = layer_grams(both, both)
    expected = gradient_map(sides)
    for given_grams in (grams, torch.stack(list(grams.values())).sum(0)):
        result = gradient_map({"a": 4, "b": 4}, given_grams)
        assert result.coordinates == pytest.approx(expected.coordinates, abs=1e-6)
        assert result.p_value == expected.p_value


def test_scaling_keeps_the_distances_of_points_in_a_plane() -> None:
    vectors = np.random.default_rng(0).normal(size=(12, 2))
    result = gradient_map({"a": 6, "b": 6}, torch.from_numpy(vectors @ vectors.T), method="mds", normalise=False)
    distances, on_map = (np.linalg.norm(points[:, None] - points, axis=-1) for points in (vectors, result.coordinates))
    assert on_map == pytest.approx(distances, abs=0.02)
    assert result.quality < 0.01
    assert "stress" in str(result)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.lists(st.integers(2, 5), min_size=2, max_size=4))
def test_silhouettes_are_those_of_scikit_learn(seed: int, counts: list[int]) -> None:
    generator = np.random.default_rng(seed)
    points = generator.normal(size=(sum(counts), 3))
    distances = np.linalg.norm(points[:, None] - points, axis=-1)
    labels = np.stack([generator.permutation(np.repeat(np.arange(len(counts)), counts)) for _ in range(3)])
    expected = [silhouette_samples(distances, row, metric="precomputed") for row in labels]
    assert silhouettes_of(distances, labels) == pytest.approx(np.array(expected), abs=1e-12)


@pytest.mark.parametrize("counts", [(8, 8), (10, 6)])
def test_sets_that_do_not_differ_are_told_apart_once_in_twenty(counts: tuple[int, int]) -> None:
    generator = np.random.default_rng(1)
    p_values = []
    for seed in range(600):
        vectors = generator.normal(size=(sum(counts), 20))
        if counts[0] == counts[1]:  # rows that belong together
            vectors += np.tile(generator.normal(size=(counts[0], 20)), (2, 1))
        grams = torch.from_numpy(vectors @ vectors.T)
        p_values.append(gradient_map({"a": counts[0], "b": counts[1]}, grams, draws=59, seed=seed).p_value)
    assert np.mean(np.array(p_values) <= 0.05) == pytest.approx(0.05, abs=0.02)


def test_sets_that_lie_apart_are_found_and_all_labellings_count() -> None:
    result = gradient_map({"a": drawn(20, 0, shared=3, strength=6.0), "b": drawn(20, 1)}, draws=199)
    assert result.p_value == 1 / 200  # of 2²⁰ labellings only two are as good
    assert result.separation > 0.1
    assert f"silhouette {result.separation:+.3f}" in str(result)
    frame = result.to_frame()
    assert frame.groupby("set").size().to_dict() == {"a": 20, "b": 20}
    assert list(frame["example"][20:]) == list(range(20))
    assert "40 gradients" in result._repr_html_()


def test_what_cannot_be_drawn_is_refused() -> None:
    side = drawn(4, 0)
    with pytest.raises(GeometryError, match="pca or mds, found 'tsne'"):
        gradient_map({"a": side, "b": side}, method="tsne")
    with pytest.raises(GeometryError, match="two sets or more"):
        gradient_map({"a": side})
    with pytest.raises(GeometryError, match=r"in the b set, found 0; .*per_sample=True"):
        gradient_map({"a": side, "b": GradientSet(side.layers, 1.0, 4, 16, FULL)})
    with pytest.raises(GeometryError, match=r"of 4 examples with each other, found \(3, 3\)"):
        gradient_map({"a": 2, "b": 2}, torch.eye(3))
    with pytest.raises(GeometryError, match=r"of 4 examples with each other, found \(0, 0\)"):
        gradient_map({"a": 2, "b": 2})
    empty = gradient_set([{NAME: sample[NAME].scaled(0.0)} for sample in side.samples])
    with pytest.raises(GeometryError, match="length zero"):
        gradient_map({"a": empty, "b": empty})


def test_what_is_out_of_range_or_not_finite_is_refused() -> None:
    side = drawn(4, 0)
    with pytest.raises(GeometryError, match="at least 0, found draws=-1"):
        gradient_map({"a": side, "b": side}, draws=-1)
    with pytest.raises(GeometryError, match="expected sets by name, found a list"):
        gradient_map([side, side])
    with pytest.raises(GeometryError, match="not finite in the inner products"):
        gradient_map({"a": 2, "b": 2}, torch.full((4, 4), float("nan")))
