"""The figure of principal angles: degrees, medians, edges and controls."""

import numpy as np
import pytest
import torch

from geomkit import plots
from geomkit.errors import GeometryError
from geomkit.gradients.factored import FactoredGradient
from geomkit.svd.principal_angles import Angles, principal_angles
from geomkit.svd.subspaces import Subspace, layer_subspace, subspace
from tests.helpers.figures import subtitle, trace


def test_angles_ascend_and_are_in_degrees(angles: Angles) -> None:
    figure = plots.plot_angles(angles)
    middle = trace(figure, "median over parameters")
    degrees = [np.degrees(layer.angles[::-1]) for layer in angles.layers.values()]
    np.testing.assert_allclose(middle.y, np.median(degrees, axis=0))
    edges = [np.degrees(np.arccos(layer.random_edge)) for layer in angles.layers.values()]
    assert trace(figure, "edge for random subspaces").y[0] == pytest.approx(np.median(edges))
    assert "degrees" in figure.layout.yaxis.title.text
    assert tuple(figure.layout.xaxis2.ticktext) == ("0", "1", "2", "–")
    overlaps = [drawn for drawn in figure.data if drawn.yaxis == "y2" and drawn.customdata is not None]
    places = {row[0]: x for drawn in overlaps for row, x in zip(drawn.customdata, drawn.x, strict=True)}
    assert len(set(places.values())) == len(angles.layers)  # no two parameters have one place
    assert [round(places[f"model.layers.{layer}.mlp.up_proj.weight"]) for layer in range(3)] == [0, 1, 2]


def test_a_control_of_the_angles_is_marked() -> None:
    sides = [
        Subspace("left", {"w": layer_subspace(FactoredGradient(torch.randn(3, 20), torch.randn(3, 9)), rank=2)})
    ] * 2
    figure = plots.plot_angles(principal_angles(*sides, sides[0]))
    np.testing.assert_allclose(trace(figure, "control").y, [1.0], atol=1e-6)
    (line,) = [drawn for drawn in figure.data if drawn.mode == "lines" and drawn.legendgroup == "control"]
    assert line.x[0] == line.x[1] == trace(figure, "control").x[0]
    (overlap,) = [drawn for drawn in figure.data if drawn.name == "other" and drawn.yaxis == "y2"]
    assert line.x[0] == overlap.x[0]
    assert trace(figure, "control").marker.color == plots.COLOURS["control"]
    assert list(figure.layout.xaxis.tickvals) == [1, 2]
    assert "control (open circles): 1" in subtitle(figure)
    assert "control" not in {entry.name for entry in plots.plot_angles(principal_angles(*sides)).data}


def test_angles_without_directions_are_refused() -> None:
    zero = {"w": FactoredGradient(torch.zeros(2, 4), torch.zeros(2, 4))}
    with pytest.warns(UserWarning, match="found less"):
        nothing = subspace(zero, rank=2)
    with pytest.raises(GeometryError, match="found none"):
        plots.plot_angles(principal_angles(nothing, nothing))
