"""Figures of spectra: which parameters they show, what their hover says, and that the noise floor is drawn at one."""

import numpy as np
import plotly.graph_objects as go
import pytest
import torch

from geomkit import plots
from geomkit.errors import GeometryError
from geomkit.gradients.factored import FactoredGradient
from geomkit.svd.noise_floor import LayerNoiseFloor, NoiseFloor
from geomkit.svd.spectrum import Spectrum, spectrum
from geomkit.svd.spectrum_contrast import SpectrumContrast

NAMES = [f"model.layers.{layer}.mlp.{place}.weight" for layer in range(2) for place in ("up_proj", "down_proj")]


@pytest.fixture(scope="module")
def found() -> Spectrum:
    generator = torch.Generator().manual_seed(0)
    return spectrum(
        {
            name: FactoredGradient(torch.randn(7, 16, generator=generator), torch.randn(7, 12, generator=generator))
            for name in NAMES
        },
        null_draws=3,
    )


def trace(figure: go.Figure, name: str) -> go.Scatter:
    (drawn,) = [each for each in figure.data if each.name == name and each.showlegend is not False]
    return drawn


def test_one_parameter_can_be_chosen(found: Spectrum) -> None:
    figure = plots.plot_cer(found, layers=NAMES[2])
    drawn = trace(figure, "gradient")
    layer = found.layers[NAMES[2]]
    assert list(drawn.y) == pytest.approx([layer.cer(int(k)) for k in drawn.x])
    assert NAMES[2] in figure.layout.title.subtitle.text
    null = [draw.cer(3) for draw in found.null[NAMES[2]]]
    _, _, middle, low, high = drawn.customdata[2]
    assert (low, middle, high) == pytest.approx(tuple(np.quantile(null, (0.05, 0.5, 0.95))))
    assert "null %{customdata[2]:.1%} [%{customdata[3]:.1%}, %{customdata[4]:.1%}]" in drawn.hovertemplate
    assert "parameters" not in drawn.hovertemplate


def test_some_parameters_can_be_chosen(found: Spectrum) -> None:
    figure = plots.plot_spectrum(found, layers="*up_proj*")
    relative = [found.layers[name].singular_values / found.layers[name].singular_values[0] for name in NAMES[::2]]
    drawn = trace(figure, "gradient")
    assert list(drawn.y) == pytest.approx(list(np.median(relative, axis=0)))
    assert drawn.customdata[3][:2] == pytest.approx(np.quantile(relative, (0.05, 0.95), axis=0)[:, 3])
    assert "90 % of 2 parameters" in drawn.hovertemplate
    assert "median of 2 parameters" in figure.layout.title.subtitle.text
    with pytest.raises(GeometryError, match=r"parameters like 'attn', found none of 4 \(model.layers.0.mlp.up_proj"):
        plots.plot_spectrum(found, layers="attn")


def test_no_band_lies_on_a_line(found: Spectrum) -> None:
    figure = plots.plot_spectrum(found, found)
    assert [each.fill for each in figure.data] == ["toself"] * 2 + [None] * 4
    assert [each.line.dash for each in figure.data[2:]] == ["dot"] * 2 + [None] * 2


def layer_noise(name: str, values: list[float], floor: float) -> LayerNoiseFloor:
    null = floor * np.linspace(0, 1, 99)
    return LayerNoiseFloor(name, (4, 3), 20, np.array(values), floor, null)


def test_noise_floor_is_drawn_at_one() -> None:
    noise = NoiseFloor(
        {
            "model.layers.0.mlp.up_proj.weight": layer_noise(
                "model.layers.0.mlp.up_proj.weight", [4.0, 2.0, 1e-5], 0.5
            ),
            "model.layers.1.mlp.up_proj.weight": layer_noise("model.layers.1.mlp.up_proj.weight", [1.0, 0.5, 0.1], 2.0),
            "lm_head.weight": layer_noise("lm_head.weight", [0.0, 0.0, 0.0], 0.0),
        },
        examples=8,
        draws=99,
    )
    figure = noise.plot()
    strong, weak = figure.data
    assert list(strong.y) == [8.0, 4.0]  # rounding, far below, is left out
    assert list(strong.customdata) == [4.0, 2.0]
    assert list(weak.y) == pytest.approx([0.5, 0.25, 0.05])
    assert figure.layout.shapes[0].y0 == 1.0
    assert [each.showlegend for each in (strong, weak)] == [True, False]
    assert "1 of 2 matrices above noise (family-wise p ≤ 0.05)" in figure.layout.title.subtitle.text
    assert len(plots.plot_noise_floor(noise, layers="*.1.*").data) == 1
    with pytest.raises(GeometryError, match=r"only zeros in 'lm_head.weight'"):
        plots.plot_noise_floor(noise, layers="lm_head.weight")


def test_legends_name_each_set_once_and_leave_room_for_the_figure(found: Spectrum) -> None:
    names = ["safety", *(f"a rather long name of control number {place}" for place in range(4))]
    for figure in (plots.plot_cer(*[found] * 5, names=names), plots.plot_spectrum(*[found] * 5, names=names)):
        assert [each.name for each in figure.data if each.showlegend is not False] == names
        assert figure.layout.height == 420 + 3 * 22
        assert list(figure.layout.xaxis.tickvals) == list(range(1, 8))


def test_two_layers_have_two_ticks_and_long_names_fit(found: Spectrum) -> None:
    assert list(plots.plot_effective_rank(found).layout.xaxis.tickvals) == [0, 1]
    names = ("safety", "benign requests, refused in the model's own words")
    figure = plots.plot_spectrum_contrast(SpectrumContrast(found, found, names))
    assert figure.layout.title.text == "Effective rank: safety − benign requests, refused…"
    assert figure.layout.yaxis.title.text == "difference"
