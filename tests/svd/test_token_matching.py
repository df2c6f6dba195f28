from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from geomkit.collection.collect import collect_gradients
from geomkit.errors import GeometryError
from geomkit.gradients.dense import DenseGradient
from geomkit.gradients.factored import FactoredGradient
from geomkit.gradients.gradient_set import Coverage, GradientSet
from geomkit.gradients.indexed import IndexedGradient
from geomkit.svd.token_matching import match_tokens
from tests.helpers.tiny import SAFETY, UTILITY, tiny_llama, tiny_tokenizer


def gaussian(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def factored(tokens: int, rows: int = 20, columns: int = 16, seed: int = 0) -> FactoredGradient:
    return FactoredGradient(gaussian(tokens, rows, seed=seed), gaussian(tokens, columns, seed=seed + 1))


def test_match_tokens_takes_rows_of_both_factors_together() -> None:
    whole = factored(9)
    result, _ = match_tokens({"a": whole}, {"a": factored(4, seed=2)})
    places = [(whole.left == row).all(1).nonzero().item() for row in result["a"].left]
    assert len(set(places)) == 4
    assert torch.equal(result["a"].right, whole.right[places])


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
    with pytest.raises(GeometryError, match=r"other than zero in every set, found none in \['lora_A'\]"):
        match_tokens({"lora_A": zero}, {"lora_A": factored(3)})


def test_match_tokens_says_why_nothing_is_left() -> None:
    summed = {"a": DenseGradient(gaussian(3, 3), 9), "norm": DenseGradient(gaussian(3), 9)}
    table = IndexedGradient(torch.tensor([1, 4]), gaussian(2, 5), size=9, tokens=7)
    for second in (summed, {"a": factored(9)}):
        with pytest.raises(GeometryError, match='collect all with form="factored"'):
            match_tokens(summed, second)
    bare = {"norm": summed["norm"], "table": table}
    with pytest.raises(GeometryError, match=r"a linear layer, found none among \['norm', 'table'\]; .* layers="):
        match_tokens(bare, bare)
    with pytest.raises(GeometryError, match="found none in common"):
        match_tokens({"a": factored(9)}, {"b": factored(9)})


# ------------------------------------------------------------------------------------------- sets with examples


def sampled(lengths: list[int], seed: int = 0) -> GradientSet:
    """Examples with so many tokens each; every token has a number of its own in its first column."""
    samples, start = [], 0
    coverage = Coverage({"w": 320}, {}, {})
    for place, length in enumerate(lengths):
        gradient = factored(length, seed=seed + 2 * place)
        gradient.left[:, 0] = torch.arange(start, start + length)
        samples.append(GradientSet({"w": gradient}, 1.0, 1, length, coverage))
        start += length
    left, right = (torch.cat([getattr(sample["w"], side) for sample in samples]) for side in ("left", "right"))
    mean = FactoredGradient(left / len(lengths), right)
    return GradientSet({"w": mean}, 1.0, len(lengths), start, coverage, tuple(samples))


def weighted(result: GradientSet, name: str) -> np.ndarray:
    """The mean again, from the examples."""
    matrices = [sample[name].dense().double().numpy() for sample in result.samples]
    return np.tensordot(result.weights, matrices, 1)


@given(lengths=st.lists(st.integers(0, 6), min_size=2, max_size=6), tokens=st.integers(1, 40), seed=st.integers(0, 99))
def test_examples_are_thinned_with_their_mean(lengths: list[int], tokens: int, seed: int) -> None:
    lengths = [1, *lengths]
    whole = sampled(lengths)
    result, other = match_tokens(whole, {"w": factored(tokens)}, seed=seed)
    kept = [set(sample["w"].left[:, 0].long().tolist()) for sample in result.samples]
    starts = np.cumsum([0, *lengths])
    assert sum(map(len, kept)) == result["w"].tokens == other["w"].tokens == min(tokens, sum(lengths))
    assert all(own <= set(range(*ends)) for own, ends in zip(kept, pairwise(starts), strict=True))
    np.testing.assert_allclose(result["w"].dense().numpy(), weighted(result, "w"), rtol=1e-5, atol=1e-5)


def test_every_token_of_every_example_is_as_likely_to_be_kept() -> None:
    whole, other = sampled([2, 9, 5]), {"w": factored(4)}
    drawn = [match_tokens(whole, other, seed=seed)[0]["w"].left[:, 0] * 3 for seed in range(800)]
    counts = torch.cat(drawn).round().long().bincount()
    expected = 800 * 4 / 16
    # A chi-square of 15 degrees of freedom; drawing without replacement makes it smaller.
    assert float(((counts - expected) ** 2 / expected).sum()) < 30


@pytest.mark.parametrize("form", ["auto", "factored"])
@pytest.mark.parametrize("reduction", ["example", "token"])
def test_collected_sets_keep_the_examples_weights(reduction: str, form: str) -> None:
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    options = {"per_sample": True, "reduction": reduction, "form": form, "progress": False}
    safety, utility = (collect_gradients(model, tokenizer, part, **options) for part in (SAFETY, UTILITY))
    counts = np.array([sample.loss_tokens for sample in utility.samples])
    share = counts / counts.sum() if reduction == "token" else np.full(len(counts), 1 / len(counts))
    np.testing.assert_allclose(utility.weights, share)
    matched = match_tokens(safety, utility)
    assert [side.examples for side in matched] == [len(SAFETY), len(UTILITY)]
    assert list(matched[0]) == [name for name in safety if "norm" not in name and "embed" not in name]
    assert "norm.weight" in str(matched[0].coverage)
    for name in matched[0]:
        total = [sum(sample[name].tokens for sample in side.samples) for side in matched]
        assert total == [side[name].tokens for side in matched]
        before = [sum(sample[name].tokens for sample in side.samples) for side in (safety, utility)]
        assert set(total) == {min(before)}
        for whole, side in zip((safety, utility), matched, strict=True):
            scale = float(np.abs(weighted(side, name)).max())
            np.testing.assert_allclose(side[name].dense().numpy(), weighted(side, name), atol=1e-6 * scale)
            if whole[name].tokens == side[name].tokens:
                np.testing.assert_allclose(side[name].dense().numpy(), whole[name].dense().numpy(), atol=1e-6 * scale)


def test_more_than_two_sides_meet_at_the_least() -> None:
    sides = sampled([3, 9]), {"w": factored(7)}, sampled([8, 8])
    matched = match_tokens(*sides, seed=1)
    assert [side["w"].tokens for side in matched] == [7, 7, 7]
    assert torch.equal(matched[1]["w"].left, sides[1]["w"].left)
    again = match_tokens(*sides, seed=1)
    assert torch.equal(matched[2]["w"].left, again[2]["w"].left)
    assert not torch.equal(matched[2]["w"].left, match_tokens(*sides, seed=2)[2]["w"].left)
    with pytest.raises(GeometryError, match="two sets to match or more, found 1"):
        match_tokens(sides[0])


def test_a_set_of_means_stays_a_set() -> None:
    mean = GradientSet(
        {"w": factored(9), "norm": DenseGradient(gaussian(3), 9)}, 1.0, 4, 9, Coverage({"w": 320}, {}, {})
    )
    result, _ = match_tokens(mean, {"w": factored(5)})
    assert isinstance(result, GradientSet)
    assert (result["w"].tokens, list(result), result.samples) == (5, ["w"], ())


def test_sides_of_other_models_and_examples_are_refused() -> None:
    with pytest.raises(GeometryError, match=r"one shape for w, found \(2, 3\) and \(2, 4\)"):
        match_tokens(*({"w": FactoredGradient(torch.ones(3, 2), torch.ones(3, size))} for size in (3, 4)))
    with pytest.raises(GeometryError, match="found a str as the given set; collect them first"):
        match_tokens("safety", "utility")
