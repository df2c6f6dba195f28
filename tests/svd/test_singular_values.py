"""Singular values of gradients of every form, against SVDs of the dense matrices."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geomkit.gradients.accumulator import add
from geomkit.gradients.arithmetic import zero_gradient
from geomkit.gradients.dense import DenseGradient
from geomkit.gradients.factored import FactoredGradient
from geomkit.gradients.layer_gradient import LayerGradient
from geomkit.gradients.summed import SumGradient
from geomkit.svd import singular_values as singular_values_module
from geomkit.svd.layer_spectrum import layer_spectrum
from geomkit.svd.nulls import random_factor_null
from geomkit.svd.singular_values import singular_values, singular_values_of, singular_values_of_gram, small_equivalent
from geomkit.svd.subspaces import layer_subspace
from tests.helpers.gradients import DEFICIENT, GRADIENTS, exact, factored, gaussian, rotation

SEEDS = st.integers(0, 2**31)
RANKS = ("numeric_rank", "effective_rank", "entropy_rank", "participation_ratio", "stable_rank")


@pytest.mark.parametrize("gradient", GRADIENTS.values(), ids=GRADIENTS)
def test_singular_values_are_those_of_the_dense_gradient(gradient: LayerGradient) -> None:
    expected = np.linalg.svd(exact(gradient), compute_uv=False)
    result = singular_values(gradient)
    assert result.dtype == np.float64
    assert len(result) == gradient.rank_bound
    assert np.abs(result - expected[: len(result)]).max() <= (1e-7 if gradient is DEFICIENT else 1e-12) * expected[0]


def test_small_singular_values_survive_a_wide_range() -> None:
    scales = torch.logspace(0, -6, 8)
    left, right = rotation(64, 1)[:8].float(), rotation(48, 2)[:8].float()
    gradient = FactoredGradient(left * scales[:, None], right)
    result = singular_values(gradient)
    assert np.abs(result - np.linalg.svd(exact(gradient), compute_uv=False)[:8]).max() < 1e-14
    assert result == pytest.approx(scales.numpy(), rel=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    seed=SEEDS,
    tokens=st.integers(1, 60),
    wide=st.floats(0, 6),
    mixed=st.booleans(),
    against=st.booleans(),
    repeated=st.booleans(),
)
def test_singular_values_are_exact_whatever_the_condition_of_the_factors(
    seed: int, tokens: int, wide: float, mixed: bool, against: bool, repeated: bool
) -> None:
    """Conditions up to 1e6, opposed (the large tokens of one side meet the small of the other), repeated tokens."""
    scales = torch.logspace(0, -wide, tokens).double()[:, None]
    turn = rotation(tokens, seed) if mixed else torch.eye(tokens).double()
    left = turn @ (scales * gaussian(tokens, 64, seed=seed).double())
    right = turn @ ((scales.flip(0) if against else 1.0) * gaussian(tokens, 80, seed=seed + 1).double())
    order = torch.arange(tokens) // 2 if repeated else torch.arange(tokens)
    gradient = FactoredGradient(left[order].float(), right[order].float())
    expected = np.linalg.svd(exact(gradient), compute_uv=False)
    result = layer_spectrum("w", gradient)
    assert np.abs(result.singular_values - expected[: result.rank_bound]).max() <= 1e-7 * expected[0]
    near = np.abs(expected / result.tolerance - 1) < 1e-2  # a value on the edge may fall on either side
    assert abs(result.numeric_rank - (expected > result.tolerance).sum()) <= near.sum()


def test_a_gram_gives_singular_values_to_the_root_of_its_precision() -> None:
    matrices = rotation(12, 1)[:8].T * torch.logspace(0, -7, 8).double()  # (12, 8), σ down to 1e-7
    stacked = torch.stack([matrices, 2 * matrices])
    result = singular_values_of_gram(stacked.mT @ stacked).numpy()
    expected = np.linalg.svd(stacked.numpy(), compute_uv=False)
    assert result.dtype == np.float64
    assert np.abs(result - expected).max() <= 2e-8 * 2
    assert result[:, :4] == pytest.approx(expected[:, :4], rel=1e-9)  # σ down to 1e-3 keeps ten digits
    assert (singular_values_of_gram(torch.zeros(3, 3)) == 0).all()


def test_tokens_that_cancel_are_taken_from_the_factors_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """G = a(b + c)ᵀ − abᵀ is far smaller than its factors: squares of these would hide it."""
    taken = []
    monkeypatch.setattr(
        "geomkit.svd.singular_values.small_equivalent",
        lambda gradient: taken.append(gradient) or small_equivalent(gradient),
    )
    a, b = gaussian(2, 40), gaussian(2, 30, seed=1)
    small = 1e-4 * gaussian(2, 30, seed=2)
    cancels = FactoredGradient(torch.cat([a, -a]), torch.cat([b + small, b]))
    assert np.abs(singular_values(cancels) - np.linalg.svd(exact(cancels), compute_uv=False)[:4]).max() < 1e-12
    assert taken == [cancels]
    singular_values(factored(30, 40, 50))
    assert taken == [cancels]


def test_tokens_without_gradient_and_repeated_inputs_cost_no_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first token says nothing to the queries, and in the first layer equal tokens have equal inputs."""
    monkeypatch.setattr("geomkit.svd.singular_values.small_equivalent", lambda _: pytest.fail("decomposed"))
    left, right = gaussian(20, 40), gaussian(10, 30, seed=1).repeat(2, 1)
    left[0], right[7] = 0.0, 0.0
    for gradient in (FactoredGradient(left, right), FactoredGradient(right, left)):
        expected = np.linalg.svd(exact(gradient), compute_uv=False)[:20]
        assert np.abs(singular_values(gradient) - expected).max() <= 1e-7 * expected[0]


