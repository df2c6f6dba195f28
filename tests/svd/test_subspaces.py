"""Subspaces of leading singular vectors, against SVDs of the dense matrices."""

import numpy as np
import pytest
import torch

from geomkit.errors import GeometryError
from geomkit.gradients.arithmetic import zero_gradient
from geomkit.gradients.dense import DenseGradient
from geomkit.gradients.factored import FactoredGradient
from geomkit.gradients.layer_gradient import LayerGradient
from geomkit.gradients.summed import SumGradient
from geomkit.svd.singular_values import singular_values
from geomkit.svd.subspaces import layer_subspace, subspace
from tests.helpers.gradients import GRADIENTS, exact, factored, gaussian, rotation, tied


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("gradient", GRADIENTS.values(), ids=GRADIENTS)
def test_basis_spans_the_leading_singular_vectors(gradient: LayerGradient, side: str) -> None:
    matrix = exact(gradient)
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    result = layer_subspace(gradient, rank=3, side=side)
    reference = (left if side == "left" else right.T)[:, : result.rank]
    basis = result.basis.double().numpy()
    assert result.basis.dtype == torch.float32
    assert basis.T @ basis == pytest.approx(np.eye(result.rank), abs=1e-6)
    assert basis @ basis.T == pytest.approx(reference @ reference.T, abs=1e-6)
    assert result.singular_values == pytest.approx(values[: result.rank], rel=1e-9)
    assert result.energy == pytest.approx((values[: result.rank] ** 2).sum() / (values**2).sum())
    assert result.numeric_rank == np.linalg.matrix_rank(
        matrix, tol=result.singular_values[0] * max(matrix.shape) * 2**-23
    )


def test_energy_takes_as_many_directions_as_it_needs() -> None:
    gradient = FactoredGradient(torch.diag(torch.tensor([4.0, 2.0, 1.0])), torch.eye(3, 9))
    assert [layer_subspace(gradient, energy=share).rank for share in (0.7, 0.9, 1.0)] == [1, 2, 3]


def test_rank_beyond_the_gradient_warns_once_and_takes_what_there_is() -> None:
    gradients = {"a": factored(5, 40, 30), "b": factored(4, 40, 30), "c": factored(30, 40, 30)}
    with pytest.warns(UserWarning, match="2 of 3 gradients .lowest: 4 in b") as caught:
        result = subspace(gradients, rank=20)
    assert len(caught) == 1
    assert {name: layer.rank for name, layer in result.layers.items()} == {"a": 5, "b": 4, "c": 20}
    assert list(result.to_frame()["rank"]) == [5, 4, 20]
    assert "rank 4 to 20" in str(result)


@pytest.mark.parametrize("wanted", [{"side": "both"}, {"method": "randomized"}, {"side": "both", "energy": 1.0}])
def test_asking_for_20_of_17_says_so(wanted: dict[str, object]) -> None:
    """An anchor of 17 loss tokens has no 20 directions, whichever way they are sought."""
    gradients = {"lm_head.weight": factored(17, 64, 32)}
    if "energy" in wanted:
        assert subspace(gradients, **wanted).layers["lm_head.weight"].rank == 17
        return
    with pytest.warns(UserWarning, match=r"expected rank 20, found less .*lowest: 17 in lm_head.weight"):
        result = subspace(gradients, rank=20, **wanted).layers["lm_head.weight"]
    assert (result.rank, result.numeric_rank, result.energy) == (17, 17, pytest.approx(1.0))


@pytest.mark.parametrize("method", ["exact", "randomized"])
@pytest.mark.parametrize("gradient", GRADIENTS.values(), ids=GRADIENTS)
def test_both_sides_come_in_pairs(gradient: LayerGradient, method: str) -> None:
    result = layer_subspace(gradient, rank=4, side="both", method=method)
    assert result.partner is not None
    left, right = result.basis.double().numpy(), result.partner.double().numpy()
    image = exact(gradient) @ right
    assert image == pytest.approx(left * result.singular_values, abs=1e-6 * result.singular_values[0])
    whole = subspace({"": gradient}, rank=result.rank, side="both", method=method)
    for side, basis in (("left", left), ("right", right)):
        alone = layer_subspace(gradient, rank=4, side=side, method=method).basis.double().numpy()
        assert alone @ alone.T == pytest.approx(basis @ basis.T, abs=1e-5)
        one = whole.on(side)
        assert (one.side, one.layers[""].partner) == (side, None)
        assert np.abs(one.layers[""].basis.double().numpy() - basis).max() < 1e-6


