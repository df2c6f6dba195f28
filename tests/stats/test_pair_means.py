"""Means over pairs: their intervals and permutation tests against simulations in which the truth is known."""

import numpy as np
import pytest

from geomkit.stats.pair_means import mean_between, within_between


def blocks(
    counts: tuple[int, int], leans: tuple[float, float], generator: np.random.Generator, paired: float = 0.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Overlaps of random subspaces of a small space that lean towards a common one; rows may share a part by place."""
    shared = paired * generator.normal(size=(max(counts), 12, 2))
    vectors = [
        generator.normal(size=(count, 12, 2)) + lean * np.eye(12, 2) + shared[:count]
        for count, lean in zip(counts, leans, strict=True)
    ]
    bases = np.linalg.qr(np.concatenate(vectors))[0]
    values = (np.einsum("iab,jac->ijbc", bases, bases) ** 2).sum((2, 3)) / 2
    n = counts[0]
    return values[:n, :n], values[:n, n:], values[n:, n:]


NULLS = [((12, 12), 0.0, 0.0), ((14, 14), 2.0, 2.0), ((16, 9), 2.0, 0.0)]


@pytest.mark.parametrize(("counts", "lean", "paired"), NULLS)
def test_labels_that_mean_nothing_are_rejected_once_in_twenty(
    counts: tuple[int, int], lean: float, paired: float
) -> None:
    generator = np.random.default_rng(0)
    drawn_blocks = (blocks(counts, (lean, lean), generator, paired) for _ in range(1000))
    p_values = [within_between(*result, generator, 99, 0.95).p_value for result in drawn_blocks]
    assert np.mean(np.array(p_values) <= 0.05) == pytest.approx(0.05, abs=0.015)


@pytest.mark.parametrize(("counts", "leans"), [((14, 14), (2.0, 2.0)), ((20, 12), (3.0, 1.0)), ((12, 12), (0.0, 1.0))])
def test_intervals_hold_the_mean(counts: tuple[int, int], leans: tuple[float, float]) -> None:
    generator = np.random.default_rng(1)
    rows = []
    for _ in range(1000):
        own, across, other = blocks(counts, leans, generator)
        contrast = within_between(own, across, other, generator, 1, 0.95)
        within, between = mean_between(own, True, 0.95), mean_between(across, False, 0.95)
        rows += [(contrast.value, *contrast.interval), (within[0], *within[1]), (between[0], *between[1])]
    values, low, high = np.array(rows).reshape(1000, 3, 3).transpose(2, 0, 1)
    covered = ((low <= values.mean(0)) & (values.mean(0) <= high)).mean(0)
    assert covered == pytest.approx(np.full(3, 0.95), abs=0.025)


def test_a_planted_subspace_is_found() -> None:
    """Fourteen examples that lean towards two directions of twelve, beside fourteen that do not: power above .9."""
    generator = np.random.default_rng(2)
    drawn_blocks = (blocks((14, 14), (2.5, 0.0), generator) for _ in range(200))
    p_values = [within_between(*result, generator, 99, 0.95).p_value for result in drawn_blocks]
    assert np.mean(np.array(p_values) <= 0.05) > 0.9


def test_a_tight_control_does_not_hide_a_contrast() -> None:
    """Examples of the control overlap among themselves far more, which is no reason to keep the safety side's."""
    generator = np.random.default_rng(3)
    own, across, other = blocks((14, 14), (2.5, 0.0), generator)
    tight = np.where(np.eye(14, dtype=bool), other, 0.9)
    assert within_between(own, across, tight, generator, 499, 0.95).p_value <= 0.01
