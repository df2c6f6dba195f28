import numpy as np
import pytest
import torch
from scipy.stats import kstest

from geomkit.controls import parameter_generator, random_factor_null
from geomkit.forms import DenseGradient, FactoredGradient, IndexedGradient, SumGradient
from geomkit.spectra import layer_spectrum


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


@pytest.mark.parametrize("tokens", [3, 12, 60])
def test_dense_null_has_the_spectrum_of_gaussian_factors(tokens: int) -> None:
    gradient = DenseGradient(torch.zeros(2, 10, 12), tokens)
    generator = torch.Generator().manual_seed(0)
    drawn = [random_factor_null(gradient, generator) for _ in range(200)]
    assert drawn[0].shape == gradient.shape
    direct = [factored(tokens, 20, 12, seed) for seed in range(0, 400, 2)]
    ours, theirs = (
        np.mean([layer_spectrum("w", found).singular_values for found in part], axis=0) for part in (drawn, direct)
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
