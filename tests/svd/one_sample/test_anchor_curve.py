"""How many anchors it takes: against dense SVDs of the same splits, and on planted directions."""

import numpy as np
import pytest

from geomkit.errors import GeometryError
from geomkit.gradients.checks import with_controls
from geomkit.gradients.gradient_set import GradientSet
from geomkit.svd.one_sample.anchor_curve import _split, anchor_curve
from tests.helpers.forms import dense
from tests.svd.one_sample.test_study import FULL, NAME, drawn, gradient_set, leading


def test_overlaps_are_those_of_dense_means_of_the_same_splits() -> None:
    safety, control = drawn(9, 0, shared=2), drawn(5, 1)
    curve = anchor_curve(safety, {"other": control}, rank=3, draws=3, seed=5)
    assert curve.counts == (1, 2, 4)
    matrices = [dense(sample[NAME]) for side in (safety, control) for sample in side.samples]
    generator = np.random.default_rng(5)
    sets = with_controls(safety, {"other": control})
    for draw in range(3):
        reference, groups = _split(sets, 4, generator)
        assert not set(reference) & set(groups["safety"])
        assert len(groups["safety"]) == len(reference) + 1
        assert sorted(groups["other"]) == list(range(9, 14))
        fixed = leading(sum(matrices[place] for place in reference), 3, "left")
        for name, places in groups.items():
            means = [leading(sum(matrices[place] for place in places[:count]), 3, "left") for count in curve.counts]
            expected = [((fixed.T @ basis) ** 2).sum() / 3 for basis in means]
            assert curve.draws[name][draw] == pytest.approx(expected, abs=1e-5)


def test_a_planted_subspace_is_approached_and_what_is_needed_follows() -> None:
    curve = anchor_curve(drawn(32, 0, shared=3, strength=4.0), drawn(32, 1), rank=3)
    means = curve.means()
    assert curve.counts == (1, 2, 4, 8, 16)
    assert (np.diff(means) > 0.01).all()
    assert curve.ceiling == means[-1] > 0.7
    assert curve.needed(float(means[2])) == 4
    assert curve.needed(float(means[2]) + 1e-9) == 8
    assert curve.needed(2.0) is None
    assert curve.means("control").max() < 0.3
    low, high = curve.band()
    assert (low <= means).all()
    assert (means <= high).all()
    assert f"90 % {curve.needed(0.9 * curve.ceiling)}" in str(curve)


def test_unrelated_examples_stay_where_random_subspaces_are() -> None:
    curve = anchor_curve(drawn(16, 0), rank=4)
    assert curve.means() == pytest.approx(np.full(4, 4 / 48), abs=0.05)


def test_a_matched_control_comes_from_the_places_of_the_anchors() -> None:
    """The safety set itself as a control never meets its own reference: the two curves are one."""
    safety = drawn(8, 0, shared=2)
    curve = anchor_curve(safety, {"itself": safety}, rank=3)
    assert curve.draws["itself"] == pytest.approx(curve.draws["safety"], abs=1e-9)


def test_frame_seed_side_and_counts() -> None:
    safety = drawn(8, 0)
    curve, again, other = (anchor_curve(safety, counts=[3], rank=2, side="right", seed=seed) for seed in (0, 0, 1))
    assert curve.counts == (3, 4)
    assert curve.expected == 2 / 40
    assert np.array_equal(curve.draws["safety"], again.draws["safety"])
    assert not np.array_equal(curve.draws["safety"], other.draws["safety"])
    frame = curve.to_frame()
    assert list(frame["parameter"]) == ["all parameters"] * 2 + [NAME] * 2
    assert frame.loc[1, "value"] == pytest.approx(curve.ceiling)
    assert "with 3" in curve._repr_html_()


def test_what_cannot_be_measured_is_refused() -> None:
    safety = drawn(8, 0)
    with pytest.raises(GeometryError, match=r"between 1 and 4, half of the examples, found \[8\]"):
        anchor_curve(safety, counts=[8])
    with pytest.raises(GeometryError, match="other names than 'safety'"):
        anchor_curve(safety, {"safety": safety})
    with pytest.raises(GeometryError, match="at least 4 per-sample gradients in the control set, found 3"):
        anchor_curve(safety, drawn(3, 1))
    with pytest.raises(GeometryError, match="per_sample=True"):
        anchor_curve(GradientSet(safety.layers, 1.0, 8, 32, FULL))
    empty = gradient_set([{NAME: sample[NAME].scaled(0.0)} for sample in safety.samples])
    with pytest.raises(GeometryError, match="found none"):
        anchor_curve(empty)


def test_sums_that_cancel_have_no_subspace() -> None:
    single = drawn(1, 0).samples[0][NAME]
    samples = [{NAME: single.scaled(1.0 if place % 2 else -1.0)} for place in range(4)]
    values = anchor_curve(gradient_set(samples), rank=2, draws=10).draws["safety"]
    assert np.isfinite(values).all()
    assert set(values.round(6).ravel()) == {0.0, 1.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank of at least 1, a whole number, found 0"),
        ({"rank": 2.5}, "found 2.5"),
        ({"draws": 0}, "at least 1, found draws=0"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(GeometryError, match=message):
        anchor_curve(drawn(8, 0), **options)