def test_one_call_for_all_gradients_gives_what_one_each_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geomkit.svd.singular_values._BATCH_NUMBERS", 100)
    shared = gaussian(5, 20, seed=7)
    siblings = [FactoredGradient(gaussian(5, size, seed=size), shared) for size in (20, 30, 20)]
    gradients = [*GRADIENTS.values(), zero_gradient((6, 5)), zero_gradient((3,)), *siblings]
    result = singular_values_of(gradients)
    assert result.dtype == torch.float64
    assert result.shape == (len(gradients), max(gradient.rank_bound for gradient in gradients))
    for gradient, values in zip(gradients, result, strict=True):
        bound = gradient.rank_bound
        alone = singular_values(gradient)
        assert values[:bound].numpy() == pytest.approx(alone, rel=1e-9, abs=1e-7 * max(alone, default=0.0))
        assert not values[bound:].any()
    assert singular_values_of([]).shape == (0, 0)


def test_a_factor_in_common_is_squared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    gram = singular_values_module._gram
    monkeypatch.setattr("geomkit.svd.singular_values._gram", lambda rows: made.append(rows) or gram(rows))
    inputs = gaussian(2, 5, 20, seed=7)  # two examples, as views of one batch
    gradients = [FactoredGradient(gaussian(5, 30, seed=k), inputs[k % 2]) for k in range(6)]
    singular_values_of(gradients)
    assert len(made) == 6 + 2


@pytest.mark.parametrize(
    "zero", [zero_gradient((8, 6)), zero_gradient((2, 4, 3)), SumGradient((zero_gradient((8, 6)),))]
)
def test_a_gradient_without_tokens_has_a_spectrum_a_null_and_an_empty_subspace(zero: LayerGradient) -> None:
    assert singular_values(zero).shape == (0,)
    assert {layer_spectrum("w", zero).statistics()[name] for name in RANKS} == {0.0}
    assert layer_spectrum("w", random_factor_null(zero, torch.Generator())).is_zero
    for side, size in zip(("left", "right"), zero.matrix_shape, strict=True):
        empty = layer_subspace(zero, rank=2, side=side)
        assert empty.basis.shape == (size, 0)
        assert (empty.energy, empty.numeric_rank) == (0.0, 0)


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, tokens=st.integers(1, 30), scale=st.floats(1e-3, 1e3))
def test_spectrum_ignores_token_order_rotations_and_scale(seed: int, tokens: int, scale: float) -> None:
    base = factored(tokens, 16, 12, seed)
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))
    moved = FactoredGradient(
        (base.left.double() @ rotation(16, seed))[order] * scale, (base.right.double() @ rotation(12, seed))[order]
    )
    assert singular_values(moved) == pytest.approx(scale * singular_values(base), rel=1e-9, abs=1e-9 * scale)
    before, after = (layer_spectrum("w", gradient).statistics() for gradient in (base, moved))
    assert after == pytest.approx(before, rel=1e-6)


def test_summed_and_factored_gradients_agree() -> None:
    parts = [factored(9, 10, 8, seed) for seed in range(4)]
    kept, formed = add(parts, keep_factors=True), add(parts)
    assert isinstance(formed, DenseGradient)
    assert singular_values(kept) == pytest.approx(singular_values(formed), rel=1e-5)
