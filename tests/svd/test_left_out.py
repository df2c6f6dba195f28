"""Spectra without a group of examples to first order: their derivative, and the coverage of their intervals."""

import numpy as np
import pytest
import torch

from geomkit.errors import GeometryError
from geomkit.gradients.factored import FactoredGradient
from geomkit.svd import layer_measure
from geomkit.svd.layer_spectrum import SMOOTH_STATISTICS
from geomkit.svd.left_out import exact_spectra, group_parts
from geomkit.svd.spectrum import spectrum
from tests.helpers.example_sets import Drawing, drawn_set, heavy, low_rank, power_law
from tests.helpers.forms import dense, drawn, seeded


def standard_errors(result, monkeypatch: pytest.MonkeyPatch, bound: int) -> np.ndarray:
    """Jackknife errors of all smooth statistics, with spectra beyond this bound to first order."""
    monkeypatch.setattr(layer_measure, "EXACT_BOUND", bound)
    measured = spectrum(result, null_draws=0, groups=len(result.samples))
    left_out = np.column_stack([measured.left_out(statistic)[:, 0] for statistic in SMOOTH_STATISTICS])
    return np.sqrt((len(left_out) - 1) * left_out.var(0))


def test_first_order_is_the_derivative_of_the_spectrum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of σ(G − ε G_j) at ε = 0, by central differences of dense SVDs, for the large singular values."""
    for tokens in (3, 12):
        result = drawn_set(power_law, np.random.default_rng(0), [tokens] * 6)
        monkeypatch.setattr(layer_measure, "EXACT_BOUND", 0)
        measured = spectrum(result, null_draws=0)
        matrices = np.array([sample["w"].dense().double().numpy() for sample in result.samples]) / 6
        for matrix, without in zip(matrices, measured.without["w"], strict=True):
            ends = [np.linalg.svd(matrices.sum(0) - e * matrix, compute_uv=False) for e in (1e-4, -1e-4)]
            slopes = (ends[0] - ends[1]) / 2e-4
            bound = measured.layers["w"].rank_bound
            kept = np.sort(measured.layers["w"].singular_values + slopes[:bound])[::-1]
            np.testing.assert_allclose(without.singular_values[:5], kept[:5], rtol=1e-3)


@pytest.mark.parametrize("form", ["factored", "tied", "indexed", "dense", "sum"])
def test_parts_of_every_form_are_the_tokens_parts(form: str) -> None:
    generator = seeded()
    parts = [drawn(form, (40, 30), generator) for _ in range(4)]
    groups = [np.array([0, 2]), np.array([1]), np.array([3])]
    matrices = [dense(part) for part in parts]
    u, values, v = np.linalg.svd(sum(matrices), full_matrices=False)
    result = group_parts(parts, groups, 30)
    for row, group in zip(result, groups, strict=True):
        expected = np.einsum("ri,rc,ic->i", u, sum(matrices[place] for place in group), v)
        np.testing.assert_allclose(row[:3], expected[:3], atol=1e-4 * values[0])


@pytest.mark.parametrize(
    "draw",
    [
        pytest.param(low_rank(), id="low rank"),
        pytest.param(power_law, id="power law"),
        pytest.param(heavy, id="heavy tails"),
    ],
)
def test_intervals_to_first_order_cover_and_are_cautious(draw: Drawing, monkeypatch: pytest.MonkeyPatch) -> None:
    """At least .93 of the 95 % intervals hold the truth; errors are 0.8 to 2.5 times those of leaving examples out."""
    generator = np.random.default_rng(1)
    monkeypatch.setattr(layer_measure, "EXACT_BOUND", 0)
    result = []
    for _ in range(150):
        drawn = drawn_set(draw, generator, generator.integers(8, 17, 16).tolist())
        measured = spectrum(drawn, null_draws=0)
        result.append([(measured.mean(statistic), *measured.interval(statistic)) for statistic in SMOOTH_STATISTICS])
    values, low, high = np.array(result).transpose(2, 0, 1)
    covered = ((low <= values.mean(0)) & (values.mean(0) <= high)).mean(0)
    assert (covered >= 0.93).all(), dict(zip(SMOOTH_STATISTICS, covered, strict=True))
    ratios = [
        standard_errors(drawn, monkeypatch, 0) / standard_errors(drawn, monkeypatch, 1000)
        for drawn in (drawn_set(draw, generator, [12] * 16) for _ in range(8))
    ]
    assert (np.mean(ratios, 0) > 0.8).all()
    assert (np.mean(ratios, 0) < 2.5).all()


@pytest.mark.parametrize("shape", [(48, 20), (20, 48)])
@pytest.mark.parametrize("tokens", [2, 15])
def test_spectra_without_a_group_are_those_of_dense_matrices(shape: tuple[int, int], tokens: int) -> None:
    """Of few tokens, and of so many that the sums are formed as matrices; to 1e-6 of the largest value."""
    generator = seeded()
    factors = [[torch.randn(tokens, size, generator=generator) for size in shape] for _ in range(6)]
    parts = [FactoredGradient(left, right) for left, right in factors]
    groups = [np.array([0, 3]), np.array([1, 2, 4]), np.array([5])]
    result = exact_spectra("w", parts, groups)
    for group, without in zip(groups, result, strict=True):
        rest = sum(dense(part) for place, part in enumerate(parts) if place not in group)
        values = np.linalg.svd(rest, compute_uv=False)
        assert without.tokens == tokens * (6 - len(group))
        assert len(without.singular_values) == without.rank_bound == min(*shape, without.tokens)
        np.testing.assert_allclose(without.singular_values, values[: without.rank_bound], atol=1e-6 * values[0])


@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_without_a_group_that_dominates_the_small_rest_is_exact(scale: float) -> None:
    """The rest is a difference, in which the dominating group cancels."""
    rng = np.random.default_rng(0)
    factors = [(rng.standard_normal((6, 16)), rng.standard_normal((6, 20))) for _ in range(8)]
    factors[0] = (scale * factors[0][0], factors[0][1])
    parts = [FactoredGradient(torch.tensor(left).float(), torch.tensor(right).float()) for left, right in factors]
    spectra = exact_spectra("w", parts, [np.array([0]), np.arange(1, 4), np.arange(4, 8)])
    rest = sum(part.dense().double().numpy() for part in parts[1:])
    expected = np.linalg.svd(rest, compute_uv=False)
    np.testing.assert_allclose(spectra[0].singular_values, expected, atol=1e-6 * expected[0])


@pytest.mark.parametrize("form", ["indexed", "sum"])
def test_the_rank_bound_without_a_group_is_that_of_the_form(form: str) -> None:
    """Which may differ from the number of tokens left, as of an embedding."""
    generator = seeded()
    parts = [drawn(form, (12, 9), generator) for _ in range(3)]
    groups = [np.array([place]) for place in range(3)]
    for group, layer in zip(groups, exact_spectra("w", parts, groups), strict=True):
        matrix = sum(dense(part) for place, part in enumerate(parts) if place not in group)
        expected = np.linalg.svd(matrix, compute_uv=False)
        kept = min(len(expected), layer.rank_bound)
        assert len(layer.singular_values) == kept
        np.testing.assert_allclose(layer.singular_values, expected[:kept], atol=1e-4 * expected[0])
        np.testing.assert_allclose(expected[kept:], 0.0, atol=1e-4 * expected[0])


def test_a_value_that_is_not_finite_is_refused() -> None:
    parts = [FactoredGradient(torch.ones(9, 5), torch.ones(9, 4)) for _ in range(3)]
    parts[1].left[2, 1] = float("inf")
    with pytest.raises(GeometryError, match="expected finite gradients"):
        exact_spectra("w", parts, [np.array([0]), np.array([1]), np.array([2])])
