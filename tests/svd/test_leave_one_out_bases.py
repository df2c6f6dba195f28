"""Leading subspaces of gradients and of their sums without one of them, against dense SVDs."""

import numpy as np
import pytest
import torch

from geomkit.gradients.arithmetic import zero_gradient
from geomkit.gradients.factored import FactoredGradient
from geomkit.gradients.layer_gradient import LayerGradient
from geomkit.svd.leave_one_out_bases import example_bases, leave_one_out_bases
from tests.helpers.forms import dense, seeded
from tests.helpers.forms import drawn as some_gradient
from tests.svd.one_sample.test_study import leading


def check(parts: list[LayerGradient], rank: int, side: str, tolerance: float) -> None:
    """Every overlap between single gradients and sums without one, against those of dense SVDs."""
    matrices = [dense(part) for part in parts]
    single, others = example_bases(parts, side, rank), leave_one_out_bases(parts, side, rank)
    expected_single = [leading(matrix, rank, side) for matrix in matrices]
    expected_others = [leading(sum(matrices) - matrix, rank, side) for matrix in [*matrices, 0 * matrices[0]]]
    for bases, expected in ((single, expected_single), (others, expected_others)):
        assert [basis.shape[1] for basis in bases] == [basis.shape[1] for basis in expected]
    for a, exact_a in zip([*single, *others], [*expected_single, *expected_others], strict=True):
        for b, exact_b in zip(others, expected_others, strict=True):
            overlap = float((a.T @ b).square().sum()) / rank
            assert overlap == pytest.approx(((exact_a.T @ exact_b) ** 2).sum() / rank, abs=tolerance)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("form", ["factored", "tied", "indexed", "dense", "sum"])
@pytest.mark.parametrize("shape", [(60, 40), (12, 40), (60, 9)])
def test_small_gradients_of_every_form_are_decomposed_exactly(form: str, side: str, shape: tuple[int, int]) -> None:
    generator = seeded()
    parts = [some_gradient(form, shape, generator) for _ in range(3)] + [zero_gradient(shape)]
    check(parts, 2, side, 1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", [(200, 90), (90, 200), (100, 100)])
def test_large_sums_are_iterated_to_their_leading_vectors(shape: tuple[int, int], side: str) -> None:
    """Examples of 20 tokens that share five directions, in a spectrum that falls as a gradient's does."""
    rows, columns = shape
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(5, rows, generator=generator)
    fall = torch.arange(1.0, columns + 1) ** -0.7
    parts = [
        FactoredGradient(
            torch.randn(20, 5, generator=generator) @ shared + torch.randn(20, rows, generator=generator),
            torch.randn(20, columns, generator=generator) * fall,
        )
        for _ in range(12)
    ]
    check(parts, 4, side, 2e-3)


def test_a_tied_head_has_the_overlaps_of_its_dense_matrices() -> None:
    """Its overlaps are those of the dense matrices; a flat spectrum as here is the worst case of the iteration."""
    generator = seeded(2)
    parts = [some_gradient("tied", (400, 80), generator) for _ in range(24)]
    check(parts, 3, "left", 2e-2)


def test_tokens_that_repeat_one_another_and_sums_that_cancel() -> None:
    repeated = FactoredGradient(torch.randn(4, 30, generator=seeded()), torch.ones(4, 20))
    check([repeated, repeated.scaled(2.0), repeated], 1, "left", 1e-5)
    without = leave_one_out_bases([repeated, repeated.scaled(-1.0), repeated], "left", 2)
    assert [basis.shape[1] for basis in without] == [0, 1, 0, 1]
    assert np.isfinite(example_bases([repeated], "left", 2)[0].numpy()).all()
