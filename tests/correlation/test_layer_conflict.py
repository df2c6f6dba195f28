"""The conflict's contrast to a control, with equal weights, shares of parameters, and from inner products."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from geomkit.correlation.conflict import conflict
from geomkit.correlation.cosine import PairGrams, contrast_ratio, expected_cosine, permutation_test, permuted_cosines
from geomkit.correlation.layer_conflict import control_difference
from geomkit.correlation.negative_share import negative_share
from geomkit.errors import GeometryError
from geomkit.gradients.gradient_set import layer_grams
from geomkit.stats.permutation import permuted_labels
from geomkit.stats.ratio import Ratio
from tests.correlation.test_conflict import NAMES, dense_cosine, from_rows, grams, planted

DIMENSION = 100
SCALE = np.arange(1, DIMENSION + 1) ** -0.5
SCALE /= np.linalg.norm(SCALE)


def means(generator: np.random.Generator, safety: float, control: float, between: float) -> np.ndarray:
    """Unit expected gradients of safety, control and utility with these cosines; ``between`` safety and control."""
    cosines = np.array([[1, between, safety], [between, 1, control], [safety, control, 1.0]])
    frame = np.linalg.qr(generator.standard_normal((DIMENSION, 3)) * SCALE[:, None]).Q
    return np.linalg.cholesky(cosines) @ frame.T


def sample(generator: np.random.Generator, mean: np.ndarray, examples: int, signal: float = 0.5) -> np.ndarray:
    return math.sqrt(signal) * mean + generator.standard_normal((examples, DIMENSION)) * SCALE


# ------------------------------------------------------------------------------------------------- the contrast


@pytest.mark.parametrize(
    ("sizes", "cosines"),
    [((16, 16, 16), (-0.3, 0.1, 0.5)), ((32, 24, 16), (-0.1, -0.14, 0.3)), ((24,) * 3, (0, 0, 0.9))],
)
def test_contrast_covers_the_planted_difference(
    sizes: tuple[int, int, int], cosines: tuple[float, float, float]
) -> None:
    generator = np.random.default_rng(0)
    draws, hits = 1000, 0
    for _ in range(draws):
        s, c, u = (sample(generator, mean, size) for mean, size in zip(means(generator, *cosines), sizes, strict=True))
        low, high = contrast_ratio(grams(s, u), grams(c, u)).interval(0.95, 2.0)
        hits += low <= cosines[0] - cosines[1] <= high
    assert 0.93 <= hits / draws <= 0.97


def test_contrast_of_one_population_is_rejected_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    p_values = []
    for _ in range(1500):
        safety, _, utility = means(generator, -0.3, 0.0, 0.0)
        s, c = sample(generator, safety, 24, 1.0), sample(generator, safety, 24, 1.0)
        u = sample(generator, utility, 24, 1.0)
        p_values.append(contrast_ratio(grams(s, u), grams(c, u)).p_value)
    assert np.mean(np.array(p_values) <= 0.05) == pytest.approx(0.05, abs=0.015)


def test_contrast_says_what_its_parts_say() -> None:
    generator = np.random.default_rng(2)
    s, c, u = (sample(generator, mean, 20, 2.0) for mean in means(generator, -0.4, 0.2, 0.1))
    result = control_difference(grams(s, u), grams(c, u), 0.95)
    safety_cosine, control = (expected_cosine(grams(side, u), 0.95)[0] for side in (s, c))
    assert result.value == pytest.approx(safety_cosine - control)
    assert result.control == control
    ratio = contrast_ratio(grams(s, u), grams(c, u))
    edge = ratio.interval(1 - result.p_value, 2.0)
    assert min(map(abs, edge)) == pytest.approx(0, abs=1e-6)  # the p-value is that of the interval which ends at zero


def test_a_control_without_a_mean_leaves_everything_open() -> None:
    generator = np.random.default_rng(3)
    s, c, u = (sample(generator, mean, 6) for mean in means(generator, 0.0, 0.0, 0.0))
    result = control_difference(grams(s, u), grams(c - c.mean(0), u), 0.95)
    assert math.isnan(result.value)
    assert (result.interval, result.p_value) == ((-2.0, 2.0), 1.0)


def test_conflict_carries_the_contrast_of_the_whole_and_of_each_parameter() -> None:
    generator = np.random.default_rng(4)
    rows = [sample(generator, mean, 12, 3.0)[:, :96] for mean in means(generator, -0.6, 0.3, 0.1)]
    safety, control, utility = map(from_rows, rows)
    result = conflict(safety, utility, control, draws=50)
    plain = conflict(safety, utility, draws=50)
    assert plain.contrast is None
    assert plain.layers[NAMES[0]].contrast is None
    assert (plain.cosine, plain.interval, plain.p_value) == (result.cosine, result.interval, result.p_value)
    halves = [row.reshape(12, 2, -1)[:, 1] for row in rows]
    expected = control_difference(grams(halves[0], halves[2]), grams(halves[1], halves[2]), 0.95)
    assert result.layers[NAMES[1]].contrast.value == pytest.approx(expected.value, abs=1e-5)
    assert result.contrast.interval[1] < 0
    assert "safety minus control" in str(result)
    frame = result.to_frame()
    assert (frame["contrast_q_value"] >= frame["contrast_p_value"]).all()
    assert "contrast" not in plain.to_frame()
    mean = rows[1].mean(0)
    control_cosines = rows[2] @ mean / np.linalg.norm(mean) / np.linalg.norm(rows[2], axis=1)
    assert result.control_per_example == pytest.approx(control_cosines, abs=1e-5)


# ---------------------------------------------------------------------------------- the voice of each parameter


def test_weights_times_cosines_are_the_cosine() -> None:
    safety, utility = planted(np.random.default_rng(5), (6, 9), -0.4, 0.5)
    frame = (result := conflict(from_rows(safety), from_rows(utility), draws=20)).to_frame()
    assert (frame["weight"] * frame["cosine"]).sum() == pytest.approx(result.cosine, abs=1e-9)
    assert (frame["weight"] > 0).all()


def test_no_parameter_owns_the_unweighted_conflict() -> None:
    safety, utility = planted(np.random.default_rng(6), (12, 12), -0.4, 1.0)
    loud = [rows * np.repeat([1, scale], 150) for rows, scale in ((safety, 100), (utility, 30))]
    quiet, result = (conflict(from_rows(a), from_rows(b), draws=50) for a, b in ((safety, utility), loud))
    assert result.equal_weights.cosine == pytest.approx(quiet.equal_weights.cosine, abs=1e-5)
    assert result.equal_weights.interval == pytest.approx(quiet.equal_weights.interval, abs=1e-5)
    assert result.equal_weights.p_value == quiet.equal_weights.p_value
    assert result.cosine == pytest.approx(result.layers[NAMES[1]].cosine, abs=5e-3)
    units = [
        np.concatenate(
            [half / np.linalg.norm(half, axis=1, keepdims=True) for half in np.split(rows, 2, axis=1)], axis=1
        )
        for rows in (safety, utility)
    ]
    assert result.equal_weights.cosine == pytest.approx(dense_cosine(*units), abs=1e-5)


def test_unweighted_interval_covers_the_planted_cosine_whatever_the_sizes() -> None:
    generator = np.random.default_rng(7)
    draws, hits = 800, 0
    for _ in range(draws):
        layers = []
        for scale in (0.1, 10):  # noise without a preferred direction: scaling to one then turns no expected gradient
            frame = np.linalg.qr(generator.standard_normal((30, 2))).Q
            expected = frame[:, 0], -0.3 * frame[:, 0] + math.sqrt(1 - 0.09) * frame[:, 1]
            safety, utility = (
                generator.pareto(1.5, (24, 1)) * (mean + 0.25 * generator.standard_normal((24, 30)))
                for mean in expected
            )
            layers.append(grams(scale * safety, utility).normalised())
        low, high = expected_cosine(layers[0] + layers[1], 0.95)[1]
        hits += low <= -0.3 <= high
    assert 0.93 <= hits / draws <= 0.97


# -------------------------------------------------------------------------------------------------- the shares


def test_the_share_of_parameters_counts_signs() -> None:
    safety, utility = planted(np.random.default_rng(8), (10, 10), 0.0, 5.0, 60)
    layers = [grams(safety, utility), grams(safety, -3 * utility), grams(safety, safety)]
    share = negative_share(layers, np.random.default_rng(0))
    assert share.value == np.mean([layer.across.mean() < 0 for layer in layers])
    assert 0 <= share.interval[0] <= share.value <= share.interval[1] <= 1


def test_shares_of_parameters_rarely_miss() -> None:
    generator = np.random.default_rng(9)
    cosines = generator.uniform(-0.5, 0.3, 30)
    shares = []
    for _ in range(120):
        common = generator.standard_normal((2, 16, 1))  # what an example does to all parameters at once
        layers = []
        for cosine in cosines:
            safety, utility = planted(generator, (16, 16), float(cosine), 0.5, 20)
            layers.append(grams(safety + 0.05 * common[0], utility + 0.05 * common[1]))
        shares.append(negative_share(layers, generator))
    expected = np.mean([share.value for share in shares])
    covered = np.mean([share.interval[0] <= expected <= share.interval[1] for share in shares])
    assert covered >= 0.9


# --------------------------------------------------------------------------------------------------- other ways


def test_inner_products_say_what_gradients_say() -> None:
    generator = np.random.default_rng(10)
    safety, control, utility = (from_rows(1 + generator.standard_normal((size, 60))) for size in (5, 6, 7))
    result = conflict(safety, utility, control, draws=50)
    again = conflict(
        layer_grams(safety, safety),
        layer_grams(utility, utility),
        layer_grams(control, control),
        across=layer_grams(safety, utility),
        control_across=layer_grams(control, utility),
        draws=50,
    )
    assert again.to_frame().equals(result.to_frame())
    assert (again.cosine, again.contrast, again.equal_weights) == (result.cosine, result.contrast, result.equal_weights)


def test_inner_products_that_do_not_fit_are_refused() -> None:
    safety, utility = (from_rows(rows) for rows in planted(np.random.default_rng(11), (5, 4), 0.0, 1.0, 12))
    within, across, other = layer_grams(safety, safety), layer_grams(safety, utility), layer_grams(utility, utility)
    with pytest.raises(GeometryError, match="same examples"):
        conflict(other, other, across=across)
    with pytest.raises(GeometryError, match="same parameters"):
        conflict({NAMES[0]: within[NAMES[0]]}, other, across=across)
    with pytest.raises(GeometryError, match="both or neither"):
        conflict(within, other, within, across=across)
    with pytest.raises(GeometryError, match="both or neither"):
        conflict(within, other, across=across, control_across=across)
    with pytest.raises(GeometryError, match="across= beside control_across=, found none"):
        conflict(safety, utility, safety, control_across=across)
    with pytest.raises(GeometryError, match="within the utility set beside across=, found gradients"):
        conflict(within, utility, across=across)
    few = {name: gram[:2, :2] for name, gram in within.items()}
    thin = {name: gram[:2] for name, gram in across.items()}
    with pytest.raises(GeometryError, match="at least 3 control"):
        conflict(within, other, few, across=across, control_across=thin)
    with pytest.raises(GeometryError, match="at least one parameter"):
        conflict({}, {}, across={})


# ------------------------------------------------------------------------------------------------- calibration


def test_permutation_p_values_of_one_population_are_uniform_and_of_conflict_small() -> None:
    generator = np.random.default_rng(12)

    def p_value(a: np.ndarray, b: np.ndarray) -> float:
        gram: PairGrams = grams(a, b)
        permuted = permuted_cosines(gram, permuted_labels(len(a), len(b), 99, generator))
        return permutation_test(gram.cosine, permuted, 0.95)[0]

    same, uneven, opposed = [], [], []
    for _ in range(1500):
        pooled = 0.3 * SCALE + generator.standard_normal((20, DIMENSION)) * SCALE
        same.append(p_value(pooled[:8], pooled[8:]))
        pooled *= np.exp(1.5 * generator.standard_normal((20, 1)))  # few examples hold most of the squared norm
        uneven.append(p_value(pooled[:8], pooled[8:]))
    for _ in range(100):
        safety, _, utility = means(generator, -0.3, 0.0, 0.0)
        opposed.append(p_value(sample(generator, safety, 16), sample(generator, utility, 16)))
    for p_values in (same, uneven):
        assert kstest(p_values, "uniform").pvalue > 1e-3
        assert np.mean(np.array(p_values) <= 0.05) == pytest.approx(0.05, abs=0.015)
    assert np.mean(np.array(opposed) <= 0.05) > 0.8


def test_planted_conflict_is_found_with_the_power_that_the_benchmarks_state() -> None:
    generator = np.random.default_rng(13)
    below = []
    for _ in range(300):
        safety, _, utility = means(generator, -0.4, 0.0, 0.5)
        s, u = sample(generator, safety, 32, 0.3), sample(generator, utility, 32, 0.3)
        below.append(expected_cosine(grams(s, u), 0.95)[1][1] < 0)
    assert np.mean(below) == pytest.approx(0.97, abs=0.03)


def test_ratio_of_two_means_has_the_textbook_interval() -> None:
    """Fieller's for paired observations, from its closed form with the samples' covariances."""
    from scipy.stats import t as student

    generator = np.random.default_rng(14)
    pairs = generator.multivariate_normal([1.0, 2.0], [[1, 0.3], [0.3, 0.5]], size=25)
    without = np.array([np.delete(pairs, place, 0).mean(0) for place in range(25)])
    ratio = Ratio(*map(float, pairs.mean(0)), (without[:, 0],), (without[:, 1],))
    (a, b), covariance = pairs.mean(0), np.cov(pairs.T) / 25
    squared = student.ppf(0.975, 24) ** 2
    polynomial = [b * b - squared * covariance[1, 1], -2 * (a * b - squared * covariance[0, 1])]
    roots = np.roots([*polynomial, a * a - squared * covariance[0, 0]])
    assert ratio.interval(0.95, 10.0) == pytest.approx(sorted(roots))
    assert torch.isfinite(torch.tensor(ratio.p_value))
