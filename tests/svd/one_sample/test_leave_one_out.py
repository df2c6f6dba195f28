"""Values without one and without two anchors, against means that are computed without them."""

import numpy as np
import pytest

from geomkit.svd.common_basis import overlaps_between, to_common_basis
from geomkit.svd.one_sample.leave_one_out import leave_one_out_cosines, leave_one_out_overlaps
from tests.helpers.forms import dense
from tests.svd.one_sample.test_study import NAME, drawn


def test_pairs_of_cosines_lack_both_anchors() -> None:
    generator = np.random.default_rng(0)
    anchors, others = generator.normal(size=(5, 9)), generator.normal(size=(7, 9))
    table = leave_one_out_cosines(
        (anchors @ anchors.T)[..., None], (anchors @ others.T)[..., None], (others**2).sum(1)[:, None]
    )
    for c in range(7):
        for j in range(5):
            if j != c % 5:
                mean = anchors.sum(0) - anchors[c % 5] - anchors[j]
                expected = others[c] @ mean / np.linalg.norm(others[c]) / np.linalg.norm(mean)
                assert table.without_two[c, j, 0] == pytest.approx(expected, abs=1e-12)


def test_leaving_out_is_what_a_study_without_that_example_finds() -> None:
    """Cosines, exactly: the study of four anchors and four matched controls is that of five without the last."""
    safety, control = drawn(5, 0, shared=2), drawn(5, 1, shared=1)

    def products(rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        anchors, controls = (
            np.stack([dense(s[NAME]).ravel() for s in side.samples[:rows]]) for side in (safety, control)
        )
        return (anchors @ anchors.T)[..., None], (anchors @ controls.T)[..., None], (controls**2).sum(1)[:, None]

    (without,) = leave_one_out_cosines(*products(5)).replicates()
    assert without[4] == pytest.approx(leave_one_out_cosines(*products(4)).values.mean(0), abs=1e-12)


def test_overlaps_with_two_anchors_left_out_are_nearly_the_sum_of_leaving_out_either() -> None:
    parts = [sample[NAME] for sample in drawn(16, 0, shared=3, strength=3.0).samples]
    common = to_common_basis(parts, "left")
    single, others = common.bases_of_gradients(3), common.leave_one_out_bases(16, 3)
    table = leave_one_out_overlaps(overlaps_between(single, others, 3).numpy()[..., None])
    exact, nearly = [], []
    for j in range(1, 16):
        rest = common.basis_of_sum([place for place in range(1, 16) if place != j], 3)
        exact.append(float(overlaps_between([single[0]], [rest], 3)))
        nearly.append(table.without_two[0, j, 0])
    assert np.corrcoef(exact, nearly)[0, 1] > 0.9
    assert np.std(nearly) == pytest.approx(np.std(exact), rel=0.25)
