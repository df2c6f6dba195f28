"""Results to draw, and what figures are asked for."""

from dataclasses import replace

import numpy as np
import plotly.graph_objects as go
import torch

from geomkit.correlation.conflict import Conflict
from geomkit.correlation.layer_conflict import LayerConflict
from geomkit.correlation.negative_share import Share
from geomkit.experiments.results import Results
from geomkit.gradients.factored import FactoredGradient
from geomkit.gradients.layer_gradient import LayerGradient
from geomkit.spf.certificate import Certificate
from geomkit.spf.step_record import StepRecord
from geomkit.stats.proportions import Rate
from tests.experiments.test_results import outcomes, record

PLACES = ("self_attn.q_proj", "mlp.up_proj")
LABELS = ("attention q_proj", "MLP up_proj")
"""What the places are called in figures."""
NAMES = [f"model.layers.{layer}.{place}.weight" for layer in range(3) for place in PLACES]


def gradients(tokens: int, seed: int) -> dict[str, LayerGradient]:
    """Return random gradients of three layers and of a matrix outside the layers."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: FactoredGradient(
            torch.randn(tokens, 16, generator=generator), torch.randn(tokens, 12, generator=generator)
        )
        for name in [*NAMES, "lm_head.weight"]
    }


def conflict() -> Conflict:
    """Return a conflict whose cosine falls from 0.05 to -0.45 over the parameters."""

    def layer(cosine: float, name: str = "") -> LayerConflict:
        return LayerConflict(name, cosine, cosine, (cosine - 0.1, cosine + 0.1), (-0.02, 0.02), 0.01)

    return Conflict(
        cosine=-0.1,
        corrected=-0.12,
        interval=(-0.2, -0.05),
        null_interval=(-0.03, 0.03),
        p_value=0.001,
        negative=Rate(3, 4),
        negative_parameters=Share(0.5, (0.2, 0.8)),
        equal_weights=layer(-0.1),
        layers={
            **{name: layer(0.05 - 0.1 * place, name) for place, name in enumerate(NAMES)},
            "lm_head.weight": layer(0.3, "lm_head.weight"),
        },
        per_example=np.array([-0.3, -0.2, -0.1, 0.1]),
    )


def certificate(violated: bool = False, bound: float = 0.0) -> Certificate:
    """Return the certificate of two steps that differ in the loss before them."""
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
        shortfall=0.0,
        fired=0.5,
        removed=0.02,
        corrected=0.0,
        leak=1e-7,
        violated=violated,
        blocks={"a": np.array([3e-3, -2e-4, 1, 0.02, 0]), "b": np.array([-1e-3, 1e-4, 0, 0, 0])},
    )
    return Certificate("test", "every block", [record, replace(record, step=2, anchor_loss=0.15)])


CURVE = {"step": [1, 50, 100], "first_order": [0.0, -0.2, -0.3], "curvature": [0.0, 0.1, 0.5]}
CERTIFICATE = {"guaranteed": True, "raising": 0.0}
BROKEN = {"cell": record("rank1", {}, seed=3)["cell"], "error": "NaN"}


def experiment(*more: dict[str, object]) -> Results:
    """Return the results of four arms, mostly on one scenario, and further records."""
    rows = [
        record("untouched", outcomes(100, 0, 20)),
        record("SFT", outcomes(10), along=[[10, 0.5], [20, 0.1]], attacks={"prefill 1": "0001", "role-play": "0011"}),
        record("SFT", outcomes(30), seed=1, along=[[10, 0.7], [20, 0.3]]),
        record("rank1", outcomes(90, 5), certificate=CERTIFICATE, curve=CURVE, attacks={"prefill 1": "0111"}),
        record("mixing", outcomes(80), certificate={"guaranteed": False, "raising": 0.4}),
        record("SFT", outcomes(50) | {"triggered_refusal": [True, False]}, scenario="backdoor"),
        record("SFT", outcomes(70), rate=2.0),
        record("rank1", outcomes(60), rate=2.0, length=3.0),
        *more,
    ]
    return Results("x", tuple(rows))


def trace(figure: go.Figure, name: str) -> go.Scatter:
    """Return the only trace of a name."""
    (named,) = [drawn for drawn in figure.data if drawn.name == name]
    return named


def drawn_traces(figure: go.Figure, name: str) -> list[go.Scatter]:
    """Return the traces of a name that have a point, without those that are in the legend only."""
    return [drawn for drawn in figure.data if drawn.name == name and drawn.x is not None and drawn.x[0] is not None]


def one_line(text: str) -> str:
    """Return a text of a figure without the breaks of its lines."""
    return text.replace("<br>", " ")


def subtitle(figure: go.Figure) -> str:
    """Return the subtitle of a figure without the breaks of its lines."""
    return one_line(figure.layout.title.subtitle.text)


def legend(figure: go.Figure) -> list[str]:
    """Return the entries of the legend."""
    return [drawn.name for drawn in figure.data if drawn.showlegend is not False]
