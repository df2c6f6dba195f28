"""Measures against the same numbers of collected gradients; sketches against theory."""

import gc
import math
import subprocess
import sys
import weakref

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geomkit.collection.collect import collect_from_tokens
from geomkit.collection.measures import inner_products, norms, singular_values, sketch
from geomkit.collection.sample_measures import measure_samples, measures_from_tokens
from geomkit.errors import CollectionError, GeometryError
from geomkit.gradients.arithmetic import inner, zero_gradient
from geomkit.gradients.dense import DenseGradient
from geomkit.gradients.factored import FactoredGradient
from geomkit.gradients.indexed import IndexedGradient
from geomkit.gradients.layer_gradient import as_matrix
from geomkit.gradients.summed import SumGradient
from geomkit.inputs.parameters import select
from geomkit.inputs.tokens import Tokens
from tests.helpers.architectures import ROWS, built, collected
from tests.helpers.tiny import SAFETY, tiny_llama, tiny_tokenizer

MODELS = [("llama", True), ("llama", False), ("gpt-2", True), ("mixtral", False), ("falcon", True)]
BUDGET = 3 * max(map(len, ROWS))


@pytest.fixture(scope="module", params=MODELS, ids=lambda model: f"{model[0]}{', tied' * model[1]}")
def collection(request):
    name, tied = request.param
    model = built(name, tied=tied)
    return model, collected(model)


def measured(model, rows=ROWS, *, budget=BUDGET, **measures):
    return measures_from_tokens(model, rows, 0, measures, tokens_per_batch=budget)


# ------------------------------------------------------------------------- against collected gradients


def test_every_measure_is_that_of_the_collected_gradient(collection):
    model, whole = collection
    found = measured(
        model,
        norm=norms,
        spectrum=singular_values(),
        leading=singular_values(2),
        sketch=sketch(3, seed=5),
        mean=inner_products(whole),
        each=inner_products(whole, per_sample=True),
    )
    assert [list(values) for values in found.values.values()] == [list(whole)] * 6
    assert found.losses == pytest.approx([sample.loss for sample in whole.samples], rel=1e-6)
    assert list(found.loss_tokens) == [sample.loss_tokens for sample in whole.samples]
    assert found.coverage.share == whole.coverage.share
    for name, mean in whole.items():
        matrices = torch.stack([as_matrix(sample[name]) for sample in whole.samples]).double()
        flat = matrices.flatten(1)
        scale = float(flat.norm())
        near = {"rtol": 2e-5, "atol": 1e-6 * scale}
        torch.testing.assert_close(found["norm"][name], flat.norm(dim=1), **near)
        if len(mean.shape) < 3:  # for experts see below
            assert_spectra_close(found["spectrum"][name], matrices)
        torch.testing.assert_close(found["leading"][name], found["spectrum"][name][:, :2])
        torch.testing.assert_close(
            found["mean"][name], flat @ as_matrix(mean).double().flatten(), **near | {"atol": 1e-6 * scale**2}
        )
        torch.testing.assert_close(found["each"][name], flat @ flat.T, **near | {"atol": 1e-6 * scale**2})
        torch.testing.assert_close(found["sketch"][name].double(), projected(name, matrices, sketch(3, seed=5)), **near)


def assert_spectra_close(values, matrices):
    """Compare singular values with dense SVDs; missing values must be zero."""
    spectra = torch.linalg.svdvals(matrices)
    missing = spectra.shape[1] - values.shape[1]
    padded = torch.nn.functional.pad(values, (0, missing))
    torch.testing.assert_close(padded, spectra, rtol=2e-5, atol=1e-6 * float(matrices.norm()))


def test_spectra_of_experts_are_whole():
    model = built("mixtral", tied=False)
    found = measured(model, spectrum=singular_values())["spectrum"]
    experts = {name: values for name, values in found.items() if "experts" in name}
    assert experts
    for name, values in experts.items():
        assert_spectra_close(values, torch.stack([as_matrix(s[name]) for s in collected(model).samples]).double())


def projected(name, matrices, measure):
    left, right = measure.test_matrices(name, tuple(matrices.shape[1:]))
    rows = matrices if left is None else left.double() @ matrices
    return rows if right is None else rows @ right.double()


def test_how_examples_are_batched_changes_nothing(collection):
    model, _ = collection
    measures = {"norm": norms, "spectrum": singular_values(2), "sketch": sketch(3)}
    together, alone = (measured(model, budget=budget, **measures) for budget in (10**4, 1))
    for measure in measures:
        for name, values in together[measure].items():
            torch.testing.assert_close(values, alone[measure][name], rtol=1e-4, atol=1e-5 * float(values.norm()))


