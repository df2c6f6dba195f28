"""Figures: their traces, their units, and that what goes in comes out."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io
import pytest
import torch

from geomkit import plots
from geomkit.correlation.conflict import Conflict
from geomkit.correlation.layer_conflict import ControlDifference, LayerConflict
from geomkit.correlation.negative_shares import Share
from geomkit.errors import GeometryError, SPFError
from geomkit.gradients.factored import FactoredGradient
from geomkit.gradients.layer_gradient import LayerGradient
from geomkit.plots.labels import place_of
from geomkit.plots.style import looks
from geomkit.spf.certificate import Certificate
from geomkit.spf.step_record import StepRecord
from geomkit.stats.pair_means import WithinBetween as PairContrast
from geomkit.stats.proportions import Rate
from geomkit.svd.one_sample.anchor_curve import AnchorCurve, LayerAnchorCurve
from geomkit.svd.one_sample.gradient_map import gradient_map
from geomkit.svd.one_sample.leave_one_out import Estimate
from geomkit.svd.one_sample.overlaps import Overlaps
from geomkit.svd.one_sample.results import Group, LayerOneSample, OneSample
from geomkit.svd.principal_angles import Angles, principal_angles
from geomkit.svd.spectrum import Spectrum, spectrum
from geomkit.svd.subspaces import Subspace, layer_subspace, subspace
from geomkit.training.evaluate import Evaluation

PLACES = ("self_attn.q_proj", "mlp.up_proj")
NAMES = [f"model.layers.{layer}.{place}.weight" for layer in range(3) for place in PLACES]


def gradients(tokens: int, seed: int) -> dict[str, LayerGradient]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: FactoredGradient(
            torch.randn(tokens, 16, generator=generator), torch.randn(tokens, 12, generator=generator)
        )
        for name in [*NAMES, "lm_head.weight"]
    }


@pytest.fixture(scope="module")
def safety() -> Spectrum:
    return spectrum(gradients(6, 0), null_draws=3)


@pytest.fixture(scope="module")
def utility() -> Spectrum:
    return spectrum(gradients(9, 1), null_draws=3)


@pytest.fixture(scope="module")
def angles() -> Angles:
    return principal_angles(subspace(gradients(6, 0), rank=4), subspace(gradients(9, 1), rank=4))


def trace(figure: go.Figure, name: str) -> go.Scatter:
    (found,) = [each for each in figure.data if each.name == name]
    return found


# ------------------------------------------------------------------------------------------------- spectra


def test_spectrum_draws_the_median_of_relative_singular_values(safety: Spectrum, utility: Spectrum) -> None:
    figure = plots.plot_spectrum(safety, utility)
    relative = [layer.singular_values / layer.singular_values[0] for layer in safety.layers.values()]
    np.testing.assert_allclose(trace(figure, "safety").y[:6], np.median(relative, axis=0))
    assert np.isnan(trace(figure, "safety").y[6:]).all()
    assert np.isfinite(trace(figure, "utility").y).all()
    assert len(figure.data) == 6
    assert figure.layout.yaxis.type == "log"
    assert figure.layout.xaxis.title.text == "index i of the singular value"


def test_null_band_encloses_the_null_median(safety: Spectrum) -> None:
    band, middle, _ = plots.plot_cer(safety).data
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
    band = plots.plot_spectrum(spectrum(mixed, null_draws=3)).data[0]
    assert max(band.x) == 9
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


def test_effective_rank_has_a_panel_per_place_and_the_null_range(safety: Spectrum, utility: Spectrum) -> None:
    figure = plots.plot_effective_rank(safety, utility)
    assert [note.text for note in figure.layout.annotations] == [*PLACES, "outside the layers"]
    frame = safety.to_frame().query("statistic == 'effective_rank'")
    rows = frame[frame["parameter"].str.contains("q_proj")]
    null, value = figure.data[:2]
    np.testing.assert_allclose(value.y, rows["value"])
    np.testing.assert_allclose(null.y + null.error_y.array, rows["null_high"])
    np.testing.assert_allclose(null.y - null.error_y.arrayminus, rows["null_low"])
    np.testing.assert_allclose(np.round(value.x), [0, 1, 2])
    assert [each.name for each in figure.data if each.showlegend] == ["safety", "utility"]
    assert figure.layout.yaxis.minallowed == 0


def test_other_statistics_can_be_drawn(safety: Spectrum) -> None:
    figure = plots.plot_effective_rank(safety, statistic="stable_rank")
    assert figure.layout.yaxis.title.text == "stable rank"
    with pytest.raises(GeometryError, match="expected a statistic among numeric_rank"):
        plots.plot_effective_rank(safety, statistic="rank")


# ------------------------------------------------------------------------------------------------- subspaces


def test_angles_ascend_and_are_in_degrees(angles: Angles) -> None:
    figure = plots.plot_angles(angles)
    middle = trace(figure, "median over parameters")
    degrees = [np.degrees(layer.angles[::-1]) for layer in angles.layers.values()]
    np.testing.assert_allclose(middle.y, np.median(degrees, axis=0))
    edges = [np.degrees(np.arccos(layer.random_edge)) for layer in angles.layers.values()]
    assert trace(figure, "edge for random subspaces").y[0] == pytest.approx(np.median(edges))
    assert "degrees" in figure.layout.yaxis.title.text
    assert tuple(figure.layout.xaxis2.categoryarray) == ("0", "1", "2", "–")


def test_a_control_of_the_angles_is_marked() -> None:
    sides = [
        Subspace("left", {"w": layer_subspace(FactoredGradient(torch.randn(3, 20), torch.randn(3, 9)), rank=2)})
    ] * 2
    found = principal_angles(*sides, sides[0])
    figure = plots.plot_angles(found)
    np.testing.assert_allclose(trace(figure, "control").y, [1.0], atol=1e-6)
    assert trace(figure, "control").marker.color == plots.COLOURS["control"]
    assert list(figure.layout.xaxis.tickvals) == [1, 2]
    assert "control (open circles): 1" in figure.layout.title.subtitle.text
    assert "control" not in {entry.name for entry in plots.plot_angles(principal_angles(*sides)).data}


def test_angles_without_directions_are_refused() -> None:
    zero = {"w": FactoredGradient(torch.zeros(2, 4), torch.zeros(2, 4))}
    with pytest.warns(UserWarning, match="found less"):
        nothing = subspace(zero, rank=2)
    with pytest.raises(GeometryError, match="found none"):
        plots.plot_angles(principal_angles(nothing, nothing))


def test_one_sample_shows_every_example_and_the_expectation() -> None:
    overlaps, null = np.array([0.5, 0.7, 0.9]), np.array([0.1, 0.3])
    control = Estimate(0.2, (0.1, 0.3), 0.5, (0.4, 0.6))
    groups = {
        "safety": Group(overlaps, overlaps, Estimate(0.7, (0.6, 0.8)), Estimate(0.7, (0.6, 0.8))),
        "refused": Group(null, null, control, control),
    }
    study = OneSample("left", 10, groups, {"w": LayerOneSample("w", 4, 50, groups)})
    figure = plots.plot_one_sample(study)
    assert [trace(figure, name).line.color for name in groups] == [plots.COLOURS["safety"], plots.COLOURS["control"]]
    assert "its 95 % interval" in figure.layout.title.subtitle.text
    np.testing.assert_array_equal(trace(figure, "safety").x, study.overlaps)
    np.testing.assert_array_equal(trace(figure, "refused").x, study.null)
    assert any(note.text == "+0.500 [+0.400, +0.600]" and note.y == "refused" for note in figure.layout.annotations)
    mean = trace(figure, "safety: mean")
    assert (mean.x[0], mean.x[0] + mean.error_x.array[0]) == pytest.approx((0.7, 0.8))
    assert figure.layout.shapes[0].x0 == 0.08
    assert "overlap" in figure.layout.xaxis.title.text


def test_anchor_curve_shows_means_bands_ceiling_and_expectation() -> None:
    drawn = {"safety": np.array([[0.2, 0.4], [0.4, 0.6]]), "refused": np.array([[0.1, 0.1], [0.3, 0.3]])}
    curve = AnchorCurve("left", 10, (1, 2), drawn, {"w": LayerAnchorCurve("w", 4, 50, drawn)})
    figure = plots.plot_anchor_curve(curve)
    np.testing.assert_allclose(trace(figure, "safety").y, [0.3, 0.5])
    np.testing.assert_allclose(trace(figure, "refused").y, [0.2, 0.2])
    assert trace(figure, "safety: 90 % of draws").y[0] == pytest.approx(0.39)
    assert sorted(shape.y0 for shape in figure.layout.shapes) == pytest.approx([0.08, 0.5])
    assert "mean over 1 parameter; band: 90 % of 2 random splits" in figure.layout.title.subtitle.text
    assert trace(figure, "refused").line.color == plots.COLOURS["control"]


@pytest.mark.parametrize("method", ["pca", "mds"])
def test_a_map_has_a_point_for_every_example(method: str) -> None:
    vectors = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    found = gradient_map({"safety": 3, "other": 4}, vectors @ vectors.T, method=method, draws=9)
    figure = plots.plot_gradient_map(found)
    np.testing.assert_array_equal(trace(figure, "other").x, found.coordinates[3:, 0])
    assert list(trace(figure, "other").customdata[:, 0]) == [0, 1, 2, 3]
    assert f"{found.separation:+.3f}" in figure.layout.title.subtitle.text
    assert figure.layout.yaxis.scaleanchor == "x"


def test_overlaps_show_every_mean_and_tell_intervals_and_contrasts() -> None:
    found = Overlaps(
        side="left",
        rank=10,
        names=("a", "b"),
        counts=(4, 4),
        pairs=np.eye(8),
        matrix=np.array([[0.5, 0.2], [0.2, 0.3]]),
        intervals=dict.fromkeys([("a", "a"), ("a", "b"), ("b", "a"), ("b", "b")], (0.1, 0.6)),
        contrasts={("a", "b"): PairContrast(0.3, (0.2, 0.4), 0.01), ("b", "a"): PairContrast(0.1, (0.0, 0.2), 0.5)},
        expected=0.05,
        parameters=("w",),
    )
    figure = plots.plot_overlaps(found)
    np.testing.assert_array_equal(figure.data[0].z, found.matrix)
    assert figure.data[0].text[0][
        1
    ] == "a – b<br>overlap <b>0.200</b> [0.100, 0.600]<br>within a less this: +0.300 " + ("[+0.200, +0.400], p = 0.01")
    assert "within" not in figure.data[0].text[0][0]
    assert list(figure.layout.xaxis.ticktext) == ["a", "b"]
    assert "mean over 1 parameter; random subspaces: 0.05" in figure.layout.title.subtitle.text


# ------------------------------------------------------------------------------------------------- conflict


def conflict() -> Conflict:
    def layer(cosine: float) -> LayerConflict:
        return LayerConflict("", cosine, cosine, (cosine - 0.1, cosine + 0.1), (-0.02, 0.02), 0.01)

    return Conflict(
        cosine=-0.1,
        corrected=-0.12,
        interval=(-0.2, -0.05),
        null_interval=(-0.03, 0.03),
        p_value=0.001,
        negative=Rate(3, 4),
        negative_parameters=Share(0.5, (0.2, 0.8)),
        negative_weight=Share(0.5, (0.2, 0.8)),
        unweighted=layer(-0.1),
        layers={**{name: layer(0.05 - 0.1 * place) for place, name in enumerate(NAMES)}, "lm_head.weight": layer(0.3)},
        per_example=np.array([-0.3, -0.2, -0.1, 0.1]),
    )


def test_conflict_map_is_centred_and_marks_what_covers_zero() -> None:
    cells, marks, key = plots.plot_conflict(conflict()).data
    assert (cells.zmin, cells.zmid, cells.zmax) == pytest.approx((-0.45, 0, 0.45))
    assert list(cells.y) == [*PLACES, "lm_head"]
    assert list(cells.x) == ["0", "1", "2", "–"]
    assert cells.z[0][0] == pytest.approx(0.05)
    assert cells.z[2][3] == pytest.approx(0.3)
    assert np.isnan(cells.z[2][0])
    assert list(zip(marks.y, marks.x, strict=True)) == [("self_attn.q_proj", "0"), ("mlp.up_proj", "0")]
    assert (key.name, key.marker.symbol) == ("95 % interval covers 0", marks.marker.symbol)


def test_one_extreme_does_not_bleach_the_conflict_map() -> None:
    weak = LayerConflict("", 0.1, 0.1, (0.05, 0.15), (-0.02, 0.02), 0.01)
    layers = {f"model.layers.{layer}.mlp.up_proj.weight": weak for layer in range(40)}
    figure = plots.plot_conflict(
        replace(conflict(), layers={**layers, "model.norm.weight": replace(weak, cosine=-0.9)})
    )
    assert figure.data[0].zmax == pytest.approx(0.1)
    assert figure.data[0].colorbar.title.text == "cosine, clipped at ±0.1"


def test_conflict_map_bears_zero_gradients() -> None:
    nowhere = LayerConflict("", np.nan, np.nan, (-1.0, 1.0), (np.nan, np.nan), np.nan)
    drawn = replace(conflict(), layers={"lm_head.weight": nowhere})
    cells, marks, _, unknown, key = plots.plot_conflict(drawn).data
    assert (cells.zmin, cells.zmax) == (-1, 1)
    assert not marks.x
    assert (list(unknown.x), list(unknown.y), key.name) == (["–"], ["lm_head"], "unknown")
    assert unknown.colorscale[0][1] == key.marker.color
    assert unknown.text[0].startswith("lm_head.weight<br>cosine unknown")
    assert "nan" not in unknown.text[0]


def test_marks_stand_out_from_dark_cells_and_from_light_ones() -> None:
    wide = LayerConflict("", 0.9, 0.9, (-0.1, 1.0), (-0.02, 0.02), 0.5)
    layers = dict(zip(NAMES, [wide, replace(wide, cosine=0.01)], strict=False))
    _, marks, key = plots.plot_conflict(replace(conflict(), layers=layers)).data
    assert list(marks.marker.line.color) == ["white", "#222222"]
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
    assert "control +0.100" in figure.layout.title.subtitle.text
    assert "minus control" in cells.text[0][0]


def test_conflict_examples_show_the_control_in_the_same_bins() -> None:
    control = np.array([0.1, 0.2, 0.3, 0.4])
    figure = plots.plot_conflict_examples(replace(conflict(), control_per_example=control))
    safety, other = figure.data
    np.testing.assert_array_equal(other.x, control)
    assert (safety.xbins.start, safety.xbins.size) == (other.xbins.start, other.xbins.size)
    assert safety.xbins.start <= -0.3 < 0.4 < safety.xbins.end
    assert (safety.marker.color, other.marker.color) == (plots.COLOURS["safety"], plots.COLOURS["control"])
    assert figure.layout.title.text.endswith("mean safety and control gradients")
    assert list(figure.layout.yaxis.tickvals) == [0, 1]


def test_conflict_examples_pass_through() -> None:
    figure = plots.plot_conflict_examples(conflict())
    np.testing.assert_array_equal(figure.data[0].x, conflict().per_example)
    assert "75.0%" in figure.layout.title.subtitle.text
    assert figure.data[0].marker.color == plots.COLOURS["safety"]
    assert figure.layout.title.text.endswith("mean safety gradient")
    assert figure.layout.shapes[0].x0 == 0


# ------------------------------------------------------------------------------------------------------ runs


def evaluation(refused: int) -> Evaluation:
    return Evaluation(Rate(refused, 100), Rate(1, 100), {"sql": Rate(40, 50)}, pd.DataFrame())


def test_evaluations_stand_side_by_side_with_their_intervals() -> None:
    arms = {"aligned": evaluation(100), "SFT": evaluation(5), "SPF": evaluation(97)}
    figure = plots.plot_evaluation(arms)
    assert [each.name for each in figure.data] == list(arms)
    tuned = trace(figure, "SFT")
    assert list(tuned.x) == [0.05, 0.01, 0.8]
    assert tuned.x[0] + tuned.error_x.array[0] == pytest.approx(Rate(5, 100).interval[1])
    assert tuned.marker.color == plots.COLOURS["SFT"]
    assert figure.layout.yaxis.ticktext == ("refusal", "over-refusal", "exact match: sql")
    assert figure.layout.xaxis.title.text == "share of prompts"


def test_one_evaluation_needs_no_legend() -> None:
    figure = evaluation(90).plot()
    assert len(figure.data) == 1
    assert figure.layout.showlegend is False


def certificate(violated: bool = False, bound: float = 0.0) -> Certificate:
    record = StepRecord(
        step=1,
        fresh=True,
        anchor_loss=0.1,
        loss_after=np.nan,
        first_order_raw=2e-3,
        first_order=-1e-4,
        bound=bound,
        worst=0.0,
        tolerance=1e-8,
        update_norm=0.3,
        fired=0.5,
        removed=0.02,
        corrected=0.0,
        leak=1e-7,
        violated=violated,
        blocks={"a": np.array([3e-3, -2e-4, 1, 0.02, 0]), "b": np.array([-1e-3, 1e-4, 0, 0, 0])},
    )
    return Certificate("test", "every block", [record, replace(record, step=2, anchor_loss=0.15)])


def measured(*changes: tuple[float, float, float]) -> Certificate:
    """The certificate of steps with given losses before and after, and first-order changes."""
    record = certificate().records[0]
    steps = [
        replace(record, step=step, anchor_loss=before, loss_after=after, first_order=first)
        for step, (before, after, first) in enumerate(changes, start=1)
    ]
    return Certificate("test", "every block", steps)


def test_certificate_draws_both_changes_and_the_fired_share() -> None:
    figure = certificate().plot()
    assert list(trace(figure, "optimizer's own update").y) == [2e-3, 2e-3]
    assert list(trace(figure, "applied update").y) == [-1e-4, -1e-4]
    assert list(trace(figure, "blocks projected").y) == [0.5, 0.5]
    assert "nats per token" in figure.layout.yaxis.title.text
    assert figure.layout.xaxis3.title.text == "optimizer step"
    assert list(figure.layout.xaxis3.tickvals) == [0, 1, 2]


def test_certificate_draws_the_drift_beside_its_first_order_part() -> None:
    figure = certificate().plot()
    loss, first = trace(figure, "safety loss on each step's own anchors"), trace(figure, "sum of first-order parts")
    assert (list(loss.x), list(loss.y)) == ([0, 1], pytest.approx([0.0, 0.05]))
    assert (list(first.x), list(first.y)) == ([0, 1, 2], pytest.approx([0.0, -1e-4, -2e-4]))
    assert "sum of its changes by each step" not in {each.name for each in figure.data}


def test_the_drift_of_anchors_that_stay_the_same_is_their_loss() -> None:
    figure = measured((0.1, 0.2, 0.03), (0.2, 0.25, 0.03)).plot()
    loss = trace(figure, "safety loss on the anchors")
    assert (list(loss.x), list(loss.y)) == ([0, 1, 2], pytest.approx([0.0, 0.1, 0.15]))
    assert "sum of its changes by each step" not in {each.name for each in figure.data}


def test_the_drift_of_drawn_anchors_is_summed_where_each_step_was_measured() -> None:
    figure = measured((0.1, 0.2, 0.03), (0.5, 0.55, 0.03)).plot()
    assert list(trace(figure, "safety loss on each step's own anchors").y) == pytest.approx([0.0, 0.4, 0.45])
    assert list(trace(figure, "sum of its changes by each step").y) == pytest.approx([0.0, 0.1, 0.15])


def test_the_loss_is_drawn_only_where_it_was_measured() -> None:
    first, second = certificate().records
    stale = replace(second, fresh=False)
    figure = Certificate("test", "every block", [first, stale, replace(second, step=3)]).plot()
    assert list(trace(figure, "safety loss on each step's own anchors").x) == [0, 2]


def test_certificate_of_a_resumed_run_keeps_its_steps() -> None:
    records = [replace(record, step=record.step + 50) for record in certificate().records]
    figure = Certificate("test", "every block", records).plot()
    assert list(trace(figure, "sum of first-order parts").x) == [50, 51, 52]


def test_certificate_marks_violations() -> None:
    figure = certificate(violated=True).plot()
    assert list(trace(figure, "violation").x) == [1, 2]
    assert "2 of 2 steps break the constraint" in figure.layout.title.subtitle.text


@pytest.mark.parametrize("bound", [0.0, np.inf])
def test_certificate_draws_no_bound_where_drift_is_not_corrected(bound: float) -> None:
    assert "bound with drift correction" not in {each.name for each in certificate(bound=bound).plot().data}


def test_certificate_draws_a_bound_where_drift_is_corrected() -> None:
    bound = trace(certificate(bound=-2e-4).plot(), "bound with drift correction")
    assert list(bound.y) == [-2e-4, -2e-4]


def test_a_long_certificate_is_thinned_and_keeps_its_extremes_and_violations() -> None:
    first = certificate().records[0]
    records = [replace(first, step=step, first_order=-1e-6 * (step % 7)) for step in range(1, 4001)]
    records[1234] = replace(records[1234], violated=True)
    records[2345] = replace(records[2345], first_order=0.5)
    long = Certificate("test", "every block", records)
    figure = plots.plot_certificate(long)
    assert len(trace(figure, "applied update").x) < 3000
    assert max(trace(figure, "applied update").y) == 0.5
    assert list(trace(figure, "violation").x) == [1235]
    assert trace(figure, "sum of first-order parts").y[-1] == pytest.approx(sum(each.first_order for each in records))


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


def test_runs_stand_side_by_side_and_the_legend_counts_by_one_measure() -> None:
    raised = replace(certificate().records[0], first_order=2e-4)
    other = Certificate("demo", "nothing", [raised, replace(raised, step=2, first_order=-1e-4)])
    figure = plots.plot_certificates({"SPF": certificate(), "demo": other})
    shown = [each for each in figure.data if each.showlegend]
    assert [each.name for each in shown] == ["SPF: 0 of 2 raise it", "demo: 1 of 2 raise it"]
    np.testing.assert_allclose(shown[1].y, [0, 2e-4, 1e-4])
    assert shown[0].line.color == plots.COLOURS["SPF"]
    with pytest.raises(SPFError, match="at least one certificate"):
        plots.plot_certificates({})


def test_empty_certificate_is_refused() -> None:
    empty = Certificate("test", "nothing", [])
    for draw in (plots.plot_certificate, plots.plot_certificate_blocks):
        with pytest.raises(SPFError, match="train first"):
            draw(empty)
    bare = replace(certificate().records[0], blocks={})
    with pytest.raises(SPFError, match="expected a block"):
        plots.plot_certificate_blocks(Certificate("test", "nothing", [bare]))


def test_history_leaves_out_rows_without_a_loss() -> None:
    history = pd.DataFrame({"step": [1, 2, 3], "loss": [2.0, 1.0, np.nan]})
    figure = plots.plot_history({"SPF": SimpleNamespace(history=history), "other": SimpleNamespace(history=history)})
    assert list(trace(figure, "SPF").x) == [1, 2]
    assert list(figure.layout.xaxis.tickvals) == [1, 2, 3]
    assert figure.layout.yaxis.title.text == "loss, nats per token"
    assert len({each.line.color for each in figure.data}) == 2


# ----------------------------------------------------------------------------------------------------- style


def test_template_is_registered_but_not_the_default() -> None:
    assert plotly.io.templates["geomkit"] == plots.TEMPLATE
    assert plotly.io.templates.default != "geomkit"


def test_series_get_distinct_colours_and_symbols() -> None:
    chosen = looks(["aligned", "SFT", "mixing", "SPF", "safety"])
    assert len({look.colour for look in chosen}) == len({look.symbol for look in chosen}) == 5


def test_places_are_the_same_in_all_layers() -> None:
    assert {place_of(name) for name in NAMES} == set(PLACES)
    assert place_of("transformer.h.3.attn.c_proj.weight") == "attn.c_proj"
    assert place_of("model.layers.0.self_attn.q_proj.bias") == "self_attn.q_proj.bias"


def test_figures_carry_the_template(angles: Angles, safety: Spectrum) -> None:
    for figure in (plots.plot_angles(angles), plots.plot_effective_rank(safety), plots.plot_conflict(conflict())):
        assert figure.layout.template.layout.plot_bgcolor == "white"
        assert figure.layout.title.text
