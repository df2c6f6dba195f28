"""Figures of whole spectra: medians, nulls, which parameters are drawn, and their hover text."""

import numpy as np
import pytest
import torch

from geomkit import plots
from geomkit.errors import GeometryError
from geomkit.gradients.factored import FactoredGradient
from geomkit.svd.spectrum import Spectrum, spectrum
from tests.helpers.figures import LABELS, NAMES, gradients, legend, subtitle, trace


def test_spectrum_draws_the_median_of_relative_singular_values(safety: Spectrum, utility: Spectrum) -> None:
    figure = plots.plot_spectrum(safety, utility)
    relative = [layer.singular_values / layer.singular_values[0] for layer in safety.layers.values()]
    np.testing.assert_allclose(trace(figure, "safety").y[:6], np.median(relative, axis=0))
    assert np.isnan(trace(figure, "safety").y[6:]).all()
    assert np.isfinite(trace(figure, "utility").y).all()
    assert len(figure.data) == 7  # a line, a null and its range for each, and the nulls' entry in the legend
    assert figure.layout.yaxis.type == "log"
    assert figure.layout.xaxis.title.text == "index i of the singular value"


def test_null_band_encloses_the_null_median(safety: Spectrum) -> None:
    middle, band, *_ = plots.plot_cer(safety).data
    half = len(band.y) // 2
    assert (band.y[:half] >= middle.y).all()
    assert (band.y[half:][::-1] <= middle.y).all()


def test_cer_passes_through_and_ends_at_one(safety: Spectrum) -> None:
    figure = plots.plot_cer(safety, names=["safety"])
    drawn = trace(figure, "safety")
    expected = [np.median([layer.cer(k) for layer in safety.layers.values()]) for k in (1, 3, 6)]
    np.testing.assert_allclose([drawn.y[0], drawn.y[2], drawn.y[-1]], expected)
    assert drawn.y[-1] == pytest.approx(1)
    assert drawn.line.color == plots.COLOURS["safety"]


def test_null_band_survives_ranks_that_differ() -> None:
    mixed = {"w": gradients(3, 0)[NAMES[0]], "v": gradients(9, 0)[NAMES[0]]}
    band = plots.plot_spectrum(spectrum(mixed, null_draws=3)).data[1]
    assert max(band.x) >= 3
    assert min(band.y) > 0


def test_no_null_no_band() -> None:
    assert len(plots.plot_spectrum(spectrum(gradients(4, 0), null_draws=0)).data) == 1


def test_many_singular_values_are_thinned() -> None:
    gradient = FactoredGradient(torch.eye(500), torch.eye(500))
    figure = plots.plot_spectrum(spectrum({"w": gradient}, null_draws=0))
    assert figure.data[0].x[0] == 1
    assert figure.data[0].x[-1] == 500
    assert len(figure.data[0].x) <= 120


def test_names_must_match_the_spectra(safety: Spectrum) -> None:
    with pytest.raises(GeometryError, match="3 spectra and 2 names"):
        plots.plot_spectrum(safety, safety, safety)
    with pytest.raises(GeometryError, match="at least one"):
        plots.plot_cer()


def test_zero_gradients_are_refused() -> None:
    zero = spectrum({"w": FactoredGradient(torch.zeros(2, 4), torch.zeros(2, 4))}, null_draws=1)
    with pytest.raises(GeometryError, match="only zeros"):
        plots.plot_spectrum(zero)


def test_one_parameter_can_be_chosen(small: Spectrum) -> None:
    figure = plots.plot_cer(small, layers=list(small.layers)[2])
    drawn = trace(figure, "gradient")
    layer = small.layers[list(small.layers)[2]]
    assert list(drawn.y) == pytest.approx([layer.cer(int(k)) for k in drawn.x])
    assert list(small.layers)[2] in subtitle(figure)
    null = [draw.cer(3) for draw in small.null[list(small.layers)[2]]]
    _, _, middle, low, high = drawn.customdata[2]
    assert (low, middle, high) == pytest.approx(tuple(np.quantile(null, (0, 0.5, 1))))
    assert "null %{customdata[2]:.1%} [%{customdata[3]:.1%}, %{customdata[4]:.1%}]" in drawn.hovertemplate
    assert "parameters" not in drawn.hovertemplate


