"""Collection from wrapped, patched and unusual models, against ``loss.backward()``.

Most cases start from the Llama of ``tests.helpers.architectures``; the reference is a backward pass per example.
"""

import copy
import itertools
from types import MethodType

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import CausalLMOutput

from geomkit.errors import CollectionError
from geomkit.gradients.factored import FactoredGradient
from geomkit.inputs.batches import collate
from geomkit.inputs.tokens import Tokens
from tests.helpers.architectures import (
    ARCHITECTURES,
    ROWS,
    backward,
    collected,
    dense,
    errors,
    mean,
    randomise,
    worst_error,
)

TOLERANCE = 1e-5


def llama(*, tied=False, family="llama", **changes):
    return ARCHITECTURES[family].build(tied=tied, **changes)


def assert_exact(model, rows=ROWS, *, tolerance=TOLERANCE, **settings):
    """Compare with backward passes, with and without gradients of single examples; no parameter may be missing."""
    reference = backward(model, rows)
    found = collected(model, rows, **settings)
    assert found.coverage.share == 1
    assert worst_error(found, reference) <= tolerance
    alone = collected(model, rows, per_sample=False, **settings)
    assert list(alone) == list(found)
    assert max(errors(dense(alone), mean(reference)).values()) <= tolerance
    return found


# ---------------------------------------------------------------------------------------------------- adapters


renamed_in_transformers = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")


def with_adapters(model, **settings):
    peft = pytest.importorskip("peft")
    settings = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"]} | settings
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        for parameter in adapted.parameters():  # a fresh adapter's second matrix is zero, and so is half the gradient
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return adapted


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lora_dropout": 0.5},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"trainable_token_indices": [5, 6, 7]},
    ],
    ids=["lora", "dropout", "dora", "saved head", "embedding", "tokens"],
)
@renamed_in_transformers
def test_adapters(settings):
    model = with_adapters(llama(family="llama with biases"), **settings).train()
    found = assert_exact(model)
    assert all("lora_" in name or "modules_to_save" in name or "tokens_delta" in name for name in found)
    assert model.training


@pytest.mark.parametrize("parameter", ["mlp.experts.gate_up_proj", "mlp.gate.weight"])
@renamed_in_transformers
def test_adapters_of_experts_and_routers(parameter):
    """Such adapters belong to a parameter, not to a module: their weights are multiplied before any call."""
    assert_exact(with_adapters(llama(family="qwen3-moe"), target_modules=["q_proj"], target_parameters=[parameter]))


@pytest.mark.parametrize("reentrant", [False, True])
@renamed_in_transformers
def test_adapters_over_a_frozen_base_with_gradient_checkpointing(reentrant):
    model = with_adapters(llama())
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_exact(model.train())


# ----------------------------------------------------------------------------------- checkpointing, modes, kernels


@pytest.mark.parametrize("reentrant", [False, True])
@renamed_in_transformers
def test_gradient_checkpointing_through_transformers(reentrant):
    """Collection runs in eval mode, in which transformers does not checkpoint."""
    model = llama()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_exact(model.train())


class Checkpointed(nn.Module):
    """A layer that is checkpointed in every mode."""

    def __init__(self, layer, *, reentrant):
        super().__init__()
        self.layer, self.reentrant = layer, reentrant

    def forward(self, hidden, **keywords):
        return checkpoint(lambda value: self.layer(value, **keywords), hidden, use_reentrant=self.reentrant)


def checkpointed(model, *, reentrant):
    layers = model.model.layers
    model.model.layers = nn.ModuleList(Checkpointed(layer, reentrant=reentrant) for layer in layers)
    return model


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_layers_that_checkpoint_themselves(family):
    """Modules run a second time in the backward pass; their gradients must not be counted twice."""
    model = checkpointed(llama(family=family), reentrant=False)
    found = assert_exact(model)
    plain = collected(llama(family=family))
    assert [gradient.tokens for gradient in found.values()] == [gradient.tokens for gradient in plain.values()]


