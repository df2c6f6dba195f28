"""The span of examples: against dense SVDs of the stacked gradients, and its intervals by simulation."""

import numpy as np
import pytest
import torch

from geomkit import plots
from geomkit.collection.collect import collect_gradients
from geomkit.collection.sample_grams import sample_grams
from geomkit.errors import GeometryError
from geomkit.gradients.gradient_set import GradientSet, layer_grams
from geomkit.inputs.parameters import ALL_PARAMETERS, layer_name
from geomkit.stats.jackknife import jackknife_groups
from geomkit.svd.example_span import span
from geomkit.svd.layer_spectrum import SMOOTH_STATISTICS
from geomkit.svd.spectrum_contrast import compare_spectra
from tests.helpers.figures import trace
from tests.helpers.tiny import SAFETY, UTILITY, tiny_llama, tiny_tokenizer


@pytest.fixture(scope="module")
def collected() -> GradientSet:
    return collect_gradients(tiny_llama(), tiny_tokenizer(), UTILITY, per_sample=True, progress=False)


def stacked(result: GradientSet, name: str) -> np.ndarray:
    """(N, entries): the flattened gradient of each example."""
    return np.array([sample[name].dense().double().numpy().ravel() for sample in result.samples])


def values_of(matrix: np.ndarray, unit: bool) -> np.ndarray:
    norms = np.linalg.norm(matrix, axis=1, keepdims=True)
    values = np.linalg.svd(matrix / norms if unit else matrix, compute_uv=False)
    return np.pad(values, (0, len(matrix) - len(values)))


@pytest.mark.parametrize("unit", [True, False])
def test_singular_values_are_those_of_the_stacked_gradients(collected: GradientSet, unit: bool) -> None:
    """Of every parameter, norms and embeddings included, and of all in one row."""
    result = span(collected, unit=unit)
    assert list(result.layers) == list(collected)
    for name, layer in result.layers.items():
        expected = values_of(stacked(collected, name), unit)
        np.testing.assert_allclose(layer.singular_values, expected, atol=1e-6 * expected[0])
        assert (layer.tokens, layer.rank_bound) == (len(UTILITY), len(UTILITY))
    whole = np.hstack([stacked(collected, name) for name in collected])
    (layer,) = span(collected, by="model", unit=unit).layers.values()
    assert layer.parameter == ALL_PARAMETERS
    np.testing.assert_allclose(layer.singular_values, values_of(whole, unit), rtol=1e-5)


@pytest.mark.parametrize("unit", [True, False])
def test_a_layer_is_one_vector_of_all_its_parameters(collected: GradientSet, unit: bool) -> None:
    result = span(collected, by="layer", unit=unit)
    assert list(result.layers) == ["embedding", "layers.0", "layers.1", "norm", "head"]
    for name, layer in result.layers.items():
        whole = np.hstack([stacked(collected, parameter) for parameter in collected if layer_name(parameter) == name])
        expected = values_of(whole, unit)
        np.testing.assert_allclose(layer.singular_values, expected, atol=1e-6 * expected[0])
    assert list(result.to_frame()["layer"].dropna().unique()) == [0, 1]
    assert {"whole layer", "outside the layers"} == {
        note.text for note in plots.plot_effective_rank(result).layout.annotations
    }


def test_left_out_are_the_spans_of_the_others(collected: GradientSet) -> None:
    result = span(collected, groups=2, seed=3)
    groups = jackknife_groups(len(UTILITY), 2, np.random.default_rng(3))
    for name in collected:
        matrix = stacked(collected, name)
        for group, layer in zip(groups, result.without[name], strict=True):
            expected = values_of(np.delete(matrix, group, axis=0), unit=True)
            np.testing.assert_allclose(layer.singular_values, expected, atol=1e-6 * expected[0])


def test_the_null_is_orthogonal_examples_of_the_same_norms(collected: GradientSet) -> None:
    assert span(collected).null_mean("effective_rank") == pytest.approx(len(UTILITY))
    name = "lm_head.weight"
    norms = np.linalg.norm(stacked(collected, name), axis=1)
    (null,) = span(collected, unit=False).null[name]
    np.testing.assert_allclose(null.singular_values, np.sort(norms)[::-1], rtol=1e-6)


def test_streamed_grams_give_the_same(collected: GradientSet) -> None:
    grams = sample_grams(tiny_llama(), tiny_tokenizer(), UTILITY, progress=False)
    for direct, streamed in zip(span(collected).layers.values(), span(grams).layers.values(), strict=True):
        np.testing.assert_allclose(direct.singular_values, streamed.singular_values, atol=1e-6 * len(UTILITY))


def test_an_example_without_a_gradient_has_no_direction() -> None:
    gram = torch.diag(torch.tensor([4.0, 9.0, 0.0]))
    (layer,) = span({"w": gram}, groups=2).layers.values()
    np.testing.assert_allclose(layer.singular_values, [1, 1, 0], atol=1e-12)


