"""The directions that carry the conflict, against dense SVDs."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import ttest_1samp

from geomkit import plots
from geomkit.collection.collect import collect_gradients
from geomkit.correlation.conflict_directions import ConflictDirections, conflict_directions
from geomkit.errors import GeometryError
from geomkit.gradients.dense import DenseGradient
from geomkit.gradients.factored import FactoredGradient
from geomkit.gradients.gradient_set import GradientSet
from geomkit.gradients.layer_gradient import LayerGradient
from tests.correlation.test_conflict import FULL, gradient_set
from tests.helpers.architectures import ROWS, built, collected
from tests.helpers.tiny import UTILITY, tiny_llama, tiny_tokenizer

SHAPES = {"model.layers.0.mlp.up_proj.weight": (9, 6), "model.layers.1.mlp.down_proj.weight": (5, 8)}


def random_set(seed: int, examples: int, *, tokens: int = 4, dense: bool = False) -> GradientSet:
    generator = torch.Generator().manual_seed(seed)

    def gradient(shape: tuple[int, int]) -> LayerGradient:
        factored = FactoredGradient(*(torch.randn(tokens, size, generator=generator) for size in shape))
        return DenseGradient(factored.dense(), tokens) if dense else factored

    samples = [
        {name: gradient(shape) for name, shape in SHAPES.items()}
        | {"model.norm.weight": DenseGradient(torch.randn(6, generator=generator), tokens)}
        for _ in range(examples)
    ]
    return gradient_set(samples)


def matrix(gradients: GradientSet, name: str) -> np.ndarray:
    return gradients[name].dense().double().numpy()


@pytest.mark.parametrize("dense", [False, True])
def test_parts_are_those_of_the_dense_svd(dense: bool) -> None:
    safety, utility = random_set(0, 1, dense=dense), random_set(1, 5, dense=dense)
    result = conflict_directions(safety, utility, rank=3)
    norms = [math.sqrt(sum(np.linalg.norm(matrix(side, name)) ** 2 for name in SHAPES)) for side in (safety, utility)]
    assert list(result.layers) == list(SHAPES)
    for name, layer in result.layers.items():
        left, values, right = np.linalg.svd(matrix(safety, name), full_matrices=False)
        for place in range(3):
            for number, sample in enumerate(utility.samples):
                part = values[place] * left[:, place] @ matrix(sample, name) @ right[place]
                assert layer.parts[place, number] == pytest.approx(part / math.prod(norms), abs=1e-6)
        assert layer.energy == pytest.approx(values[:3] ** 2 / (values**2).sum(), abs=1e-6)
        whole = [(matrix(safety, name) * matrix(sample, name)).sum() for sample in utility.samples]
        assert layer.whole == pytest.approx(np.array(whole) / math.prod(norms), abs=1e-6)


def test_a_set_weighted_by_tokens_has_the_cosine_one_with_itself() -> None:
    utility = collect_gradients(tiny_llama(), tiny_tokenizer(), UTILITY, True, reduction="token", progress=False)
    assert len(set(utility.weights)) > 1
    assert conflict_directions(utility, utility).cosine == pytest.approx(1, abs=1e-5)


def test_parts_of_all_directions_add_up_to_the_cosine() -> None:
    safety, utility = random_set(2, 3), random_set(3, 6)
    result = conflict_directions(safety, utility, rank=9)
    flat = [np.concatenate([matrix(side, name).ravel() for name in SHAPES]) for side in (safety, utility)]
    cosine = flat[0] @ flat[1] / np.linalg.norm(flat[0]) / np.linalg.norm(flat[1])
    assert result.cosine == pytest.approx(cosine, abs=1e-6)
    assert result.total.parts.sum(0) == pytest.approx(result.total.whole, abs=1e-6)
    assert result.energy == pytest.approx(1, abs=1e-6)
    assert result.share == pytest.approx(1, abs=1e-5)
    frame = result.to_frame()
    assert frame["contribution"].sum() == pytest.approx(cosine, abs=1e-6)
    assert sum(layer.weight for layer in result.layers.values()) == pytest.approx(1)
    last = result.by_index().iloc[-1]
    assert (last["direction"], last["cumulative_energy"]) == (0, pytest.approx(1))
    assert last["cumulative_contribution"] == pytest.approx(cosine, abs=1e-6)
    assert math.isnan(frame[frame["direction"] == 0]["p_value"].iloc[0])


def test_intervals_and_p_values_are_students() -> None:
    result = conflict_directions(random_set(4, 3), random_set(5, 12), rank=2)
    table, total = result.by_index(), result.total
    for place in range(2):
        low, high = ttest_1samp(total.parts[place], 0).confidence_interval(0.95)
        assert (table["low"][place], table["high"][place]) == pytest.approx((low, high))
        excess = total.parts[place] - total.energy[place] * total.whole
        assert table["p_value"][place] == pytest.approx(ttest_1samp(excess, 0).pvalue)


def conflict_along(profile: np.ndarray, generator: np.random.Generator) -> ConflictDirections:
    """A diagonal safety gradient whose directions meet utility examples in proportion to a profile, with noise."""
    values = np.array([4.0, 3.0, 2.0, 1.0, 1.0, 1.0])
    safety = {"w": DenseGradient(torch.diag(torch.tensor(values)).float(), 9)}
    noise = generator.standard_normal((16, 6, 6))
    utility = [{"w": DenseGradient(torch.tensor(np.diag(-profile) + sample).float(), 9)} for sample in noise]
    return conflict_directions(safety, gradient_set(utility), rank=3)


def test_a_conflict_spread_like_the_energy_is_called_so_and_one_in_the_tail_is_not() -> None:
    generator = np.random.default_rng(0)
    alike = [
        conflict_along(np.array([4.0, 3.0, 2.0, 1.0, 1.0, 1.0]) / 2, generator).by_index()["p_value"]
        for _ in range(300)
    ]
    assert np.mean(np.array(alike) <= 0.05) == pytest.approx(0.05, abs=0.02)
    tail = conflict_along(np.array([0.0, 0.0, 0.0, 4.0, 4.0, 4.0]), generator)
    assert tail.share < 0.5 < tail.energy
    assert tail.by_index()["p_value"].iloc[-1] < 0.01
    assert tail.share_interval[1] < tail.energy
    assert "of the safety energy and" in str(tail)


def test_share_interval_covers_the_truth_and_is_endless_without_a_cosine() -> None:
    generator = np.random.default_rng(1)
    profile = np.array([1.0, 1.0, 1.0, 2.0, 2.0, 0.0])
    values = np.array([4.0, 3.0, 2.0, 1.0, 1.0, 1.0])
    truth = (values * profile)[:3].sum() / (values * profile).sum()
    intervals = [conflict_along(profile, generator).share_interval for _ in range(400)]
    assert 0.92 <= np.mean([low <= truth <= high for low, high in intervals]) <= 0.98
    none = [conflict_along(np.zeros(6), generator) for _ in range(40)]
    assert np.mean([np.isinf(result.share_interval).all() for result in none]) > 0.8
    assert any("may be zero" in str(result) for result in none)


def test_embeddings_and_heads_of_a_model_take_part() -> None:
    model = built("llama", tied=True)
    safety, utility = collected(model, ROWS[:2]), collected(model, ROWS[2:])
    result = conflict_directions(safety, utility, rank=4)
    assert "model.embed_tokens.weight" in result.layers
    for name, layer in result.layers.items():
        left, values, right = torch.linalg.svd(safety[name].dense().double(), full_matrices=False)
        dense = torch.stack([sample[name].dense().double() for sample in utility.samples])
        parts = torch.einsum("ki,nij,kj->kn", (left * values).T[:4], dense, right[:4])
        scale = layer.whole @ layer.whole / (layer.whole @ (safety[name].dense().double() * dense).sum((1, 2)).numpy())
        assert layer.parts == pytest.approx(scale * parts.numpy(), abs=1e-5)


def test_sets_without_directions_are_refused() -> None:
    safety, utility = random_set(6, 3), random_set(7, 4)
    with pytest.raises(GeometryError, match="per_sample=True"):
        conflict_directions(safety, GradientSet(utility.layers, 1.0, 4, 16, FULL))
    with pytest.raises(GeometryError, match="rank of at least 1"):
        conflict_directions(safety, utility, rank=0)
    with pytest.raises(GeometryError, match="same parameters"):
        conflict_directions({name: safety[name] for name in SHAPES}, utility)
    vectors = gradient_set([{"norm": sample["model.norm.weight"]} for sample in utility.samples])
    with pytest.raises(GeometryError, match="vectors only"):
        conflict_directions(vectors, vectors)
    nothing = {name: gradient.scaled(0.0) for name, gradient in safety.items()}
    with pytest.raises(GeometryError, match="other than zero"):
        conflict_directions(nothing, utility)


def test_figure_draws_both_accounts() -> None:
    result = conflict_directions(random_set(8, 3), random_set(9, 8), rank=3)
    figure = plots.plot_conflict_directions(result)
    frame = result.by_index()
    lines = {trace.name: trace for trace in figure.data if trace.xaxis == "x" and trace.name}
    assert list(lines["conflict"].x) == pytest.approx([0, *frame["cumulative_energy"]])
    assert list(lines["conflict"].y) == pytest.approx([0, *frame["cumulative_contribution"]])
    assert list(lines["spread like the energy"].y) == pytest.approx([0, result.cosine])
    single = next(trace for trace in figure.data if trace.xaxis == "x2" and trace.name == "conflict")
    assert list(single.x) == [1, 2, 3]
    assert list(single.y + single.error_y.array) == pytest.approx(list(frame["high"][:3]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank of at least 1, a whole number, found 0"),
        ({"rank": 2.5}, "found 2.5"),
        ({"confidence": 95}, "found 95; give .95, not 95"),
        ({"confidence": 1.0}, "found 1.0"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(GeometryError, match=message):
        conflict_directions(random_set(6, 3), random_set(7, 4), **options)


def test_the_headline_names_no_more_directions_than_there_are() -> None:
    assert "the first 4 directions hold" in str(conflict_directions(random_set(6, 3), random_set(7, 4), rank=4))
    headline = str(conflict_directions(random_set(6, 3), random_set(7, 4), rank=999))
    assert "the first 6 directions hold" in headline
    assert "the first direction holds" in str(conflict_directions(random_set(6, 3), random_set(7, 4), rank=1))
