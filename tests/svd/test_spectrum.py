"""Spectra of sets: their nulls, and their intervals over examples."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from geomkit.collection.collect import collect_gradients
from geomkit.errors import GeometryError
from geomkit.gradients.dense import DenseGradient
from geomkit.gradients.factored import FactoredGradient
from geomkit.stats.jackknife import jackknife_groups, jackknife_interval
from geomkit.svd.layer_spectrum import SMOOTH_STATISTICS, LayerSpectrum
from geomkit.svd.spectrum import Spectrum, spectrum
from tests.helpers.example_sets import Drawing, drawn_set, heavy, low_rank, matched_to, power_law
from tests.helpers.gradients import factored, gaussian, indexed
from tests.helpers.tiny import UTILITY, tiny_llama, tiny_tokenizer

RANKS = ("numeric_rank", "effective_rank", "entropy_rank", "participation_ratio", "stable_rank")
JUMPING = ("numeric_rank", "rank90", "rank95", "rank99")


def effective_rank(matrix: np.ndarray) -> float:
    values = np.linalg.svd(matrix, compute_uv=False)
    shares = values[values > 0] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


@pytest.mark.parametrize("reduction", ["example", "token"])
@pytest.mark.parametrize("form", ["auto", "factored"])
def test_left_out_are_the_spectra_of_the_others(reduction: str, form: str) -> None:
    """In every parameter and form: embeddings, linear layers, and a head."""
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    result = collect_gradients(
        model, tokenizer, UTILITY, per_sample=True, reduction=reduction, form=form, progress=False
    )
    measured = spectrum(result, null_draws=0, groups=3, seed=5)
    groups = jackknife_groups(len(UTILITY), 3, np.random.default_rng(5))
    assert "model.embed_tokens.weight" in measured.without
    for name, without in measured.without.items():
        samples = np.array([sample[name].dense().double().numpy() for sample in result.samples])
        for group, layer in zip(groups, without, strict=True):
            kept = np.setdiff1d(np.arange(len(samples)), group)
            expected = np.linalg.svd(np.tensordot(result.weights[kept], samples[kept], 1), compute_uv=False)
            relative = layer.singular_values / layer.singular_values[0]
            np.testing.assert_allclose(relative, (expected / expected[0])[: layer.rank_bound], atol=1e-6)
            assert layer.tokens == sum(result.samples[place][name].tokens for place in kept)


def test_intervals_are_those_of_the_jackknife() -> None:
    result = drawn_set(power_law, np.random.default_rng(0), [5] * 6, ("v", "w"))
    measured = spectrum(result, null_draws=0, confidence=0.9)
    matrices = {name: np.array([sample[name].dense().numpy() for sample in result.samples]) for name in result}
    values = np.array([effective_rank(each.sum(0)) for each in matrices.values()])
    without = np.array(
        [[effective_rank(np.delete(each, place, 0).sum(0)) for each in matrices.values()] for place in range(6)]
    )
    frame = measured.to_frame().query("statistic == 'effective_rank'")
    low, high = jackknife_interval(values, without, confidence=0.9)
    np.testing.assert_allclose(frame[["value", "low", "high"]], np.column_stack([values, low, high]), rtol=1e-5)
    expected = [float(end) for end in jackknife_interval(values.mean(), without.mean(1), confidence=0.9)]
    assert measured.interval("effective_rank") == pytest.approx(expected, rel=1e-5)
    assert f"[{expected[0]:.3g}, {expected[1]:.3g}] (null nan)" in str(measured)


def test_what_has_no_interval() -> None:
    result = drawn_set(power_law, np.random.default_rng(0), [5] * 6)
    frame = spectrum(result, null_draws=0).to_frame().set_index("statistic")
    assert frame.loc[list(JUMPING), ["low", "high"]].isna().all(axis=None)
    assert frame.loc[list(SMOOTH_STATISTICS), ["low", "high"]].notna().all(axis=None)
    assert {*JUMPING, *SMOOTH_STATISTICS} == set(frame.index)
    alone = replace(result, samples=result.samples[:1])
    for bare in (spectrum(dict(result)), spectrum(result, groups=0), spectrum(alone)):
        assert bare.to_frame()[["low", "high"]].isna().all(axis=None)
        assert all(map(math.isnan, bare.interval("effective_rank")))
        assert "[" not in str(bare)
    assert all(map(math.isnan, spectrum(result).interval("rank90")))
    with pytest.raises(GeometryError, match=r"expected one of numeric_rank, .* found 'rank'"):
        spectrum(result).interval("rank")
    with pytest.raises(GeometryError, match="found groups=1"):
        spectrum(result, groups=1)


def test_cer_has_no_interval_where_leaving_out_takes_it_to_one() -> None:
    result = drawn_set(power_law, np.random.default_rng(0), [3] * 7, ("v", "w"))  # 21 tokens, 18 without an example
    frame = spectrum(result, null_draws=0).to_frame().set_index(["statistic", "parameter"])
    assert frame.loc["cer20", ["low", "high"]].isna().all(axis=None)
    assert frame.loc["cer10", ["low", "high"]].notna().all(axis=None)
    assert all(map(math.isnan, spectrum(result).interval("cer20")))
    few = drawn_set(power_law, np.random.default_rng(0), [3] * 3)  # 9 tokens: 1 with and without
    assert spectrum(few).interval("cer10") == (1, 1)


def test_a_zero_gradient_has_no_part_in_the_interval_of_the_mean() -> None:
    result = drawn_set(power_law, np.random.default_rng(0), [5] * 6, ("v", "w"))
    with_zero = replace(
        result,
        layers={**result.layers, "w": result["w"].scaled(0.0)},
        samples=tuple(replace(s, layers={**s.layers, "w": s["w"].scaled(0.0)}) for s in result.samples),
    )
    measured = spectrum(with_zero, null_draws=0)
    frame = measured.to_frame().query("statistic == 'effective_rank' and parameter == 'v'")
    assert measured.interval("effective_rank") == pytest.approx(tuple(frame[["low", "high"]].iloc[0]))


def test_frames_tell_tolerance_tokens_and_bound() -> None:
    result = spectrum(drawn_set(power_law, np.random.default_rng(0), [5] * 6), null_draws=0)
    (layer,) = result.layers.values()
    frame = result.to_frame()
    assert list(frame.columns[:7]) == ["parameter", "kind", "layer", "statistic", "value", "low", "high"]
    assert set(frame["tolerance"]) == {layer.singular_values[0] * 48 * float(np.finfo(np.float32).eps)}
    assert (set(frame["tokens"]), set(frame["rank_bound"])) == ({30}, {30})


def test_nuclear_rank_counts_equal_values_and_is_below_the_effective_rank() -> None:
    result = drawn_set(heavy, np.random.default_rng(0), [5] * 6)
    values = np.linalg.svd(result["w"].dense().double().numpy(), compute_uv=False)
    (layer,) = spectrum(result, null_draws=0).layers.values()
    assert layer.nuclear_rank == pytest.approx(np.linalg.norm(values, 1) ** 2 / np.linalg.norm(values) ** 2, rel=1e-6)
    assert layer.participation_ratio < layer.nuclear_rank < layer.effective_rank
    equal = replace(layer, singular_values=np.array([2.0, 2.0, 2.0, 0.0]))
    assert equal.nuclear_rank == pytest.approx(3)


@pytest.mark.parametrize(
    ("draw", "examples", "groups", "tokens", "least"),
    [
        pytest.param(low_rank(), 16, 16, None, 0.93, id="low rank, 16 examples"),
        pytest.param(power_law, 32, 8, 300, 0.93, id="power law, 32 examples in 8 groups at equal tokens"),
        pytest.param(heavy, 32, 16, None, 0.87, id="heavy tails, 32 examples in 16 groups"),
    ],
)
def test_intervals_cover(draw: Drawing, examples: int, groups: int, tokens: int | None, least: float) -> None:
    """Cautious where examples are alike (.93 to 1), and a little short where few of them have most of the weight."""
    generator = np.random.default_rng(1)
    result = []
    for seed in range(200):
        drawn = drawn_set(draw, generator, generator.integers(8, 20, examples).tolist())
        measured = spectrum(matched_to(drawn, tokens) if tokens else drawn, null_draws=0, groups=groups, seed=seed)
        result.append([(measured.mean(statistic), *measured.interval(statistic)) for statistic in SMOOTH_STATISTICS])
    values, low, high = np.array(result).transpose(2, 0, 1)
    truth = values.mean(0)
    covered = ((low <= truth) & (truth <= high)).mean(0)
    assert (covered >= least).all(), dict(zip(SMOOTH_STATISTICS, covered, strict=True))
    assert covered.mean() < 0.995


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"confidence": 95}, "found 95; give .95, not 95"),
        ({"confidence": 1.0}, "found 1.0"),
        ({"null_draws": -1}, "at least 0, found null_draws=-1"),
        ({"groups": 1}, "0 for no intervals, found groups=1"),
        ({"groups": -1}, "found groups=-1"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, object], said: str) -> None:
    result = drawn_set(power_law, np.random.default_rng(0), [4] * 4)
    with pytest.raises(GeometryError, match=said):
        spectrum(result, **options)


@pytest.mark.parametrize("argument", [UTILITY, "safety", None, [1]], ids=["Dataset", "str", "None", "list"])
def test_examples_are_no_gradients(argument: object) -> None:
    with pytest.raises(
        GeometryError, match=r"from collect_gradients\(\.\.\., per_sample=True\), found .* collect them"
    ):
        spectrum(argument)


def test_what_is_not_finite_is_refused() -> None:
    result = drawn_set(power_law, np.random.default_rng(0), [4] * 4)
    first, *others = result.samples
    spoilt = replace(first, layers={"w": first["w"].scaled(math.nan)})
    for bad in ({"w": spoilt["w"]}, replace(result, samples=(spoilt, *others))):
        with pytest.raises(GeometryError, match=r"not finite in a gradient of shape \(48, 40\)"):
            spectrum(bad)


def test_a_zero_gradient_has_rank_zero_and_is_left_out_of_means() -> None:
    result = spectrum({"a": factored(4, 8, 6), "zero": FactoredGradient(torch.zeros(4, 8), torch.ones(4, 6))})
    zero = result.layers["zero"].statistics()
    assert {zero[name] for name in RANKS} == {0.0}
    assert math.isnan(zero["cer10"])
    assert result.mean("cer10") == 1.0
    assert result.mean("stable_rank") == result.layers["a"].stable_rank


def test_spectrum_of_a_set_has_a_null_for_each_matrix_and_none_for_vectors() -> None:
    gradients = {
        "model.layers.0.mlp.up_proj.weight": factored(6, 40, 30),
        "model.embed_tokens.weight": indexed(),
        "lm_head.weight": DenseGradient(gaussian(14, 9), tokens=50),
        "model.norm.weight": DenseGradient(gaussian(9), tokens=50),
    }
    result = spectrum(gradients, null_draws=3)
    frame = result.to_frame()
    assert list(result.layers) == list(gradients)[:3]
    assert {len(draws) for draws in result.null.values()} == {3}
    assert len(frame) == 3 * 11
    assert ((frame.null_low <= frame.null) & (frame.null <= frame.null_high)).all()
    assert set(frame.kind) == {"mlp", "embedding", "head"}
    assert result.null_mean("numeric_rank") == pytest.approx((6 + 3 + 9) / 3)
    assert "3 parameters" in result._repr_html_()


def test_null_is_reproducible_and_independent_of_the_other_parameters() -> None:
    gradients = {"a": factored(6, 40, 30), "b": factored(6, 40, 30)}
    both, alone = spectrum(gradients, seed=1), spectrum({"b": gradients["b"]}, seed=1)
    assert np.array_equal(both.null["b"][0].singular_values, alone.null["b"][0].singular_values)
    assert not np.array_equal(both.null["a"][0].singular_values, both.null["b"][0].singular_values)
    other = spectrum(gradients, seed=2).null["b"][0]
    assert not np.array_equal(both.null["b"][0].singular_values, other.singular_values)


def test_spectrum_without_a_null_says_so() -> None:
    result = spectrum({"a": factored(6, 40, 30)}, null_draws=0)
    assert result.to_frame().null.isna().all()
    assert math.isnan(result.null_mean("cer10"))


def test_misuse_is_explained() -> None:
    result = spectrum({"a": factored(6, 40, 30)})
    with pytest.raises(GeometryError, match="cer10"):
        result.mean("rank")
    with pytest.raises(GeometryError, match="at least 1"):
        result.layers["a"].cer(0)
    with pytest.raises(GeometryError, match="at most 1"):
        result.layers["a"].rank_at(1.5)


def test_parameters_have_the_same_weight_in_the_null_however_many_draws_they_have() -> None:
    def drawn(name: str, *values: float) -> LayerSpectrum:
        return LayerSpectrum(name, (4, 4), 4, 4, np.array(values))

    null = {"a": (drawn("a", 1.0, 1.0), drawn("a", 1.0, 0.0)), "b": (drawn("b", 1.0, 1.0, 1.0, 1.0),)}
    result = Spectrum({name: draws[0] for name, draws in null.items()}, null)
    assert result.null_mean("effective_rank") == pytest.approx((1.5 + 4) / 2)
