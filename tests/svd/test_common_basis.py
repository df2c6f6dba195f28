"""Leading subspaces of gradients and of their sums in a common basis, against dense SVDs."""

import numpy as np
import pytest
import torch

from geomkit.gradients.arithmetic import zero_gradient
from geomkit.gradients.factored import FactoredGradient
from geomkit.gradients.layer_gradient import LayerGradient
from geomkit.svd.common_basis import overlaps_between, to_common_basis
from geomkit.svd.one_sample.study import one_sample_study
from tests.helpers.forms import dense, seeded
from tests.helpers.forms import drawn as some_gradient
from tests.svd.one_sample.test_study import COLUMNS, NAME, ROWS, drawn, leading


def check_partial_sums(parts: list[LayerGradient], rank: int, side: str) -> None:
    """Every overlap between single gradients and sums without one, against those of dense SVDs."""
    matrices = [dense(part) for part in parts]
    common = to_common_basis(parts, side)
    single, others = common.bases_of_gradients(rank), common.leave_one_out_bases(len(parts), rank)
    expected_single = [leading(matrix, rank, side) for matrix in matrices]
    expected_others = [leading(sum(matrices) - matrix, rank, side) for matrix in [*matrices, 0 * matrices[0]]]
    assert [basis.shape[1] for basis in single] == [basis.shape[1] for basis in expected_single]
    assert [basis.shape[1] for basis in others] == [basis.shape[1] for basis in expected_others]
    for a, exact_a in zip([*single, *others], [*expected_single, *expected_others], strict=True):
        for b, exact_b in zip(others, expected_others, strict=True):
            assert float((a.T @ b).square().sum()) == pytest.approx(((exact_a.T @ exact_b) ** 2).sum(), abs=1e-5)
    assert common.basis_of_sum([1, 2], rank).shape[1] == leading(matrices[1] + matrices[2], rank, side).shape[1]
    products = common.gram()
    assert products is not None
    flat = np.stack(matrices).reshape(len(parts), -1)
    assert products.numpy() == pytest.approx(flat @ flat.T, abs=1e-3, rel=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("count", [3, 6])
def test_partial_sums_have_the_subspaces_of_each_sum(count: int, side: str) -> None:
    """Three examples have fewer tokens than the matrix has rows and columns, six have more."""
    check_partial_sums([sample[NAME] for sample in drawn(count, 3, shared=2).samples], 5, side)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("form", ["factored", "tied", "indexed", "dense", "sum"])
@pytest.mark.parametrize("shape", [(60, 40), (12, 40), (60, 9)])
def test_partial_sums_of_every_form_and_of_examples_without_a_share(
    form: str, side: str, shape: tuple[int, int]
) -> None:
    generator = seeded()
    parts = [some_gradient(form, shape, generator) for _ in range(3)] + [zero_gradient(shape)]
    check_partial_sums(parts, 2, side)


def test_rows_that_nobody_looked_up_are_left_away() -> None:
    generator = seeded(3)
    parts = [some_gradient("indexed", (900, 40), generator) for _ in range(4)]
    check_partial_sums(parts, 3, "left")
    assert to_common_basis(parts, "left").left[0].shape[1] <= 24


def test_large_matrices_are_decomposed_for_their_leading_vectors_only() -> None:
    parts = [some_gradient("dense", (200, 180), seeded(seed)) for seed in range(3)]
    check_partial_sums(parts, 4, "left")


def test_without_room_to_keep_the_gradients_the_result_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [sample[NAME] for sample in drawn(6, 3, shared=2).samples]
    bases = to_common_basis(parts, "left").leave_one_out_bases(6, 3)
    monkeypatch.setattr("geomkit.svd.common_basis._FORMED", 0)
    common = to_common_basis(parts, "left")
    assert common.gram() is None
    for a, b in zip(bases, common.leave_one_out_bases(6, 3), strict=True):
        assert float(overlaps_between([a], [b], 3)) == pytest.approx(1, abs=1e-9)
    study = one_sample_study(drawn(4, 0), drawn(4, 1), rank=3)
    monkeypatch.undo()
    again = one_sample_study(drawn(4, 0), drawn(4, 1), rank=3)
    assert study.overlaps == pytest.approx(again.overlaps, abs=1e-9)
    assert study.groups["control"].cosines == pytest.approx(again.groups["control"].cosines, abs=1e-7)


def test_no_direction_beyond_the_rank_of_the_others() -> None:
    parts = [FactoredGradient(torch.eye(1, ROWS), torch.eye(1, COLUMNS))] * 3
    assert [basis.shape[1] for basis in to_common_basis(parts, "left").leave_one_out_bases(3, 5)] == [1] * 4


@pytest.mark.parametrize("count", [2, 12])
def test_sums_in_one_go_are_the_sums_one_by_one(count: int) -> None:
    parts = [sample[NAME] for sample in drawn(count, 3, shared=2).samples]
    common = to_common_basis(parts, "left")
    generator = np.random.default_rng(0)
    sums = [generator.choice(count, size=1 + place % count, replace=False).tolist() for place in range(12)]
    for places, basis in zip(sums, common.bases_of_sums(sums, 3), strict=True):
        (alone,) = common.bases_of_sums([places], 3)
        assert float((alone.T @ basis).square().sum()) == pytest.approx(3, abs=1e-9)
