"""Overlaps of single examples: against dense SVDs."""

import numpy as np
import pytest
import torch

from geomkit.errors import GeometryError
from geomkit.gradients.factored import FactoredGradient
from geomkit.gradients.gradient_set import GradientSet
from geomkit.svd.one_sample.overlaps import overlaps
from tests.svd.one_sample.test_study import FULL, NAME, drawn, gradient_set, leading


def test_overlaps_are_those_of_dense_subspaces() -> None:
    sets = {"a": drawn(4, 0, shared=2), "b": drawn(3, 1)}
    result = overlaps(sets, rank=3, draws=10)
    matrices = [s[NAME].dense().double().numpy() for side in sets.values() for s in side.samples]
    bases = [leading(matrix, 3, "left") for matrix in matrices]
    expected = [[((a.T @ b) ** 2).sum() / 3 for b in bases] for a in bases]
    assert result.pairs == pytest.approx(np.array(expected), abs=1e-5)
    within = [expected[i][j] for i in range(4) for j in range(i)]
    assert result.matrix[0, 0] == pytest.approx(np.mean(within), abs=1e-5)
    assert result.matrix[0, 1] == pytest.approx(np.mean(np.array(expected)[:4, 4:]), abs=1e-5)
    assert result.contrasts["a", "b"].value == pytest.approx(result.matrix[0, 0] - result.matrix[0, 1])
    assert result.expected == 3 / 48


def test_frame_and_headline_say_the_same() -> None:
    result = overlaps({"a": drawn(5, 0, shared=3, strength=15.0), "b": drawn(5, 1), "c": drawn(4, 2)}, rank=3)
    frame = result.to_frame().set_index(["first", "second"])
    assert len(frame) == 9
    assert frame.loc[("a", "b"), "contrast"] == result.contrasts["a", "b"].value
    assert frame.loc[("b", "a"), "value"] == pytest.approx(frame.loc[("a", "b"), "value"])
    assert np.isnan(frame.loc[("a", "a"), "p_value"])
    assert (frame["q_value"].dropna() >= frame["p_value"].dropna()).all()
    assert f"within a {result.matrix[0, 0]:.3f}" in str(result)
    assert "random subspaces 0.062" in result._repr_html_()


def test_the_same_place_is_never_compared_between_sets_of_one_size() -> None:
    """A set and its own copy: within and between are one number, and nothing is found."""
    side = drawn(6, 0, shared=2)
    result = overlaps({"a": side, "b": side}, rank=3)
    assert result.matrix == pytest.approx(np.full((2, 2), result.matrix[0, 0]))
    assert result.contrasts["a", "b"].value == pytest.approx(0, abs=1e-12)
    assert result.contrasts["a", "b"].p_value > 0.9


def test_right_side_and_seeds() -> None:
    sets = {"a": drawn(4, 0), "b": drawn(5, 1)}
    first, again, other = (overlaps(sets, rank=3, side="right", draws=50, seed=seed) for seed in (0, 0, 1))
    assert first.expected == 3 / 40
    assert first.contrasts["a", "b"] == again.contrasts["a", "b"]
    assert np.array_equal(first.pairs, other.pairs)
    assert first.intervals == other.intervals


def test_a_parameter_that_an_example_lacks_is_left_out() -> None:
    def without(side: GradientSet) -> GradientSet:
        return gradient_set([{**sample, "expert": sample[NAME].scaled(0.0)} for sample in side.samples])

    assert overlaps({"a": without(drawn(3, 0)), "b": without(drawn(3, 1))}, rank=2).parameters == (NAME,)


def test_sets_that_cannot_be_compared_are_refused() -> None:
    side = drawn(4, 0)
    with pytest.raises(GeometryError, match=r"found 1; give e\.g\. a control"):
        overlaps({"a": side})
    with pytest.raises(GeometryError, match="in the b set, found 2"):
        overlaps({"a": side, "b": drawn(2, 1)})
    with pytest.raises(GeometryError, match="per_sample=True"):
        overlaps({"a": side, "b": GradientSet(side.layers, 1.0, 4, 16, FULL)})
    empty = gradient_set([{NAME: sample[NAME].scaled(0.0)} for sample in side.samples])
    with pytest.raises(GeometryError, match="found none"):
        overlaps({"a": empty, "b": empty})


def test_examples_without_tokens_in_common_need_no_more_room() -> None:
    sets = {
        name: gradient_set([{"w": FactoredGradient(torch.randn(3, 300), torch.randn(3, 200))} for _ in range(3)])
        for name in "ab"
    }
    assert overlaps(sets, rank=2).matrix.max() < 0.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank of at least 1, a whole number, found 0"),
        ({"rank": 2.5}, "found 2.5"),
        ({"confidence": 95}, "found 95; give .95, not 95"),
        ({"confidence": 1.0}, "found 1.0"),
        ({"draws": -1}, "at least 0, found draws=-1"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(GeometryError, match=message):
        overlaps({"a": drawn(4, 0), "b": drawn(4, 1)}, **options)


def test_sets_need_names() -> None:
    with pytest.raises(GeometryError, match="expected sets by name, found a list"):
        overlaps([drawn(4, 0), drawn(4, 1)])
    with pytest.raises(GeometryError, match="found a str as the b set; collect them first"):
        overlaps({"a": drawn(4, 0), "b": "utility"})
