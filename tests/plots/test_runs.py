"""Figures of evaluations and of training losses."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from geomkit import plots
from geomkit.stats.means import Estimate
from geomkit.stats.proportions import Rate
from geomkit.training.evaluation import Evaluation
from tests.helpers.figures import legend, subtitle, trace


def evaluation(refused: int) -> Evaluation:
    return Evaluation(Rate(refused, 100), Rate(1, 100), {"sql": Rate(40, 50)}, pd.DataFrame())


def test_evaluations_stand_side_by_side_with_their_intervals() -> None:
    arms = {"aligned": evaluation(100), "SFT": evaluation(5), "SPF": evaluation(97)}
    figure = plots.plot_evaluation(arms)
    assert [drawn.name for drawn in figure.data] == list(arms)
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


def test_a_perplexity_is_no_share_and_is_named_in_the_title() -> None:
    skills = {"sql": Rate(40, 50), "text": Estimate(12.0, 11.0, 13.0, 50)}
    settings = {"metrics": {"sql": "exact match", "text": "perplexity"}}
    figure = Evaluation(Rate(90, 100), Rate(0, 0), skills, pd.DataFrame(), settings=settings).plot()
    assert list(figure.data[0].x) == [0.9, 0.8]
    assert "not drawn: perplexity: text" in subtitle(figure)


def test_history_leaves_out_rows_without_a_loss() -> None:
    history = pd.DataFrame({"step": [1, 2, 3], "loss": [2.0, 1.0, np.nan]})
    figure = plots.plot_history({"SPF": SimpleNamespace(history=history), "other": SimpleNamespace(history=history)})
    assert list(trace(figure, "SPF").x) == [1, 2]
    assert list(figure.layout.xaxis.tickvals) == [1, 2, 3]
    assert figure.layout.yaxis.title.text == "training loss,<br>nats per token"
    assert len({drawn.line.color for drawn in figure.data}) == 2


def test_the_safety_loss_stands_below_the_training_loss_where_it_was_measured() -> None:
    plain = pd.DataFrame({"step": [1, 2], "loss": [2.0, 1.0]})
    guarded = plain.assign(**{"spf/anchor_loss": [0.1, 0.2]})
    runs = {name: SimpleNamespace(history=history) for name, history in (("SFT", plain), ("SPF", guarded))}
    figure = plots.plot_history(runs)
    below = [drawn for drawn in figure.data if drawn.yaxis == "y2"]
    assert [(drawn.name, list(drawn.y)) for drawn in below] == [("SPF", [0.1, 0.2])]
    assert subtitle(figure) == "safety loss: on the anchors of the step; not measured in SFT"
    assert legend(figure) == ["SFT", "SPF"]
    assert not [drawn for drawn in plots.plot_history({"SFT": runs["SFT"]}).data if drawn.yaxis == "y2"]
