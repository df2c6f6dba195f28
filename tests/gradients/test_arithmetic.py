"""Inner products between gradients of any forms against numpy on the dense matrices."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geomkit.errors import GeometryError
from geomkit.gradients.accumulator import add
from geomkit.gradients.arithmetic import gram, inner, zero_gradient
from geomkit.gradients.dense import DenseGradient
from geomkit.gradients.factored import FactoredGradient
from geomkit.gradients.indexed import IndexedGradient, coalesce
from geomkit.gradients.summed import SumGradient
from geomkit.svd.nulls import random_factor_null
from geomkit.svd.singular_values import singular_values
from geomkit.svd.subspaces import layer_subspace
from tests.helpers.forms import FORMS, dense, drawn, forms, seeded, seeds, shapes

quick = settings(max_examples=80, deadline=None, derandomize=True)
some_forms = st.lists(forms, min_size=1, max_size=5)


@quick
@given(some_forms, some_forms, shapes, seeds)
def test_inner_products_between_any_forms(rows, columns, shape, seed):
    generator = seeded(seed)
    a, b = ([drawn(form, shape, generator) for form in side] for side in (rows, columns))
    flat_a, flat_b = (np.stack([dense(gradient).ravel() for gradient in side]) for side in (a, b))
    result = gram(a, b)
    assert result.dtype == torch.float64
    assert result.shape == (len(a), len(b))
    # Where forming the matrix is cheaper it is formed in fp32.
    scale = np.linalg.norm(flat_a, axis=1)[:, None] * np.linalg.norm(flat_b, axis=1) + 10
    np.testing.assert_allclose(result.numpy() / scale, flat_a @ flat_b.T / scale, atol=1e-6)
    np.testing.assert_allclose(gram(b, a).numpy().T / scale, result.numpy() / scale, atol=1e-12)
    assert inner(a[0], b[0]) == pytest.approx(float(flat_a[0] @ flat_b[0]), abs=1e-6 * scale[0, 0])
    symmetric = gram(a, a)
    assert torch.equal(symmetric, symmetric.T) or symmetric.numpy() == pytest.approx(
        symmetric.T.numpy(), abs=1e-6 * scale.max() ** 2
    )
    assert symmetric.diagonal().numpy() == pytest.approx([part.norm**2 for part in a], rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("limit", [1, 7, 10**6])
def test_grams_do_not_depend_on_how_much_is_taken_at_a_time(limit, monkeypatch):
    for name in ("_FP64_NUMBERS", "_BLOCK_TOKENS", "_MIN_STRIP_ROWS"):
        monkeypatch.setattr(f"geomkit.gradients.arithmetic.{name}", limit)
    generator = seeded()
    few = [drawn("factored", (40, 30), generator) for _ in range(5)]
    many = [FactoredGradient(torch.randn(60, 40, generator=generator), torch.randn(60, 30)) for _ in range(3)]
    mixed = [drawn(form, (40, 30), generator) for form in FORMS]
    for a, b in ((few, few), (few, few[:2]), (many, many), (many, few), (mixed, mixed), (mixed, many)):
        expected = np.array([[(dense(x) * dense(y)).sum() for y in b] for x in a])
        np.testing.assert_allclose(gram(a, b), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_an_embedding_is_never_formed_for_an_inner_product(monkeypatch):
    """Inner products of indexed rows, of few tokens of a head and of their sum form no dense matrix."""
    generator = seeded()
    gradients = [drawn(form, (200, 6), generator) for form in ("factored", "indexed", "tied", "zero")]
    expected = np.array([[(dense(a) * dense(b)).sum() for b in gradients] for a in gradients])
    for form in (FactoredGradient, IndexedGradient, SumGradient):
        monkeypatch.setattr(form, "dense", lambda _: pytest.fail("formed"))
    assert gram(gradients, gradients).numpy() == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert [part.norm**2 for part in gradients] == pytest.approx(expected.diagonal(), rel=1e-5)


def test_token_grams_and_formed_matrices_agree():
    """Inner products come from T × T Gram matrices for few tokens, and from formed matrices for many."""
    generator = seeded()
    few = FactoredGradient(torch.randn(3, 40, generator=generator), torch.randn(3, 50, generator=generator))
    many = FactoredGradient(torch.randn(300, 40, generator=generator), torch.randn(300, 50, generator=generator))
    for a, b in ((few, few), (many, many), (few, many)):
        assert inner(a, b) == pytest.approx(float((dense(a) * dense(b)).sum()), rel=1e-5)


@pytest.mark.parametrize("shape", [(6, 5), (4,), (2, 3, 5), ()])
def test_a_zero_gradient_goes_through_everything(shape):
    zero = zero_gradient(shape)
    assert (zero.shape, zero.tokens, zero.rank_bound, zero.norm) == (shape, 0, 0, 0.0)
    assert torch.equal(zero.dense(), torch.zeros(shape))
    gradient = DenseGradient(torch.randn(shape, generator=seeded()), tokens=3)
    assert gram([zero, gradient], [zero, gradient]).numpy() == pytest.approx(np.diag([0, gradient.norm**2]), rel=1e-6)
    assert torch.equal(add([zero, gradient, zero]).dense(), gradient.tensor)
    assert add([zero, gradient]).tokens == 3
    assert add([zero, zero], keep_factors=True).norm == 0
    assert singular_values(zero).shape == (0,)
    assert random_factor_null(zero, seeded()).norm == 0
    assert layer_subspace(zero, rank=2).rank == 0
    assert zero.scaled(2.0).norm == 0
    if len(shape) == 2:
        assert zero.floats == 0
        for form in ("factored", "indexed"):
            part = drawn(form, shape, seeded())
            assert type(add([zero, part], keep_factors=True)) is type(part)


def test_rows_that_share_an_index_are_summed():
    result = coalesce(torch.tensor([4, 1, 4]), torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), size=6, tokens=3)
    assert result.indices.tolist() == [1, 4]
    assert result.rows.tolist() == [[3.0, 4.0], [6.0, 8.0]]
    assert (result.rank_bound, result.tokens) == (2, 3)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("other", FORMS)
def test_different_shapes_are_refused(form, other):
    a, b = drawn(form, (4, 3), seeded()), drawn(other, (1, 3), seeded())
    for operation in (inner, lambda a, b: gram([a], [b]), lambda a, b: add([a, b])):
        with pytest.raises(GeometryError, match=r"expected gradients of one shape, found \[\(1, 3\), \(4, 3\)\]"):
            operation(a, b)


@pytest.mark.parametrize("form", FORMS)
def test_products_in_fp32_differ_by_rounding(form: str) -> None:
    generator = seeded()
    parts = [drawn(form, (60, 40), generator) for _ in range(5)]
    expected = gram(parts, parts)
    scale = max(float(expected.diagonal().max()), 1.0)
    result = gram(parts, parts, products=torch.float32)
    assert result.dtype == torch.float64
    np.testing.assert_allclose(result, expected, atol=2e-6 * scale)
    matrices = np.stack([dense(part).ravel() for part in parts])
    np.testing.assert_allclose(expected, matrices @ matrices.T, atol=1e-5 * scale)