def power_law(exponent: float, rows: int = 300, columns: int = 200) -> tuple[DenseGradient, np.ndarray]:
    values = torch.arange(1, columns + 1, dtype=torch.float64) ** -exponent
    matrix = rotation(rows, 1)[:, :columns] @ torch.diag(values) @ rotation(columns, 2).T
    return DenseGradient(matrix, tokens=10_000), values.numpy()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_randomized_subspaces_say_how_good_they_are(exponent: float, side: str) -> None:
    gradient, values = power_law(exponent)
    matrix = gradient.tensor.numpy()
    result = layer_subspace(gradient, rank=10, side=side, method="randomized")
    basis = result.basis.double().numpy()
    inside = np.linalg.norm(basis.T @ matrix if side == "left" else matrix @ basis) ** 2 / np.linalg.norm(matrix) ** 2
    best = (values[:10] ** 2).sum() / (values**2).sum()
    assert result.energy == pytest.approx(inside, rel=1e-6)
    assert result.energy == pytest.approx(best, rel=1e-3)
    assert result.energy <= best * (1 + 1e-9)
    assert (result.singular_values <= values[:10] * (1 + 1e-9)).all()
    assert result.singular_values == pytest.approx(values[:10], rel=5e-3)
    both = layer_subspace(gradient, rank=10, side="both", method="randomized")
    apart = matrix @ both.partner.double().numpy() - both.basis.double().numpy() * both.singular_values
    assert both.residual == pytest.approx(np.linalg.norm(apart) / np.linalg.norm(matrix), rel=0.01, abs=1e-6)
    assert both.residual == result.residual
    assert layer_subspace(gradient, rank=10, side=side).residual == 0


def test_a_harder_spectrum_has_a_larger_residual_and_the_result_says_so() -> None:
    gradients = {"easy": power_law(2.0)[0], "hard": power_law(0.5)[0]}
    result = subspace(gradients, rank=10, method="randomized")
    residuals = result.to_frame().set_index("parameter")["residual"]
    assert 0 < 100 * residuals["easy"] < residuals["hard"] < 0.05
    assert f"residual at most {residuals['hard']:.1e}" in str(result)
    alone = subspace({"hard": gradients["hard"]}, rank=10, method="randomized").layers["hard"]
    assert torch.equal(alone.basis, result.layers["hard"].basis)


def test_randomized_subspace_of_nothing_is_empty() -> None:
    result = layer_subspace(zero_gradient((8, 6)), rank=2, side="both", method="randomized")
    assert (result.basis.shape, result.partner.shape, result.energy, result.residual) == ((8, 0), (6, 0), 0.0, 0.0)


def test_misused_sides_and_methods_are_explained() -> None:
    gradients = {"a": factored(5, 8, 6)}
    with pytest.raises(GeometryError, match="needs all singular values; give rank="):
        subspace(gradients, energy=0.9, method="randomized")
    with pytest.raises(GeometryError, match=r"'up'.*give one of these"):
        subspace(gradients, rank=2, side="up")
    with pytest.raises(GeometryError, match="side='both'"):
        subspace(gradients, rank=2).on("right")


def test_subspace_leaves_vectors_out_and_keeps_the_side() -> None:
    result = subspace({"a": factored(5, 40, 30), "norm": DenseGradient(gaussian(9), tokens=5)}, rank=2, side="right")
    assert list(result.layers) == ["a"]
    assert result.layers["a"].basis.shape == (30, 2)
    assert result.side == "right"


def test_zero_gradient_has_an_empty_subspace() -> None:
    result = layer_subspace(FactoredGradient(torch.zeros(4, 8), torch.ones(4, 6)), rank=2)
    assert result.basis.shape == (8, 0)
    assert (result.energy, result.numeric_rank) == (0.0, 0)


@pytest.mark.parametrize("wanted", [{}, {"rank": 2, "energy": 0.5}, {"rank": 0}, {"energy": 0.0}])
def test_subspace_takes_one_criterion(wanted: dict[str, float]) -> None:
    with pytest.raises(GeometryError, match="expected"):
        layer_subspace(factored(5, 8, 6), **wanted)


def test_tall_sums_are_decomposed_a_strip_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tied embedding and head with more tokens than columns, of which few rows are ever formed at once."""
    monkeypatch.setattr("geomkit.svd.singular_vectors._STRIP", 16)
    monkeypatch.setattr("geomkit.gradients.layer_gradient._STRIP_ROWS", 16)
    gradient = tied(tokens=40, rows=300)
    formed = []
    take = SumGradient.take
    monkeypatch.setattr(SumGradient, "take", lambda self, rows, *more: formed.append(rows) or take(self, rows, *more))
    matrix = exact(gradient)
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    assert singular_values(gradient) == pytest.approx(values, rel=1e-9)
    for side, reference in (("left", left[:, :5]), ("right", right[:5].T)):
        basis = layer_subspace(gradient, rank=5, side=side).basis.double().numpy()
        assert basis @ basis.T == pytest.approx(reference @ reference.T, abs=1e-6)
    assert max(rows.stop - rows.start for rows in formed) == 16
