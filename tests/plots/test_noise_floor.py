"""The figure of the noise floor: values relative to it, and which are above."""

import numpy as np
import pytest

from geomkit import plots
from geomkit.errors import GeometryError
from geomkit.svd.noise_floor import LayerNoiseFloor, NoiseFloor


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
    assert [drawn.showlegend for drawn in (strong, weak)] == [True, False]
    assert "1 of 2 matrices above noise (family-wise p ≤ 0.05)" in figure.layout.title.subtitle.text
    assert len(plots.plot_noise_floor(noise, layers="*.1.*").data) == 1
    with pytest.raises(GeometryError, match=r"only zeros in 'lm_head.weight'"):
        plots.plot_noise_floor(noise, layers="lm_head.weight")
