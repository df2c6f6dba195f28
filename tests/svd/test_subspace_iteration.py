"""Leading vectors by subspace iteration, against numpy's decomposition."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import subspace_angles

import geomkit as gk
from geomkit.gradients.dense import DenseGradient
from geomkit.gradients.factored import FactoredGradient
from geomkit.svd.subspace_iteration import leading_vectors
from tests.helpers.forms import FORMS, dense, drawn, seeded

SHORTFALL = 2e-3


def with_values(values, shape, generator):
    """Return a matrix with these singular values and random singular vectors."""
    left, right = (np.linalg.qr(generator.normal(size=(size, len(values))))[0] for size in shape)
    return (left * values) @ right.T


def missed(matrix, left):
    """Return the share of the k leading squared singular values that a basis misses, in fp64."""
    best = (np.linalg.svd(matrix, compute_uv=False)[: left.shape[1]] ** 2).sum()
    return 1 - np.square(left.double().numpy().T @ matrix).sum() / best


@pytest.mark.parametrize("form", [form for form in FORMS if form != "zero"])
@pytest.mark.parametrize("shape", [(9, 6), (40, 30), (30, 50)])
def test_vectors_of_every_form_are_those_of_the_matrix(form, shape):
    """Up to nine directions are all of a small gradient: the vectors are exact."""
    gradient = drawn(form, shape, seeded(5))
    matrix = dense(gradient)
    left, values, right = np.linalg.svd(matrix)
    rank = min(2, np.linalg.matrix_rank(matrix, tol=1e-4))
    vectors = leading_vectors(gradient, rank, seeded())
    if values[rank : rank + 1].sum() < 0.8 * values[rank - 1]:  # a gap, without which the vectors are not determined
        assert subspace_angles(vectors.left.numpy(), left[:, :rank]).max() < 0.1
        assert subspace_angles(vectors.right.numpy(), right[:rank].T).max() < 0.1
    assert missed(matrix, vectors.left) < 1e-2
    inside = np.square(vectors.left.double().numpy().T @ matrix).sum() / np.square(matrix).sum()
    assert vectors.energy == pytest.approx(inside, rel=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    decay=st.floats(0, 2),
    rank=st.integers(1, 12),
    shape=st.tuples(st.integers(20, 150), st.integers(20, 150)),
    seed=st.integers(0, 2**31),
)
def test_the_estimated_shortfall_is_that_of_numpy(decay, rank, shape, seed):
    """For σ_i = i^−decay the energy is never above the exact one; where σ decays, it misses no more than twice as said.

    Where σ hardly decays, any subspace is about as good as the exact one.
    """
    generator = np.random.default_rng(seed)
    matrix = with_values(np.arange(1, min(shape) + 1) ** -decay, shape, generator).astype(np.float32)
    vectors = leading_vectors(DenseGradient(torch.from_numpy(matrix), tokens=10**6), rank, seeded(seed))
    shortfall = missed(matrix.astype(np.float64), vectors.left)
    assert -1e-5 < shortfall <= (2 * vectors.shortfall + 1e-5 if decay >= 0.1 else 0.05)
    if decay >= 0.5:
        assert vectors.shortfall <= SHORTFALL
    identity = vectors.left.T @ vectors.left
    assert torch.allclose(identity, torch.eye(len(identity)), atol=5e-6)


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_gradient_of_lower_rank_has_fewer_vectors(tokens):
    gradient = FactoredGradient(
        torch.randn(tokens, 40, generator=seeded()), torch.randn(tokens, 30, generator=seeded(1))
    )
    vectors = leading_vectors(gradient, 10, seeded())
    assert vectors.left.shape == (40, tokens)
    assert vectors.right.shape == (30, tokens)
    assert vectors.energy == pytest.approx(1, abs=1e-6)
    assert vectors.shortfall <= 1e-6


@pytest.mark.parametrize("scale", [1e-15, 1e12])
def test_the_size_of_a_gradient_does_not_matter(scale):
    matrix = with_values(np.arange(1, 31) ** -0.7, (40, 30), np.random.default_rng(0)).astype(np.float32)
    plain, scaled = (
        leading_vectors(DenseGradient(torch.from_numpy(matrix * np.float32(factor)), 99), 3, seeded())
        for factor in (1, scale)
    )
    assert subspace_angles(plain.left.numpy(), scaled.left.numpy()).max() < 1e-3
    assert plain.energy == pytest.approx(scaled.energy, rel=1e-4)


def test_real_gradients_lose_less_than_the_stated_share(organism):
    model, tokenizer = organism
    gradients = gk.collect_gradients(model, tokenizer, gk.load_examples("safety").select(range(8)), progress=False)
    for name, gradient in gradients.layers.items():
        if min(gradient.matrix_shape) > 1:
            for rank in (1, 10):
                vectors = leading_vectors(gradient, rank, seeded())
                shortfall = missed(gradient.dense().double().numpy().reshape(gradient.matrix_shape), vectors.left)
                assert shortfall <= 2 * vectors.shortfall + 1e-5, name
                assert vectors.shortfall <= SHORTFALL