def test_a_reentrant_checkpoint_is_refused():
    model = checkpointed(llama(), reentrant=True).train()
    with pytest.raises(CollectionError, match="use_reentrant=False"):
        collected(model)
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("family", "dropout"),
    [
        ("llama", {"attention_dropout": 0.5}),
        ("gpt-2", {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}),
        ("opt", {"dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.5}),
    ],
)
def test_either_mode_with_dropout(family, dropout, training):
    model = llama(family=family, **dropout).train(training)
    assert_exact(model)
    assert model.training is training


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "gpt-2", "gemma 3"])
def test_attention_kernels(family, attention):
    model = llama(family=family)
    model.set_attn_implementation(attention)
    assert_exact(model)


class PaddedOnTheLeft(nn.Module):
    """Moves the padding of a batch to the left before the model, and moves the logits back after it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask=None, labels=None, **keywords):
        if attention_mask is None:
            return self.model(input_ids=input_ids, labels=labels, **keywords)
        lengths = attention_mask.sum(1).tolist()
        rows = [Tokens(tuple(ids[:n].tolist()), (True,) * n) for ids, n in zip(input_ids, lengths, strict=True)]
        moved = collate(rows, 0, side="left")
        positions = (moved.attention_mask.cumsum(1) - 1).clamp(min=0)
        logits = self.model(
            input_ids=moved.input_ids, attention_mask=moved.attention_mask, position_ids=positions, **keywords
        ).logits
        return CausalLMOutput(logits=torch.stack([row.roll(n, 0) for row, n in zip(logits, lengths, strict=True)]))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "gpt-2", "qwen3-moe"])
def test_padding_on_the_left(family, attention):
    model = llama(family=family)
    model.set_attn_implementation(attention)
    assert_exact(PaddedOnTheLeft(model), together=4)


# ---------------------------------------------------------------------------------------------------- precision


def test_fp64_weights():
    assert_exact(llama().double(), tolerance=1e-6)


BF16 = 2e-2
"""bf16 has 8 bits: a sum of products has about this relative error in another order of summation."""


def assert_no_rounder(found, in_bf16, in_fp32):
    """Check that a collection is as far from fp32 as plain backward passes in bf16 are, in its worst parameter.

    In these models that is 2 to 6 %, and 25 % where a router, rounded, chooses another expert.
    """
    lost = [
        max(errors(a, b).values()) for a, b in zip([mean(in_bf16), *in_bf16], [mean(in_fp32), *in_fp32], strict=True)
    ]
    assert worst_error(found, in_bf16) <= BF16
    assert worst_error(found, in_fp32) <= 1.2 * max(lost)


@pytest.mark.parametrize("family", ["llama", "gpt-2", "gemma 3", "qwen3-moe"])
def test_bf16_weights(family):
    model = llama(family=family).bfloat16()
    found = collected(model)
    assert found.coverage.share == 1
    assert all(gradient.dense().dtype == torch.float32 for gradient in found.values())
    assert_no_rounder(found, backward(model), backward(copy.deepcopy(model).float()))


@pytest.mark.parametrize("family", ["llama", "gpt-2", "gemma 3", "qwen3-moe"])
def test_inside_autocast(family):
    model = llama(family=family)
    in_fp32 = backward(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        in_bf16 = backward(model)
        found = collected(model)
        factored = collected(model, form="factored")
    assert found.coverage.share == 1
    assert_no_rounder(found, in_bf16, in_fp32)
    # The model's products may be rounded; those that turn factors into gradients may not.
    assert max(errors(dense(found), dense(factored)).values()) <= 1e-6


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inside_a_block_without_gradients(mode):
    model = llama()
    reference = backward(model)
    with mode():
        found = collected(model)
    assert worst_error(found, reference) <= TOLERANCE


# ---------------------------------------------------------------------------------------------------- wrappers


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel(one_process):
    model = llama()
    reference = backward(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    found = collected(wrapped)
    assert found.coverage.share == 1
    assert worst_error(found, reference) <= TOLERANCE
    batch = collate(ROWS[:1], 0)  # and its own training goes on as before
    for _ in range(2):
        wrapped(input_ids=batch.input_ids, labels=batch.labels).loss.backward()
    assert all(torch.allclose(p.grad, 2 * reference[0][n], rtol=1e-3, atol=1e-5) for n, p in model.named_parameters())


def compiled_around(model):
    return torch.compile(model, backend="eager")


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


def compiled_in_part(model):
    model.model.layers[1].compile(backend="eager")
    return model


def compiled_by_its_forward(model):
    layer = model.model.layers[1]
    layer.forward = torch.compile(layer.forward, backend="eager")
    return model


def compiled_around_a_layer(model):
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    return model


COMPILED = [compiled_around, compiled_in_place, compiled_in_part, compiled_by_its_forward, compiled_around_a_layer]


@pytest.mark.parametrize("compiled", COMPILED)
def test_a_compiled_model(compiled):
    """Compiled code does not call hooks, so that the original code is run."""
    model = llama()
    reference = backward(model)
    wrapped = compiled(model)
    with torch.no_grad():  # compiled by now
        batch = collate(ROWS[:2], 0)
        wrapped(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    found = collected(wrapped)
    assert found.coverage.share == 1
    if compiled is compiled_around_a_layer:
        reference = [
            {name.replace("1.", "1._orig_mod.") if ".1." in name else name: value for name, value in example.items()}
            for example in reference
        ]
    assert worst_error(found, reference) <= TOLERANCE


# ------------------------------------------------------------------------------- modules that are used unusually


class Extended(nn.Module):
    """A Llama with ``more(hidden, input_ids)`` between its last hidden state and the head."""

    def __init__(self, more, **modules):
        super().__init__()
        self.model, self.more = llama(), more
        for name, module in modules.items():
            self.add_module(name, module)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            for module in modules.values():
                randomise(module)

    def forward(self, input_ids, attention_mask=None, labels=None, **_):
        hidden = self.model.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        logits = self.model.lm_head(self.more(self, hidden, input_ids))
        loss = (
            None if labels is None else functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        )
        return CausalLMOutput(loss=loss, logits=logits)


USES = {
    "linear": functional.linear,
    "matmul": lambda x, weight: x @ weight.T,
    "einsum": lambda x, weight: torch.einsum("bli,oi->blo", x, weight),
    "transposed": lambda x, weight: torch.matmul(weight, x.mT).mT,
    "scaled": lambda x, weight: x * weight.norm(),
    "normalised": lambda x, weight: functional.linear(x, weight / weight.norm(dim=1, keepdim=True)),
}


@pytest.mark.parametrize("also_called", [False, True], ids=["never called", "also called"])
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_weight_that_is_used_without_its_module(use, also_called):
    def more(self, hidden, _):
        return use(hidden, self.added.weight) + (self.added(hidden) if also_called else 0)

    found = assert_exact(Extended(more, added=nn.Linear(16, 16, bias=also_called)))
    assert "added.weight" in found.coverage.notes


def test_a_weight_of_the_model_that_is_used_elsewhere():
    """The module runs as usual, and its weight is used once more, as by probes and regularisers."""
    model = Extended(
        lambda self, hidden, _: hidden + functional.linear(hidden, self.model.model.layers[0].mlp.up_proj.weight[:16])
    )
    found = assert_exact(model)
    assert set(found.coverage.notes) == {"model.model.layers.0.mlp.up_proj.weight"}


def test_a_parameter_of_a_container_that_is_never_called():
    """PEFT stores the adapters of an embedding in such containers."""
    model = Extended(
        lambda self, hidden, ids: hidden + functional.embedding(ids, self.table["a"].T) @ self.table["b"],
        table=nn.ParameterDict({"a": torch.ones(3, 24), "b": torch.ones(3, 16)}),
    )
    assert_exact(model)


def test_a_parameter_of_the_model_itself():
    def more(self, hidden, _):
        return hidden * self.scale

    model = Extended(more)
    model.scale = nn.Parameter(torch.full((16,), 1.5))
    assert_exact(model)


@pytest.mark.parametrize("times", [2, 3])
def test_a_module_that_is_called_several_times(times):
    def more(self, hidden, _):
        for _ in range(times):
            hidden = hidden + self.norm(self.added(hidden))
        return hidden

    found = assert_exact(Extended(more, added=nn.Linear(16, 16), norm=nn.LayerNorm(16)))
    assert set(found.coverage.notes) == {"added.weight", "added.bias", "norm.weight", "norm.bias"}
    assert all("called" in note for note in found.coverage.notes.values())


class Snake(nn.Module):
    """A module with a weight per unit that is not affine in the weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))

    def forward(self, value):
        return value + torch.sin(self.weight * value) ** 2 / self.weight


