"""Sound models pass every check; a model that is broken on purpose fails the right check, and no other."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_outputs import CausalLMOutput

from geomkit.collection.check import questions
from geomkit.collection.check.check import check_collection
from geomkit.collection.collect import collect_gradients
from geomkit.errors import CollectionError, DataError
from geomkit.inputs.parameters import select
from geomkit.inputs.tokens import encode
from tests.helpers.architectures import ARCHITECTURES, backward, dense, errors
from tests.helpers.tiny import UTILITY, conversations, tiny_llama, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
NAMES = ["repeatable", "complete", "padding right", "padding left", "batch", "attention", "dtype"]


def check(model, examples=UTILITY, **settings):
    return check_collection(model, TOKENIZER, examples, progress=False, **settings)


def verdicts(found):
    return {name: result.verdict for name, result in found.checks.items()}


def assert_fails_only(found, name):
    assert [result.name for result in found.failures] == [name], str(found)
    assert not found.ok
    failure = found[name]
    assert failure.advice
    assert str(failure) in str(found)
    assert failure.difference > failure.tolerance or failure.cosine < 0.999
    with pytest.raises(CollectionError, match=f"gradients cannot be trusted as they are; {name}: differs by"):
        found.raise_on_failure()


# ------------------------------------------------------------------------------------------------- sound models


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_sound_model_passes(attention):
    model = tiny_llama(attn_implementation=attention)
    found = check(model)
    assert found.ok
    found.raise_on_failure()
    expected = dict.fromkeys(NAMES, "ok") | {"dtype": "skipped"}
    assert verdicts(found) == (expected if attention == "sdpa" else expected | {"attention": "skipped"})
    assert found["repeatable"].difference == 0
    assert found["repeatable"].note == "bit for bit the same"
    assert max(result.difference for result in found.checks.values() if result.verdict == "ok") <= 1e-5
    assert min(result.cosine for result in found.checks.values() if result.verdict == "ok") >= 1 - 1e-7
    assert "all measured checks are ok" in str(found)
    assert f"LlamaForCausalLM, float32, {attention}, cpu; 4 examples, 41 tokens; 100.0%" in str(found)


@pytest.mark.parametrize("name", ["gpt-2", "gemma 3", "opt", "falcon with alibi and biases", "qwen3-moe"])
def test_sound_models_of_other_families(name):
    """The biases of OPT's keys have gradient zero in exact arithmetic, so that their gradient is rounding."""
    found = check(ARCHITECTURES[name].build(tied=True), count=2)
    assert found.ok, str(found)
    assert max(result.difference for result in found.checks.values() if result.verdict == "ok") <= 1e-4


def test_bf16_within_its_rounding():
    found = check(tiny_llama().bfloat16())
    assert found.ok, str(found)
    assert verdicts(found) == dict.fromkeys(NAMES, "ok")
    assert 1e-3 < found["dtype"].difference < 0.1
    assert found["dtype"].note == "the fp32 copy took 20.3 KiB"


def test_autocast_is_compared_with_the_same_model_without():
    model = tiny_llama()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = check(model)
    assert found.ok, str(found)
    assert found["dtype"].note == "autocast against the same without"
    assert 1e-3 < found["dtype"].difference < 0.1
    assert "bfloat16" in found.setting


def test_adapters_alone_and_a_choice_of_layers():
    model = tiny_llama()
    model.model.layers[0].requires_grad_(False)
    found = check(model, layers=select(kinds=["mlp", "norm"], indices=[0, 1]))
    assert found.ok
    assert list(found.coverage.seen) == [
        name for name, _ in model.named_parameters() if ".layers.1." in name and ("mlp" in name or "norm" in name)
    ]


def test_what_has_no_part_in_the_loss():
    model = tiny_llama()
    model.extra = nn.Linear(3, 3)
    found = check(model)
    assert found.ok
    assert set(found.coverage.missing) == {"extra.weight", "extra.bias"}
    with pytest.raises(CollectionError, match="found none among"):
        check(model, layers="nothing")


