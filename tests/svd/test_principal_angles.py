import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import subspace_angles

from geomkit.errors import GeometryError
from geomkit.gradients.factored import FactoredGradient
from geomkit.svd.nulls import haar_overlap, random_edge
from geomkit.svd.principal_angles import basis_angles, principal_angles
from geomkit.svd.subspaces import LayerSubspace, Subspace, subspace

SEEDS = st.integers(0, 2**31)


def gaussian(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def frame(size: int, rank: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(gaussian(size, rank, seed=seed)).Q


def named(basis: torch.Tensor, name: str = "w") -> Subspace:
    rank = basis.shape[1]
    return Subspace("left", {name: LayerSubspace(basis, np.ones(rank), 1.0, rank, name)})


def planted(angles: list[float], size: int = 40, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Two bases at known principal angles, hidden by a rotation of the space and of each basis."""
    k = len(angles)
    turned = frame(size, size, seed)
    theta = torch.tensor(angles, dtype=torch.float64)
    a, b = turned[:, :k], turned[:, :k] * theta.cos() + turned[:, k : 2 * k] * theta.sin()
    return a @ frame(k, k, seed + 1), b @ frame(k, k, seed + 2)


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, rank_a=st.integers(1, 8), rank_b=st.integers(1, 8))
def test_angles_are_those_of_scipy_and_do_not_depend_on_basis_order_or_rotation(
    seed: int, rank_a: int, rank_b: int
) -> None:
    a, b = frame(12, rank_a, seed), frame(12, rank_b, seed + 1)
    result = basis_angles(a, b)
    assert result == pytest.approx(subspace_angles(a.numpy(), b.numpy()), abs=1e-6)
    assert (np.diff(result) <= 1e-12).all()
    assert basis_angles(b, a) == pytest.approx(result, abs=1e-7)
    turned = frame(12, 12, seed + 2)
    assert basis_angles(turned @ a, turned @ b @ frame(rank_b, rank_b, seed + 3)) == pytest.approx(result, abs=1e-7)
    overlap = principal_angles(named(a), named(b)).mean_overlap
    assert overlap == pytest.approx(float((a.T @ b).square().sum()) / min(rank_a, rank_b), abs=1e-12)


def test_tiny_and_large_angles_are_exact_together() -> None:
    angles = [math.pi / 2, 1.2, 0.3, 1e-4, 1e-6, 1e-8]
    assert basis_angles(*planted(angles)) == pytest.approx(angles, abs=1e-14)


def test_a_tiny_angle_survives_fp32_bases_that_can_represent_it() -> None:
    a, b = torch.eye(5)[:, :1], torch.tensor([[1.0], [1e-8], [0.0], [0.0], [0.0]])
    assert basis_angles(a, b) == pytest.approx([1e-8], rel=1e-6)


def test_bases_from_gradients_are_accurate_to_fp32() -> None:
    left = gaussian(8, 60).float()
    a, b = (FactoredGradient(left, gaussian(8, 50, seed=seed).float()) for seed in (1, 2))
    same = principal_angles(subspace({"w": a}, rank=8), subspace({"w": b}, rank=8)).layers["w"]
    assert same.angles.max() < 1e-6
    assert same.overlap == pytest.approx(1.0)


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS)
def test_angles_of_fp32_bases_are_those_of_scipy(seed: int) -> None:
    a, b = frame(40, 6, seed).float(), frame(40, 9, seed + 1).float()
    assert basis_angles(a, b) == pytest.approx(subspace_angles(a.double().numpy(), b.double().numpy()), abs=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(1e-5, math.pi / 2), min_size=1, max_size=6), SEEDS)
def test_planted_angles_are_recovered_from_fp32_bases(angles: list[float], seed: int) -> None:
    a, b = planted(sorted(angles, reverse=True), seed=seed)
    assert basis_angles(a.float(), b.float()) == pytest.approx(sorted(angles, reverse=True), abs=2e-6)


def test_a_control_is_measured_at_the_rank_of_what_it_controls() -> None:
    a, b, control = named(frame(30, 4, 0)), named(frame(30, 6, 1)), named(frame(30, 5, 2))
    result = principal_angles(a, b, control)
    cut = control.layers["w"].basis[:, :4]
    assert result.mean_control == pytest.approx(float((cut.T @ b.layers["w"].basis).square().sum()) / 4, abs=1e-12)
    assert result.mean_overlap == principal_angles(a, b).mean_overlap
    table = result.to_frame().set_index("statistic")
    assert table.control["overlap"] == result.mean_control
    assert np.isnan(table.control["largest_angle"])
    assert f"control {result.mean_control:.3g}" in str(result)


def test_without_a_control_or_with_one_of_lower_rank_there_is_none() -> None:
    a, b = named(frame(30, 4, 0)), named(frame(30, 6, 1))
    for result in (principal_angles(a, b), principal_angles(a, b, named(frame(30, 3, 2)))):
        assert np.isnan(result.mean_control)
        assert result.to_frame()["control"].isna().all()
        assert "control" not in str(result)
    with pytest.raises(GeometryError, match="dimensions 30 and 31"):
        principal_angles(a, b, named(frame(31, 4, 0)))


def test_overlap_and_edge_of_random_subspaces_are_as_expected() -> None:
    size, rank_a, rank_b = 256, 16, 8
    drawn = [
        principal_angles(named(frame(size, rank_a, seed)), named(frame(size, rank_b, seed + 1000))).layers["w"]
        for seed in range(40)
    ]
    assert np.mean([result.overlap for result in drawn]) == pytest.approx(haar_overlap(rank_a, rank_b, size), rel=0.05)
    assert np.mean([result.largest_cosine for result in drawn]) == pytest.approx(
        random_edge(rank_a, rank_b, size), rel=0.1
    )
    assert drawn[0].random_edge == random_edge(16, 8, 256)


def test_published_edges() -> None:
    assert random_edge(20, 20, 4096) == pytest.approx(0.139, abs=5e-4)
    assert random_edge(20, 20, 512) == pytest.approx(0.387, abs=5e-4)
    assert random_edge(20, 12, 32) == 1.0


def test_frame_has_each_statistic_beside_its_null() -> None:
    result = principal_angles(named(frame(30, 4, 0)), named(frame(30, 6, 1)))
    table = result.to_frame().set_index("statistic")
    assert table.value["overlap"] == result.mean_overlap
    assert table.null["overlap"] == result.mean_expected_overlap == pytest.approx(6 / 30)
    assert table.null["largest_cosine"] == result.layers["w"].random_edge
    assert table.value["largest_angle"] == pytest.approx(np.degrees(result.layers["w"].angles[0]))
    assert "mean overlap" in result._repr_html_()


def test_an_empty_subspace_has_no_angles() -> None:
    result = principal_angles(named(frame(30, 4, 0)), named(torch.zeros(30, 0)))
    assert len(result.layers["w"].angles) == 0
    assert math.isnan(result.mean_overlap)
    assert result.to_frame()["value"].isna().all()


def test_subspaces_that_cannot_be_compared_are_refused() -> None:
    a = named(frame(30, 4, 0))
    with pytest.raises(GeometryError, match="left and right"):
        principal_angles(a, Subspace("right", a.layers))
    with pytest.raises(GeometryError, match=r"found those of both; compare a.on\('left'\)"):
        principal_angles(Subspace("both", a.layers), Subspace("both", a.layers))
    with pytest.raises(GeometryError, match="same parameters"):
        principal_angles(a, named(frame(30, 4, 0), "v"))
    with pytest.raises(GeometryError, match="dimensions 30 and 31"):
        principal_angles(a, named(frame(31, 4, 0)))
