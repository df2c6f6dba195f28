"""Operations of every form of a gradient against numpy on the dense matrix."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geomkit.errors import GeometryError
from geomkit.gradients.dense import DenseGradient
from geomkit.gradients.factored import FactoredGradient
from geomkit.gradients.indexed import IndexedGradient
from geomkit.gradients.layer_gradient import as_matrix
from geomkit.gradients.summed import SumGradient
from tests.helpers.forms import FORMS, THIN, dense, drawn, forms, seeded, seeds, shapes

quick = settings(max_examples=80, deadline=None, derandomize=True)


@quick
@given(forms, shapes, seeds)
def test_one_gradient(form, shape, seed):
    """Tolerances: products with a weight 1e-12 (fp64), norms 1e-6, fp32 results 1e-5 of the largest entry."""
    generator = seeded(seed)
    gradient = drawn(form, shape, generator)
    matrix = dense(gradient)
    scale = np.abs(matrix).max() + 1
    weight = torch.randn(shape, generator=generator)
    assert gradient.shape == gradient.matrix_shape == shape
    assert gradient.dense().dtype == torch.float32
    np.testing.assert_allclose(gradient.dense(), matrix, atol=1e-5 * scale)
    np.testing.assert_allclose(as_matrix(gradient), matrix, atol=1e-5 * scale)
    np.testing.assert_allclose(gradient.scaled(-2.5).dense(), -2.5 * matrix, atol=1e-5 * scale)
    assert type(gradient.scaled(2.0)) is type(gradient)
    assert gradient.scaled(2.0).tokens == gradient.tokens
    # Parts of a sum may cancel: its error is relative to them.
    assert gradient.norm == pytest.approx(np.linalg.norm(matrix), rel=1e-6, abs=1e-5 if form in {"tied", "sum"} else 0)
    by_hand = float((weight.double().numpy() * matrix).sum())
    assert gradient.dot(weight) == pytest.approx(by_hand, rel=1e-12, abs=1e-12 * scale * weight.numel())
    changed = weight.clone()
    gradient.add_to(changed, 0.5)
    np.testing.assert_allclose(changed, weight.double().numpy() + 0.5 * matrix, atol=1e-5 * scale)
    if form not in {"dense", "sum"}:  # a random dense tensor has the rank that it has, whatever tokens it names
        assert np.linalg.matrix_rank(matrix) <= gradient.rank_bound <= min(*shape, gradient.tokens)


@quick
@given(forms, shapes, seeds, st.integers(0, 4), st.sampled_from((torch.float32, torch.float64, torch.bfloat16)))
def test_products_from_both_sides(form, shape, seed, width, dtype):
    generator = seeded(seed)
    gradient = drawn(form, shape, generator)
    matrix = dense(gradient)
    right, left = (torch.randn(*size, generator=generator).to(dtype) for size in ((shape[1], width), (width, shape[0])))
    expected = {
        "matmul": (gradient.matmul(right), matrix @ right.double().numpy()),
        "rmatmul": (gradient.rmatmul(left), left.double().numpy() @ matrix),
    }
    exact = dtype == torch.float64
    for result, wanted in expected.values():
        assert result.dtype == (torch.float64 if exact else torch.float32)
        np.testing.assert_allclose(result, wanted, atol=(1e-12 if exact else 1e-4) * (1 + np.abs(matrix).max()))


@quick
@given(forms, shapes, seeds, st.data())
def test_some_rows(form, shape, seed, data):
    gradient = drawn(form, shape, seeded(seed))
    wanted = data.draw(st.lists(st.integers(0, shape[0] - 1), unique=True))
    start, stop = data.draw(st.integers(0, 10)), data.draw(st.integers(0, 10))
    matrix = dense(gradient)
    np.testing.assert_allclose(gradient.take(torch.tensor(wanted, dtype=torch.int64)), matrix[wanted], atol=1e-12)
    result = gradient.take(slice(start, stop), torch.float32)
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result, matrix[start:stop], atol=1e-4)


@quick
@given(forms, shapes, seeds)
def test_thin_forms(form, shape, seed):
    gradient = drawn(form, shape, seeded(seed))
    factors = gradient.factors()
    if factors is None:
        assert form not in {"factored", "indexed", "zero"}
        assert form not in THIN or sum(part.rank_bound for part in gradient.parts) >= min(shape)
        return
    left, right = factors
    assert form in THIN
    assert (left.shape[1], right.shape[1], len(left)) == (*shape, len(right))
    np.testing.assert_allclose(left.double().numpy().T @ right.double().numpy(), dense(gradient), atol=1e-12)
    if form == "tied":
        assert len(left) < min(shape)


@pytest.mark.parametrize("form", FORMS)
def test_large_matrices_are_read_strip_by_strip(form, monkeypatch):
    monkeypatch.setattr("geomkit.gradients.layer_gradient._STRIP_ROWS", 3)
    generator = seeded()
    gradient = drawn(form, (8, 5), generator)
    matrix = dense(gradient)
    weight, left, right = (torch.randn(*size, generator=generator).double() for size in ((8, 5), (2, 8), (5, 2)))
    assert gradient.dot(weight) == pytest.approx(float((weight.numpy() * matrix).sum()), rel=1e-12, abs=1e-12)
    assert gradient.norm == pytest.approx(np.linalg.norm(matrix), rel=1e-6)
    np.testing.assert_allclose(gradient.matmul(right), matrix @ right.numpy(), atol=1e-12)
    np.testing.assert_allclose(gradient.rmatmul(left), left.numpy() @ matrix, atol=1e-12)


def test_norms_from_token_grams_and_from_the_matrix_agree():
    for tokens in (3, 300):
        gradient = FactoredGradient(torch.randn(tokens, 40, generator=seeded(1)), torch.randn(tokens, 50))
        assert gradient.norm == pytest.approx(np.linalg.norm(dense(gradient)), rel=1e-6)


@pytest.mark.parametrize(("shape", "matrix"), [((4,), (4, 1)), ((2, 3, 5), (6, 5)), ((), (1, 1)), ((3, 2), (3, 2))])
def test_every_shape_has_rows_and_columns(shape, matrix):
    tensor = torch.arange(1.0, 1 + torch.Size(shape).numel()).reshape(shape)
    gradient = DenseGradient(tensor, tokens=2)
    assert gradient.matrix_shape == matrix
    assert as_matrix(gradient).shape == matrix
    assert gradient.rank_bound == (min(matrix) if len(shape) > 2 else min(*matrix, 2))
    assert gradient.norm == pytest.approx(float(tensor.double().norm()))
    assert gradient.dot(tensor) == pytest.approx(float(tensor.square().sum()))
    assert torch.equal(gradient.matmul(torch.eye(matrix[1])), tensor.reshape(matrix))
    assert torch.equal(gradient.rmatmul(torch.eye(matrix[0])), tensor.reshape(matrix))


def test_a_sum_counts_the_tokens_and_numbers_of_its_parts_and_bounds_the_rank():
    head, table = drawn("factored", (30, 8), seeded(0)), drawn("indexed", (30, 8), seeded(1))
    both = SumGradient((head, table))
    assert both.tokens == head.tokens + table.tokens
    assert both.floats == head.floats + table.floats < 30 * 8
    assert both.rank_bound == min(8, head.tokens + len(table.indices))
    assert (both.shape, both.device) == (head.shape, head.device)


def test_a_sum_of_nothing_of_sums_or_of_shapes_is_refused():
    a, b = drawn("factored", (4, 3), seeded()), drawn("indexed", (1, 3), seeded())
    for parts in ((), (a, b), (a, SumGradient((a,)))):
        with pytest.raises(GeometryError, match="expected parts of one shape, none itself a sum"):
            SumGradient(parts)


def test_an_embedding_in_which_nothing_was_looked_up_is_zero():
    empty = IndexedGradient(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 3), size=5, tokens=0)
    assert (empty.norm, empty.rank_bound) == (0.0, 0)
    assert not empty.dense().any()
    assert not empty.take(torch.tensor([1, 4])).any()
    assert not empty.matmul(torch.ones(3, 2)).any()


@pytest.mark.parametrize("form", FORMS)
def test_half_precision_weights_are_read_in_fp64_and_changed_in_their_own_type(form):
    generator = seeded()
    gradient = drawn(form, (6, 5), generator)
    weight = torch.randn(6, 5, generator=generator).bfloat16()
    assert gradient.dot(weight) == pytest.approx(float((weight.double().numpy() * dense(gradient)).sum()), rel=1e-12)
    expected = weight.double().numpy() + dense(gradient)
    gradient.add_to(weight, 1.0)
    assert weight.dtype == torch.bfloat16
    np.testing.assert_allclose(weight.double(), expected, atol=0.1, rtol=0.02)
