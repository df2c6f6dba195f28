"""Collection on models that were made to break it, against ``loss.backward()`` on each example alone."""

import copy
import functools
import threading
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize, prune
from transformers.modeling_outputs import CausalLMOutput

from geomkit.collection.collect import collect_from_tokens, collect_gradients
from geomkit.errors import CollectionError, GeomkitError
from geomkit.inputs.tokens import Tokens
from tests.helpers.architectures import ROWS, backward, collected, dense, errors, mean, randomise, worst_error
from tests.helpers.forms import FORMS, drawn, seeded
from tests.helpers.tiny import SAFETY, tiny_llama, tiny_tokenizer

TOLERANCE = 1e-5
WORDS = 25
MARK = 24
"""Id of a token that some bodies below treat differently; the rows of ``tests.helpers.architectures`` lack it."""


class Small(nn.Module):
    """Model with an embedding, ``body(self, hidden, input_ids)``, a cumulative sum over tokens, and a head."""

    def __init__(self, body, **modules):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.embed, self.head, self.body = nn.Embedding(WORDS, 16), nn.Linear(16, WORDS, bias=False), body
            for name, make in modules.items():
                setattr(self, name, make())
            randomise(self)

    def forward(self, input_ids, attention_mask=None, labels=None, **_):
        hidden = self.body(self, self.embed(input_ids), input_ids)
        logits = self.head(hidden + 0.1 * hidden.cumsum(1))
        loss = (
            None if labels is None else functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        )
        return CausalLMOutput(loss=loss, logits=logits)


def plainly(self, hidden, _):
    return hidden + self.added(hidden)


def linear():
    return nn.Linear(16, 16)


def parameter(*shape):
    return lambda: nn.Parameter(torch.ones(shape))


def row(*ids):
    return Tokens(ids, (False, *[True] * (len(ids) - 1)))


def drawn_rows(number, length, *, seed=0):
    ids = torch.randint(1, MARK, (number, length), generator=seeded(seed))
    return [row(*example) for example in ids.tolist()]


def assert_exact(model, rows=ROWS, *, tolerance=TOLERANCE, expected=None, **settings):
    """Compare every parameter, in the sum and in every sample; missing parameters must have no gradient."""
    expected = expected or backward(model, rows)
    found = collected(model, rows, **settings)
    assert worst_error(found, expected) <= tolerance
    alone = collected(model, rows, per_sample=False, **settings)
    assert list(alone) == list(found)
    assert max(errors(dense(alone), mean(expected)).values()) <= tolerance
    assert not any(mean(expected)[name].any() for name in found.coverage.missing)
    return found


def hooks_on(model):
    """Return all hooks on modules, parameters and buffers."""
    owners = [*model.modules(), *model.parameters(), *model.buffers()]
    kinds = [f"_{kind}" for kind in ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")]
    return [hook for owner in owners for kind in kinds for hook in (getattr(owner, kind, None) or {}).values()]


# ------------------------------------------------------------------------------ what runs is not what is written


class Doubled(nn.Linear):
    @functools.wraps(nn.Linear.forward)
    def forward(self, value):
        return 2 * nn.Linear.forward(self, value)


def scaled_by_its_parent(self, hidden, _):
    return hidden + self.added(hidden) * self.added.alpha


def called_with_another_weight(self, hidden, _):
    return hidden + torch.func.functional_call(self.added, {"weight": 2 * self.added.weight}, (hidden,))


class Extra(nn.Linear):
    """``nn.Linear`` with a parameter that its forward does not use."""

    def __init__(self):
        super().__init__(16, 16)
        self.alpha = nn.Parameter(torch.ones(16))


def scaled_by_a_hook():
    module = Extra()
    module.register_forward_hook(lambda self, _, output: self.alpha * output)
    return module


def quantised_by_hooks():
    """Hooks that replace the weight while the module runs, as quantisation-aware training does."""
    module = linear()
    weight = module.weight

    def before(self, _):
        del self._parameters["weight"]
        self.weight = torch.tanh(weight)

    def after(self, *_):
        del self.weight
        self._parameters["weight"] = weight

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)
    return module


