from collections.abc import Iterable

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp, kstest

from geomkit.gradients.dense import DenseGradient
from geomkit.gradients.factored import FactoredGradient
from geomkit.gradients.indexed import IndexedGradient
from geomkit.gradients.layer_gradient import LayerGradient
from geomkit.gradients.summed import SumGradient
from geomkit.svd.layer_spectrum import layer_spectrum
from geomkit.svd.nulls import NullDraws, random_factor_null
from geomkit.utils.seeding import parameter_generator


def gaussian(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def factored(tokens: int, rows: int = 20, columns: int = 16, seed: int = 0) -> FactoredGradient:
    return FactoredGradient(gaussian(tokens, rows, seed=seed), gaussian(tokens, columns, seed=seed + 1))


def test_factored_null_keeps_inputs_and_norms_and_draws_directions() -> None:
    gradient = FactoredGradient(gaussian(500, 20) * torch.rand(500, 1), gaussian(500, 16))
    drawn = random_factor_null(gradient, torch.Generator().manual_seed(0))
    assert isinstance(drawn, FactoredGradient)
    assert drawn.right is gradient.right
    assert drawn.left.norm(dim=1).numpy() == pytest.approx(gradient.left.norm(dim=1).numpy(), rel=1e-5)
    cosines = (drawn.left * gradient.left).sum(1) / gradient.left.norm(dim=1) ** 2
    # Of a uniform direction in 20 dimensions, (1 + cosine) / 2 is Beta(9.5, 9.5).
    assert kstest(((1 + cosines) / 2).numpy(), "beta", args=(9.5, 9.5)).pvalue > 0.01


def test_factored_null_keeps_the_effect_of_shared_inputs() -> None:
    steep = FactoredGradient(gaussian(32, 200), gaussian(32, 200, seed=1) * torch.arange(1, 201) ** -1.5)
    flat = FactoredGradient(steep.left, gaussian(32, 200, seed=1))
    cer = [
        layer_spectrum("w", random_factor_null(gradient, torch.Generator().manual_seed(0))).cer(10)
        for gradient in (steep, flat)
    ]
    assert cer[0] > 0.9 > 0.6 > cer[1]


def test_factored_null_leaves_tokens_without_gradient_alone() -> None:
    gradient = FactoredGradient(torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.eye(2))
    drawn = random_factor_null(gradient, torch.Generator())
    assert drawn.left.norm(dim=1).tolist() == pytest.approx([0, 5])


def test_indexed_null_keeps_rows_and_norms() -> None:
    gradient = IndexedGradient(torch.tensor([1, 4]), gaussian(2, 5), size=9, tokens=7)
    drawn = random_factor_null(gradient, torch.Generator().manual_seed(0))
    assert isinstance(drawn, IndexedGradient)
    assert drawn.indices.tolist() == [1, 4]
    assert drawn.rows.norm(dim=1).numpy() == pytest.approx(gradient.rows.norm(dim=1).numpy(), rel=1e-5)
    assert (drawn.tokens, drawn.rank_bound) == (7, 2)


def test_null_of_a_sum_keeps_what_each_part_keeps() -> None:
    table = IndexedGradient(torch.tensor([1, 4]), gaussian(2, 20), size=30, tokens=7)
    head = FactoredGradient(gaussian(6, 30), gaussian(6, 20))
    drawn = random_factor_null(SumGradient((head, table)), torch.Generator().manual_seed(0))
    assert isinstance(drawn, SumGradient)
    drawn_head, drawn_table = drawn.parts
    assert torch.equal(drawn_head.right, head.right)
    assert drawn_head.left.norm(dim=1).numpy() == pytest.approx(head.left.norm(dim=1).numpy(), rel=1e-5)
    assert torch.equal(drawn_table.indices, table.indices)
    assert not torch.equal(drawn_table.rows, table.rows)


PUBLISHED = [(16, 0.69, 1.0), (32, 0.41, 0.72), (64, 0.25, 0.45), (128, 0.16, 0.29), (1024, 0.06, 0.12)]
"""CER(10) and CER(20) of LᵀR, both factors Gaussian, T × 1024."""


def energies(gradients: Iterable[LayerGradient]) -> tuple[float, float]:
    """Mean CER(10) and CER(20)."""
    result = [layer_spectrum("w", gradient) for gradient in gradients]
    return float(np.mean([one.cer(10) for one in result])), float(np.mean([one.cer(20) for one in result]))


@pytest.mark.parametrize(("tokens", "cer10", "cer20"), PUBLISHED)
@pytest.mark.parametrize("form", ["dense", "factored"])
def test_nulls_of_unstructured_gradients_have_the_published_energy(
    form: str, tokens: int, cer10: float, cer20: float
) -> None:
    gradient = DenseGradient(torch.zeros(1024, 1024), tokens) if form == "dense" else factored(tokens, 1024, 1024)
    generator = torch.Generator().manual_seed(0)
    draws = 1 if tokens == 1024 else 4
    result = energies(random_factor_null(gradient, generator) for _ in range(draws))
    assert result == pytest.approx((cer10, cer20), abs=0.01)


def power_law(tokens: int, left: float, right: float, seed: int) -> FactoredGradient:
    """Factors whose rows have a covariance with eigenvalues i^−left and i^−right."""
    base = factored(tokens, 1024, 1024, seed)
    index = torch.arange(1.0, 1025.0)
    return FactoredGradient(base.left * index ** (-left / 2), base.right * index ** (-right / 2))


@pytest.mark.parametrize(
    ("tokens", "exponent", "published"), [(32, 1.0, (0.74, 0.90)), (1024, 1.0, (0.60, 0.70)), (32, 1.5, (0.96, 0.99))]
)
def test_null_explains_the_share_of_the_inputs_and_not_that_of_the_left_rows(
    tokens: int, exponent: float, published: tuple[float, float]
) -> None:
    """The published energies have both factors coloured; the null keeps the right one and draws the left afresh."""
    seeds = range(0, 100, 2) if tokens == 32 else range(1)
    coloured = [power_law(tokens, exponent, exponent, seed) for seed in seeds]
    assert energies(coloured) == pytest.approx(published, abs=0.02)  # of a few draws, whose spread is that
    generator = torch.Generator().manual_seed(0)
    null = energies(random_factor_null(gradient, generator) for gradient in coloured)
    # Rows of steep factors have uneven norms, which the null keeps too and which make it a little steeper.
    inputs = energies(power_law(tokens, 0.0, exponent, seed) for seed in seeds)
    assert null == pytest.approx(inputs, abs=0.02)
    assert null[0] < published[0] - 0.05


@pytest.mark.parametrize("tokens", [3, 12, 60])
def test_dense_null_has_the_spectrum_of_gaussian_factors(tokens: int) -> None:
    gradient = DenseGradient(torch.zeros(2, 10, 12), tokens)
    generator = torch.Generator().manual_seed(0)
    drawn = [random_factor_null(gradient, generator) for _ in range(200)]
    assert drawn[0].shape == gradient.shape
    direct = [factored(tokens, 20, 12, seed) for seed in range(0, 400, 2)]
    ours, theirs = (
        np.mean([layer_spectrum("w", result).singular_values for result in part], axis=0) for part in (drawn, direct)
    )
    bound = len(theirs)
    assert ours[:bound] == pytest.approx(theirs, rel=0.05)
    assert ours[bound:] == pytest.approx(0.0, abs=1e-6 * ours[0])  # experts are bounded by their shape, not by tokens


def test_generators_differ_between_parameters_and_between_seeds() -> None:
    drawn = {
        torch.randn(1, generator=parameter_generator(seed, name)).item() for seed in (0, 1, 2**40) for name in "ab"
    }
    assert len(drawn) == 6
    again = torch.randn(1, generator=parameter_generator(2**40, "b")).item()
    assert again in drawn


@pytest.mark.parametrize(("tokens", "rows", "columns"), [(12, 60, 40), (30, 60, 20), (90, 24, 40), (90, 60, 20)])
def test_singular_values_of_the_null_have_its_distribution(tokens: int, rows: int, columns: int) -> None:
    """Few tokens, tokens between the sides, and many tokens of wide and tall matrices: two-sample tests."""
    left = gaussian(tokens, rows) * torch.linspace(0.2, 2, tokens)[:, None]
    gradient = FactoredGradient(left, gaussian(tokens, columns, seed=1) * torch.arange(1.0, columns + 1) ** -0.5)
    generator = torch.Generator().manual_seed(0)
    drawn = NullDraws(150, generator).singular_values(gradient)
    expected = [layer_spectrum("w", random_factor_null(gradient, generator)).singular_values for _ in range(150)]
    assert {len(values) for values in drawn} == {gradient.rank_bound}
    for measure in (lambda s: s[0], lambda s: s[-1], lambda s: s.sum() / s[0]):
        assert ks_2samp([measure(s) for s in drawn], [measure(s) for s in expected]).pvalue > 0.001


def test_gradients_of_as_many_tokens_have_the_same_random_directions() -> None:
    """Whoever draws first: a second gradient has the draws of a generator of its own with the same seed."""
    first, second = factored(12, 60, 40), factored(12, 60, 40, seed=7)
    shared = NullDraws(2, torch.Generator().manual_seed(0))
    shared.singular_values(first)
    alone = NullDraws(2, torch.Generator().manual_seed(0))
    inputs = second.right.double() @ second.right.double().T
    pairs = zip(shared.singular_values(second), alone.singular_values(second, inputs), strict=True)
    for of_shared, of_alone in pairs:
        np.testing.assert_allclose(of_shared, of_alone, rtol=1e-9)
