"""The three forms of a gradient are one algebra: every operation agrees with numpy on the dense matrix."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geomkit.algebra import add, as_matrix, coalesce, gram, inner
from geomkit.errors import GeometryError
from geomkit.layer_gradient import DenseGradient, FactoredGradient, IndexedGradient

FORMS = ("factored", "indexed", "dense")
quick = settings(max_examples=60, deadline=None, derandomize=True)
shapes = st.tuples(st.integers(1, 9), st.integers(1, 9))
forms = st.sampled_from(FORMS)
seeds = st.integers(0, 2**31)


def drawn(form, shape, generator):
    """A random gradient of a form, with a random number of tokens."""
    tokens = int(torch.randint(1, 7, (), generator=generator))
    rows, columns = shape

    def normal(*size):
        return torch.randn(*size, generator=generator)

    if form == "factored":
        return FactoredGradient(normal(tokens, rows), normal(tokens, columns))
    if form == "indexed":
        return coalesce(
            torch.randint(0, rows, (tokens,), generator=generator), normal(tokens, columns), size=rows, tokens=tokens
        )
    return DenseGradient(normal(rows, columns), tokens)


def dense(gradient):
    """The reference: the matrix in fp64, made from the parts by numpy."""
    if isinstance(gradient, FactoredGradient):
        return gradient.left.double().numpy().T @ gradient.right.double().numpy()
    if isinstance(gradient, IndexedGradient):
        matrix = np.zeros(gradient.shape)
        np.add.at(matrix, gradient.indices.numpy(), gradient.rows.double().numpy())
        return matrix
    return gradient.tensor.double().numpy()


@quick
@given(forms, shapes, seeds)
def test_one_gradient(form, shape, seed):
    """Products with a weight to 1e-12 relative (fp64), norms to 1e-6, fp32 results to 1e-5 of the largest entry."""
    generator = torch.Generator().manual_seed(seed)
    gradient = drawn(form, shape, generator)
    matrix = dense(gradient)
    scale = np.abs(matrix).max() + 1
    weight = torch.randn(shape, generator=generator)
    assert gradient.shape == gradient.matrix_shape == shape
    np.testing.assert_allclose(gradient.dense(), matrix, atol=1e-5 * scale)
    np.testing.assert_allclose(as_matrix(gradient), matrix, atol=1e-5 * scale)
    np.testing.assert_allclose(gradient.scaled(-2.5).dense(), -2.5 * matrix, atol=1e-5 * scale)
    assert type(gradient.scaled(2.0)) is type(gradient)
    assert gradient.scaled(2.0).tokens == gradient.tokens
    assert gradient.norm == pytest.approx(np.linalg.norm(matrix), rel=1e-6)
    by_hand = float((weight.double().numpy() * matrix).sum())
    assert gradient.dot(weight) == pytest.approx(by_hand, rel=1e-12, abs=1e-12 * scale * weight.numel())
    changed = weight.clone()
    gradient.add_to(changed, 0.5)
    np.testing.assert_allclose(changed, weight.double().numpy() + 0.5 * matrix, atol=1e-5 * scale)
    if form != "dense":  # a random dense tensor has the rank that it has, whatever tokens it names
        assert np.linalg.matrix_rank(matrix) <= gradient.rank_bound <= min(*shape, gradient.tokens)


@quick
@given(st.lists(forms, min_size=1, max_size=4), st.lists(forms, min_size=1, max_size=4), shapes, seeds)
def test_inner_products_between_any_forms(rows, columns, shape, seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = ([drawn(form, shape, generator) for form in side] for side in (rows, columns))
    flat_a, flat_b = (np.stack([dense(gradient).ravel() for gradient in side]) for side in (a, b))
    found = gram(a, b)
    assert found.dtype == torch.float64
    assert found.shape == (len(a), len(b))
    # Where forming the matrix is cheaper it is formed in fp32.
    scale = np.linalg.norm(flat_a, axis=1)[:, None] * np.linalg.norm(flat_b, axis=1) + 1
    np.testing.assert_allclose(found.numpy() / scale, flat_a @ flat_b.T / scale, atol=1e-6)
    np.testing.assert_allclose(gram(b, a).numpy().T / scale, found.numpy() / scale, atol=1e-12)
    assert inner(a[0], b[0]) == pytest.approx(float(flat_a[0] @ flat_b[0]), abs=1e-6 * scale[0, 0])


@quick
@given(st.lists(forms, min_size=1, max_size=5), shapes, seeds, st.booleans())
def test_sums(parts, shape, seed, keep):
    generator = torch.Generator().manual_seed(seed)
    gradients = [drawn(form, shape, generator) for form in parts]
    before = [gradient.dense().clone() for gradient in gradients]
    total = add(gradients, keep_factors=keep)
    np.testing.assert_allclose(total.dense(), sum(map(dense, gradients)), atol=1e-4)
    assert total.tokens == sum(gradient.tokens for gradient in gradients)
    assert total.shape == shape
    assert all(torch.equal(gradient.dense(), held) for gradient, held in zip(gradients, before, strict=True))
    if set(parts) == {"factored"} and keep:
        assert isinstance(total, FactoredGradient)
    if not keep:
        assert total.floats <= shape[0] * shape[1]


def test_token_grams_and_formed_matrices_agree():
    """With few tokens the inner products come from T × T Grams, with many from the matrices."""
    generator = torch.Generator().manual_seed(0)
    few = FactoredGradient(torch.randn(3, 40, generator=generator), torch.randn(3, 50, generator=generator))
    many = FactoredGradient(torch.randn(300, 40, generator=generator), torch.randn(300, 50, generator=generator))
    for a, b in ((few, few), (many, many), (few, many)):
        assert inner(a, b) == pytest.approx(float((dense(a) * dense(b)).sum()), rel=1e-5)


def test_a_large_weight_is_read_strip_by_strip(monkeypatch):
    monkeypatch.setattr("geomkit.layer_gradient._STRIP", 3)
    generator = torch.Generator().manual_seed(0)
    gradient = drawn("factored", (8, 5), generator)
    weight = torch.randn(8, 5, generator=generator)
    assert gradient.dot(weight) == pytest.approx(float((weight.double().numpy() * dense(gradient)).sum()), rel=1e-12)


@pytest.mark.parametrize(("shape", "matrix"), [((4,), (4, 1)), ((2, 3, 5), (6, 5)), ((), (1, 1)), ((3, 2), (3, 2))])
def test_every_shape_has_rows_and_columns(shape, matrix):
    gradient = DenseGradient(torch.ones(shape), tokens=2)
    assert gradient.matrix_shape == matrix
    assert as_matrix(gradient).shape == matrix
    assert gradient.rank_bound == min(*matrix, 2)


def test_rows_that_share_an_index_are_summed():
    found = coalesce(torch.tensor([4, 1, 4]), torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), size=6, tokens=3)
    assert found.indices.tolist() == [1, 4]
    assert found.rows.tolist() == [[3.0, 4.0], [6.0, 8.0]]
    assert (found.rank_bound, found.tokens) == (2, 3)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("other", FORMS)
def test_different_shapes_are_refused(form, other):
    generator = torch.Generator().manual_seed(0)
    a, b = drawn(form, (4, 3), generator), drawn(other, (1, 3), generator)
    for operation in (inner, lambda a, b: gram([a], [b]), lambda a, b: add([a, b])):
        with pytest.raises(GeometryError, match=r"expected gradients of one shape, found \[\(1, 3\), \(4, 3\)\]"):
            operation(a, b)


@pytest.mark.parametrize("form", FORMS)
def test_half_precision_weights_are_read_in_fp64_and_changed_in_their_own_type(form):
    generator = torch.Generator().manual_seed(0)
    gradient = drawn(form, (6, 5), generator)
    weight = torch.randn(6, 5, generator=generator).bfloat16()
    assert gradient.dot(weight) == pytest.approx(float((weight.double().numpy() * dense(gradient)).sum()), rel=1e-12)
    expected = weight.double().numpy() + dense(gradient)
    gradient.add_to(weight, 1.0)
    assert weight.dtype == torch.bfloat16
    np.testing.assert_allclose(weight.double(), expected, atol=0.1, rtol=0.02)
