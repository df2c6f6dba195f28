import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest

from geomkit.correlation.conflict import conflict
from geomkit.correlation.cosine import PairGrams, expected_cosine, permutation_test, permuted_cosines
from geomkit.errors import GeometryError
from geomkit.gradients.accumulator import add
from geomkit.gradients.dense import DenseGradient
from geomkit.gradients.factored import FactoredGradient
from geomkit.gradients.gradient_set import Coverage, GradientSet
from geomkit.gradients.layer_gradient import LayerGradient
from geomkit.stats.permutation import permuted_labels

FULL = Coverage({}, {}, {})
NAMES = ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight")


def gradient_set(samples: list[dict[str, LayerGradient]]) -> GradientSet:
    sets = tuple(GradientSet(sample, 1.0, 1, 4, FULL) for sample in samples)
    mean = {name: add([sample[name] for sample in samples]).scaled(1 / len(samples)) for name in samples[0]}
    return GradientSet(mean, 1.0, len(samples), 4 * len(samples), FULL, sets)


def from_rows(rows: np.ndarray, scale: float = 1.0) -> GradientSet:
    """Split each example's vector over two (3, d/6) matrices."""
    parts = torch.tensor(rows * scale, dtype=torch.float32).reshape(len(rows), 2, 3, -1)
    return gradient_set([{name: DenseGradient(part[i], 5) for i, name in enumerate(NAMES)} for part in parts])


def planted(
    generator: np.random.Generator, sizes: tuple[int, int], cosine: float, signal: float, dimension: int = 300
) -> tuple[np.ndarray, np.ndarray]:
    """Examples whose expected gradients have a known cosine; ``signal`` is ‖E g‖² / tr Cov(g), the spectrum 1/i."""
    scale = np.arange(1, dimension + 1) ** -0.5
    scale /= np.linalg.norm(scale)
    frame = np.linalg.qr(generator.standard_normal((dimension, 2)) * scale[:, None]).Q
    directions = frame[:, 0], cosine * frame[:, 0] + math.sqrt(1 - cosine**2) * frame[:, 1]
    noise = (generator.standard_normal((size, dimension)) * scale for size in sizes)
    return tuple(math.sqrt(signal) * mean + sample for mean, sample in zip(directions, noise, strict=True))


def grams(safety: np.ndarray, utility: np.ndarray) -> PairGrams:
    return PairGrams(safety @ safety.T, safety @ utility.T, utility @ utility.T)


def dense_cosine(a: np.ndarray, b: np.ndarray) -> float:
    first, second = a.mean(0), b.mean(0)
    return float(first @ second / np.linalg.norm(first) / np.linalg.norm(second))


def test_cosines_are_those_of_the_dense_mean_gradients() -> None:
    safety, utility = planted(np.random.default_rng(0), (6, 9), -0.4, 0.5)
    result = conflict(from_rows(safety), from_rows(utility), draws=50)
    assert result.cosine == pytest.approx(dense_cosine(safety, utility), abs=1e-6)
    halves = [rows.reshape(len(rows), 2, -1)[:, 1] for rows in (safety, utility)]
    assert result.layers[NAMES[1]].cosine == pytest.approx(dense_cosine(*halves), abs=1e-6)
    mean = safety.mean(0)
    inner = utility @ mean
    assert result.negative.successes == (inner < 0).sum()
    assert result.negative.n == 9
    expected = inner / np.linalg.norm(mean) / np.linalg.norm(utility, axis=1)
    assert result.per_example == pytest.approx(expected, abs=1e-6)