class Plain(nn.Module):
    """A model that is not from transformers."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(len(TOKENIZER), 8), nn.Linear(8, len(TOKENIZER))

    def forward(self, input_ids, attention_mask, use_cache):
        return CausalLMOutput(logits=self.head(self.table(input_ids)))


def test_a_model_without_attention_or_positions():
    found = check(Plain())
    assert found["attention"].verdict == "skipped"
    assert found["padding left"].verdict == "skipped"
    assert "unexpected keyword argument 'position_ids'" in found["padding left"].note
    assert found.ok


# --------------------------------------------------------------------------------------- broken, and put right again


def with_mean_over_positions(model):
    return model.model.embed_tokens.register_forward_hook(lambda _m, _i, out: out + out.mean(1, keepdim=True))


def with_statistics_of_the_batch(model):
    return model.model.embed_tokens.register_forward_hook(lambda _m, _i, out: out + out.mean(0, keepdim=True))


def with_noise(model):
    return model.model.embed_tokens.register_forward_hook(lambda _m, _i, out: out + 0.1 * torch.randn_like(out))


def one_at_a_time_is_right(model):
    found = collect_gradients(model, TOKENIZER, UTILITY, per_sample=True, tokens_per_batch=1, progress=False)
    rows = encode(TOKENIZER, UTILITY)
    for sample, expected in zip(found.samples, backward(model, rows), strict=True):
        assert max(errors(dense(sample), expected).values()) <= 1e-5


def test_hidden_states_that_depend_on_padding():
    model = tiny_llama()
    with_mean_over_positions(model)
    found = check(model)
    assert {result.name for result in found.failures} == {"padding right", "padding left"}  # padding is padding
    assert "tokens_per_batch=1" in found["padding right"].advice
    one_at_a_time_is_right(model)


def test_hidden_states_that_depend_on_the_batch():
    model = tiny_llama()
    with_statistics_of_the_batch(model)
    found = check(model)
    assert_fails_only(found, "batch")
    assert "tokens_per_batch=1" in found["batch"].advice
    one_at_a_time_is_right(model)


def test_positions_that_do_not_heed_padding_on_the_left():
    model = ARCHITECTURES["gpt-2"].build(tied=False)
    model.transformer.register_forward_pre_hook(
        lambda _m, inputs, keywords: (inputs, keywords | {"position_ids": None}), with_kwargs=True
    )
    found = check(model)
    assert_fails_only(found, "padding left")
    assert "pad on the right, as geomkit always does" in found["padding left"].advice
    together = collect_gradients(model, TOKENIZER, UTILITY, per_sample=True, progress=False)
    for sample, expected in zip(together.samples, backward(model, encode(TOKENIZER, UTILITY)), strict=True):
        assert max(errors(dense(sample), expected).values()) <= 1e-5


def test_padding_on_the_left_that_gives_nan():
    model = tiny_llama()

    def break_off(_module, inputs, keywords, out):
        if not bool(keywords["attention_mask"][:, 0].all()):
            out.logits = out.logits * math.nan
        return out

    model.register_forward_hook(break_off, with_kwargs=True)
    found = check(model)
    assert [result.name for result in found.failures] == ["padding left"]
    assert found["padding left"].difference == math.inf
    assert "expected a finite loss, found nan" in str(found)


def test_random_numbers_in_eval_mode():
    model = tiny_llama()
    handle = with_noise(model)
    found = check(model)
    assert_fails_only(found, "repeatable")
    assert "draws random numbers in eval mode" in found["repeatable"].advice
    assert {result.verdict for result in found.checks.values() if result.name != "repeatable"} == {"skipped"}
    assert "nothing can be compared" in " ".join(str(found).split())  # the table breaks lines
    handle.remove()
    assert check(model).ok


@pytest.mark.parametrize(("size", "ok"), [(0.1, False), (1e-7, True)])
def test_a_kernel_that_does_not_give_the_same_twice(size, ok):
    """A kernel with a varying order of summation: it depends on torch's deterministic mode, not on the seed."""
    model, order = tiny_llama(), torch.Generator().manual_seed(0)

    def vary(_module, _inputs, out):
        noise = size * torch.randn(out.shape, generator=order)
        return out if torch.are_deterministic_algorithms_enabled() else out + noise

    model.model.embed_tokens.register_forward_hook(vary)
    found = check(model)
    assert "not bit for bit the same" in found["repeatable"].note
    assert found.ok is ok
    if not ok:
        assert_fails_only(found, "repeatable")
        assert "torch.use_deterministic_algorithms(True)" in found["repeatable"].advice
    torch.use_deterministic_algorithms(True)
    try:
        assert check(model)["repeatable"].note == "bit for bit the same"
    finally:
        torch.use_deterministic_algorithms(False)


def crooked(module, query, key, value, attention_mask, **keywords):
    return sdpa_attention_forward(module, 1.1 * query, key, value, attention_mask, **keywords)


@pytest.fixture
def crooked_attention():
    AttentionInterface.register("crooked", crooked)
    AttentionMaskInterface.register("crooked", sdpa_mask)
    yield
    for interface in (AttentionInterface, AttentionMaskInterface):
        del interface._global_mapping["crooked"]


