import pytest
import torch

from geomkit.errors import GeometryError
from geomkit.forms import DenseGradient, FactoredGradient, IndexedGradient
from geomkit.token_matching import match_tokens, subsample_tokens


def gaussian(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def factored(tokens: int, rows: int = 20, columns: int = 16, seed: int = 0) -> FactoredGradient:
    return FactoredGradient(gaussian(tokens, rows, seed=seed), gaussian(tokens, columns, seed=seed + 1))


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