def test_what_is_no_gram_of_one_set_is_refused(collected: GradientSet) -> None:
    other = collect_gradients(tiny_llama(), tiny_tokenizer(), SAFETY, per_sample=True, progress=False)
    with pytest.raises(GeometryError, match=r"\(N, N\) inner products of N ≥ 2"):
        span(layer_grams(collected, other))
    for few in ({}, {"w": torch.ones(1, 1)}, {"w": torch.eye(2), "v": torch.eye(3)}):
        with pytest.raises(GeometryError, match="N ≥ 2"):
            span(few)
    with pytest.raises(GeometryError, match=r"no symmetry in \['w'\]"):
        span({"w": torch.tensor([[1.0, 2.0], [0.0, 1.0]])})
    with pytest.raises(GeometryError, match="per_sample=True"):
        span(GradientSet({}, 1.0, 3, 9, collected.coverage))


@pytest.mark.parametrize("examples", [16, 32])
def test_intervals_cover(examples: int) -> None:
    """A population whose directions fall like a power, in 16 groups."""
    generator = np.random.default_rng(0)
    runs = []
    for seed in range(300):
        rows = generator.standard_normal((examples, 300)) * np.arange(1, 301) ** -0.75
        measured = span({"w": torch.from_numpy(rows @ rows.T)}, seed=seed)
        runs.append([(measured.mean(statistic), *measured.interval(statistic)) for statistic in SMOOTH_STATISTICS[:6]])
    values, low, high = np.array(runs).transpose(2, 0, 1)
    truth = values.mean(0)
    covered = ((low <= truth) & (truth <= high)).mean(0)
    assert ((covered >= 0.9) & (covered <= 0.985)).all(), dict(zip(SMOOTH_STATISTICS, covered, strict=False))


def drawn_gram(generator: np.random.Generator, directions: int) -> dict[str, torch.Tensor]:
    rows = generator.standard_normal((16, directions)) @ np.eye(directions, 200)
    rows += 0.05 * generator.standard_normal((16, 200))
    return {"w": torch.from_numpy(rows @ rows.T)}


def test_contrasts_tell_spans_apart_with_power_above_nine_in_ten_and_few_false_alarms() -> None:
    """Of 16 examples: 4 directions against 12 (against 8 it is .6, against 6 .2); 4 against 4 in 2 % of 200."""
    generator = np.random.default_rng(1)

    def p_value(a: int, b: int) -> float:
        contrast = compare_spectra(*(span(drawn_gram(generator, directions)) for directions in (a, b)))
        return contrast.p_value("entropy_rank")

    assert np.mean([p_value(4, 12) < 0.05 for _ in range(60)]) > 0.9
    assert np.mean([p_value(4, 4) < 0.05 for _ in range(200)]) <= 0.05


def test_the_figures_of_spectra_draw_spans(collected: GradientSet) -> None:
    result = span(collected)
    expected = np.median([layer.singular_values / layer.singular_values[0] for layer in result.layers.values()], axis=0)
    np.testing.assert_allclose(trace(plots.plot_spectrum(result, names=["safety"]), "safety").y, expected, rtol=1e-6)
    assert trace(plots.plot_cer(result), "gradient").y[-1] == pytest.approx(1)
    assert "outside the layers" in {note.text for note in plots.plot_effective_rank(result).layout.annotations}
    layers = plots.plot_effective_rank(span(collected, by="layer")).layout.title
    assert layers.text.replace("<br>", " ") == "Effective rank of the span by layer"
    assert "orthogonal" in layers.subtitle.text
    whole = span(collected, by="model")
    assert plots.plot_effective_rank(whole).data[1].y[0] == pytest.approx(whole.mean("effective_rank"))
    assert compare_spectra(result, result).plot().data


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"confidence": 95}, "found 95; give .95, not 95"),
        ({"confidence": 1.0}, "found 1.0"),
        ({"groups": 1}, "0 for no intervals, found groups=1"),
        ({"groups": -1}, "found groups=-1"),
        ({"by": "layers"}, "one of parameter, layer, model, found 'layers'"),
        ({"by": ["layer"]}, r"found \['layer'\]"),
        ({"by": None}, "found None"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(GeometryError, match=said):
        span({"w": torch.eye(4)}, **options)


@pytest.mark.parametrize("argument", [UTILITY, "safety", None, [1]], ids=["Dataset", "str", "None", "list"])
def test_examples_are_no_gradients(argument: object) -> None:
    with pytest.raises(
        GeometryError, match=r"from collect_gradients\(\.\.\., per_sample=True\), found .* collect them"
    ):
        span(argument)


def test_no_groups_give_no_intervals_and_what_is_not_finite_is_refused() -> None:
    result = span({"w": torch.eye(4)}, groups=0)
    assert result.unit == "examples"
    assert "[" not in str(result)
    with pytest.raises(GeometryError, match="not finite in w"):
        span({"w": torch.full((3, 3), float("nan"))})


def test_spans_of_other_numbers_of_examples_do_not_compare() -> None:
    four, five = (span({"w": torch.eye(size)}) for size in (4, 5))
    with pytest.raises(GeometryError, match=r"equal numbers of examples, found 4 and 5; .* as many of each set"):
        compare_spectra(four, five)