class Together(nn.Module):
    """Adapts a module with other shapes or outputs to (B, L, d)."""

    def __init__(self, inner, call):
        super().__init__()
        self.inner, self.call = inner, call

    def forward(self, hidden):
        return self.call(self.inner, hidden)


def causal_convolution(inner, hidden):
    return inner(functional.pad(hidden.mT, (2, 0))).mT


def causal_attention(inner, hidden):
    mask = nn.Transformer.generate_square_subsequent_mask(hidden.shape[1], dtype=hidden.dtype)
    return inner(hidden, hidden, hidden, attn_mask=mask, need_weights=False)[0]


def narrowed(form):
    """Return layers with a parametrised weight that has as many rows as a batch has examples."""
    return nn.Sequential(form(nn.Linear(16, len(ROWS))), nn.Linear(len(ROWS), 16))


MODULES = {
    "snake": Snake,
    "recurrent": lambda: Together(nn.GRU(16, 16, batch_first=True), lambda inner, hidden: inner(hidden)[0]),
    "recurrent (L, B, d)": lambda: Together(
        nn.GRU(16, 16), lambda inner, hidden: inner(hidden.mT.permute(2, 0, 1))[0].transpose(0, 1)
    ),
    "convolution": lambda: Together(nn.Conv1d(16, 16, 3), causal_convolution),
    "attention": lambda: Together(nn.MultiheadAttention(16, 2, batch_first=True), causal_attention),
    "group norm of tokens": lambda: Together(
        nn.GroupNorm(4, 16), lambda inner, hidden: inner(hidden.flatten(0, 1)).view_as(hidden)
    ),
    "weight norm": lambda: narrowed(nn.utils.parametrizations.weight_norm),
    "orthogonal": lambda: narrowed(nn.utils.parametrizations.orthogonal),
    "slopes": lambda: Together(nn.PReLU(16), lambda inner, hidden: inner(hidden.mT).mT),
    "one slope": nn.PReLU,
    "bilinear": lambda: Together(nn.Bilinear(16, 16, 16), lambda inner, hidden: inner(hidden, hidden.flip(2))),
}


