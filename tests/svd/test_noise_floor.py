"""The noise floor against simulations in which the expected gradient is known."""

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch

from geomkit.errors import GeometryError
from geomkit.gradients.arithmetic import zero_gradient
from geomkit.gradients.dense import DenseGradient
from geomkit.gradients.factored import FactoredGradient
from geomkit.gradients.gradient_set import Coverage, GradientSet
from geomkit.gradients.layer_gradient import LayerGradient
from geomkit.svd.noise_floor import LayerNoiseFloor, NoiseFloor, noise_floor

ROWS, COLUMNS = 12, 10


def gaussian(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def gradient_set(samples: Sequence[Mapping[str, LayerGradient]]) -> GradientSet:
    sets = tuple(GradientSet(sample, 1.0, 1, 1, Coverage({}, {}, {})) for sample in samples)
    return GradientSet(samples[0], 1.0, len(sets), len(sets), Coverage({}, {}, {}), sets)


def dense(samples: np.ndarray) -> GradientSet:
    """(N, P, rows, columns) numbers, as P parameters of N examples."""
    return gradient_set(
        [{f"w{place}": DenseGradient(torch.from_numpy(one), 50) for place, one in enumerate(s)} for s in samples]
    )


def coloured(generator: np.random.Generator, *size: int) -> np.ndarray:
    """Noise whose rows and columns fall off as 1/√i: far from the white noise of the closed forms."""
    fall = np.outer(np.arange(1, ROWS + 1) ** -0.5, np.arange(1, COLUMNS + 1) ** -0.5)
    return generator.normal(size=(*size, ROWS, COLUMNS)) * fall


def directions(generator: np.random.Generator, values: Sequence[float]) -> np.ndarray:
    left, right = (np.linalg.qr(generator.normal(size=(size, len(values)))).Q for size in (ROWS, COLUMNS))
    return left @ np.diag(values) @ right.T


def each(generator: np.random.Generator, examples: int, repeats: int, values: Sequence[float]) -> list[LayerNoiseFloor]:
    planted = np.stack([directions(generator, values) for _ in range(20)])
    sets = (dense(planted + coloured(generator, examples, 20)) for _ in range(repeats))
    return [layer for seed, drawn in enumerate(sets) for layer in noise_floor(drawn, seed=seed).layers.values()]


@pytest.mark.parametrize("examples", [8, 20])
def test_pure_noise_is_called_a_signal_as_often_as_promised(examples: int) -> None:
    result = each(np.random.default_rng(examples), examples, 50, [0.0])
    p_values = np.array([layer.p_value for layer in result])
    assert 0.035 <= (p_values <= 0.05).mean() <= 0.065
    assert 0.45 <= (p_values <= 0.5).mean() <= 0.55
    assert [layer.signal_rank > 0 for layer in result] == (p_values <= 0.05).tolist()


def test_planted_directions_are_counted() -> None:
    """The weakest is at twice the floor of 16 examples."""
    result = each(np.random.default_rng(0), 16, 15, [2.0, 1.7, 1.44])
    ranks = np.array([layer.signal_rank for layer in result])
    assert np.median([layer.floor for layer in result]) == pytest.approx(0.72, abs=0.03)
    assert (ranks == 3).mean() >= 0.95
    assert (ranks > 3).mean() <= 0.05


def test_a_strong_direction_does_not_hide_a_weak_one() -> None:
    """Signs alone would carry a part of the strong one, up to 20 · 2/√16, into the floor."""
    result = each(np.random.default_rng(1), 16, 5, [20.0, 1.4])
    assert np.mean([layer.signal_rank == 2 for layer in result]) >= 0.95


def marchenko_pastur_edge(shape: tuple[int, int], noise: float) -> float:
    """The largest singular value of a large matrix of independent entries with this standard deviation."""
    return noise * (shape[0] ** 0.5 + shape[1] ** 0.5)


def test_white_noise_ends_at_the_edge_and_coloured_noise_beyond() -> None:
    generator = np.random.default_rng(0)
    white = noise_floor(dense(generator.normal(size=(12, 1, 80, 60)))).layers["w0"]
    assert white.floor == pytest.approx(marchenko_pastur_edge((80, 60), 12**-0.5), rel=0.05)
    drawn = coloured(generator, 12, 1)
    noise = (drawn.var(axis=0, ddof=1).mean() / 12) ** 0.5
    assert noise_floor(dense(drawn)).layers["w0"].floor > 1.15 * marchenko_pastur_edge((ROWS, COLUMNS), noise)


def test_one_signal_among_many_parameters_is_found_with_few_draws_and_none_is_invented() -> None:
    generator = np.random.default_rng(0)
    planted = directions(generator, [1.6])
    missed, invented = 0, 0
    for seed in range(100):
        drawn = coloured(generator, 12, 25)
        drawn[:, 7] += planted
        result = noise_floor(dense(drawn), seed=seed, draws=39)
        missed += "w7" not in result.significant
        invented += len(result.significant - {"w7"}) > 0
        assert result.to_frame()["q_value"].min() > 0.05  # 39 draws are too few for a q-value below 25 / 40
    assert missed <= 100 * 0.05
    assert invented <= 100 * 0.1  # 5 %, and two standard deviations of what 100 experiments show


def test_the_result_names_everything_and_says_what_it_cannot() -> None:
    generator = np.random.default_rng(0)
    few = {"model.layers.0.mlp.up_proj.weight": 3.0, "lm_head.weight": 0.0}
    shared = FactoredGradient(gaussian(1, 40), gaussian(1, 50, seed=1))
    samples = [
        {
            **{
                name: FactoredGradient(
                    torch.cat([strength * shared.left, gaussian(2, 40, seed=int(generator.integers(1000)))]),
                    torch.cat([shared.right, gaussian(2, 50, seed=int(generator.integers(1000)))]),
                )
                for name, strength in few.items()
            },
            "model.norm.weight": DenseGradient(torch.ones(9), 5),
            "model.layers.0.self_attn.q_proj.weight": zero_gradient((8, 6)),
        }
        for _ in range(10)
    ]
    result = noise_floor(gradient_set(samples))
    frame = result.to_frame().set_index("parameter")
    assert list(frame.index) == [*few, "model.layers.0.self_attn.q_proj.weight"]
    assert list(frame["signal_rank"]) == [1, 0, 0]
    assert frame["p_value"].iloc[2] == 1.0
    assert (frame["q_value"] >= frame["p_value"]).all()
    assert (frame["p_family"] >= frame["p_value"]).all()
    assert result.significant == {next(iter(few))}
    assert frame["layer"].iloc[0] == 0
    assert "10 examples" in str(result)
    assert "3 matrices" in result._repr_html_()
    assert isinstance(result, NoiseFloor)
    assert noise_floor(gradient_set(samples)).to_frame().equals(result.to_frame())


def test_misuse_is_explained() -> None:
    drawn = dense(np.random.default_rng(0).normal(size=(8, 1, 5, 4)))
    with pytest.raises(GeometryError, match="found 7"):
        noise_floor(dense(np.ones((7, 1, 4, 3))))
    with pytest.raises(GeometryError, match="give 99 or more"):
        noise_floor(drawn, draws=10)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"confidence": 95}, "found 95; give .95, not 95"),
        ({"confidence": 1.0}, "found 1.0"),
        ({"draws": 0}, "at least 1, found draws=0"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, object], said: str) -> None:
    drawn = dense(np.random.default_rng(0).normal(size=(8, 1, 5, 4)))
    with pytest.raises(GeometryError, match=said):
        noise_floor(drawn, **options)