def test_factored_and_dense_samples_agree() -> None:
    generator = torch.Generator().manual_seed(0)

    def sample() -> FactoredGradient:
        return FactoredGradient(torch.randn(4, 30, generator=generator), torch.randn(4, 40, generator=generator))

    factored = [[{"w": sample()} for _ in range(5)] for _ in range(2)]
    formed = [[{"w": DenseGradient(example["w"].dense(), 4)} for example in side] for side in factored]
    a, b = (conflict(gradient_set(side[0]), gradient_set(side[1]), draws=50) for side in (factored, formed))
    assert (a.cosine, *a.interval, *a.null_interval) == pytest.approx(
        (b.cosine, *b.interval, *b.null_interval), abs=1e-5
    )


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), scale=st.floats(1e-3, 1e3), cosine=st.floats(-0.9, 0.9))
def test_conflict_ignores_scale_order_and_rotation(seed: int, scale: float, cosine: float) -> None:
    generator = np.random.default_rng(seed)
    safety, utility = planted(generator, (7, 5), cosine, 1.0, 12)
    turn = np.linalg.qr(generator.standard_normal((12, 12))).Q
    before = conflict(from_rows(safety), from_rows(utility), draws=20)
    turned = conflict(from_rows((safety @ turn)[::-1].copy(), scale), from_rows(utility @ turn), draws=20)
    for statistic in ("cosine", "corrected", "interval"):
        assert getattr(turned, statistic) == pytest.approx(getattr(before, statistic), abs=1e-3, nan_ok=True)
    assert turned.negative == before.negative


def test_opposed_sets_are_found_in_conflict() -> None:
    safety, utility = planted(np.random.default_rng(0), (20, 24), -0.7, 1.0)
    result = conflict(from_rows(safety), from_rows(utility), draws=199)
    assert result.interval[0] < -0.7 < result.interval[1] < 0
    assert result.cosine < result.null_interval[0]
    assert result.p_value == 1 / 200
    assert result.negative.value > 0.5
    frame = result.to_frame()
    assert list(frame["layer"]) == [0, 1]
    assert (frame["q_value"] <= 0.05).all()
    assert "shuffled" in result._repr_html_()


def test_noise_draws_the_plain_cosine_to_zero_and_not_the_corrected_one() -> None:
    generator = np.random.default_rng(2)
    drawn = [grams(*planted(generator, (16, 16), -0.6, 0.1)) for _ in range(200)]
    assert np.mean([gram.cosine for gram in drawn]) > -0.45
    assert np.median([expected_cosine(gram, 0.95)[0] for gram in drawn]) == pytest.approx(-0.6, abs=0.05)


@pytest.mark.parametrize(
    ("sizes", "cosine", "signal"),
    [((32, 32), -0.3, 0.3), ((16, 48), 0.0, 0.3), ((32, 24), -0.8, 0.5), ((12, 12), 0.3, 1.0)],
)
def test_interval_covers_the_planted_cosine(sizes: tuple[int, int], cosine: float, signal: float) -> None:
    generator = np.random.default_rng(3)
    draws = 1200
    hits = 0
    for _ in range(draws):
        low, high = expected_cosine(grams(*planted(generator, sizes, cosine, signal, 100)), 0.95)[1]
        hits += low <= cosine <= high
    assert 0.93 <= hits / draws <= 0.97


def test_interval_is_everything_where_a_mean_is_only_noise() -> None:
    generator = np.random.default_rng(4)
    intervals = [expected_cosine(grams(*planted(generator, (8, 8), 0.5, 0.0)), 0.95)[1] for _ in range(50)]
    assert np.mean([interval == (-1.0, 1.0) for interval in intervals]) > 0.8


def test_a_mean_of_noise_is_said_to_be_one() -> None:
    generator = np.random.default_rng(12)
    sets = [from_rows(rows - rows.mean(0)) for rows in planted(generator, (6, 6), 0.0, 0.0, 60)]
    result = conflict(*sets, draws=20)
    assert math.isnan(result.corrected)
    assert "no larger than its noise" in str(result)