@pytest.mark.parametrize("together", [2, len(ROWS)])
@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_modules_without_a_closed_form(module, together):
    assert_exact(Extended(lambda self, hidden, _: hidden + self.added(hidden), added=module()), together=together)


def test_a_shared_layer():
    model = llama()
    model.model.layers[1] = model.model.layers[0]
    assert_exact(model)


def test_a_module_that_never_ran():
    model = llama()
    model.added = nn.Linear(3, 3)
    reference = backward(model)
    found = collected(model)
    assert worst_error(found, reference) <= TOLERANCE
    for gradients in (found, *found.samples):
        assert set(gradients.coverage.missing) == {"added.weight", "added.bias"}
        assert all(gradients.coverage.reasons.values())


def test_a_module_that_ran_for_nothing():
    """The module runs, but its output does not affect the loss."""

    def more(self, hidden, _):
        self.added(hidden)
        return hidden

    model = Extended(more, added=nn.Linear(16, 16))
    found = collected(model)
    assert worst_error(found, backward(model)) <= TOLERANCE
    assert set(found.coverage.missing) == {"added.weight", "added.bias"}


@pytest.mark.parametrize("together", [1, 3])
def test_a_module_that_only_some_examples_use(together):
    """The module runs only on the examples of a batch whose second token is that of the first example."""

    def more(self, hidden, ids):
        chosen = ids[:, 1] == ROWS[0].input_ids[1]
        return hidden if not chosen.any() else hidden.index_add(0, chosen.nonzero()[:, 0], self.added(hidden[chosen]))

    model = Extended(more, added=nn.Linear(16, 16))
    found = assert_exact(model, together=together)
    norms = [sample["added.weight"].norm for sample in found.samples]
    assert min(norms) == 0 < max(norms)


