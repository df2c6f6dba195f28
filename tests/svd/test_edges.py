"""The closed forms of random matrix theory against drawn matrices and their source."""

import numpy as np
import pytest

from geomkit.errors import GeometryError
from geomkit.svd.edges import _median_of_marchenko_pastur, gavish_donoho_threshold, marchenko_pastur_edge


@pytest.mark.parametrize("shape", [(400, 400), (150, 600), (600, 150)])
def test_edge_is_the_largest_singular_value_of_noise(shape: tuple[int, int]) -> None:
    drawn = 0.3 * np.random.default_rng(0).normal(size=shape)
    assert np.linalg.norm(drawn, 2) == pytest.approx(marchenko_pastur_edge(shape, 0.3), rel=0.02)


@pytest.mark.parametrize("ratio", [0.05, 0.3, 0.77, 1.0])
def test_median_is_that_of_drawn_matrices(ratio: float) -> None:
    columns = 800
    rows = round(ratio * columns)
    drawn = np.random.default_rng(0).normal(size=(rows, columns)) / np.sqrt(columns)
    values = np.linalg.svd(drawn, compute_uv=False)
    assert np.median(values**2) == pytest.approx(_median_of_marchenko_pastur(rows / columns), rel=0.01)


@pytest.mark.parametrize("rows", [2, 10, 25, 50, 75, 100])
def test_coefficient_for_unknown_noise_is_near_the_published_cubic(rows: int) -> None:
    """Gavish and Donoho give ω(β) ≈ 0.56β³ − 0.95β² + 1.82β + 1.43, good to .02, and 4/√3 and 2.858 at β = 1."""
    cubic = np.polyval([0.56, -0.95, 1.82, 1.43], rows / 100)
    assert gavish_donoho_threshold(np.ones(rows), (rows, 100)) == pytest.approx(cubic, abs=0.02)
    assert gavish_donoho_threshold(np.ones(100), (100, 100)) == pytest.approx(2.858, abs=5e-4)
    assert gavish_donoho_threshold(np.ones(100), (100, 100), noise=0.1) == pytest.approx(4 / 3**0.5)


@pytest.mark.parametrize("shape", [(200, 300), (300, 200)])
def test_planted_spikes_are_found_with_and_without_knowing_the_noise(shape: tuple[int, int]) -> None:
    generator = np.random.default_rng(0)
    left, right = (np.linalg.qr(generator.normal(size=(size, 4))).Q for size in shape)
    noise = 0.5
    edge = marchenko_pastur_edge(shape, noise)
    matrix = left @ np.diag(edge * np.array([3.0, 2.5, 2.0, 1.5])) @ right.T + noise * generator.normal(size=shape)
    values = np.linalg.svd(matrix, compute_uv=False)
    known, unknown = gavish_donoho_threshold(values, shape, noise), gavish_donoho_threshold(values, shape)
    assert (values > known).sum() == (values > unknown).sum() == 4
    assert unknown == pytest.approx(known, rel=0.03)
    assert known > edge


def test_threshold_needs_all_values_or_the_noise() -> None:
    with pytest.raises(GeometryError, match="give noise="):
        gavish_donoho_threshold(np.ones(17), (64, 128))
    assert gavish_donoho_threshold(np.ones(17), (64, 128), noise=1.0) > 0
