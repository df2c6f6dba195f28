"""The figure of a certificate by block: its values, and what is drawn of many steps and many blocks."""

from dataclasses import replace

import numpy as np
import pytest

from geomkit import plots
from geomkit.spf.certificate import Certificate
from tests.helpers.figures import certificate


def test_certificate_draws_blocks_by_steps() -> None:
    figure = certificate().plot(by="block")
    (heat,) = figure.data
    assert list(heat.y) == ["a", "b"]
    np.testing.assert_allclose(heat.z, [[-2e-4, -2e-4], [1e-4, 1e-4]])
    assert (heat.zmin, heat.zmid, heat.zmax) == pytest.approx((-2e-4, 0, 2e-4))
    assert figure.layout.title.subtitle.text.endswith("red raises it, by 0.0001 at most")
    assert list(figure.layout.xaxis.range) == [0.5, 2.5]


def test_a_map_of_many_steps_shows_the_worst_of_each_stretch() -> None:
    first = certificate().records[0]
    records = [replace(first, step=step) for step in range(1, 1001)]
    records[503] = replace(first, step=504, blocks={**first.blocks, "a": np.array([1e-3, 7e-4, 1, 0.02, 0])})
    (heat,) = plots.plot_certificate_blocks(Certificate("test", "every block", records)).data
    assert heat.z.shape == (2, 200)
    assert (heat.z[0].max(), heat.x[heat.z[0].argmax()]) == (7e-4, 501)
    assert tuple(heat.customdata[0, 100]) == (504, 1e-3)


def test_a_map_of_many_blocks_names_some_of_them_by_their_ends() -> None:
    record = certificate().records[0]
    names = [f"base_model.model.model.layers.{layer}.a_module_with_quite_a_long_name.weight" for layer in range(100)]
    blocks = dict.fromkeys(names, record.blocks["a"])
    axis = plots.plot_certificate_blocks(Certificate("test", "every block", [replace(record, blocks=blocks)])).layout
    assert list(axis.yaxis.tickvals) == names[::2]
    assert axis.yaxis.ticktext[5] == "…ers.10.a_module_with_quite_a_long_name"