@pytest.mark.usefixtures("crooked_attention")
def test_an_attention_kernel_that_differs_from_eager():
    model = tiny_llama(attn_implementation="crooked")
    found = check(model)
    assert_fails_only(found, "attention")
    assert model.config._attn_implementation == "crooked"
    assert 'model.set_attn_implementation("eager")' in found["attention"].advice
    model.set_attn_implementation("eager")
    assert check(model).ok
    # In bf16 it is not said to be the kernel before fp32 has been tried.
    low = tiny_llama(attn_implementation="crooked").bfloat16()
    assert "load the model in float32 and check again" in check(low)["attention"].advice


def test_bf16_that_loses_more_than_its_rounding():
    """An input near the kink of a ReLU has different signs in bf16 and in fp32."""
    model = ARCHITECTURES["opt"].build(tied=False).bfloat16()
    found = check(model)
    assert_fails_only(found, "dtype")
    assert 'dtype="float32"' in found["dtype"].advice
    assert check(model.float()).ok


class Doubling(nn.Parameter):
    """A tensor subclass that computes products itself, as quantised weights do."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            out = function(*args, **(kwargs or {}))
        return 2 * out if function is linear else out


def test_a_weight_whose_gradient_is_not_the_closed_form():
    model = tiny_llama()
    layer = model.model.layers[1].mlp.up_proj
    plain = layer.weight
    layer.weight = Doubling(plain.detach().clone())
    found = check(model)
    assert_fails_only(found, "complete")
    assert found["complete"].parameter == "model.layers.1.mlp.up_proj.weight"
    assert found["complete"].difference == pytest.approx(0.5)
    assert "leave the parameter out with layers=" in found["complete"].advice
    others = [name for name, _ in model.named_parameters() if "layers.1.mlp.up_proj" not in name]
    assert check(model, layers=others).ok
    layer.weight = plain
    assert check(model).ok


# ---------------------------------------------------------------------------------------------- memory and errors


def test_autograd_forms_gradients_in_groups(monkeypatch):
    model = tiny_llama()
    together = check(model)["complete"]
    monkeypatch.setattr(questions, "_GROUP_ENTRIES", 1)
    assert check(model)["complete"] == together


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError, TypeError])
def test_no_copy_in_fp32(error):
    model = tiny_llama().bfloat16()

    def fail(_):
        raise error("not enough memory: you tried to allocate it\nat length")

    model.__deepcopy__ = fail
    found = check(model)
    assert found["dtype"].verdict == "skipped"
    assert found["dtype"].note == ("no fp32 copy, which needs 20.3 KiB: not enough memory: you tried to allocate it")


def test_quantised_weights_have_no_copy_in_fp32():
    model = tiny_llama()
    model.register_parameter("scale", nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False))
    assert check(model)["dtype"].note == "the weights are quantised, so that there is no fp32 copy of them"


def test_one_example_is_not_enough():
    with pytest.raises(DataError, match=r"expected at least 2 examples, .* found 1; give more"):
        check(tiny_llama(), UTILITY.select([0]))
    with pytest.raises(DataError, match=r"expected at least 2 examples, .* found 1"):
        check(tiny_llama(), count=1)


def test_examples_of_one_length():
    assert check(tiny_llama(), conversations(("help", "no"), ("paint", "sure")), count=2).ok


def test_only_the_first_examples_are_run():
    found = check(tiny_llama(), count=2)
    assert "2 examples, 22 tokens" in found.setting


def test_a_frame_of_it():
    frame = check(tiny_llama()).to_frame()
    assert list(frame["check"]) == NAMES
    assert list(frame.columns)[:5] == ["check", "verdict", "difference", "cosine", "tolerance"]
    assert "padding right" in check(tiny_llama())._repr_html_()


# ---------------------------------------------------------------------------------------------- left as found


def state_of(model):
    return (
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        [None if parameter.grad is None else parameter.grad.clone().tolist() for parameter in model.parameters()],
        [parameter.detach().clone().tolist() for parameter in model.parameters()],
        [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()],
        model.config._attn_implementation,
        torch.get_rng_state().tolist(),
        torch.get_float32_matmul_precision(),
    )


@pytest.mark.parametrize("fails_at", [None, *range(1, 19, 3)])
def test_the_model_is_left_as_found_wherever_it_breaks_off(fails_at):
    model = tiny_llama(attention_dropout=0.5).bfloat16().train()
    model.model.layers[0].eval()
    model.model.norm.requires_grad_(False)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    runs = []

    def interrupt(_module, _inputs):
        runs.append(model.config._attn_implementation)
        if len(runs) == fails_at:
            raise KeyboardInterrupt

    model.model.register_forward_pre_hook(interrupt)
    before = state_of(model)
    if fails_at is None:
        assert check(model).ok
        assert set(runs) == {"sdpa", "eager"}
    else:
        with pytest.raises(KeyboardInterrupt):
            check(model)
    assert state_of(model) == before
