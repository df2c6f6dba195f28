import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geomkit.errors import GeometryError
from geomkit.gradients.arithmetic import add, as_matrix, coalesce, zero_gradient
from geomkit.gradients.dense import DenseGradient
from geomkit.gradients.factored import FactoredGradient
from geomkit.gradients.indexed import IndexedGradient
from geomkit.gradients.layer_gradient import LayerGradient
from geomkit.gradients.summed import SumGradient
from geomkit.svd import singular_values as singular_values_module
from geomkit.svd.layer_spectrum import LayerSpectrum, layer_spectrum
from geomkit.svd.nulls import random_factor_null
from geomkit.svd.singular_values import singular_values, singular_values_of, singular_values_of_gram, small_equivalent
from geomkit.svd.spectrum import spectrum
from geomkit.svd.subspaces import layer_subspace, subspace

SEEDS = st.integers(0, 2**31)
RANKS = ("numeric_rank", "effective_rank", "entropy_rank", "participation_ratio", "stable_rank")


def gaussian(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def factored(tokens: int, rows: int, columns: int, seed: int = 0) -> FactoredGradient:
    return FactoredGradient(gaussian(tokens, rows, seed=seed), gaussian(tokens, columns, seed=seed + 1))


def indexed() -> IndexedGradient:
    return IndexedGradient(torch.tensor([1, 4, 6]), gaussian(3, 5), size=9, tokens=7)


def exact(gradient: LayerGradient) -> np.ndarray:
    if isinstance(gradient, SumGradient):
        return sum((exact(part) for part in gradient.parts), np.zeros(gradient.shape))
    if isinstance(gradient, FactoredGradient):
        return (gradient.left.double().T @ gradient.right.double()).numpy()
    return as_matrix(gradient).double().numpy()


def rotation(size: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(gaussian(size, size, seed=seed).double()).Q


def planted(values: list[float], size: int = 12) -> LayerSpectrum:
    count = len(values)
    return layer_spectrum("w", FactoredGradient(torch.diag(torch.tensor(values)), torch.eye(count, size)))


def tied(tokens: int = 4, rows: int = 30, columns: int = 12) -> SumGradient:
    """What a tied embedding and head have: factors over the tokens, and rows that were looked up."""
    looked_up = coalesce(torch.tensor([3, 1, 3, 8]), gaussian(4, columns, seed=5), rows, 4)
    return SumGradient((factored(tokens, rows, columns), looked_up))


DEFICIENT = FactoredGradient(torch.ones(6, 10), gaussian(6, 20))

GRADIENTS = {
    "few tokens": factored(7, 40, 30),
    "one token": factored(1, 12, 9),
    "tokens between the sides": factored(20, 40, 16),
    "many tokens": factored(100, 12, 16),
    "rank deficient": DEFICIENT,
    "indexed": indexed(),
    "dense": DenseGradient(gaussian(14, 9), tokens=50),
    "experts": DenseGradient(gaussian(3, 4, 8), tokens=60),
    "tied, few tokens": tied(),
    "tied, many tokens": tied(tokens=40),
    "tied, wide": tied(rows=12, columns=30),
    "sum with a dense part": SumGradient((DenseGradient(gaussian(14, 9), tokens=50), factored(3, 14, 9))),
}


@pytest.mark.parametrize("gradient", GRADIENTS.values(), ids=GRADIENTS)
def test_singular_values_are_those_of_the_dense_gradient(gradient: LayerGradient) -> None:
    expected = np.linalg.svd(exact(gradient), compute_uv=False)
    found = singular_values(gradient)
    assert found.dtype == np.float64
    assert len(found) == gradient.rank_bound
    assert np.abs(found - expected[: len(found)]).max() <= (1e-7 if gradient is DEFICIENT else 1e-12) * expected[0]


def test_small_singular_values_survive_a_wide_range() -> None:
    scales = torch.logspace(0, -6, 8)
    left, right = rotation(64, 1)[:8].float(), rotation(48, 2)[:8].float()
    gradient = FactoredGradient(left * scales[:, None], right)
    found = singular_values(gradient)
    assert np.abs(found - np.linalg.svd(exact(gradient), compute_uv=False)[:8]).max() < 1e-14
    assert found == pytest.approx(scales.numpy(), rel=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    seed=SEEDS,
    tokens=st.integers(1, 60),
    wide=st.floats(0, 6),
    mixed=st.booleans(),
    against=st.booleans(),
    repeated=st.booleans(),
)
def test_singular_values_are_exact_whatever_the_condition_of_the_factors(
    seed: int, tokens: int, wide: float, mixed: bool, against: bool, repeated: bool
) -> None:
    """Conditions up to 1e6, opposed (the large tokens of one side meet the small of the other), repeated tokens."""
    scales = torch.logspace(0, -wide, tokens).double()[:, None]
    turn = rotation(tokens, seed) if mixed else torch.eye(tokens).double()
    left = turn @ (scales * gaussian(tokens, 64, seed=seed).double())
    right = turn @ ((scales.flip(0) if against else 1.0) * gaussian(tokens, 80, seed=seed + 1).double())
    order = torch.arange(tokens) // 2 if repeated else torch.arange(tokens)
    gradient = FactoredGradient(left[order].float(), right[order].float())
    expected = np.linalg.svd(exact(gradient), compute_uv=False)
    found = layer_spectrum("w", gradient)
    assert np.abs(found.singular_values - expected[: found.rank_bound]).max() <= 1e-7 * expected[0]
    near = np.abs(expected / found.tolerance - 1) < 1e-2  # a value on the edge may fall on either side
    assert abs(found.numeric_rank - (expected > found.tolerance).sum()) <= near.sum()


def test_a_gram_gives_singular_values_to_the_root_of_its_precision() -> None:
    matrices = rotation(12, 1)[:8].T * torch.logspace(0, -7, 8).double()  # (12, 8), σ down to 1e-7
    stacked = torch.stack([matrices, 2 * matrices])
    found = singular_values_of_gram(stacked.mT @ stacked).numpy()
    expected = np.linalg.svd(stacked.numpy(), compute_uv=False)
    assert found.dtype == np.float64
    assert np.abs(found - expected).max() <= 2e-8 * 2
    assert found[:, :4] == pytest.approx(expected[:, :4], rel=1e-9)  # σ down to 1e-3 keeps ten digits
    assert (singular_values_of_gram(torch.zeros(3, 3)) == 0).all()


def test_tokens_that_cancel_are_taken_from_the_factors_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """G = a(b + c)ᵀ − abᵀ is far smaller than its factors: squares of these would hide it."""
    taken = []
    monkeypatch.setattr(
        "geomkit.svd.singular_values.small_equivalent",
        lambda gradient: taken.append(gradient) or small_equivalent(gradient),
    )
    a, b = gaussian(2, 40), gaussian(2, 30, seed=1)
    small = 1e-4 * gaussian(2, 30, seed=2)
    cancels = FactoredGradient(torch.cat([a, -a]), torch.cat([b + small, b]))
    assert np.abs(singular_values(cancels) - np.linalg.svd(exact(cancels), compute_uv=False)[:4]).max() < 1e-12
    assert taken == [cancels]
    singular_values(factored(30, 40, 50))
    assert taken == [cancels]


def test_tokens_without_gradient_and_repeated_inputs_cost_no_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first token says nothing to the queries, and in the first layer equal tokens have equal inputs."""
    monkeypatch.setattr("geomkit.svd.singular_values.small_equivalent", lambda _: pytest.fail("decomposed"))
    left, right = gaussian(20, 40), gaussian(10, 30, seed=1).repeat(2, 1)
    left[0], right[7] = 0.0, 0.0
    for gradient in (FactoredGradient(left, right), FactoredGradient(right, left)):
        expected = np.linalg.svd(exact(gradient), compute_uv=False)[:20]
        assert np.abs(singular_values(gradient) - expected).max() <= 1e-7 * expected[0]


def test_one_call_for_all_gradients_gives_what_one_each_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geomkit.svd.singular_values._BATCH_NUMBERS", 100)
    shared = gaussian(5, 20, seed=7)
    siblings = [FactoredGradient(gaussian(5, size, seed=size), shared) for size in (20, 30, 20)]
    gradients = [*GRADIENTS.values(), zero_gradient((6, 5)), zero_gradient((3,)), *siblings]
    found = singular_values_of(gradients)
    assert found.dtype == torch.float64
    assert found.shape == (len(gradients), max(gradient.rank_bound for gradient in gradients))
    for gradient, values in zip(gradients, found, strict=True):
        bound = gradient.rank_bound
        alone = singular_values(gradient)
        assert values[:bound].numpy() == pytest.approx(alone, rel=1e-9, abs=1e-7 * max(alone, default=0.0))
        assert not values[bound:].any()
    assert singular_values_of([]).shape == (0, 0)


def test_a_factor_in_common_is_squared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    gram = singular_values_module._gram
    monkeypatch.setattr("geomkit.svd.singular_values._gram", lambda rows: made.append(rows) or gram(rows))
    inputs = gaussian(2, 5, 20, seed=7)  # two examples, as views of one batch
    gradients = [FactoredGradient(gaussian(5, 30, seed=k), inputs[k % 2]) for k in range(6)]
    singular_values_of(gradients)
    assert len(made) == 6 + 2


@pytest.mark.parametrize(
    "zero", [zero_gradient((8, 6)), zero_gradient((2, 4, 3)), SumGradient((zero_gradient((8, 6)),))]
)
def test_a_gradient_without_tokens_has_a_spectrum_a_null_and_an_empty_subspace(zero: LayerGradient) -> None:
    assert singular_values(zero).shape == (0,)
    assert {layer_spectrum("w", zero).statistics()[name] for name in RANKS} == {0.0}
    assert layer_spectrum("w", random_factor_null(zero, torch.Generator())).is_zero
    for side, size in zip(("left", "right"), zero.matrix_shape, strict=True):
        empty = layer_subspace(zero, rank=2, side=side)
        assert empty.basis.shape == (size, 0)
        assert (empty.energy, empty.numeric_rank) == (0.0, 0)


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, tokens=st.integers(1, 30), scale=st.floats(1e-3, 1e3))
def test_spectrum_ignores_token_order_rotations_and_scale(seed: int, tokens: int, scale: float) -> None:
    base = factored(tokens, 16, 12, seed)
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))
    moved = FactoredGradient(
        (base.left.double() @ rotation(16, seed))[order] * scale, (base.right.double() @ rotation(12, seed))[order]
    )
    assert singular_values(moved) == pytest.approx(scale * singular_values(base), rel=1e-9, abs=1e-9 * scale)
    before, after = (layer_spectrum("w", gradient).statistics() for gradient in (base, moved))
    assert after == pytest.approx(before, rel=1e-6)


@pytest.mark.parametrize("k", [1, 3, 8])
def test_equal_singular_values_have_that_rank_by_every_measure(k: int) -> None:
    found = planted([2.0] * k).statistics()
    assert [found[name] for name in RANKS] == pytest.approx([k] * len(RANKS))
    assert found["rank99"] == k


def test_measures_of_a_geometric_spectrum() -> None:
    found = planted([4.0, 2.0, 1.0])
    shares = np.array([4, 2, 1]) / 7
    energy = np.array([16, 4, 1]) / 21
    assert found.effective_rank == pytest.approx(math.exp(-(shares * np.log(shares)).sum()))
    assert found.entropy_rank == pytest.approx(math.exp(-(energy * np.log(energy)).sum()))
    assert found.participation_ratio == pytest.approx(21**2 / (16**2 + 4**2 + 1))
    assert found.stable_rank == pytest.approx(21 / 16)
    assert [found.cer(k) for k in (1, 2, 3, 9)] == pytest.approx([16 / 21, 20 / 21, 1, 1])
    assert [found.rank_at(energy) for energy in (0.5, 16 / 21, 0.9, 0.99, 1.0)] == [1, 1, 2, 3, 3]


def test_nine_of_ten_equal_values_hold_ninety_percent() -> None:
    assert planted([0.1] * 10).rank_at(0.9) == 9


def test_numeric_rank_leaves_rounding_out() -> None:
    found = planted([1.0, 1e-3, 1e-7, 0.0])
    assert found.tolerance == pytest.approx(12 * np.finfo(np.float32).eps)
    assert found.numeric_rank == 2


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12))
def test_measures_are_ordered_and_bounded(values: list[float]) -> None:
    found = planted(values)
    slack = 1 + 1e-6
    assert 1 / slack <= found.stable_rank <= found.entropy_rank * slack
    assert found.participation_ratio <= found.entropy_rank * slack <= found.effective_rank * slack**2
    assert found.effective_rank <= found.rank_bound * slack


def test_a_zero_gradient_has_rank_zero_and_is_left_out_of_means() -> None:
    found = spectrum({"a": factored(4, 8, 6), "zero": FactoredGradient(torch.zeros(4, 8), torch.ones(4, 6))})
    zero = found.layers["zero"].statistics()
    assert {zero[name] for name in RANKS} == {0.0}
    assert math.isnan(zero["cer10"])
    assert found.mean("cer10") == 1.0
    assert found.mean("stable_rank") == found.layers["a"].stable_rank


@pytest.mark.parametrize(("tokens", "published"), [(16, 0.69), (32, 0.41), (64, 0.25), (128, 0.16)])
def test_cer_of_gaussian_factors(tokens: int, published: float) -> None:
    drawn = [layer_spectrum("w", factored(tokens, 1024, 1024, seed)).cer(10) for seed in (0, 10, 20, 30)]
    assert np.mean(drawn) == pytest.approx(published, abs=0.01)


def test_spectrum_of_a_set_has_a_null_for_each_matrix_and_none_for_vectors() -> None:
    gradients = {
        "model.layers.0.mlp.up_proj.weight": factored(6, 40, 30),
        "model.embed_tokens.weight": indexed(),
        "lm_head.weight": DenseGradient(gaussian(14, 9), tokens=50),
        "model.norm.weight": DenseGradient(gaussian(9), tokens=50),
    }
    found = spectrum(gradients, null_draws=3)
    frame = found.to_frame()
    assert list(found.layers) == list(gradients)[:3]
    assert {len(draws) for draws in found.null.values()} == {3}
    assert len(frame) == 3 * 11
    assert ((frame.null_low <= frame.null) & (frame.null <= frame.null_high)).all()
    assert set(frame.kind) == {"mlp", "embedding", "head"}
    assert found.null_mean("numeric_rank") == pytest.approx((6 + 3 + 9) / 3)
    assert "3 parameters" in found._repr_html_()


def test_null_is_reproducible_and_independent_of_the_other_parameters() -> None:
    gradients = {"a": factored(6, 40, 30), "b": factored(6, 40, 30)}
    both, alone = spectrum(gradients, seed=1), spectrum({"b": gradients["b"]}, seed=1)
    assert np.array_equal(both.null["b"][0].singular_values, alone.null["b"][0].singular_values)
    assert not np.array_equal(both.null["a"][0].singular_values, both.null["b"][0].singular_values)
    other = spectrum(gradients, seed=2).null["b"][0]
    assert not np.array_equal(both.null["b"][0].singular_values, other.singular_values)


def test_spectrum_without_a_null_says_so() -> None:
    found = spectrum({"a": factored(6, 40, 30)}, null_draws=0)
    assert found.to_frame().null.isna().all()
    assert math.isnan(found.null_mean("cer10"))


def test_misuse_is_explained() -> None:
    found = spectrum({"a": factored(6, 40, 30)})
    with pytest.raises(GeometryError, match="cer10"):
        found.mean("rank")
    with pytest.raises(GeometryError, match="at least 1"):
        found.layers["a"].cer(0)
    with pytest.raises(GeometryError, match="at most 1"):
        found.layers["a"].rank_at(1.5)


# ------------------------------------------------------------------------------------------------- subspaces


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("gradient", GRADIENTS.values(), ids=GRADIENTS)
def test_basis_spans_the_leading_singular_vectors(gradient: LayerGradient, side: str) -> None:
    matrix = exact(gradient)
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    found = layer_subspace(gradient, rank=3, side=side)
    reference = (left if side == "left" else right.T)[:, : found.rank]
    basis = found.basis.double().numpy()
    assert found.basis.dtype == torch.float32
    assert basis.T @ basis == pytest.approx(np.eye(found.rank), abs=1e-6)
    assert basis @ basis.T == pytest.approx(reference @ reference.T, abs=1e-6)
    assert found.singular_values == pytest.approx(values[: found.rank], rel=1e-9)
    assert found.energy == pytest.approx((values[: found.rank] ** 2).sum() / (values**2).sum())
    assert found.numeric_rank == np.linalg.matrix_rank(
        matrix, tol=found.singular_values[0] * max(matrix.shape) * 2**-23
    )


def test_energy_takes_as_many_directions_as_it_needs() -> None:
    gradient = FactoredGradient(torch.diag(torch.tensor([4.0, 2.0, 1.0])), torch.eye(3, 9))
    assert [layer_subspace(gradient, energy=share).rank for share in (0.7, 0.9, 1.0)] == [1, 2, 3]


def test_rank_beyond_the_gradient_warns_once_and_takes_what_there_is() -> None:
    gradients = {"a": factored(5, 40, 30), "b": factored(4, 40, 30), "c": factored(30, 40, 30)}
    with pytest.warns(UserWarning, match="2 of 3 gradients .lowest: 4 in b") as caught:
        found = subspace(gradients, rank=20)
    assert len(caught) == 1
    assert {name: layer.rank for name, layer in found.layers.items()} == {"a": 5, "b": 4, "c": 20}
    assert list(found.to_frame()["rank"]) == [5, 4, 20]
    assert "rank 4 to 20" in str(found)


@pytest.mark.parametrize("wanted", [{"side": "both"}, {"method": "randomized"}, {"side": "both", "energy": 1.0}])
def test_asking_for_20_of_17_says_so(wanted: dict[str, object]) -> None:
    """An anchor of 17 loss tokens has no 20 directions, whichever way they are sought."""
    gradients = {"lm_head.weight": factored(17, 64, 32)}
    if "energy" in wanted:
        assert subspace(gradients, **wanted).layers["lm_head.weight"].rank == 17
        return
    with pytest.warns(UserWarning, match=r"expected rank 20, found less .*lowest: 17 in lm_head.weight"):
        found = subspace(gradients, rank=20, **wanted).layers["lm_head.weight"]
    assert (found.rank, found.numeric_rank, found.energy) == (17, 17, pytest.approx(1.0))


@pytest.mark.parametrize("method", ["exact", "randomized"])
@pytest.mark.parametrize("gradient", GRADIENTS.values(), ids=GRADIENTS)
def test_both_sides_come_in_pairs(gradient: LayerGradient, method: str) -> None:
    found = layer_subspace(gradient, rank=4, side="both", method=method)
    assert found.partner is not None
    left, right = found.basis.double().numpy(), found.partner.double().numpy()
    image = exact(gradient) @ right
    assert image == pytest.approx(left * found.singular_values, abs=1e-6 * found.singular_values[0])
    whole = subspace({"": gradient}, rank=found.rank, side="both", method=method)
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
    found = layer_subspace(gradient, rank=10, side=side, method="randomized")
    basis = found.basis.double().numpy()
    inside = np.linalg.norm(basis.T @ matrix if side == "left" else matrix @ basis) ** 2 / np.linalg.norm(matrix) ** 2
    best = (values[:10] ** 2).sum() / (values**2).sum()
    assert found.energy == pytest.approx(inside, rel=1e-6)
    assert found.energy == pytest.approx(best, rel=1e-3)
    assert found.energy <= best * (1 + 1e-9)
    assert (found.singular_values <= values[:10] * (1 + 1e-9)).all()
    assert found.singular_values == pytest.approx(values[:10], rel=5e-3)
    both = layer_subspace(gradient, rank=10, side="both", method="randomized")
    apart = matrix @ both.partner.double().numpy() - both.basis.double().numpy() * both.singular_values
    assert both.residual == pytest.approx(np.linalg.norm(apart) / np.linalg.norm(matrix), rel=0.01, abs=1e-6)
    assert both.residual == found.residual
    assert layer_subspace(gradient, rank=10, side=side).residual == 0


def test_a_harder_spectrum_has_a_larger_residual_and_the_result_says_so() -> None:
    gradients = {"easy": power_law(2.0)[0], "hard": power_law(0.5)[0]}
    found = subspace(gradients, rank=10, method="randomized")
    residuals = found.to_frame().set_index("parameter")["residual"]
    assert 0 < 100 * residuals["easy"] < residuals["hard"] < 0.05
    assert f"residual at most {residuals['hard']:.1e}" in str(found)
    alone = subspace({"hard": gradients["hard"]}, rank=10, method="randomized").layers["hard"]
    assert torch.equal(alone.basis, found.layers["hard"].basis)


def test_randomized_subspace_of_nothing_is_empty() -> None:
    found = layer_subspace(zero_gradient((8, 6)), rank=2, side="both", method="randomized")
    assert (found.basis.shape, found.partner.shape, found.energy, found.residual) == ((8, 0), (6, 0), 0.0, 0.0)


def test_misused_sides_and_methods_are_explained() -> None:
    gradients = {"a": factored(5, 8, 6)}
    with pytest.raises(GeometryError, match="needs all singular values; give rank="):
        subspace(gradients, energy=0.9, method="randomized")
    with pytest.raises(GeometryError, match=r"'up'.*give one of these"):
        subspace(gradients, rank=2, side="up")
    with pytest.raises(GeometryError, match="side='both'"):
        subspace(gradients, rank=2).on("right")


def test_subspace_leaves_vectors_out_and_keeps_the_side() -> None:
    found = subspace({"a": factored(5, 40, 30), "norm": DenseGradient(gaussian(9), tokens=5)}, rank=2, side="right")
    assert list(found.layers) == ["a"]
    assert found.layers["a"].basis.shape == (30, 2)
    assert found.side == "right"


def test_zero_gradient_has_an_empty_subspace() -> None:
    found = layer_subspace(FactoredGradient(torch.zeros(4, 8), torch.ones(4, 6)), rank=2)
    assert found.basis.shape == (8, 0)
    assert (found.energy, found.numeric_rank) == (0.0, 0)


@pytest.mark.parametrize("wanted", [{}, {"rank": 2, "energy": 0.5}, {"rank": 0}, {"energy": 0.0}])
def test_subspace_takes_one_criterion(wanted: dict[str, float]) -> None:
    with pytest.raises(GeometryError, match="expected"):
        layer_subspace(factored(5, 8, 6), **wanted)


def test_summed_and_factored_gradients_agree() -> None:
    parts = [factored(9, 10, 8, seed) for seed in range(4)]
    kept, formed = add(parts, keep_factors=True), add(parts)
    assert isinstance(formed, DenseGradient)
    assert singular_values(kept) == pytest.approx(singular_values(formed), rel=1e-5)


def test_tall_sums_are_decomposed_a_strip_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tied embedding and head with more tokens than columns, of which few rows are ever formed at once."""
    monkeypatch.setattr("geomkit.svd.singular_vectors._STRIP", 16)
    monkeypatch.setattr("geomkit.gradients.layer_gradient._STRIP", 16)
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