def test_a_branch_that_only_some_batches_take():
    def more(self, hidden, ids):
        return self.added(hidden) if (ids[:, 1] == ROWS[0].input_ids[1]).all() else hidden

    assert_exact(Extended(more, added=nn.Linear(16, 16)), together=1)


# --------------------------------------------------------------------------------------------- hooks and patches


def scaled_output(module, inputs, output):
    return 3 * output


def scaled_in_place(module, inputs, output):
    return output.mul_(3)


def scaled_input(module, inputs):
    return (3 * inputs[0],)


HOOKED = ["model.layers.0.mlp.up_proj", "model.norm", "lm_head"]


@pytest.mark.parametrize(
    ("hook", "target"),
    [
        *itertools.product([scaled_output, scaled_in_place], [*HOOKED, "model.embed_tokens"]),
        *itertools.product([scaled_input], HOOKED),
    ],
)
def test_a_users_hook(hook, target):
    model = llama()
    module = model.get_submodule(target)
    register = module.register_forward_pre_hook if hook is scaled_input else module.register_forward_hook
    handle = register(hook)
    assert_exact(model)
    assert len(module._forward_hooks) + len(module._forward_pre_hooks) == 1
    handle.remove()


def test_a_hook_on_every_module():
    model = llama()
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, _, output: 2 * output if isinstance(module, nn.Linear) else output
    )
    try:
        assert_exact(model)
    finally:
        handle.remove()


@pytest.mark.parametrize("target", ["model.layers.0.mlp.up_proj", "model.norm"])
def test_a_hook_on_a_parameter_changes_nothing(target):
    """The hook changes the gradient that an optimizer gets, not the gradient of the loss."""
    model = llama()
    reference = backward(model)
    handle = model.get_submodule(target).weight.register_hook(lambda gradient: 3 * gradient)
    for found in (collected(model), collected(model, per_sample=False)):
        assert max(errors(dense(found), mean(reference)).values()) <= TOLERANCE
    assert worst_error(collected(model), reference) <= TOLERANCE
    handle.remove()


@pytest.mark.parametrize("target", ["model.layers.0.mlp.up_proj", "model.norm", "model.embed_tokens"])
def test_a_forward_that_is_patched_on_the_instance(target):
    model = llama()
    module = model.get_submodule(target)
    module.forward = MethodType(lambda self, value: 3 * type(self).forward(self, value), module)
    assert_exact(model)


def test_a_subclass_with_a_forward_of_its_own():
    class Doubled(nn.Linear):
        def forward(self, value):
            return 2 * super().forward(value)

    assert_exact(Extended(lambda self, hidden, _: hidden + self.added(hidden), added=Doubled(16, 16)))


# -------------------------------------------------------------------------------------------- layout and choice


