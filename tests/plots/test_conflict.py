"""Figures of conflict: the scale of colours, marks where an interval covers zero, unknown values."""

from dataclasses import replace

import numpy as np
import pytest

from geomkit import plots
from geomkit.correlation.layer_conflict import ControlDifference, LayerConflict
from geomkit.errors import GeometryError
from tests.helpers.figures import LABELS, NAMES, conflict, subtitle


def test_conflict_map_is_centred_and_marks_what_covers_zero() -> None:
    cells, marks, key = plots.plot_conflict(conflict()).data
    assert (cells.zmin, cells.zmid, cells.zmax) == pytest.approx((-0.45, 0, 0.45))
    assert list(cells.y) == [*LABELS, "head"]
    assert list(cells.x) == ["0", "1", "2", "–"]
    assert cells.z[0][0] == pytest.approx(0.05)
    assert cells.z[2][3] == pytest.approx(0.3)
    assert np.isnan(cells.z[2][0])
    assert list(zip(marks.y, marks.x, strict=True)) == [(LABELS[0], "0"), (LABELS[1], "0")]
    assert (key.name, key.marker.symbol) == ("95 % interval covers 0", marks.marker.symbol)


def test_one_extreme_does_not_bleach_the_conflict_map() -> None:
    weak = LayerConflict("", 0.1, 0.1, (0.05, 0.15), (-0.02, 0.02), 0.01)
    layers = {f"model.layers.{layer}.mlp.up_proj.weight": weak for layer in range(40)}
    figure = plots.plot_conflict(
        replace(conflict(), layers={**layers, "model.norm.weight": replace(weak, cosine=-0.9)})
    )
    assert figure.data[0].zmax == pytest.approx(0.1)
    assert subtitle(figure).endswith("colours end at ±0.1")
    bars = replace(conflict(), layers={**layers, "model.layers.0.self_attn.q_proj.bias": replace(weak, cosine=-0.9)})
    assert plots.plot_conflict(bars).data[0].zmax == pytest.approx(0.1)
    assert plots.plot_conflict(conflict()).data[0].zmax == pytest.approx(0.45)  # all are matrices


def test_conflict_map_bears_zero_gradients() -> None:
    nowhere = LayerConflict("", np.nan, np.nan, (-1.0, 1.0), (np.nan, np.nan), np.nan)
    drawn = replace(conflict(), layers={"lm_head.weight": nowhere})
    cells, marks, _, unknown, key = plots.plot_conflict(drawn).data
    assert (cells.zmin, cells.zmax) == (-1, 1)
    assert not marks.x
    assert (list(unknown.x), list(unknown.y), key.name) == (["–"], ["head"], "unknown")
    assert unknown.colorscale[0][1] == key.marker.color
    assert unknown.text[0].startswith("lm_head.weight<br>cosine unknown")
    assert "nan" not in unknown.text[0]


def test_marks_stand_out_from_dark_cells_and_from_light_ones() -> None:
    wide = LayerConflict("", 0.9, 0.9, (-0.1, 1.0), (-0.02, 0.02), 0.5)
    layers = dict(zip(NAMES, [wide, replace(wide, cosine=0.01)], strict=False))
    _, marks, key = plots.plot_conflict(replace(conflict(), layers=layers)).data
    assert list(marks.marker.line.color) == ["#FFFFFF", "#222222"]
    assert key.marker.line.color == "#222222"


def test_an_unknown_contrast_is_grey_and_has_no_mark() -> None:
    measured = conflict()
    unknown = ControlDifference(np.nan, (-2.0, 2.0), 1.0, np.nan, (-1.0, 1.0))
    layers = {name: replace(layer, contrast=unknown) for name, layer in measured.layers.items()}
    layers[NAMES[0]] = replace(measured.layers[NAMES[0]], contrast=None)
    drawn = replace(measured, layers=layers, contrast=unknown)
    cells, marks, _, grey, _ = plots.plot_conflict(drawn, contrast=True).data
    assert np.isnan(cells.z).all()
    assert (len(grey.x), len(marks.x)) == (len(layers), 0)
    assert "minus control unknown" in grey.text[-1]


def test_conflict_map_of_the_contrast_marks_where_its_own_interval_covers_zero() -> None:
    measured = conflict()
    with pytest.raises(GeometryError, match="pass control="):
        plots.plot_conflict(measured, contrast=True)
    contrasts = [
        ControlDifference(-0.2, (-0.3, -0.1), 0.001, 0.1, (0.0, 0.2)),
        ControlDifference(0.1, (-0.1, 0.3), 0.3, 0.0, (-0.1, 0.1)),
    ]
    layers = {
        name: replace(layer, contrast=contrasts[place % 2])
        for place, (name, layer) in enumerate(measured.layers.items())
    }
    figure = plots.plot_conflict(replace(measured, layers=layers, contrast=contrasts[0]), contrast=True)
    cells, marks, _ = figure.data
    assert sorted({value for value in cells.z.flatten() if not np.isnan(value)}) == [-0.2, 0.1]
    assert len(marks.x) == sum(layer.contrast is contrasts[1] for layer in layers.values())
    assert "control +0.100" in subtitle(figure)
    assert "minus control" in cells.text[0][0]


def test_conflict_examples_show_the_control_in_the_same_bins() -> None:
    control = np.array([0.1, 0.2, 0.3, 0.4])
    figure = plots.plot_conflict_examples(replace(conflict(), control_per_example=control))
    safety, other = figure.data
    np.testing.assert_array_equal(other.x, control)
    assert (safety.xbins.start, safety.xbins.size) == (other.xbins.start, other.xbins.size)
    assert safety.xbins.start <= -0.3 < 0.4 < safety.xbins.end
    assert (safety.marker.color, other.marker.color) == (plots.COLOURS["safety"], plots.COLOURS["control"])
    assert "with the mean safety and control gradients" in subtitle(figure)
    assert list(figure.layout.yaxis.tickvals) == [0, 1]
    assert figure.layout.yaxis.range == figure.layout.yaxis2.range


def test_conflict_examples_pass_through() -> None:
    figure = plots.plot_conflict_examples(conflict())
    np.testing.assert_array_equal(figure.data[0].x, conflict().per_example)
    assert "75.0%" in subtitle(figure)
    assert figure.data[0].marker.color == plots.COLOURS["safety"]
    assert "with the mean safety gradient;" in subtitle(figure)
    assert figure.layout.shapes[0].x0 == 0
