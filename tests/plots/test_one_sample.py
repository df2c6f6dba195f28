"""Figures of single examples: every example, the means, the expectation for random subspaces."""

import numpy as np
import pytest
import torch

from geomkit import plots
from geomkit.stats.pair_means import WithinBetween
from geomkit.svd.one_sample.anchor_curve import AnchorCurve, LayerAnchorCurve
from geomkit.svd.one_sample.gradient_map import gradient_map
from geomkit.svd.one_sample.leave_one_out import GroupMean
from geomkit.svd.one_sample.overlaps import Overlaps
from geomkit.svd.one_sample.results import Group, LayerOneSample, OneSample
from tests.helpers.figures import subtitle, trace


def test_one_sample_shows_every_example_and_the_expectation() -> None:
    overlaps, null = np.array([0.5, 0.7, 0.9]), np.array([0.1, 0.3])
    control = GroupMean(0.2, (0.1, 0.3), 0.5, (0.4, 0.6))
    groups = {
        "safety": Group(overlaps, overlaps, GroupMean(0.7, (0.6, 0.8)), GroupMean(0.7, (0.6, 0.8))),
        "refused": Group(null, null, control, control),
    }
    study = OneSample("left", 10, groups, {"w": LayerOneSample("w", 4, 50, groups)})
    figure = plots.plot_one_sample(study)
    assert [trace(figure, name).line.color for name in groups] == [plots.COLOURS["safety"], plots.COLOURS["control"]]
    assert "its 95 % interval" in subtitle(figure)
    np.testing.assert_array_equal(trace(figure, "safety").x, study.overlaps)
    np.testing.assert_array_equal(trace(figure, "refused").x, study.control_overlaps)
    assert any(
        note.text == "safety − refused: +0.500 [+0.400, +0.600]" and note.y == "refused"
        for note in figure.layout.annotations
    )
    mean = trace(figure, "safety: mean")
    assert (mean.x[0], mean.x[0] + mean.error_x.array[0]) == pytest.approx((0.7, 0.8))
    assert figure.layout.shapes[0].x0 == 0.08
    assert "overlap" in figure.layout.xaxis.title.text


def test_anchor_curve_shows_means_bands_ceiling_and_expectation() -> None:
    drawn = {"safety": np.array([[0.2, 0.4], [0.4, 0.6]]), "refused": np.array([[0.1, 0.1], [0.3, 0.3]])}
    curve = AnchorCurve("left", 10, (1, 2), drawn, {"w": LayerAnchorCurve("w", 4, 50, drawn)})
    figure = plots.plot_anchor_curve(curve)
    np.testing.assert_allclose(trace(figure, "safety").y, [0.3, 0.5])
    np.testing.assert_allclose(trace(figure, "refused").y, [0.2, 0.2])
    assert trace(figure, "safety: 90 % of draws").y[0] == pytest.approx(0.39)
    assert sorted(shape.y0 for shape in figure.layout.shapes) == pytest.approx([0.08, 0.5])
    assert "mean over 1 parameter; band: 90 % of 2 random splits" in subtitle(figure)
    assert trace(figure, "refused").line.color == plots.COLOURS["control"]


@pytest.mark.parametrize("method", ["pca", "mds"])
def test_a_map_has_a_point_for_every_example(method: str) -> None:
    vectors = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    plane = gradient_map({"safety": 3, "other": 4}, vectors @ vectors.T, method=method, draws=9)
    figure = plots.plot_gradient_map(plane)
    np.testing.assert_array_equal(trace(figure, "other").x, plane.coordinates[3:, 0])
    assert list(trace(figure, "other").customdata[:, 0]) == [0, 1, 2, 3]
    assert f"{plane.separation:+.3f}" in subtitle(figure)
    assert figure.layout.yaxis.scaleanchor == "x"


def test_overlaps_show_every_mean_and_tell_intervals_and_contrasts() -> None:
    overlaps = Overlaps(
        side="left",
        rank=10,
        names=("a", "b"),
        counts=(4, 4),
        pairs=np.eye(8),
        matrix=np.array([[0.5, 0.2], [0.2, 0.3]]),
        intervals=dict.fromkeys([("a", "a"), ("a", "b"), ("b", "a"), ("b", "b")], (0.1, 0.6)),
        contrasts={("a", "b"): WithinBetween(0.3, (0.2, 0.4), 0.01), ("b", "a"): WithinBetween(0.1, (0.0, 0.2), 0.5)},
        expected=0.05,
        parameters=("w",),
    )
    figure = plots.plot_overlaps(overlaps)
    np.testing.assert_array_equal(figure.data[0].z, overlaps.matrix)
    assert figure.data[0].text[0][
        1
    ] == "a – b<br>overlap <b>0.200</b> [0.100, 0.600]<br>within a less this: +0.300 " + ("[+0.200, +0.400], p = 0.01")
    assert "within" not in figure.data[0].text[0][0]
    assert list(figure.layout.xaxis.ticktext) == ["a", "b"]
    assert "mean over 1 parameter; random subspaces: 0.05" in subtitle(figure)
