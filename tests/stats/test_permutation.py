from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import bootstrap

from geomkit.errors import GeometryError
from geomkit.stats.permutation import bootstrap_interval, percentile_interval, permuted_labels


def test_permuted_labels_deal_groups_of_the_right_sizes_evenly() -> None:
    labels = permuted_labels(3, 5, 4000, np.random.default_rng(0))
    assert (labels.sum(1) == 3).all()
    assert labels.mean(0) == pytest.approx(np.full(8, 3 / 8), abs=0.03)
    assert len(np.unique(labels, axis=0)) == 56


def test_percentile_interval_is_central() -> None:
    assert percentile_interval(np.arange(1001.0)) == pytest.approx((25, 975))


METHODS = ("expanded", "percentile", "BCa")


def coverage(draw: Callable[[], tuple[np.ndarray, np.ndarray | None]], truth: float, method: str, seed: int) -> float:
    generator = np.random.default_rng(seed)
    hits = 0
    for _ in range(1000):
        values, clusters = draw()
        low, high = bootstrap_interval(values, generator, clusters=clusters, method=method, draws=400)
        hits += low <= truth <= high
    return hits / 1000


def test_default_interval_covers_the_mean_of_few_skewed_values() -> None:
    generator = np.random.default_rng(0)
    assert 0.93 <= coverage(lambda: (generator.beta(4, 3, 8), None), 4 / 7, "expanded", 0) <= 0.97


@pytest.mark.parametrize("method", METHODS)
def test_every_interval_covers_the_mean_of_many_values(method: str) -> None:
    generator = np.random.default_rng(1)
    assert 0.93 <= coverage(lambda: (generator.beta(4, 3, 64), None), 4 / 7, method, 0) <= 0.97


@pytest.mark.parametrize("method", ["percentile", "BCa"])
def test_the_other_intervals_are_too_narrow_for_few_values(method: str) -> None:
    generator = np.random.default_rng(2)
    assert 0.85 <= coverage(lambda: (generator.normal(size=8), None), 0.0, method, 0) <= 0.92


def prompts_and_answers(generator: np.random.Generator, prompts: int) -> tuple[np.ndarray, np.ndarray]:
    """One to six answers to each prompt, half of whose variance is the prompt's."""
    prompt = np.repeat(np.arange(prompts), generator.integers(1, 7, prompts))
    return generator.normal(size=prompts)[prompt] + generator.normal(size=len(prompt)), prompt


def test_clusters_are_covered_and_ignoring_them_is_not() -> None:
    generator = np.random.default_rng(4)
    assert 0.93 <= coverage(lambda: prompts_and_answers(generator, 24), 0.0, "expanded", 0) <= 0.97
    assert coverage(lambda: (prompts_and_answers(generator, 24)[0], None), 0.0, "expanded", 0) < 0.85


@pytest.mark.parametrize("method", METHODS)
def test_clusters_of_one_are_examples(method: str) -> None:
    values = np.random.default_rng(0).normal(size=12)
    alone = bootstrap_interval(values, np.random.default_rng(1), method=method)
    assert bootstrap_interval(values, np.random.default_rng(1), method=method, clusters=np.arange(12)) == alone


def test_interval_is_that_of_scipy() -> None:
    values = np.random.default_rng(0).normal(size=20)
    for method in ("percentile", "BCa"):
        found = bootstrap_interval(values, np.random.default_rng(1), method=method, draws=5000)
        expected = bootstrap((values,), np.mean, method=method, n_resamples=5000, rng=np.random.default_rng(2))
        assert found == pytest.approx(tuple(expected.confidence_interval), abs=0.03)


@pytest.mark.parametrize("method", METHODS)
def test_values_that_do_not_vary_have_no_width(method: str) -> None:
    assert bootstrap_interval(np.full(5, 0.3), np.random.default_rng(0), method=method) == pytest.approx((0.3, 0.3))


def test_misuse_is_explained() -> None:
    generator = np.random.default_rng(0)
    with pytest.raises(GeometryError, match="two examples"):
        bootstrap_interval([1.0], generator)
    with pytest.raises(GeometryError, match="two clusters"):
        bootstrap_interval([1.0, 2.0], generator, clusters=["a", "a"])
    with pytest.raises(GeometryError, match="label for each of 2 values, found 1"):
        bootstrap_interval([1.0, 2.0], generator, clusters=["a"])


def test_confidence_and_draws_in_range_are_asked_for() -> None:
    for options, said in (({"confidence": 95}, "give .95, not 95"), ({"draws": 0}, "found draws=0")):
        with pytest.raises(GeometryError, match=said):
            bootstrap_interval([1.0, 2.0], np.random.default_rng(0), **options)