class OnLongTexts(torch.nn.Module):
    """A norm, followed by a linear layer for more than ten tokens."""

    def __init__(self, norm):
        super().__init__()
        self.norm, self.more = norm, torch.nn.Linear(16, 16, bias=False)

    def forward(self, hidden):
        hidden = self.norm(hidden)
        return hidden + self.more(hidden) if hidden.shape[1] > 10 else hidden


def test_an_example_without_part_in_a_parameter_has_its_zero_gradient_measured():
    model = tiny_llama()
    model.model.norm = OnLongTexts(model.model.norm)
    assert 0 < sum(len(row) > 10 for row in ROWS) < len(ROWS)
    found = measured(model, budget=1, norm=norms, one=lambda _, gradients: torch.ones(len(gradients)))
    assert found["norm"]["model.norm.more.weight"].gt(0).tolist() == [len(row) > 10 for row in ROWS]
    assert found["one"]["model.norm.more.weight"].tolist() == [1] * len(ROWS)
    assert list(found["norm"]) == [name for name, _ in model.named_parameters()]


def test_selection_and_examples_are_those_of_collection():
    found = measure_samples(
        tiny_llama(), tiny_tokenizer(), SAFETY, {"norm": norms}, layers=select(kinds="mlp", indices=1), progress=False
    )
    assert list(found["norm"]) == [f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down")]
    with pytest.raises(CollectionError, match="expected trainable parameters that match"):
        measure_samples(tiny_llama(), tiny_tokenizer(), SAFETY, {"norm": norms}, layers="nothing", progress=False)


# ------------------------------------------------------------------------------------------- results


def test_a_frame_has_a_row_per_number():
    found = measured(tiny_llama(), norm=norms, sketch=sketch(2))
    frame = found.to_frame()
    assert list(frame.columns) == ["example", "parameter", "kind", "layer", "measure", "index", "value"]
    assert len(frame) == sum(values.numel() for measure in found.values.values() for values in measure.values())
    name = "model.layers.1.self_attn.q_proj.weight"
    row = frame[(frame.measure == "sketch") & (frame.parameter == name) & (frame.example == 3) & (frame["index"] == 2)]
    assert row.value.item() == pytest.approx(float(found["sketch"][name][3, 1, 0]))
    assert (row.kind.item(), row.layer.item()) == ("attention", 1)
    pd.testing.assert_frame_equal(found.to_frame("norm"), frame[frame.measure == "norm"], check_dtype=False)
    assert str(found).startswith(f"norm, sketch of {len(ROWS)} examples")
    assert found._repr_html_().count("<tr") <= 13


def test_numbers_side_by_side_are_those_of_all_parameters():
    found = measured(tiny_llama(), norm=norms, sketch=sketch(2))
    total = found.side_by_side("norm").square().sum(1).sqrt()
    whole = collected(tiny_llama())
    assert total.tolist() == pytest.approx([sample.norm for sample in whole.samples], rel=1e-5)
    assert found.side_by_side("sketch").shape[0] == len(ROWS)
    with pytest.raises(GeometryError, match="expected one of norm, sketch, found 'norms'"):
        found.side_by_side("norms")


def test_narrow_batches_are_filled_up_with_zeros():
    widths = iter([2, 3, 1])

    def ragged(_parameter, gradients):
        return torch.ones(len(gradients), next(widths))

    rows = [Tokens((5, 6, 7), (False, True, True))] * 3
    found = measures_from_tokens(tiny_llama(), rows, 0, {"ones": ragged}, layers="lm_head.weight", tokens_per_batch=1)
    assert found["ones"]["lm_head.weight"].tolist() == [[1, 1, 0], [1, 1, 1], [1, 0, 0]]


# -------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("measure", "message"),
    [
        (lambda _name, gradients: torch.zeros(len(gradients) + 1), "'bad' to return a tensor with a row for each of 3"),
        (lambda _name, _gradients: torch.tensor(1.0), r"found shape \(\)"),
        (lambda _name, gradients: [0.0] * len(gradients), "found list for"),
    ],
)
def test_a_measure_without_a_row_per_gradient_is_refused(measure, message):
    with pytest.raises(GeometryError, match=message):
        measured(tiny_llama(), bad=measure)