def test_p_value_is_uniform_when_examples_are_exchangeable() -> None:
    generator = np.random.default_rng(5)
    p_values = []
    for _ in range(600):
        safety, utility = planted(generator, (8, 12), 0.0, 0.2, 40)
        pooled = np.concatenate([safety, utility])[generator.permutation(20)] + 0.3
        gram = grams(pooled[:8], pooled[8:])
        permuted = permuted_cosines(gram, permuted_labels(8, 12, 99, generator))
        p_values.append(permutation_test(gram.cosine, permuted, 0.95)[0])
    assert kstest(p_values, "uniform").pvalue > 0.01
    assert np.mean(np.array(p_values) <= 0.05) == pytest.approx(0.05, abs=0.025)


def test_permuted_cosines_are_those_of_the_divided_examples() -> None:
    safety, utility = planted(np.random.default_rng(6), (4, 6), -0.2, 1.0)
    labels = permuted_labels(4, 6, 5, np.random.default_rng(0))
    pooled = np.concatenate([safety, utility])
    expected = [dense_cosine(pooled[chosen], pooled[~chosen]) for chosen in labels]
    assert permuted_cosines(grams(safety, utility), labels) == pytest.approx(expected)


def test_seeds_decide_the_draws_and_nothing_else() -> None:
    sets = [from_rows(rows) for rows in planted(np.random.default_rng(7), (6, 6), 0.0, 0.5)]
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    first, again, other = (conflict(*sets, draws=100, seed=seed) for seed in (0, 0, 1))
    assert first.null_interval == again.null_interval != other.null_interval
    assert first.interval == other.interval
    assert np.array_equal(state, np.random.get_state()[1])  # noqa: NPY002


def test_a_layer_without_gradient_has_no_cosine_and_no_significance() -> None:
    safety, utility = planted(np.random.default_rng(8), (5, 5), 0.0, 1.0, 12)
    utility[:, 6:] = 0
    result = conflict(from_rows(safety), from_rows(utility), draws=50)
    empty = result.layers[NAMES[1]]
    assert math.isnan(empty.cosine)
    assert math.isnan(empty.corrected)
    assert (empty.interval, empty.p_value) == ((-1.0, 1.0), 1.0)
    assert not math.isnan(result.cosine)
    assert result.to_frame()["q_value"].notna().all()


def test_sets_that_cannot_be_compared_are_refused() -> None:
    safety, utility = (from_rows(rows) for rows in planted(np.random.default_rng(9), (5, 5), 0.0, 1.0, 12))
    mean_only = GradientSet(safety.layers, 1.0, 5, 20, FULL)
    with pytest.raises(GeometryError, match="per_sample=True"):
        conflict(mean_only, utility)
    with pytest.raises(GeometryError, match="at least 3 utility"):
        conflict(safety, gradient_set([dict(sample) for sample in utility.samples[:2]]))
    renamed = gradient_set([{"other": sample[NAMES[0]], NAMES[1]: sample[NAMES[1]]} for sample in utility.samples])
    with pytest.raises(GeometryError, match="same parameters"):
        conflict(safety, renamed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"confidence": 95}, "found 95; give .95, not 95"),
        ({"confidence": 1.0}, "found 1.0"),
        ({"draws": 0}, "at least 1, found draws=0"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    sides = (from_rows(np.random.default_rng(seed).normal(size=(4, 12))) for seed in (0, 1))
    with pytest.raises(GeometryError, match=message):
        conflict(*sides, **options)


def test_examples_other_models_and_what_is_not_finite_are_refused() -> None:
    side, wide = (from_rows(np.random.default_rng(0).normal(size=(4, size))) for size in (12, 18))
    with pytest.raises(GeometryError, match="found a dict as the utility set"):
        conflict(side, dict(side))
    with pytest.raises(GeometryError, match="found a str as the control set"):
        conflict(side, side, "control")
    with pytest.raises(GeometryError, match=f"one shape for {NAMES[0]}, found .3, 2. and .3, 3."):
        conflict(side, wide)
    with pytest.raises(GeometryError, match=f"not finite in {NAMES[0]}"):
        conflict(side, from_rows(np.full((4, 12), math.nan)))
