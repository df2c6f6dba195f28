import numpy as np
import pytest
import torch
from scipy.stats import kstest

from geomkit.controls import (
    bootstrap_interval,
    bootstrap_weights,
    match_tokens,
    parameter_generator,
    percentile_interval,
    permuted_labels,
    random_factor_null,
    subsample_tokens,
)
from geomkit.errors import GeometryError
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


def test_subsample_tokens_takes_rows_of_both_factors_together() -> None:
    gradients = {"a": factored(9), "b": factored(7, seed=2)}
    found = subsample_tokens(gradients, {"a": 4, "b": 7}, torch.Generator().manual_seed(0))
    assert {name: gradient.tokens for name, gradient in found.items()} == {"a": 4, "b": 7}
    assert torch.equal(found["b"].left, gradients["b"].left)
    places = [(gradients["a"].left == row).all(1).nonzero().item() for row in found["a"].left]
    assert len(set(places)) == 4
    assert torch.equal(found["a"].right, gradients["a"].right[places])


def test_subsample_tokens_takes_one_number_for_all() -> None:
    found = subsample_tokens({"a": factored(9), "b": factored(7)}, 5, torch.Generator())
    assert {gradient.tokens for gradient in found.values()} == {5}


def test_match_tokens_thins_out_the_longer_side_only() -> None:
    first, second = (
        {"a": factored(9), "b": factored(4), "c": DenseGradient(gaussian(3, 3), 9)},
        {"a": factored(6), "b": factored(8), "c": factored(9)},
    )
    matched = match_tokens(first, second, seed=3)
    assert [{name: gradient.tokens for name, gradient in side.items()} for side in matched] == [{"a": 6, "b": 4}] * 2
    assert torch.equal(matched[1]["a"].left, second["a"].left)
    again = match_tokens(first, second, seed=3)
    assert torch.equal(matched[0]["a"].left, again[0]["a"].left)


def test_match_tokens_leaves_zero_gradients_out_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    zero = factored(0)
    matched = match_tokens({"lora_A": zero, "lora_B": factored(5)}, {"lora_A": factored(3), "lora_B": factored(4)})
    assert [list(side) for side in matched] == [["lora_B"]] * 2
    assert caplog.messages == ["left 1 of 2 layers out, whose gradient is zero: ['lora_A']"]
    with pytest.raises(GeometryError, match=r"that is not zero on either side, found none in \['lora_A'\]"):
        match_tokens({"lora_A": zero}, {"lora_A": factored(3)})


def test_match_tokens_says_why_nothing_is_left() -> None:
    summed = {"a": DenseGradient(gaussian(3, 3), 9), "norm": DenseGradient(gaussian(3), 9)}
    table = IndexedGradient(torch.tensor([1, 4]), gaussian(2, 5), size=9, tokens=7)
    for second in (summed, {"a": factored(9)}):
        with pytest.raises(GeometryError, match='collect both with form="factored"'):
            match_tokens(summed, second)
    bare = {"norm": summed["norm"], "table": table}
    with pytest.raises(GeometryError, match=r"a linear layer, found none among \['norm', 'table'\]; .* layers="):
        match_tokens(bare, bare)
    with pytest.raises(GeometryError, match="found none in common"):
        match_tokens({"a": factored(9)}, {"b": factored(9)})


def test_subsample_tokens_refuses_what_it_cannot_match() -> None:
    generator = torch.Generator()
    with pytest.raises(GeometryError, match="1 to 9 tokens of a, found 10"):
        subsample_tokens({"a": factored(9)}, 10, generator)
    with pytest.raises(GeometryError, match="found DenseGradient"):
        subsample_tokens({"a": DenseGradient(gaussian(3, 3), 9)}, 4, generator)
    with pytest.raises(GeometryError, match=r"none for .'a'"):
        subsample_tokens({"a": factored(9)}, {}, generator)


def test_bootstrap_weights_are_shares_of_a_resample() -> None:
    weights = bootstrap_weights(5, 1000, np.random.default_rng(0))
    assert weights.shape == (1000, 5)
    assert weights.sum(1) == pytest.approx(np.ones(1000))
    assert weights.mean(0) == pytest.approx(np.full(5, 0.2), abs=0.02)
    assert np.var(weights[:, 0] * 5) == pytest.approx(0.8, rel=0.15)


def test_permuted_labels_deal_groups_of_the_right_sizes_evenly() -> None:
    labels = permuted_labels(3, 5, 4000, np.random.default_rng(0))
    assert (labels.sum(1) == 3).all()
    assert labels.mean(0) == pytest.approx(np.full(8, 3 / 8), abs=0.03)
    assert len(np.unique(labels, axis=0)) == 56


def test_percentile_interval_is_central() -> None:
    assert percentile_interval(np.arange(1001.0)) == pytest.approx((25, 975))


def test_bootstrap_interval_covers_the_mean_of_few_skewed_values() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(800):
        low, high = bootstrap_interval(generator.beta(4, 3, 8), generator, draws=400)
        hits += low <= 4 / 7 <= high
    assert 0.93 <= hits / 800 <= 0.97