def test_a_measure_that_changes_its_dimensions_is_refused():
    shapes = iter([(1,), (1, 1)])
    with pytest.raises(GeometryError, match="found 2 after 1"):
        measures_from_tokens(
            tiny_llama(), ROWS, 0, {"odd": lambda *_: torch.zeros(next(shapes))}, layers="lm*", tokens_per_batch=1
        )


def test_what_is_no_measure_is_refused_before_anything_runs():
    with pytest.raises(GeometryError, match="expected at least one measure"):
        measure_samples(None, None, None, {})
    with pytest.raises(GeometryError, match="expected a callable for measure 'norm', found 'norms'"):
        measure_samples(None, None, None, {"norm": "norms"})
    with pytest.raises(GeometryError, match="expected measures by name, found"):
        measure_samples(None, None, None, [norms])
    with pytest.raises(GeometryError, match="at least one singular value"):
        singular_values(0)
    with pytest.raises(GeometryError, match="at least one row and column"):
        sketch((4, 0))
    with pytest.raises(GeometryError, match="'rademacher' or 'gaussian', found 'sparse'"):
        sketch(entries="sparse")


def test_a_reference_must_have_what_is_measured():
    mean = collect_from_tokens(tiny_llama(), ROWS, 0, layers=select(kinds="mlp"))
    with pytest.raises(GeometryError, match="collect with per_sample=True"):
        inner_products(mean, per_sample=True)
    with pytest.raises(GeometryError, match=r"found none for .*; collect both with the same layers="):
        measured(tiny_llama(), product=inner_products(mean))


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interruption_leaves_the_model_as_found(error):
    model = tiny_llama().train()
    model.lm_head.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calls = []

    def interrupted(parameter, gradients):
        calls.append(parameter)
        if len(calls) == 12:
            raise error
        return torch.zeros(len(gradients))

    state = torch.get_rng_state()
    with pytest.raises(error):
        measured(model, bad=interrupted)
    assert all(module.training for module in model.modules())
    assert not model.lm_head.weight.requires_grad
    assert model.model.norm.weight.requires_grad
    assert all(weight.grad is None for weight in model.parameters())
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


# -------------------------------------------------------------------------------------------- memory


def test_memory_does_not_grow_with_the_number_of_examples():
    """No gradient is stored after its call, and not more are in memory at once for 4N examples than for N."""
    model = tiny_llama()

    def most_alive(rows):
        alive, most = weakref.WeakSet(), 0

        def watch(_parameter, gradients):
            nonlocal most
            alive.update(gradients)
            most = max(most, len(alive))
            return torch.zeros(len(gradients))

        measured(model, rows, budget=2 * len(rows[0]), watch=watch, sketch=sketch(2))
        gc.collect()
        assert not alive
        return most

    assert most_alive(ROWS[:1] * 16) == most_alive(ROWS[:1] * 4)


def test_no_tensor_is_left_but_the_results():
    model = tiny_llama()
    measure = sketch(2)
    measured(model, sketch=measure)  # draws the test matrices

    def floats():
        gc.collect()
        return sum(value.numel() for value in gc.get_objects() if issubclass(type(value), torch.Tensor))

    before = floats()
    found = measured(model, ROWS * 4, sketch=measure)
    assert floats() - before == sum(values.numel() for values in found["sketch"].values())


# ------------------------------------------------------------------------------------------ sketches


def random_pair(kind, generator):
    if kind == "rank one":
        a = torch.outer(torch.randn(7, generator=generator), torch.randn(6, generator=generator))
        return a, a
    if kind == "diagonal":
        return torch.eye(7, 6), torch.diag(torch.arange(6.0))[[0, 1, 2, 3, 4, 5, 5]]
    return torch.randn(7, 6, generator=generator), torch.randn(7, 6, generator=generator)


def gaussian_variance(a, b, p, q):
    """Return the variance by the formula in the docstring of ``sketch``."""
    left, right = (a.T @ b), (a @ b.T)
    alpha, beta, tau = float(left.square().sum()), float(right.square().sum()), float((left @ left).trace())
    product = float((a * b).sum())
    crossed = alpha + beta + float(a.square().sum() * b.square().sum()) + product**2
    return (alpha + tau) / q + (beta + tau) / p + crossed / (p * q)


