"""Every token's part in the singular values of a gradient, against dense SVDs."""

import numpy as np
import pytest
import torch

from geomkit.errors import GeometryError
from geomkit.gradients.factored import FactoredGradient
from geomkit.svd.singular_values import rank_tolerance
from geomkit.svd.token_decomposition import token_decomposition
from tests.helpers.gradients import exact, factored, gaussian

_REPEATED = FactoredGradient(gaussian(6, 30).repeat(2, 1), gaussian(12, 20))
GRADIENTS = {
    "few tokens": factored(7, 40, 30),
    "tall": factored(90, 40, 16),
    "wide": factored(90, 16, 40),
    "between": factored(20, 40, 16),
    "tokens that repeat one another": _REPEATED,
    "tokens that nearly cancel": FactoredGradient(
        torch.cat([gaussian(5, 30), gaussian(5, 30) + 1e-5]), torch.cat([gaussian(5, 20), -gaussian(5, 20)])
    ),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_values_parts_and_vectors_are_those_of_the_matrix(name: str) -> None:
    gradient = GRADIENTS[name]
    result = token_decomposition(gradient)
    u, values, v = np.linalg.svd(exact(gradient), full_matrices=False)
    bound = gradient.rank_bound
    np.testing.assert_allclose(result.values[:bound], values[:bound], atol=2e-6 * values[0])
    rank = int((values > rank_tolerance(values, gradient.shape)).sum())
    left, right = gradient.left.double().numpy(), gradient.right.double().numpy()
    expected = (left @ u[:, :rank]) * (right @ v[:rank].T)
    size = np.linalg.norm(left, axis=1).max() * np.linalg.norm(right, axis=1).max()
    # Signs of the vectors cancel in a part; parts of the smallest values are as uncertain as their vectors.
    steady = values[:rank] > 1e-2 * values[0]
    np.testing.assert_allclose(result.parts[:, :rank].numpy()[:, steady], expected[:, steady], atol=1e-4 * size)
    k = min(3, int(steady.sum()))
    assert float((result.left(k).T @ torch.from_numpy(u[:, :k])).square().sum()) == pytest.approx(k, abs=1e-5)


def test_parts_of_groups_add_up_to_the_singular_values() -> None:
    gradient = GRADIENTS["few tokens"]
    result = token_decomposition(gradient)
    parts = result.parts_of_groups([3, 1, 0, 3], [[0, 3], [1], [2]])
    torch.testing.assert_close(parts.sum(0), result.values)
    torch.testing.assert_close(parts[1], result.parts[3])
    assert not parts[2].any()


def test_what_is_not_finite_is_refused() -> None:
    for tokens in (5, 50):
        gradient = factored(tokens, 12, 9)
        with pytest.raises(GeometryError, match="not finite"):
            token_decomposition(FactoredGradient(gradient.left * float("nan"), gradient.right))
