"""Single examples against the mean of the others: against dense SVDs, planted directions and repeated studies."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles

from geomkit.errors import GeometryError
from geomkit.gradients.accumulator import add
from geomkit.gradients.dense import DenseGradient
from geomkit.gradients.factored import FactoredGradient
from geomkit.gradients.gradient_set import Coverage, GradientSet
from geomkit.gradients.layer_gradient import LayerGradient
from geomkit.svd.one_sample.study import one_sample_study
from tests.helpers.forms import dense, seeded
from tests.helpers.tiny import UTILITY

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
    study = one_sample_study(safety, utility, rank=3)
    dense = [sample[NAME].dense().double().numpy() for sample in safety.samples]

    def leading(matrix: np.ndarray) -> np.ndarray:
        return np.linalg.svd(matrix)[0][:, :3]

    expected = [
        np.mean(np.cos(subspace_angles(leading(matrix), leading(sum(dense) - matrix))) ** 2) for matrix in dense
    ]
    assert study.overlaps == pytest.approx(expected, abs=1e-5)
    last = leading(utility.samples[4][NAME].dense().double().numpy())
    assert study.control_overlaps[4] == pytest.approx(
        np.mean(np.cos(subspace_angles(last, leading(sum(dense) - dense[0]))) ** 2), abs=1e-5
    )
    assert study.overlap == pytest.approx(np.mean(expected), abs=1e-5)
    assert study.expected == 3 / ROWS


def leading(matrix: np.ndarray, rank: int, side: str) -> np.ndarray:
    left, values, right = np.linalg.svd(matrix)
    count = min(rank, int((values > 1e-4 * values[0]).sum())) if values[0] else 0
    return (left if side == "left" else right.T)[:, :count]


# -------------------------------------------------------------------------------------------------- cosines


def test_cosines_are_those_with_the_mean_of_the_others_over_all_parameters() -> None:
    safety, control = drawn(5, 0, shared=2), drawn(7, 1)
    study = one_sample_study(safety, control, rank=3)

    def flat(sample: GradientSet) -> np.ndarray:
        return np.concatenate([dense(gradient).ravel() for gradient in sample.values()])

    anchors, controls = ([flat(sample) for sample in side.samples] for side in (safety, control))

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    expected = [cosine(row, sum(anchors) - row) for row in anchors]
    assert study.groups["safety"].cosines == pytest.approx(expected, abs=1e-6)
    expected = [cosine(row, sum(anchors) - anchors[place % 5]) for place, row in enumerate(controls)]
    assert study.groups["control"].cosines == pytest.approx(expected, abs=1e-6)
    matrices = [dense(sample[NAME]).ravel() for sample in safety.samples]
    expected = [cosine(row, sum(matrices) - row) for row in matrices]
    assert study.layers[NAME].groups["safety"].cosines == pytest.approx(expected, abs=1e-6)


# ------------------------------------------------------------------------------------------------ intervals


def small(count: int, generator: torch.Generator, lean: float, spread: float = 0.0) -> GradientSet:
    """Few-token gradients of a small matrix, whose left rows lean towards three directions."""
    samples: list[dict[str, LayerGradient]] = []
    for _ in range(count):
        left, right = torch.randn(6, 16, generator=generator), torch.randn(6, 14, generator=generator)
        left[:3] += lean * torch.eye(3, 16)
        right[:3] += 2.0
        size = 1 + spread * float(torch.rand((), generator=generator))
        samples.append({"w": FactoredGradient(size * left, right)})
    return gradient_set(samples)


@pytest.mark.parametrize(("counts", "leans"), [((16, 16), (3.0, 1.0)), ((14, 9), (4.0, 2.0))])
def test_intervals_hold_what_such_studies_find_on_average(counts: tuple[int, int], leans: tuple[float, float]) -> None:
    generator = seeded(1)
    rows = []
    for _ in range(300):
        sets = [small(count, generator, lean, 1.0) for count, lean in zip(counts, leans, strict=True)]
        groups = one_sample_study(*sets, rank=3).groups
        means = (groups["safety"].overlap, groups["control"].overlap, groups["safety"].cosine)
        contrasts = (groups["control"].overlap, groups["control"].cosine)
        rows += [(estimate.value, *estimate.interval) for estimate in means]
        rows += [(estimate.contrast, *estimate.contrast_interval) for estimate in contrasts]
    values, lows, highs = np.array(rows).reshape(300, 5, 3).transpose(2, 0, 1)
    truth = values.mean(0)
    covered = ((lows <= truth) & (truth <= highs)).mean(0)
    assert (covered > 0.92).all()
    assert (covered < 0.99).all()


def test_a_contrast_that_is_not_there_is_not_found() -> None:
    """Controls drawn as the anchors are: the interval leaves zero out about once in twenty studies."""
    generator = seeded(5)
    missed = 0
    for _ in range(300):
        study = one_sample_study(small(14, generator, 3.0), small(14, generator, 3.0), rank=3)
        low, high = study.contrast_interval
        missed += not low <= 0 <= high
    assert missed / 300 == pytest.approx(0.05, abs=0.035)


# ---------------------------------------------------------------------------------------------------- study


def test_shared_directions_are_found_above_the_null() -> None:
    study = one_sample_study(drawn(8, 0, shared=3, strength=15.0), drawn(10, 1), rank=3)
    assert study.interval[0] < study.overlap < study.interval[1]
    assert study.interval[0] > 0.5 > study.control_interval[1]
    assert "random subspaces 0.062" in str(study)
    assert study.contrast_interval[0] > 0
    assert "anchors" in study._repr_html_()


def test_unrelated_examples_overlap_as_random_subspaces_do() -> None:
    study = one_sample_study(drawn(12, 0), drawn(12, 1), rank=4)
    assert study.overlap == pytest.approx(study.expected, abs=0.04)
    assert study.control_overlap == pytest.approx(study.expected, abs=0.04)


def test_rank_is_common_to_everything_and_no_more_than_any_gradient_has() -> None:
    safety, utility = drawn(4, 0), drawn(4, 1)
    short = dict(utility.samples[0])
    short[NAME] = FactoredGradient(utility.samples[0][NAME].left[:5], utility.samples[0][NAME].right[:5])
    study = one_sample_study(safety, gradient_set([short, *map(dict, utility.samples[1:])]), rank=20)
    assert study.layers[NAME].rank == 5
    assert study.expected == 5 / ROWS


def test_right_side_compares_input_spaces() -> None:
    study = one_sample_study(drawn(4, 0), drawn(4, 1), rank=3, side="right")
    assert study.layers[NAME].dimension == COLUMNS
    assert study.side == "right"


def test_every_control_meets_the_same_means() -> None:
    safety, first, second = drawn(5, 0, shared=2), drawn(4, 1), drawn(5, 2, shared=1)
    both = one_sample_study(safety, {"first": first, "second": second}, rank=3)
    assert list(both.groups) == ["safety", "first", "second"]
    for name, control in (("first", first), ("second", second)):
        alone = one_sample_study(safety, control, rank=3).groups["control"]
        assert both.groups[name].overlaps == pytest.approx(alone.overlaps, abs=1e-9)
        assert both.groups[name].overlap.contrast_interval == pytest.approx(alone.overlap.contrast_interval, abs=1e-9)
        assert both.groups[name].overlap.contrast == pytest.approx(both.overlap - alone.overlaps.mean())
    assert both.control_overlap == both.groups["first"].overlaps.mean()
    assert both.contrast == both.groups["first"].overlap.contrast
    frame = both.to_frame()
    assert len(frame) == 2 * 3 * 2
    assert set(frame["parameter"]) == {"all parameters", NAME}
    assert frame.loc[0, "value"] == both.overlap


def test_a_parameter_without_gradient_in_some_example_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    def with_expert(side: GradientSet, first: float) -> GradientSet:
        samples = [dict(sample) for sample in side.samples]
        for place, sample in enumerate(samples):
            sample["expert"] = sample[NAME].scaled(1.0 if place else first)
        return gradient_set(samples)

    study = one_sample_study(with_expert(drawn(4, 0), 0.0), with_expert(drawn(4, 1), 1.0), rank=3)
    assert list(study.layers) == [NAME]
    assert "left expert out" in caplog.text


def test_sets_that_cannot_be_studied_are_refused() -> None:
    safety, utility = drawn(4, 0), drawn(4, 1)
    with pytest.raises(GeometryError, match="per_sample=True"):
        one_sample_study(GradientSet(safety.layers, 1.0, 4, 16, FULL), utility)
    with pytest.raises(GeometryError, match="control set, found 2"):
        one_sample_study(safety, drawn(2, 1))
    with pytest.raises(GeometryError, match="left or right, found 'both'"):
        one_sample_study(safety, utility, side="both")  # type: ignore[arg-type]
    with pytest.raises(GeometryError, match="other names than 'safety'"):
        one_sample_study(safety, {"safety": utility})
    with pytest.raises(GeometryError, match="a control at least"):
        one_sample_study(safety, {})
    empty = gradient_set([{NAME: sample[NAME].scaled(0.0)} for sample in safety.samples])
    with pytest.raises(GeometryError, match="found none"):
        one_sample_study(empty, gradient_set([{NAME: sample[NAME]} for sample in utility.samples]))


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
        one_sample_study(drawn(4, 0), drawn(4, 1), **options)


@pytest.mark.parametrize("value", [UTILITY, "control", [1]], ids=["Dataset", "str", "list"])
def test_examples_are_no_gradients(value: object) -> None:
    with pytest.raises(
        GeometryError, match=r"from collect_gradients\(\.\.\., per_sample=True\), found .* collect them"
    ):
        one_sample_study(drawn(4, 0), value)


def test_sets_of_other_models_and_what_is_not_finite_are_refused() -> None:
    safety = drawn(4, 0)
    wide = gradient_set([{**sample, NAME: DenseGradient(torch.ones(2, 3), 4)} for sample in safety.samples])
    spoilt = gradient_set([{**sample, NAME: sample[NAME].scaled(math.nan)} for sample in safety.samples])
    with pytest.raises(
        GeometryError, match=f"one shape for {NAME}, found .* and .2, 3.; collect both from the same model"
    ):
        one_sample_study(safety, wide)
    with pytest.raises(GeometryError, match="not finite"):
        one_sample_study(safety, spoilt)
