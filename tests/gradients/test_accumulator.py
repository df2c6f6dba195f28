"""Sums of gradients against numpy's sums of the dense matrices; they are thin as long as that is smaller."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geomkit.errors import GeometryError
from geomkit.gradients.accumulator import Accumulator, add
from geomkit.gradients.dense import DenseGradient
from geomkit.gradients.factored import FactoredGradient
from geomkit.gradients.indexed import IndexedGradient, coalesce
from geomkit.gradients.summed import SumGradient
from geomkit.svd.singular_values import singular_values
from tests.helpers.forms import dense, drawn, forms, seeded, seeds, shapes

quick = settings(max_examples=80, deadline=None, derandomize=True)
some_forms = st.lists(forms, min_size=1, max_size=5)


def entries(parts):
    """Return copies of all tensors of gradients, to check that they do not change."""
    for part in parts:
        if isinstance(part, SumGradient):
            yield from entries(part.parts)
        else:
            yield from (value.clone() for value in vars(part).values() if isinstance(value, torch.Tensor))


@quick
@given(some_forms, shapes, seeds, st.booleans(), st.floats(-2, 2))
def test_sums(parts, shape, seed, keep, scale):
    generator = seeded(seed)
    gradients = [drawn(form, shape, generator) for form in parts]
    before = list(entries(gradients))
    running = Accumulator(keep_factors=keep)
    handed_out = []
    for gradient in gradients:
        running.add(gradient)
        partial = running.total()
        handed_out.append((partial, partial.dense().clone()))
    assert all(torch.equal(partial.dense(), held) for partial, held in handed_out)  # not changed by what followed
    total = sum(map(dense, gradients))
    for result, factor in (
        (running.total(), 1.0),
        (running.total(scale), scale),
        (add(gradients, keep_factors=keep), 1.0),
    ):
        np.testing.assert_allclose(result.dense(), factor * total, atol=1e-4)
        assert result.tokens == sum(gradient.tokens for gradient in gradients)
        assert result.shape == shape
    assert all(torch.equal(now, then) for now, then in zip(entries(gradients), before, strict=True))
    if not keep:
        assert running.floats <= shape[0] * shape[1]
    if keep and set(parts) <= {"factored", "indexed", "tied", "zero"}:
        assert not isinstance(running.total(), DenseGradient)


def test_a_running_sum_turns_dense_when_its_parts_are_more_than_the_matrix():
    parts = [FactoredGradient(torch.ones(2, 9), torch.ones(2, 8)) for _ in range(5)]
    running, keeping = Accumulator(), Accumulator(keep_factors=True)
    floats = []
    for part in parts:
        running.add(part)
        keeping.add(part)
        floats.append(running.floats)
    assert floats == [34, 68, 72, 72, 72]
    assert isinstance(running.total(), DenseGradient)
    assert isinstance(keeping.total(), FactoredGradient)
    assert keeping.total(0.5).tokens == 10
    assert keeping.floats == 5 * 34
    keeping.add(DenseGradient(torch.ones(9, 8), tokens=1))
    assert isinstance(keeping.total(), DenseGradient)
    assert torch.equal(keeping.total().dense(), torch.full((9, 8), 11.0))


def test_a_dense_sum_goes_on_in_place():
    running = Accumulator()
    for _ in range(3):
        running.add(DenseGradient(torch.ones(4), tokens=1))
    before = running._dense.data_ptr()
    running.add(DenseGradient(torch.ones(4), tokens=1))
    assert running._dense.data_ptr() == before
    assert running.total(0.5).tensor.tolist() == [2.0] * 4


def test_rows_that_are_looked_up_again_and_again_do_not_pile_up():
    running = Accumulator(keep_factors=True)
    for _ in range(50):
        running.add(coalesce(torch.tensor([1, 3]), torch.ones(2, 4), size=20, tokens=2))
    assert running.floats <= 20 * 4
    total = running.total()
    assert isinstance(total, IndexedGradient)
    assert (total.indices.tolist(), total.tokens) == ([1, 3], 100)
    assert torch.equal(total.rows, torch.full((2, 4), 50.0))


def test_a_tied_embedding_and_head_stay_apart_and_thin():
    generator = seeded()
    parts = [drawn(form, (200, 30), generator) for form in ("factored", "indexed", "factored", "zero", "indexed")]
    total = add(parts)
    assert isinstance(total, SumGradient)
    assert [type(part) for part in total.parts] == [FactoredGradient, IndexedGradient]
    np.testing.assert_allclose(
        singular_values(total), np.linalg.svd(sum(map(dense, parts)), compute_uv=False)[: total.rank_bound], atol=1e-5
    )


def test_nothing_has_no_sum():
    for nothing in (lambda: add([]), Accumulator().total):
        with pytest.raises(GeometryError, match="expected at least one gradient to sum"):
            nothing()