@pytest.mark.parametrize("entries", ["gaussian", "rademacher"])
@pytest.mark.parametrize("kind", ["random", "rank one", "diagonal"])
def test_inner_products_of_sketches_are_unbiased_with_the_variance_that_is_stated(entries, kind):
    a, b = random_pair(kind, torch.Generator().manual_seed(1))
    size, draws = (3, 4), 4000
    pair = [DenseGradient(a, 1), DenseGradient(b, 1)]
    found = np.empty(draws)
    for seed in range(draws):
        first, second = sketch(size, seed, entries=entries)("w", pair).double()
        found[seed] = float((first * second).sum())
    stated = gaussian_variance(a.double(), b.double(), *size)
    assert abs(found.mean() - float((a * b).sum())) < 4 * math.sqrt(stated / draws)
    assert stated <= float(a.norm() * b.norm()) ** 2 * (2 / 3 + 2 / 4 + 4 / 12) * (1 + 1e-6)
    # The variance of a variance is large where products of normal variables have heavy tails.
    error = 4 * np.std((found - found.mean()) ** 2) / math.sqrt(draws)
    if entries == "gaussian":
        assert abs(found.var() - stated) < error
    else:
        assert found.var() < stated + error


def test_a_side_no_longer_than_its_size_is_kept():
    gradient = FactoredGradient(torch.randn(3, 5), torch.randn(3, 9))
    whole = sketch((5, 9))("w", [gradient])[0]
    torch.testing.assert_close(whole, gradient.dense())
    inputs = sketch((2, 100))("w", [gradient])[0]
    assert inputs.shape == (2, 9)
    vector = DenseGradient(torch.randn(6), 1)
    assert torch.equal(sketch((2, 3))("w", [vector])[0, :, 0], vector.tensor)
    assert sketch((2, 2))("w", [vector]).shape == (1, 4, 1)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 7), st.integers(1, 9), st.integers(0, 100))
def test_every_form_has_the_sketch_of_its_dense_form(p, q, seed):
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator)

    factored = FactoredGradient(drawn(3, 6), drawn(3, 8))
    indexed = IndexedGradient(torch.tensor([1, 4]), drawn(2, 8), 6, 5)
    gradients = [factored, indexed, SumGradient((factored, indexed)), DenseGradient(drawn(6, 8), 3)]
    measure = sketch((p, q), seed)
    for gradient in [*gradients, zero_gradient((6, 8)), DenseGradient(drawn(2, 3, 8), 4), zero_gradient((2, 3, 8))]:
        (found,) = measure("w", [gradient])
        (expected,) = projected("w", as_matrix(gradient)[None].double(), measure)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    for shape in ((5,), (300,)):
        vector = DenseGradient(drawn(*shape), 2)
        (found,) = measure("v", [vector])
        assert found.shape == (min(p * q, *shape), 1)


def test_sketches_of_two_sets_compare():
    model, measure = tiny_llama(), sketch(12)
    a, b = (measured(model, rows, sketch=sketch(12)).side_by_side("sketch").double() for rows in (ROWS[:2], ROWS[2:]))
    whole = collected(model)
    exact = torch.tensor(
        [[sum(inner(x[n], y[n]) for n in whole) for y in whole.samples[2:]] for x in whole.samples[:2]]
    )
    sizes = [torch.tensor([sample.norm for sample in samples]) for samples in (whole.samples[:2], whole.samples[2:])]
    bound = math.sqrt(2 / 12 + 2 / 12 + 4 / 144) * torch.outer(*sizes)
    assert bool(((a @ b.T - exact).abs() < 3 * bound).all())
    assert measure.test_matrices("w", (40, 30))[0].shape == (12, 40)
    different = [measure.test_matrices(name, (40, 30))[0] for name in ("v", "w")]
    assert not torch.equal(*different)
    assert not torch.equal(different[1], sketch(12, seed=1).test_matrices("w", (40, 30))[0])


def test_sketches_are_the_same_in_every_process():
    code = (
        "import torch; from geomkit.collection.measures import sketch; "
        "left, right = sketch(4, 3).test_matrices('model.layers.0.mlp.up_proj.weight', (9, 8)); "
        "print(left.sign().int().flatten().tolist(), right.sign().int().flatten().tolist())"
    )
    said = subprocess.run(  # noqa: S603 - our own code
        [sys.executable, "-c", code], env={"PYTHONHASHSEED": "1"}, capture_output=True, text=True, check=True
    ).stdout
    left, right = sketch(4, 3).test_matrices("model.layers.0.mlp.up_proj.weight", (9, 8))
    assert said == f"{left.sign().int().flatten().tolist()} {right.sign().int().flatten().tolist()}\n"