SQUARE = [
    Tokens(tuple(torch.randperm(20, generator=torch.Generator().manual_seed(seed))[:6].tolist()), (False, True) * 3)
    for seed in range(6)
]
"""As many examples as tokens per example: the size of a dimension does not tell one from the other."""


def positions_once(self, hidden):
    return self.positions(torch.arange(hidden.shape[1]))


def positions_in_a_batch_of_one(self, hidden):
    return self.positions(torch.arange(hidden.shape[1])[None])


def positions_repeated(self, hidden):
    return self.positions(torch.arange(hidden.shape[1])[None]).repeat(len(hidden), 1, 1)


def positions_summed(self, hidden):
    """A sum over a first dimension of size one, which must stay of size one."""
    return self.positions(torch.arange(hidden.shape[1])[None]).sum(0)


def tokens_first(self, hidden):
    return self.added(hidden.transpose(0, 1)).transpose(0, 1)


def flat(self, hidden):
    return self.added(hidden.flatten(0, 1)).view_as(hidden)


def flat_with_tokens_first(self, hidden):
    return self.added(hidden.transpose(0, 1).flatten(0, 1)).view(hidden.shape[1], -1, 16).transpose(0, 1)


def norm_with_tokens_first(self, hidden):
    return self.norm(hidden.transpose(0, 1)).transpose(0, 1)


def flat_norm_with_tokens_first(self, hidden):
    return self.norm(hidden.transpose(0, 1).flatten(0, 1)).view(hidden.shape[1], -1, 16).transpose(0, 1)


def norm_with_heads_first(self, hidden):
    heads = hidden.unflatten(2, (4, 4)).permute(2, 0, 1, 3)
    return self.small_norm(heads).permute(1, 2, 0, 3).flatten(2)


def layer_with_heads_first(self, hidden):
    heads = hidden.unflatten(2, (4, 4)).permute(2, 0, 1, 3)
    return self.small(heads).permute(1, 2, 0, 3).flatten(2)


def bias_alone(self, hidden):
    return self.added.bias


def last_token_alone(self, hidden):
    """The input of a value head or a pooler: a row per example."""
    return self.added(hidden[:, 1]).unsqueeze(1)


LAYOUTS = [
    positions_once,
    positions_in_a_batch_of_one,
    positions_repeated,
    positions_summed,
    tokens_first,
    flat,
    flat_with_tokens_first,
    norm_with_tokens_first,
    flat_norm_with_tokens_first,
    norm_with_heads_first,
    layer_with_heads_first,
    bias_alone,
    last_token_alone,
]


@pytest.mark.parametrize(
    ("rows", "together"), [(ROWS, 4), (SQUARE, 4), (SQUARE, 6)], ids=["of all lengths", "as many as heads", "square"]
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_wherever_a_module_keeps_the_examples(layout, rows, together):
    modules = {
        "added": nn.Linear(16, 16),
        "norm": nn.LayerNorm(16),
        "small": nn.Linear(4, 4),
        "small_norm": nn.LayerNorm(4),
    }
    model = Extended(lambda self, hidden, _: hidden + layout(self, hidden), positions=nn.Embedding(32, 16), **modules)
    reference = backward(model, rows)
    found = collected(model, rows, together=together)
    assert worst_error(found, reference) <= TOLERANCE
    assert set(found) == {name for name, gradient in mean(reference).items() if gradient.any()}


def test_only_some_layers_train():
    model = llama(tied=True)
    model.requires_grad_(False)
    model.model.layers[1].mlp.requires_grad_(True)
    model.model.norm.requires_grad_(True)
    assert len(assert_exact(model)) == 4


def test_a_module_whose_bias_alone_trains():
    model = llama(family="llama with biases")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    assert len(assert_exact(model)) == 14


def test_a_tied_weight_of_which_only_the_head_would_be_factored():
    found = assert_exact(llama(tied=True), form="factored")
    assert not isinstance(found["model.embed_tokens.weight"], FactoredGradient)
