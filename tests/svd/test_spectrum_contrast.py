"""The difference of two spectra: its arithmetic, its error rates by simulation, and its figure."""

import math
from dataclasses import replace

import numpy as np
import pytest

from geomkit import plots
from geomkit.errors import GeometryError
from geomkit.stats.jackknife import jackknife_interval, jackknife_p_value
from geomkit.stats.multiple_testing import benjamini_hochberg
from geomkit.svd.layer_spectrum import SMOOTH_STATISTICS
from geomkit.svd.spectrum import Spectrum, spectrum
from geomkit.svd.spectrum_contrast import SpectrumContrast, compare_spectra
from tests.helpers.example_sets import Drawing, drawn_set, heavy, low_rank, matched_to, power_law

NAMES = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(3)]


def measured(draw: Drawing, seed: int, parameters=("w",), examples: int = 8, tokens: int = 5, **options) -> Spectrum:
    generator = np.random.default_rng(seed)
    result = drawn_set(draw, generator, [tokens] * examples, parameters)
    return spectrum(result, null_draws=0, seed=seed, **options)


def narrow(generator: np.random.Generator, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Nearly all in two output directions."""
    left, right = power_law(generator, tokens)
    return left * np.where(np.arange(left.shape[1]) < 2, 1, 0.01), right


@pytest.fixture(scope="module")
def contrast() -> SpectrumContrast:
    """The first layer's difference is planted, the others' are not."""
    planted = measured(narrow, 0, NAMES[:1], examples=16)
    a, b = (measured(power_law, seed, NAMES, examples=16) for seed in (1, 2))
    mixed = replace(a, layers={**a.layers, **planted.layers}, without={**a.without, **planted.without})
    return compare_spectra(mixed, b)


def test_rows_are_welch_jackknives_and_false_discoveries_are_bounded(contrast: SpectrumContrast) -> None:
    frame = contrast.to_frame()
    assert list(frame.columns[:4]) == ["parameter", "kind", "layer", "statistic"]
    assert list(dict.fromkeys(frame["parameter"])) == NAMES
    for statistic in SMOOTH_STATISTICS:
        rows = frame[frame["statistic"] == statistic]
        a, b = (np.array([each[name].statistics()[statistic] for name in NAMES]) for each in sides(contrast))
        without = [side.left_out(statistic) for side in (contrast.a, contrast.b)]
        assert without[0].shape == (16, 3)
        low, high = jackknife_interval(a - b, *without)
        np.testing.assert_allclose(rows[["a", "b", "difference"]], np.column_stack([a, b, a - b]))
        np.testing.assert_allclose(rows[["low", "high"]], np.column_stack([low, high]))
        np.testing.assert_allclose(rows["p_value"], jackknife_p_value(a - b, *without))
        np.testing.assert_allclose(rows["q_value"], benjamini_hochberg(rows["p_value"]))
        assert ((rows["p_value"] < 0.05) == ((rows["low"] > 0) | (rows["high"] < 0))).all()


def sides(contrast: SpectrumContrast):
    return contrast.a.layers, contrast.b.layers


def test_the_mean_is_over_parameters_with_the_same_groups(contrast: SpectrumContrast) -> None:
    difference, interval = contrast.mean("stable_rank")
    assert difference == pytest.approx(contrast.a.mean("stable_rank") - contrast.b.mean("stable_rank"))
    without = [side.left_out("stable_rank").mean(1) for side in (contrast.a, contrast.b)]
    assert interval == pytest.approx([float(end) for end in jackknife_interval(difference, *without)])
    assert contrast.p_value("stable_rank") == pytest.approx(float(jackknife_p_value(difference, *without)))
    assert str(contrast).startswith("safety − control: mean effective rank -")
    assert str(contrast).endswith("effective rank differs in 1 of 3 parameters")
    assert "safety − control" in contrast._repr_html_()


def test_statistics_that_jump_have_a_difference_only(contrast: SpectrumContrast) -> None:
    rows = contrast.to_frame().query("statistic == 'rank90'")
    assert rows["difference"].notna().all()
    assert rows[["low", "high", "p_value", "q_value"]].isna().all(axis=None)
    difference, interval = contrast.mean("rank90")
    assert difference == pytest.approx(rows["difference"].mean())
    assert all(map(math.isnan, (*interval, contrast.p_value("rank90"))))


def test_what_does_not_compare_is_refused() -> None:
    whole = measured(power_law, 0, NAMES)
    with pytest.raises(GeometryError, match=r"1 on one side only \(model.layers.2.*match_tokens"):
        compare_spectra(whole, measured(power_law, 1, NAMES[:2]))
    with pytest.raises(GeometryError, match=r"found 40 and 48 in model.layers.0.* \(3 differ\).*match_tokens first"):
        compare_spectra(whole, measured(power_law, 1, NAMES, tokens=6))
    with pytest.raises(GeometryError, match="expected utility spectra with groups of examples left out"):
        compare_spectra(whole, measured(power_law, 1, NAMES, groups=0), names=("safety", "utility"))
    with pytest.raises(GeometryError, match="found none"):
        compare_spectra(Spectrum({}, {}), Spectrum({}, {}))


# ------------------------------------------------------------------------------------------------- error rates


def p_values(first: Drawing, second: Drawing, draws: int, examples: int = 16, tokens: int = 80) -> np.ndarray:
    """One row per pair of independent sets at equal tokens, one column per smooth statistic."""
    generator = np.random.default_rng(3)
    result = []
    for _ in range(draws):
        sets = (drawn_set(draw, generator, generator.integers(5, 12, examples).tolist()) for draw in (first, second))
        contrast = compare_spectra(*(spectrum(matched_to(each, tokens), null_draws=0) for each in sets))
        result.append([contrast.p_value(statistic) for statistic in SMOOTH_STATISTICS])
    return np.array(result)


@pytest.mark.parametrize("draw", [low_rank(), heavy], ids=["low rank", "heavy tails"])
def test_one_population_is_rarely_told_apart_from_itself(draw: Drawing) -> None:
    """At .05, of 150: 0 to .02 by statistic for low rank, .01 to .07 for heavy tails; jackknife errors are cautious."""
    rejected = (p_values(draw, draw, 70) < 0.05).mean(0)
    assert (rejected <= 0.08).all(), dict(zip(SMOOTH_STATISTICS, rejected, strict=True))


def test_a_planted_difference_is_found_with_power_of_six_to_ten_in_ten() -> None:
    """3 shared directions against 12, 24 examples a side: seen were 1 by entropy, .98 nuclear, .6 effective rank."""
    result = p_values(low_rank(3), low_rank(12), 40, examples=24, tokens=120) < 0.05
    power = dict(zip(SMOOTH_STATISTICS, result.mean(0), strict=True))
    assert min(power["entropy_rank"], power["nuclear_rank"]) >= 0.9
    assert power["effective_rank"] >= 0.5


# ------------------------------------------------------------------------------------------------- figures


def test_figure_fills_what_differs(contrast: SpectrumContrast) -> None:
    figure = contrast.plot()
    rows = contrast.to_frame().query("statistic == 'effective_rank'")
    full, hollow = figure.data
    assert (list(full.x), list(hollow.x)) == ([0], [1, 2])
    assert (full.marker.color, hollow.marker.color) == (plots.COLOURS["safety"], "#FFFFFF")
    np.testing.assert_allclose(hollow.y, rows["difference"][1:])
    np.testing.assert_allclose(hollow.y + hollow.error_y.array, rows["high"][1:])
    np.testing.assert_allclose(hollow.y - hollow.error_y.arrayminus, rows["low"][1:])
    assert figure.layout.yaxis.title.text == "difference"
    assert list(figure.layout.xaxis.tickvals) == [0, 1, 2]
    assert figure.layout.shapes[0].y0 == 0
    assert figure.layout.title.text == "Effective rank: safety − control"
    assert "95 % intervals" in figure.layout.title.subtitle.text


def test_figure_draws_other_statistics_and_keeps_its_legend(contrast: SpectrumContrast) -> None:
    alike = compare_spectra(measured(power_law, 1, NAMES), measured(power_law, 2, NAMES))
    full, hollow = plots.plot_spectrum_contrast(alike, "cer10").data
    assert (list(full.x), list(hollow.x)) == ([None], [0, 1, 2])
    assert full.showlegend
    assert plots.plot_spectrum_contrast(contrast, "cer10").layout.title.text == "CER(10): safety − control"
    with pytest.raises(GeometryError, match="found 'rank'"):
        plots.plot_spectrum_contrast(contrast, "rank")


def test_effective_rank_has_lines_for_intervals(contrast: SpectrumContrast) -> None:
    figure = plots.plot_effective_rank(contrast.a, contrast.b)
    rows = contrast.a.to_frame().query("statistic == 'effective_rank'")
    value = figure.data[1]
    np.testing.assert_allclose(value.y + value.error_y.array, rows["high"])
    np.testing.assert_allclose(value.y - value.error_y.arrayminus, rows["low"])
    np.testing.assert_allclose(value.customdata[:, 1:3].astype(float), rows[["low", "high"]])
    assert "interval" in value.hovertemplate
    assert "95 % intervals" in figure.layout.title.subtitle.text
    bare = plots.plot_effective_rank(Spectrum(contrast.a.layers, {}))
    assert "interval" not in bare.data[1].hovertemplate + bare.layout.title.subtitle.text


def test_what_are_no_two_spectra_is_refused() -> None:
    whole = measured(power_law, 0)
    with pytest.raises(GeometryError, match="expected two names, found"):
        compare_spectra(whole, whole, names=("a", "b", "c"))
    with pytest.raises(GeometryError, match="found a dict; measure each with spectrum or span"):
        compare_spectra(whole, {})
    with pytest.raises(GeometryError, match=r"give \.95, not 95"):
        compare_spectra(whole, whole, confidence=95)
    layer = whole.layers["w"]
    wide, spanned = (
        replace(whole, layers={"w": replace(layer, **new)}) for new in ({"shape": (48, 99)}, {"unit": "examples"})
    )
    with pytest.raises(GeometryError, match=r"one shape for w, found \(48, 40\) and \(48, 99\)"):
        compare_spectra(whole, wide)
    with pytest.raises(GeometryError, match="found one of tokens and one of examples"):
        compare_spectra(whole, spanned)


@pytest.mark.parametrize("unit", ["tokens", "examples"])
def test_hovers_say_what_was_counted(unit: str) -> None:
    whole = measured(power_law, 0)
    result = replace(whole, layers={"w": replace(whole.layers["w"], unit=unit)})
    for figure in (plots.plot_effective_rank(result), compare_spectra(result, result).plot()):
        assert any(f"}} {unit}" in (trace.hovertemplate or "") for trace in figure.data)


def test_a_zero_gradient_is_not_told_apart(contrast: SpectrumContrast) -> None:
    zero = measured(lambda generator, tokens: tuple(0 * part for part in power_law(generator, tokens)), 0, NAMES[:1])
    other = measured(power_law, 1, NAMES[:1])
    rows = compare_spectra(zero, other).to_frame()
    assert rows[["low", "high", "p_value", "q_value"]].isna().all(axis=None)
    assert math.isnan(compare_spectra(zero, other).mean("effective_rank")[0])
