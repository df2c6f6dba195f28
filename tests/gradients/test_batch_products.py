"""Products of a batch's gradients against the dense gradients, for every form and number of tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geomkit.gradients import batch_products
from geomkit.gradients.arithmetic import zero_gradient
from geomkit.gradients.batch_products import products_and_norms, products_with, squared_norms
from geomkit.gradients.dense import DenseGradient
from geomkit.gradients.factored import FactoredGradient
from geomkit.gradients.indexed import coalesce
from geomkit.gradients.layer_gradient import as_matrix
from geomkit.gradients.summed import SumGradient

ROWS, COLUMNS = 9, 6


def numbers(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def factored(seed, tokens):
    return FactoredGradient(numbers(seed, tokens, ROWS), numbers(seed + 1, tokens, COLUMNS))


def indexed(seed, tokens):
    places = torch.randint(ROWS, (tokens,), generator=torch.Generator().manual_seed(seed))
    return coalesce(places, numbers(seed, tokens, COLUMNS), ROWS, tokens)


def dense(seed, tokens):
    return DenseGradient(numbers(seed, ROWS, COLUMNS), tokens)


def summed(seed, tokens):
    return SumGradient((factored(seed, tokens), indexed(seed + 2, tokens)))


FORMS = (factored, indexed, dense, summed)


def assert_right(gradients):
    matrix, basis = numbers(99, ROWS, COLUMNS), torch.linalg.qr(numbers(98, ROWS, 2)).Q
    formed = [as_matrix(gradient).double() for gradient in gradients]
    products, (squares, inside) = products_with(gradients, matrix), squared_norms(gradients, basis)
    size = 1e-5 * max(float(one.norm()) for one in formed)
    torch.testing.assert_close(
        products, torch.stack([(one * matrix).sum() for one in formed]), rtol=1e-5, atol=size * float(matrix.norm())
    )
    torch.testing.assert_close(squares, torch.stack([one.square().sum() for one in formed]), rtol=1e-4, atol=size**2)
    expected = torch.stack([(basis.double().T @ one).square().sum() for one in formed])
    torch.testing.assert_close(inside, expected, rtol=1e-4, atol=1e-6 * float(squares.max()))
    # The same numbers, with the matrices formed and without.
    for forming in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(batch_products, "_forming_is_cheaper", lambda *_, forming=forming: forming)
            (first, double), *norms = products_and_norms(gradients, [matrix, 2 * matrix], basis)
        bounds = {"rtol": 1e-5, "atol": size * float(matrix.norm())}
        torch.testing.assert_close((first, double / 2), (products, products), **bounds)
        torch.testing.assert_close(norms[0], squares, rtol=1e-4, atol=size**2)
        torch.testing.assert_close(norms[1], inside, rtol=1e-4, atol=1e-6 * float(squares.max()))
    plain, nothing = squared_norms(gradients)
    torch.testing.assert_close(plain, squares)
    assert float(nothing.abs().max()) == 0


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(FORMS), st.integers(1, 8)), min_size=1, max_size=5), st.integers(0, 1000))
def test_any_gradients_give_what_their_matrices_give(kinds, seed):
    assert_right([form(seed + 10 * place, tokens) for place, (form, tokens) in enumerate(kinds)])


@pytest.mark.parametrize("most", [1, 10**9])
def test_factored_gradients_in_runs_of_any_size(monkeypatch, most):
    """With few tokens by Gram matrices of tokens, with many by forming the matrix, in small and in large runs."""
    monkeypatch.setattr(batch_products, "_MOST_NUMBERS", most)
    monkeypatch.setattr(batch_products, "_FORMED_NUMBERS", most)
    for lengths in ((1, 2, 3), (40, 2, 30), (0, 3), (0, 0)):
        assert_right([factored(tokens, tokens) for tokens in lengths])


def test_factors_that_are_rows_of_one_tensor():
    left, right = numbers(0, 12, ROWS), numbers(1, 12, COLUMNS)
    parts = [slice(0, 3), slice(4, 9), slice(9, 12)]
    assert_right([FactoredGradient(left[part], right[part]) for part in parts])
    # Only one factor is a view: the other was copied, so that its rows lie elsewhere.
    assert_right([FactoredGradient(left[part], right[part].clone()) for part in parts])


@pytest.mark.parametrize("numbers_at_a_time", [4 * COLUMNS, 3 * ROWS * COLUMNS])
def test_examples_of_a_padded_batch_formed_in_strips_or_together(monkeypatch, numbers_at_a_time):
    """What lies between the examples is not theirs, also where windows over it are taken without a copy."""
    monkeypatch.setattr(batch_products, "_FORMED_NUMBERS", numbers_at_a_time)
    left, right = numbers(0, 20, ROWS), numbers(1, 20, COLUMNS)
    for starts, tokens in (
        ((0, 5, 10, 15), (5, 5, 4, 3)),
        ((0, 5, 10, 15), (5, 0, 5, 5)),
        ((1, 4, 12, 18), (2, 7, 1, 2)),
    ):
        parts = [slice(start, start + count) for start, count in zip(starts, tokens, strict=True)]
        assert_right([FactoredGradient(left[part], right[part]) for part in parts])


def test_few_tokens_are_not_formed_and_many_are():
    shapes = [FactoredGradient(numbers(0, tokens, 512), numbers(1, tokens, 512)) for tokens in (8, 256)]
    chosen = [batch_products._forming_is_cheaper([gradient], 1) for gradient in shapes]
    assert chosen == [False, True]
    assert batch_products._forming_is_cheaper(shapes[:1], 2) < batch_products._forming_is_cheaper(shapes[1:], 2)


def test_vectors_experts_and_zero_gradients():
    vectors = [DenseGradient(numbers(seed, 5), 3) for seed in range(3)]
    values = products_with(vectors, torch.ones(5, 1))
    torch.testing.assert_close(values, torch.stack([vector.tensor.double().sum() for vector in vectors]))
    experts = [DenseGradient(numbers(seed, 2, 3, 4), 3) for seed in range(2)]
    found = products_with(experts, torch.ones(6, 4))
    torch.testing.assert_close(found, torch.stack([one.tensor.double().sum() for one in experts]))
    assert products_with([zero_gradient((ROWS, COLUMNS))], torch.ones(ROWS, COLUMNS)).tolist() == [0.0]
    assert squared_norms([zero_gradient((ROWS, COLUMNS))])[0].tolist() == [0.0]
