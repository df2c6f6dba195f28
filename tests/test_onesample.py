import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles

from geomkit._leave_one_out import bases_without_each
from geomkit.algebra import add, zero_gradient
from geomkit.errors import GeometryError
from geomkit.forms import DenseGradient, FactoredGradient
from geomkit.gradients import Coverage, GradientSet
from geomkit.layer_gradient import LayerGradient
from geomkit.onesample import one_sample_study
from tests.forms import dense, seeded
from tests.forms import drawn as some_gradient

FULL = Coverage({}, {}, {})
TOKENS, ROWS, COLUMNS = 12, 48, 40
NAME = "model.layers.0.mlp.up_proj.weight"


def gradient_set(samples: list[dict[str, LayerGradient]]) -> GradientSet:
    sets = tuple(GradientSet(sample, 1.0, 1, 4, FULL) for sample in samples)
    mean = {name: add([sample[name] for sample in samples]) for name in samples[0]}
    return GradientSet(mean, 1.0, len(samples), 4 * len(samples), FULL, sets)


def drawn(count: int, seed: int, *, shared: int = 0, strength: float = 6.0) -> GradientSet:
    """Examples of random factors whose left rows lean towards ``shared`` common directions."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.linalg.qr(torch.randn(ROWS, ROWS, generator=torch.Generator().manual_seed(99))).Q[:shared]
    inputs = torch.randn(TOKENS, COLUMNS, generator=torch.Generator().manual_seed(98))
    samples = []
    for _ in range(count):
        left = torch.randn(TOKENS, ROWS, generator=generator)
        left[:shared] += strength * common
        right = torch.randn(TOKENS, COLUMNS, generator=generator)
        right[:shared] += strength * inputs[:shared]
        samples.append({NAME: FactoredGradient(left, right), "model.norm.weight": DenseGradient(left.sum(0), TOKENS)})
    return gradient_set(samples)


def test_anchor_meets_the_mean_of_the_others() -> None:
    safety, utility = drawn(4, 0, shared=2), drawn(5, 1)
    found = one_sample_study(safety, utility, rank=3)
    dense = [sample[NAME].dense().double().numpy() for sample in safety.samples]

    def leading(matrix: np.ndarray) -> np.ndarray:
        return np.linalg.svd(matrix)[0][:, :3]

    expected = [np.mean(np.cos(subspace_angles(leading(own), leading(sum(dense) - own))) ** 2) for own in dense]
    assert found.overlaps == pytest.approx(expected, abs=1e-5)
    last = leading(utility.samples[4][NAME].dense().double().numpy())
    assert found.null[4] == pytest.approx(
        np.mean(np.cos(subspace_angles(last, leading(sum(dense) - dense[0]))) ** 2), abs=1e-5
    )
    assert found.overlap == pytest.approx(np.mean(expected), abs=1e-5)
    assert found.expected == 3 / ROWS


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("count", [3, 6])
def test_one_frame_for_all_sums_gives_the_subspaces_of_each_sum(count: int, side: str) -> None:
    """Three examples have fewer tokens than the matrix has rows and columns, six have more."""
    parts = [sample[NAME] for sample in drawn(count, 3, shared=2).samples]
    for place, basis in enumerate(bases_without_each(parts, 5, side)):
        left, _, right = np.linalg.svd(sum(p.dense().double() for i, p in enumerate(parts) if i != place).numpy())
        expected = (left if side == "left" else right.T)[:, :5]
        assert basis.double().numpy() @ basis.double().numpy().T == pytest.approx(expected @ expected.T, abs=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("form", ["tied", "indexed"])
def test_embeddings_and_examples_without_a_share_have_their_means(form: str, side: str) -> None:
    generator = seeded()
    parts = [some_gradient(form, (60, 40), generator) for _ in range(3)] + [zero_gradient((60, 40))]
    for place, basis in enumerate(bases_without_each(parts, 2, side)):
        left, _, right = np.linalg.svd(sum(dense(part) for i, part in enumerate(parts) if i != place))
        expected = (left if side == "left" else right.T)[:, :2]
        assert basis.double().numpy() @ basis.double().numpy().T == pytest.approx(expected @ expected.T, abs=1e-5)


def test_no_direction_beyond_the_rank_of_the_others() -> None:
    parts = [FactoredGradient(torch.eye(1, ROWS), torch.eye(1, COLUMNS))] * 3
    assert [basis.shape for basis in bases_without_each(parts, 5, "left")] == [(ROWS, 1)] * 3


def test_shared_directions_are_found_above_the_null() -> None:
    found = one_sample_study(drawn(8, 0, shared=3, strength=15.0), drawn(10, 1), rank=3)
    assert found.interval[0] < found.overlap < found.interval[1]
    assert found.interval[0] > 0.5 > found.null_interval[1]
    assert "random subspaces 0.062" in str(found)
    assert found.to_frame().loc[0, "null"] == pytest.approx(found.null_mean)
    assert "anchors" in found._repr_html_()


def test_unrelated_examples_overlap_as_random_subspaces_do() -> None:
    found = one_sample_study(drawn(12, 0), drawn(12, 1), rank=4)
    assert found.overlap == pytest.approx(found.expected, abs=0.04)
    assert found.null_mean == pytest.approx(found.expected, abs=0.04)


def test_rank_is_common_to_everything_and_no_more_than_any_gradient_has() -> None:
    safety, utility = drawn(4, 0), drawn(4, 1)
    short = dict(utility.samples[0])
    short[NAME] = FactoredGradient(utility.samples[0][NAME].left[:5], utility.samples[0][NAME].right[:5])
    found = one_sample_study(safety, gradient_set([short, *map(dict, utility.samples[1:])]), rank=20)
    assert found.layers[NAME].rank == 5
    assert found.expected == 5 / ROWS


def test_right_side_compares_input_spaces() -> None:
    found = one_sample_study(drawn(4, 0), drawn(4, 1), rank=3, side="right")
    assert found.layers[NAME].dimension == COLUMNS
    assert found.side == "right"


def test_seed_decides_the_interval_only() -> None:
    sets = drawn(5, 0), drawn(5, 1)
    first, again, other = (one_sample_study(*sets, rank=3, seed=seed) for seed in (0, 0, 1))
    assert first.interval == again.interval != other.interval
    assert np.array_equal(first.overlaps, other.overlaps)


def test_a_parameter_without_gradient_in_some_example_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    def with_expert(found: GradientSet, first: float) -> GradientSet:
        samples = [dict(sample) for sample in found.samples]
        for place, sample in enumerate(samples):
            sample["expert"] = sample[NAME].scaled(1.0 if place else first)
        return gradient_set(samples)

    found = one_sample_study(with_expert(drawn(4, 0), 0.0), with_expert(drawn(4, 1), 1.0), rank=3)
    assert list(found.layers) == [NAME]
    assert "left expert out" in caplog.text


def test_sets_that_cannot_be_studied_are_refused() -> None:
    safety, utility = drawn(4, 0), drawn(4, 1)
    with pytest.raises(GeometryError, match="per_sample=True"):
        one_sample_study(GradientSet(safety.layers, 1.0, 4, 16, FULL), utility)
    with pytest.raises(GeometryError, match="control set, found 2"):
        one_sample_study(safety, drawn(2, 1))
    empty = gradient_set([{NAME: sample[NAME].scaled(0.0)} for sample in safety.samples])
    with pytest.raises(GeometryError, match="found none"):
        one_sample_study(empty, gradient_set([{NAME: sample[NAME]} for sample in utility.samples]))
