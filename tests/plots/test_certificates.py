"""Figures of certificates: changes, drift, bounds and violations, step by step and run by run."""

from dataclasses import replace

import numpy as np
import pytest

from geomkit import plots
from geomkit.errors import SPFError
from geomkit.spf.certificate import Certificate
from tests.helpers.figures import certificate, subtitle, trace


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
    assert "sum of its changes by each step" not in {drawn.name for drawn in figure.data}


def test_the_drift_of_anchors_that_stay_the_same_is_their_loss() -> None:
    figure = measured((0.1, 0.2, 0.03), (0.2, 0.25, 0.03)).plot()
    loss = trace(figure, "safety loss on the anchors")
    assert (list(loss.x), list(loss.y)) == ([0, 1, 2], pytest.approx([0.0, 0.1, 0.15]))
    assert "sum of its changes by each step" not in {drawn.name for drawn in figure.data}


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
    assert list(trace(figure, "breaks the constraint").x) == [1, 2]
    assert "2 of 2 steps break the constraint" in subtitle(figure)


@pytest.mark.parametrize("bound", [0.0, np.inf])
def test_certificate_draws_no_bound_where_drift_is_not_corrected(bound: float) -> None:
    assert "bound with drift correction" not in {drawn.name for drawn in certificate(bound=bound).plot().data}


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
    assert list(trace(figure, "breaks the constraint").x) == [1235]
    assert trace(figure, "sum of first-order parts").y[-1] == pytest.approx(
        sum(record.first_order for record in records)
    )


def test_runs_stand_side_by_side_and_the_legend_counts_by_one_measure() -> None:
    raised = replace(certificate().records[0], first_order=2e-4)
    other = Certificate("demo", "nothing", [raised, replace(raised, step=2, first_order=-1e-4)])
    figure = plots.plot_certificates({"SPF": certificate(), "demo": other})
    shown = [drawn for drawn in figure.data if drawn.showlegend]
    assert [drawn.name for drawn in shown] == ["SPF: 0 of 2 raise it", "demo: 1 of 2 raise it"]
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


def test_a_certificate_in_which_nothing_was_projected_says_that_spf_was_idle() -> None:
    idle = [replace(record, fired=0.0) for record in certificate().records]
    raising = [replace(record, first_order=0.1, violated=True) for record in idle]
    figure = Certificate("monitor", "nothing", raising).plot()
    assert subtitle(figure).startswith(
        "SPF was idle, nothing was projected: rule monitor only measures; 2 of 2 updates"
    )
    assert "blocks projected" not in {drawn.name for drawn in figure.data}
    assert list(trace(figure, "raises the safety loss").x) == [1, 2]
    found = Certificate("test", "every block", idle).plot()
    assert "rule test found no conflict; 0 of 2 updates raised" in subtitle(found)
    assert "idle" not in subtitle(certificate().plot())


def test_runs_that_are_compared_have_one_scale() -> None:
    other = Certificate("demo", "nothing", [replace(record, first_order=0.3) for record in certificate().records])
    layout = plots.plot_certificates({"SPF": certificate(), "demo": other}).layout
    assert layout.yaxis.range == layout.yaxis2.range
    assert layout.yaxis.range[1] > 0.6
