"""Spectra of weighted sums, against SVDs of sums that are formed."""

import numpy as np
import pytest
import torch

from geomkit.gradients.arithmetic import zero_gradient
from geomkit.gradients.dense import DenseGradient
from geomkit.gradients.factored import FactoredGradient
from geomkit.gradients.indexed import coalesce
from geomkit.gradients.layer_gradient import LayerGradient
from geomkit.gradients.summed import SumGradient
from geomkit.svd.weighted_sums import weighted_spectra
from tests.helpers.gradients import gaussian


def several(kind: str) -> list[LayerGradient]:
    def factored(tokens: int, rows: int, columns: int, seed: int) -> FactoredGradient:
        return FactoredGradient(gaussian(tokens, rows, seed=seed), gaussian(tokens, columns, seed=seed + 50))

    def looked_up(seed: int) -> LayerGradient:
        return coalesce(torch.tensor([3, seed, 3, 8]), gaussian(4, 12, seed=seed), 30, 4)

    made = {
        "few tokens": lambda k: factored(2 + k, 40, 30, k),
        "many tokens": lambda k: factored(9, 20, 12, k),
        "many tokens, wide": lambda k: factored(9, 12, 20, k),
        "rows": looked_up,
        "dense": lambda k: DenseGradient(gaussian(14, 9, seed=k), tokens=50),
        "dense, wide": lambda k: DenseGradient(gaussian(9, 14, seed=k), tokens=50),
        "experts": lambda k: DenseGradient(gaussian(3, 4, 8, seed=k), tokens=50),
        "tied": lambda k: SumGradient((factored(4, 30, 12, k), looked_up(k))),
        "some without": lambda k: factored(3, 40, 30, k) if k else zero_gradient((40, 30)),
    }
    return [made[kind](k) for k in range(5)]


@pytest.mark.parametrize(
    "kind",
    "few tokens|many tokens|many tokens, wide|rows|dense|dense, wide|experts|tied|some without".split("|"),
)
def test_weighted_sums_have_the_spectra_of_formed_ones(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geomkit.svd.weighted_sums._NUMBERS", 1000)  # several strips, and several blocks of weights
    gradients = several(kind)
    weights = gaussian(7, 5, seed=9).double()
    formed = torch.stack([gradient.take(slice(None)) for gradient in gradients])
    expected = np.linalg.svd(np.tensordot(weights, formed, 1), compute_uv=False)
    result = weighted_spectra(gradients, weights).numpy()
    size = min(result.shape[1], expected.shape[1])
    assert np.abs(result[:, :size] - expected[:, :size]).max() <= 1e-7 * expected.max()
    assert expected[:, size:] == pytest.approx(0.0, abs=1e-12)