def scaled_in_name_only():
    table = nn.Embedding(WORDS, 16)
    table.embed_scale = 4.0
    return table


WRITTEN = {
    "pruned": (plainly, lambda: prune.l1_unstructured(linear(), "weight", 0.5)),
    "weight norm": (plainly, lambda: nn.utils.weight_norm(linear())),
    "wrapped forward": (plainly, lambda: Doubled(16, 16)),
    "another weight": (called_with_another_weight, linear),
    "quantised by hooks": (plainly, quantised_by_hooks),
    "extra, in a hook": (plainly, scaled_by_a_hook),
    "extra, in the parent": (scaled_by_its_parent, Extra),
    "scaled in name only": (lambda self, hidden, ids: hidden + self.added(ids), scaled_in_name_only),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize(("body", "make"), WRITTEN.values(), ids=WRITTEN)
def test_a_module_that_is_not_what_its_class_says(body, make):
    assert assert_exact(Small(body, added=make)).coverage.share == 1


def test_an_extra_parameter_that_nobody_uses():
    found = assert_exact(Small(plainly, added=Extra))
    assert set(found.coverage.reasons) == {"added.alpha"}


def doubled(function):
    @functools.wraps(function)
    def wrapper(*values):
        return 2 * function(*values)

    return wrapper


@pytest.mark.parametrize(("owner", "name"), [(functional, "linear"), (nn.Linear, "forward"), (nn.Embedding, "forward")])
def test_a_function_of_torch_that_is_patched(owner, name, monkeypatch):
    monkeypatch.setattr(owner, name, doubled(getattr(owner, name)))
    assert_exact(Small(plainly, added=linear))


# --------------------------------------------------------------------------------- whose tokens a call is about


def experts(self, hidden, ids):
    flat = hidden.flatten(0, 1)
    for expert, tokens in zip(self.added, self.route(ids), strict=True):
        flat = flat.index_add(0, tokens, expert(flat[tokens]))
    return flat.view_as(hidden)


def marked_first(ids):
    marked = ids.flatten() == MARK
    return [marked.nonzero().squeeze(1), (~marked).nonzero().squeeze(1)]


def all_but_in_order_of_words(ids):
    return [ids.flatten().argsort(stable=True), torch.arange(0)]


def all_but_in_reverse(ids):
    return [torch.arange(ids.numel()).flip(0), torch.arange(0)]


AS_MANY_AS_EXAMPLES = [row(MARK, MARK, 3, 4, 5, 6, 7), row(2, 3, 4, 5, 6, 7), row(MARK, 6, 7, 8)]
RIGHT_AT_FIRST = [row(*[MARK] * 8), row(*[MARK] * 8), row(MARK, MARK, 3, 4), row(1, 2, 3, 4)]
"""Two batches of two examples; a split that is right for the first batch is wrong for the second."""


@pytest.mark.parametrize(
    ("route", "rows", "together"),
    [
        (marked_first, AS_MANY_AS_EXAMPLES, 3),
        (marked_first, RIGHT_AT_FIRST, 2),
        (marked_first, ROWS, 3),
        (all_but_in_order_of_words, ROWS, 3),
        (all_but_in_reverse, ROWS, 5),
    ],
    ids=["B tokens", "B tokens later", "no tokens", "B·L tokens by word", "B·L tokens in reverse"],
)
def test_an_expert_that_gets(route, rows, together):
    model = Small(experts, added=lambda: nn.ModuleList([linear(), linear()]))
    model.route = route
    assert_exact(model, rows, together=together)


def test_dense_experts_that_look_like_a_batch():
    """(E, B·L, d) with as many experts as examples."""

    def body(self, hidden, _):
        copies = torch.stack([hidden.flatten(0, 1) * factor for factor in (1, 2, 3, 4)])
        return hidden + self.added(copies).sum(0).view_as(hidden)

    assert_exact(Small(body, added=linear), drawn_rows(4, 16), together=4)


# ------------------------------------------------------------------------- a weight that is used outside its call


def used_a_little_more(self, hidden, _):
    return hidden + self.added(hidden) + 5e-4 * functional.linear(hidden.tanh(), self.added.weight)


def used_more_for_marked_tokens(self, hidden, ids):
    factor = 0.03 * (ids == MARK)[..., None]
    return hidden + self.added(hidden) + factor * functional.linear(hidden.tanh(), self.added.weight).tanh()


def norm_used_a_little_more(self, hidden, _):
    return self.added(hidden) + 1e-3 * hidden.tanh() * self.added.weight


@pytest.mark.parametrize(
    ("body", "make"),
    [(used_a_little_more, linear), (norm_used_a_little_more, lambda: nn.LayerNorm(16))],
    ids=["linear", "norm"],
)
def test_a_small_use_outside(body, make):
    assert_exact(Small(body, added=make))


@pytest.mark.parametrize("others", [8, 40])
def test_a_use_outside_in_one_example_only(others):
    rows = [*drawn_rows(others, 12), row(*range(1, 11), MARK, 3)]
    assert_exact(Small(used_more_for_marked_tokens, added=linear), rows, together=len(rows))


def test_a_use_outside_in_bf16():
    """The use is 4 % of the gradient, less than the tolerance of bf16; rounding itself is below 1 % here."""

    def body(self, hidden, _):
        return self.added(hidden) + 0.2 * hidden.tanh() * self.added.weight

    model, name = Small(body, added=lambda: nn.LayerNorm(16)).bfloat16(), "added.weight"
    found, expected = collected(model), backward(copy.deepcopy(model).float())
    for ours, theirs in zip([found, *found.samples], [mean(expected), *expected], strict=True):
        assert errors({name: ours[name].dense()}, theirs)[name] <= 1e-2


# ----------------------------------------------------------------------------------- values that do not stay


def test_an_input_that_changes_in_place_under_autocast():
    """Autocast allows it, because autograd stores a rounded copy of the input."""

    def body(self, hidden, _):
        hidden = self.first(hidden).float()
        output = self.added(hidden)
        hidden.mul_(0.5)
        return output.float() + hidden

    model = Small(body, first=linear, added=linear)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_exact(model, tolerance=2e-2)


class Latents(nn.Module):
    """A layer whose input is a parameter (learned queries) or a buffer."""

    def __init__(self, form):
        super().__init__()
        latents = torch.randn(3, 32)
        if form == "buffer":
            self.register_buffer("latents", latents)
        else:
            self.latents = nn.Parameter(latents)
        self.inside, self.outside = nn.Linear(32, 64), nn.Linear(64, 16)

    def forward(self, hidden):
        return hidden + self.outside(self.inside(self.latents).tanh()).mean(0)


@pytest.mark.parametrize("form_of_sum", ["auto", "factored"])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("rows", [ROWS, ROWS[:1]], ids=["five", "one"])
@pytest.mark.parametrize("form", ["parameter", "buffer"])
def test_what_was_collected_does_not_train_on(form, rows, per_sample, form_of_sum):
    model = Small(plainly, added=lambda: Latents(form))
    assert_exact(model, rows, form=form_of_sum, together=len(rows))
    found = collected(model, rows, form=form_of_sum, together=len(rows), per_sample=per_sample)
    before = [
        {name: value.clone() for name, value in dense(gradients).items()} for gradients in (found, *found.samples)
    ]
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            value.mul_(1.5)
    for gradients, was in zip((found, *found.samples), before, strict=True):
        assert all(torch.equal(value, was[name]) for name, value in dense(gradients).items())


@pytest.mark.parametrize("per_sample", [False, True])
def test_infinite_inputs_whose_output_gradients_are_finite(per_sample):
    class Cut(torch.autograd.Function):
        @staticmethod
        def forward(_, value):
            return value.nan_to_num(0, 1, -1)

        @staticmethod
        def backward(_, gradient):
            return gradient

    def body(self, hidden, _):
        infinite = torch.cat([hidden[..., :1].detach() / 0, hidden[..., 1:]], dim=-1)
        return hidden + Cut.apply(self.added(infinite))

    with pytest.raises(CollectionError, match=r"expected a finite gradient of added\.weight"):
        collected(Small(body, added=lambda: nn.Linear(16, 16, bias=False)), per_sample=per_sample)


# -------------------------------------------------------------------------------------- functions without a gradient


class FirstAlone(torch.autograd.Function):
    """Autograd function that returns ``None`` for the gradient of an unused input."""

    @staticmethod
    def forward(_, value, __):
        return value * 1.0

    @staticmethod
    def backward(_, gradient):
        return gradient, None


SECOND = {
    "parameter": (lambda self, *_: self.second, parameter(1)),
    "linear": (lambda self, hidden, _: self.second(hidden), linear),
    "norm": (lambda self, hidden, _: self.second(hidden), lambda: nn.LayerNorm(16)),
    "embedding": (lambda self, _, ids: self.second(ids), lambda: nn.Embedding(WORDS, 16)),
}


@pytest.mark.parametrize(("second", "make"), SECOND.values(), ids=SECOND)
def test_a_function_that_returns_no_gradient(second, make):
    model = Small(
        lambda self, hidden, ids: hidden + FirstAlone.apply(self.added(hidden), second(self, hidden, ids)),
        added=linear,
        second=make,
    )
    found = assert_exact(model)
    zero = {name for name in found if not found[name].dense().any()} | set(found.coverage.missing)
    assert zero == {name for name, _ in model.named_parameters() if name.startswith("second")}


class Poison(torch.autograd.Function):
    """Identity whose backward returns NaN at marked places."""

    @staticmethod
    def forward(ctx, value, where):
        ctx.save_for_backward(where)
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return torch.where(*ctx.saved_tensors, torch.nan, gradient), None


def poisoned(self, hidden, ids):
    return Poison.apply(self.added(hidden), (ids == MARK)[..., None].expand_as(hidden))


def poisoned_flat(self, hidden, ids):
    output = self.added(hidden.flatten(0, 1)).view_as(hidden)
    return Poison.apply(output, (ids == MARK)[..., None].expand_as(hidden))


@pytest.mark.parametrize("broken", [0, 1, 2, 4, 27, 32, 48])  # 1/49 · 49 < 1 in fp64
@pytest.mark.parametrize("body", [poisoned, poisoned_flat])
def test_the_one_example_of_49_that_is_broken_is_named(body, broken):
    rows = [row(MARK if index == broken else 3, 4, 5, 6) for index in range(49)]
    with pytest.raises(CollectionError, match=rf"^example {broken}: expected a finite gradient"):
        collected(Small(body, added=linear), rows, together=49)


# ----------------------------------------------------------------------------------------------- left as found


class Itself(nn.Module):
    """Module that returns its parameter, or its input."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))

    def forward(self, value=None):
        return self.weight if value is None else value


def same_weight():
    return parametrize.register_parametrization(linear(), "weight", nn.Identity())


SAME = {
    "its own parameter": (lambda self, hidden, _: hidden * self.added(), {"added": Itself}),
    "another's parameter": (
        lambda self, hidden, _: hidden * self.added(self.scale),
        {"added": Itself, "scale": parameter(16)},
    ),
    "parametrised by identity": (plainly, {"added": same_weight}),
}


@pytest.mark.parametrize(("body", "modules"), SAME.values(), ids=SAME)
def test_a_module_that_returns_what_is_not_its_own(body, modules):
    model = Small(body, **modules)
    expected = backward(model)
    assert_exact(model, expected=expected)
    assert not hooks_on(model)
    assert set(errors(mean(backward(model)), mean(expected)).values()) == {0.0}


class Adapted(nn.Linear):
    """A frozen layer plus a trainable product of low rank, as in loralib."""

    def __init__(self):
        super().__init__(16, 16)
        self.weight.requires_grad_(False)
        self.down, self.up, self.merged = nn.Parameter(torch.ones(4, 16)), nn.Parameter(torch.ones(16, 4)), False

    def forward(self, value):
        plain = functional.linear(value, self.weight, self.bias)
        return plain if self.merged else plain + value @ self.down.T @ self.up.T


class Merged(Adapted):
    """The same, with the product merged into the weight in eval mode."""

    def train(self, mode=True):
        super().train(mode)
        if mode is self.merged:
            with torch.no_grad():
                self.weight.add_(self.up @ self.down, alpha=-1 if mode else 1)
            self.merged = not mode
        return self


def test_a_module_that_merges_weights_in_eval_mode():
    model, twin = Small(plainly, added=Merged).train(), Small(plainly, added=Adapted)
    before = model.added.weight.clone()
    assert assert_exact(model, expected=backward(twin)).coverage.share == 1
    assert model.added.training
    assert not model.added.merged
    assert torch.equal(model.added.weight, before)


def test_a_module_that_has_merged_its_weights():
    model = Small(plainly, added=Merged).eval()
    before = model.added.weight.clone()
    found = assert_exact(model)
    assert set(found.coverage.missing) == {"added.down", "added.up"}
    assert model.added.merged
    assert not model.added.training
    assert torch.equal(model.added.weight, before)


@pytest.mark.parametrize("per_sample", [False, True])
def test_a_checkpoint_that_differentiates_on_its_own_is_refused(per_sample):
    """Such a checkpoint writes ``.grad`` during the backward pass, and hides the modules that it runs."""

    class Offloaded(torch.autograd.Function):
        @staticmethod
        def forward(ctx, function, value):
            ctx.function = function
            ctx.save_for_backward(value)
            with torch.no_grad():
                return function(value)

        @staticmethod
        def backward(ctx, gradient):
            (value,) = ctx.saved_tensors
            value = value.detach().requires_grad_()
            with torch.enable_grad():
                output = ctx.function(value)
            torch.autograd.backward(output, gradient)
            return None, value.grad

    model = Small(lambda self, hidden, _: Offloaded.apply(self.added, hidden), added=linear)
    model.head.weight.grad, model.added.weight.grad = torch.ones(WORDS, 16), torch.ones(16, 16)
    before = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    with pytest.raises(CollectionError, match="checkpoint"):
        collected(model, per_sample=per_sample)
    for name, value in model.named_parameters():
        assert (value.grad is None) if before[name] is None else torch.equal(value.grad, before[name])
    assert not hooks_on(model)


class Recomputed(nn.Module):
    """Module that replaces a buffer with frequencies whenever it runs."""

    def __init__(self):
        super().__init__()
        self.linear = linear()
        self.register_buffer("frequencies", torch.zeros(16), persistent=False)

    def forward(self, hidden):
        self.frequencies = torch.linspace(1, 2, 16)
        return self.linear(hidden) * self.frequencies


def test_a_buffer_that_is_replaced():
    model = Small(plainly, added=Recomputed)
    expected = backward(model)
    model.added.frequencies = before = torch.zeros(16)
    assert_exact(model, expected=expected)
    assert model.added.frequencies is before
    assert not before.any()


def test_frequencies_that_grow_with_the_text():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = tiny_llama(rope_parameters=rope, max_position_embeddings=6).eval()
    before = {name: value.clone() for name, value in model.named_buffers()}
    collected(model)
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())


def stance():
    return torch._dynamo.eval_frame._stance.stance


@pytest.fixture
def high_precision():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("high_precision")
def test_two_threads_at_once():
    """The second collection begins before the first ends, and would end after it if it did not wait."""
    inside, done = [threading.Event(), threading.Event()], [threading.Event(), threading.Event()]
    worst, state, before = {}, torch.get_rng_state(), stance()

    def body(place, awaited):
        def meet(self, hidden, ids):
            inside[place].set()
            awaited.wait(0.3)
            return plainly(self, hidden, ids)

        return meet

    models = [Small(body(0, inside[1]), added=linear), Small(body(1, done[0]), added=lambda: nn.LayerNorm(16))]
    expected = [backward(Small(plainly, added=make)) for make in (linear, lambda: nn.LayerNorm(16))]

    def work(place):
        worst[place] = worst_error(collected(models[place]), expected[place])
        done[place].set()

    threads = [threading.Thread(target=work, args=(place,), daemon=True) for place in range(2)]
    for thread in threads:
        thread.start()
        assert inside[0].wait(5)
    for thread in threads:
        thread.join(timeout=10)
    assert set(worst) == {0, 1}
    assert max(worst.values()) <= TOLERANCE
    assert torch.get_float32_matmul_precision() == "high"
    assert stance() == before
    assert torch.equal(torch.get_rng_state(), state)


def test_a_collection_inside_a_collection_is_refused():
    model = Small(plainly, added=linear)
    handle = model.added.register_forward_hook(lambda *_: collected(model) and None)
    with pytest.raises(CollectionError, match="expected"):
        collected(model)
    handle.remove()
    assert not hooks_on(model)
    assert_exact(model)


# ------------------------------------------------------------------------------------------------------- types


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("together", [1, 3])
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_a_default_type_that_is_not_the_models(default, together):
    model = Small(
        lambda self, hidden, _: self.norm(plainly(self, hidden, _)), added=linear, norm=lambda: nn.LayerNorm(16)
    )
    expected = backward(model)
    with default_dtype(default):
        sets = [collected(model, together=together, form=form) for form in ("auto", "factored")]
        sets = [(found, [dense(gradients) for gradients in (found, *found.samples)]) for found in sets]
    for found, formed in sets:
        assert worst_error(found, expected) <= TOLERANCE
        for values, reference in zip(formed, [mean(expected), *expected], strict=True):
            assert {value.dtype for value in values.values()} == {torch.float32}
            assert max(errors(values, reference).values()) <= TOLERANCE


@pytest.mark.parametrize("form", ["auto", "factored"])
def test_fp64_is_exact(form):
    model = Small(
        lambda self, hidden, _: self.norm(plainly(self, hidden, _)), added=linear, norm=lambda: nn.LayerNorm(16)
    ).double()
    found = assert_exact(model, tolerance=1e-12, form=form)
    assert all(
        value.dtype == torch.float64 for gradients in (found, *found.samples) for value in dense(gradients).values()
    )


MEASURES = {
    "dense": lambda gradient: gradient.dense(),
    "matmul": lambda gradient: gradient.matmul(torch.linspace(-1, 1, 18).view(6, 3)),
    "rmatmul": lambda gradient: gradient.rmatmul(torch.linspace(-1, 1, 24).view(3, 8)),
    "take": lambda gradient: gradient.take(slice(1, 4), torch.float32),
    "added": lambda gradient: (weight := torch.ones(8, 6), gradient.add_to(weight, 0.3))[0],
    "dot": lambda gradient: torch.tensor(gradient.dot(torch.linspace(-1, 1, 48).view(8, 6))),
    "norm": lambda gradient: torch.tensor(gradient.norm),
}


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
@pytest.mark.parametrize("form", FORMS)
def test_a_gradient_knows_no_autocast(form, measure):
    expected = measure(drawn(form, (8, 6), seeded()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = measure(drawn(form, (8, 6), seeded()))
    assert found.dtype == expected.dtype == torch.float32
    assert torch.equal(found, expected)


# ------------------------------------------------------------------------------------------------- wrong arguments


@pytest.mark.parametrize(
    ("examples", "settings", "message"),
    [
        (list(SAFETY), {}, "expected .*[Dd]ataset.* found .*list"),
        ((example for example in SAFETY), {}, "expected .*[Dd]ataset.* found .*generator"),
        (SAFETY.to_iterable_dataset(), {}, "expected .*[Dd]ataset.* found .*IterableDataset"),
        (SAFETY, {"reduction": "mean"}, "expected .*reduction.*example.*token.* found .*mean"),
        (SAFETY, {"form": "dense"}, "expected .*form.*auto.*factored.* found .*dense"),
    ],
    ids=["list", "generator", "iterable", "reduction", "form"],
)
def test_wrong_arguments(examples, settings, message):
    with pytest.raises(GeomkitError, match=message):
        collect_gradients(tiny_llama(), tiny_tokenizer(), examples, progress=False, **settings)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "expected at least one example"),
        ([ROWS[0], Tokens((5, 6, 7), (False,) * 3)], "example 1: expected .*tokens.* found"),
        ([ROWS[0], Tokens((5, 6, 7), (True, False, False))], "example 1: expected .*tokens.* found"),
        ([ROWS[0], Tokens((5,), (True,))], "example 1: expected .*tokens.* found"),
    ],
    ids=["none", "nothing scored", "the first token alone", "one token"],
)
def test_wrong_rows(rows, message):
    with pytest.raises(GeomkitError, match=message):
        collect_from_tokens(Small(plainly, added=linear), rows, 0)
