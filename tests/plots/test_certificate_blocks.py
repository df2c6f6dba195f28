"""The figure of a certificate by block: its values, and what is drawn of many steps and many blocks."""

from dataclasses import replace

import numpy as np
import pytest

from geomkit import plots
from geomkit.spf.certificate import Certificate
from tests.helpers.figures import certificate, subtitle


def test_certificate_draws_blocks_by_steps() -> None:
    figure = certificate().plot(by="block")
    (heat,) = figure.data
    assert list(heat.y) == ["a", "b"]
    changes = np.array([[-2e-4, -2e-4], [1e-4, 1e-4]])
    np.testing.assert_allclose(heat.customdata[:, :, 2], changes)
    # Ticks are at powers of ten, of which the smallest of four is where the scale becomes logarithmic.
    np.testing.assert_allclose(heat.z, np.arcsinh(changes / 1e-6))
    assert list(heat.colorbar.ticktext)[4:] == ["0", "1e-06", "1e-05", "0.0001", "0.001"]
    np.testing.assert_allclose(heat.colorbar.tickvals[4:], np.arcsinh([0, 1, 10, 100, 1000]))
    assert (heat.zmin, heat.zmid, heat.zmax) == pytest.approx((-np.arcsinh(200), 0, np.arcsinh(200)))
    assert subtitle(figure).endswith("red raises it, by 0.0001 at most")
    assert list(figure.layout.xaxis.range) == [0.5, 2.5]


def test_a_map_of_many_steps_shows_the_worst_of_each_stretch() -> None:
    first = certificate().records[0]
    records = [replace(first, step=step) for step in range(1, 1001)]
    records[503] = replace(first, step=504, blocks={**first.blocks, "a": np.array([1e-3, 7e-4, 1, 0.02, 0])})
    (heat,) = plots.plot_certificate_blocks(Certificate("test", "every block", records)).data
    assert heat.z.shape == (2, 200)
    assert heat.x[heat.z[0].argmax()] == 501
    assert tuple(heat.customdata[0, 100]) == (504, 1e-3, 7e-4)


def test_a_map_of_many_blocks_names_some_of_them_by_their_ends() -> None:
    record = certificate().records[0]
    names = [f"base_model.model.model.layers.{layer}.a_module_with_quite_a_long_name.weight" for layer in range(100)]
    blocks = dict.fromkeys(names, record.blocks["a"])
    axis = plots.plot_certificate_blocks(Certificate("test", "every block", [replace(record, blocks=blocks)])).layout
    assert list(axis.yaxis.tickvals) == names[::2]
    assert axis.yaxis.ticktext[5] == "10 …ule_with_quite_a_long_name"