def test_some_parameters_can_be_chosen(small: Spectrum) -> None:
    figure = plots.plot_spectrum(small, layers="*up_proj*")
    layers = [layer for name, layer in small.layers.items() if "up_proj" in name]
    relative = [layer.singular_values / layer.singular_values[0] for layer in layers]
    drawn = trace(figure, "gradient")
    assert list(drawn.y) == pytest.approx(list(np.median(relative, axis=0)))
    assert drawn.customdata[3][:2] == pytest.approx(np.quantile(relative, (0.05, 0.95), axis=0)[:, 3])
    assert "90 % of 2 parameters" in drawn.hovertemplate
    assert "median of 2 parameters" in subtitle(figure)
    with pytest.raises(GeometryError, match=r"parameters like 'attn', found none of 4 \(model.layers.0.mlp.up_proj"):
        plots.plot_spectrum(small, layers="attn")


def test_no_band_lies_on_a_line(small: Spectrum) -> None:
    alone = plots.plot_spectrum(small)
    assert [drawn.fill for drawn in alone.data] == [None, "toself", None, None]
    figure = plots.plot_spectrum(small, small)
    assert not any(drawn.fill for drawn in figure.data)
    first, second = [set(drawn.x) for drawn in figure.data if drawn.name and drawn.name.endswith("range of the null")]
    assert min(len(first), len(second)) > 1
    assert not first & second  # side by side


def test_the_null_of_a_median_is_the_median_of_each_draw(small: Spectrum) -> None:
    figure = plots.plot_cer(small, small, names=["a", "b"])
    (marks,) = [drawn for drawn in figure.data if drawn.name == "a: range of the null"]
    k = int(marks.x[1])
    assert 1 < k < 7
    medians = [np.median([small.null[name][draw].cer(k) for name in small.layers]) for draw in range(3)]
    assert marks.y[1] == pytest.approx(np.median(medians))
    assert marks.y[1] + marks.error_y.array[1] == pytest.approx(max(medians))
    assert marks.y[1] - marks.error_y.arrayminus[1] == pytest.approx(min(medians))


def test_layers_and_matrices_have_panels(safety: Spectrum, utility: Spectrum) -> None:
    by_layer = safety.plot(facet="layer")
    assert [note.text for note in by_layer.layout.annotations] == [
        "layer 0",
        "layer 1",
        "layer 2",
        "outside the layers",
    ]
    by_matrix = plots.plot_spectrum(safety, utility, facet="matrix", layers=[0, 2], kinds="attention")
    assert [note.text for note in by_matrix.layout.annotations] == [LABELS[0]]
    chosen = [safety.layers[f"model.layers.{layer}.self_attn.q_proj.weight"] for layer in (0, 2)]
    relative = [layer.singular_values / layer.singular_values[0] for layer in chosen]
    np.testing.assert_allclose(trace(by_matrix, "safety").y[:6], np.median(relative, axis=0)[:6])
    assert by_layer.layout.yaxis2.matches  # panels that are compared have one scale
    assert legend(by_layer) == ["gradient", "null: random gradients"]
    with pytest.raises(GeometryError, match="expected a facet among layer, matrix, found 'kind'"):
        safety.plot(facet="kind")
    with pytest.raises(GeometryError, match="of kind 'norm', found none of 7"):
        safety.plot(kinds="norm")


def test_legends_name_each_set_once_and_leave_room_for_the_figure(small: Spectrum) -> None:
    names = ["safety", *(f"a rather long name of control number {place}" for place in range(4))]
    for figure in (plots.plot_cer(*[small] * 5, names=names), plots.plot_spectrum(*[small] * 5, names=names)):
        assert legend(figure) == [*names, "null: random gradients"]
        assert figure.layout.margin.b == 56 + 34 + 4 * 22  # a line of the legend each, but for two short ones
        assert list(figure.layout.xaxis.tickvals) == list(range(1, 8))
