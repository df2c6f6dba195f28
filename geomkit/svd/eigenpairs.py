"""Eigenvalues and eigenvectors of symmetric matrices, by what takes least time.

Small matrices, and all on a GPU, are decomposed by torch in one batch. Large ones on a CPU are decomposed by scipy: one
of 576 rows takes two thirds of torch's time, and on a CPU whose cores are busy with other work, where the threads of
torch's library wait for one another at every step, far less.
"""

import numpy as np
import torch
from torch import Tensor

_LARGE = 160
"""Size above which scipy decomposes a matrix on a CPU."""


def eigenvalues(matrices: Tensor) -> Tensor:
    """Return the eigenvalues of symmetric matrices (…, n, n): (…, n), ascending."""
    if not _is_for_scipy(matrices):
        values: Tensor = torch.linalg.eigvalsh(matrices)
        return values
    from scipy.linalg import eigh

    size = matrices.shape[-1]
    by_matrix = [
        eigh(matrix, eigvals_only=True, driver="evd", check_finite=False)
        for matrix in matrices.reshape(-1, size, size).numpy()
    ]
    return torch.from_numpy(np.stack(by_matrix)).reshape(matrices.shape[:-1])


def eigenpairs(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues (n,) of a symmetric matrix (n, n), ascending, and its eigenvectors as columns."""
    if not _is_for_scipy(matrix):
        values, vectors = torch.linalg.eigh(matrix)
        return values, vectors
    from scipy.linalg import eigh

    values, vectors = eigh(matrix.numpy(), driver="evd", check_finite=False)
    return torch.from_numpy(values), torch.from_numpy(vectors)


def largest_eigenpairs(matrices: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the largest eigenvalues of symmetric matrices, and their eigenvectors.

    Args:
        matrices: (B, n, n).
        count: k, number of eigenvalues.

    Returns:
        (B, k) eigenvalues, descending, and (B, n, k) eigenvectors as columns; of all n if n is below k.
    """
    size = matrices.shape[-1]
    if not _is_for_scipy(matrices):
        values, vectors = torch.linalg.eigh(matrices)
        return values.flip(-1)[..., :count], vectors.flip(-1)[..., :count]
    # scipy finds the largest eigenvalues of a large matrix without the others; torch cannot.
    from scipy.linalg import eigh

    leading = max(size - count, 0), size - 1
    pairs = (eigh(matrix, subset_by_index=leading, check_finite=False) for matrix in matrices.numpy())
    values, vectors = (torch.from_numpy(np.stack(parts)[..., ::-1].copy()) for parts in zip(*pairs, strict=True))
    return values, vectors


def _is_for_scipy(matrices: Tensor) -> bool:
    return matrices.shape[-1] > _LARGE and matrices.numel() > 0 and matrices.device.type == "cpu"
