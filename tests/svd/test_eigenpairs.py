"""Eigenvalues and eigenvectors of small and of large symmetric matrices, against numpy."""

import numpy as np
import pytest
import torch

from geomkit.svd.eigenpairs import eigenpairs, eigenvalues, largest_eigenpairs
from tests.helpers.gradients import gaussian

SIZES = (12, 170)  # the large one is decomposed by scipy on a CPU


def squares(size: int, *batch: int) -> torch.Tensor:
    """Positive definite matrices of a batch, no two alike."""
    factors = gaussian(int(np.prod(batch)) * size, size + 5).double().reshape(*batch, size, size + 5)
    return factors @ factors.mT


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("batch", [(), (1,), (2, 3)])
def test_eigenvalues_are_those_of_numpy(size: int, batch: tuple[int, ...]) -> None:
    matrices = squares(size, *batch)
    torch.testing.assert_close(eigenvalues(matrices), torch.from_numpy(np.linalg.eigvalsh(matrices.numpy())))


@pytest.mark.parametrize("size", SIZES)
def test_no_matrix_has_no_eigenvalues(size: int) -> None:
    assert eigenvalues(torch.zeros(0, size, size, dtype=torch.float64)).shape == (0, size)


@pytest.mark.parametrize("size", SIZES)
def test_eigenpairs_put_the_matrix_together_again(size: int) -> None:
    matrix = squares(size)
    values, vectors = eigenpairs(matrix)
    assert (values.diff() >= 0).all()
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(vectors * values @ vectors.T, matrix)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [3, 500])
def test_the_largest_eigenpairs_come_first(size: int, count: int) -> None:
    matrices = squares(size, 2)
    values, vectors = largest_eigenpairs(matrices, count)
    expected = np.linalg.eigvalsh(matrices.numpy())[:, ::-1][:, :count].copy()
    torch.testing.assert_close(values, torch.from_numpy(expected))
    torch.testing.assert_close(matrices @ vectors, vectors * values[:, None])
