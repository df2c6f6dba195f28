"""Descriptions against the memory and the gradients of the collection itself."""

import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from geomkit.collection.collect import collect_from_tokens, collect_gradients
from geomkit.errors import CollectionError, DataError
from geomkit.gradients.indexed import IndexedGradient
from geomkit.gradients.summed import SumGradient
from geomkit.inputs.parameters import select
from geomkit.inputs.tokens import Tokens, encode
from geomkit.planning.describe import describe
from tests.helpers.architectures import ARCHITECTURES
from tests.helpers.tiny import SAFETY, UTILITY, tiny_llama, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def plan(model, **settings):
    return describe(model, TOKENIZER, UTILITY, **settings)


def by_name(description):
    return {plan.name: plan for plan in description.parameters}


def bytes_of(gradient):
    """Return the bytes of a gradient in memory."""
    if isinstance(gradient, SumGradient):
        return sum(map(bytes_of, gradient.parts))
    return 4 * gradient.floats + (8 * len(gradient.indices) if isinstance(gradient, IndexedGradient) else 0)


# --------------------------------------------------------------------------------------- the memory of the result

WIDE = {"hidden_size": 128, "intermediate_size": 160}  # wide enough for factors to be the smaller form


@pytest.mark.parametrize("form", ["auto", "factored"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("wide", [{}, WIDE], ids=["narrow", "wide"])
def test_the_result_of_a_llama(wide, tied, form):
    """All bounds hold, with room for tokens that do not contribute, such as two in three queries of the last layer."""
    model = tiny_llama(tied=tied, **wide)
    planned = plan(model, per_sample=True, form=form)
    found = collect_gradients(model, TOKENIZER, UTILITY, per_sample=True, form=form, progress=False)
    for name, gradient in found.items():
        bound = by_name(planned)[name]
        assert bytes_of(gradient) <= bound.result <= 3 * bytes_of(gradient), name
        assert sum(bytes_of(sample[name]) for sample in found.samples) <= bound.samples, name
    assert sum(map(bytes_of, found.values())) <= planned.memory.result <= 1.5 * sum(map(bytes_of, found.values()))
    sample_bytes = sum(bytes_of(gradient) for sample in found.samples for gradient in sample.values())
    assert sample_bytes <= planned.memory.samples <= 1.5 * sample_bytes


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_result_of_every_family(name, tied):
    model = ARCHITECTURES[name].build(tied=tied)
    planned = plan(model, per_sample=True)
    found = collect_gradients(model, TOKENIZER, UTILITY, per_sample=True, progress=False)
    assert [plan.name for plan in planned.parameters if plan.chosen] == list(found)
    result = sum(map(bytes_of, found.values()))
    sample_bytes = sum(bytes_of(gradient) for sample in found.samples for gradient in sample.values())
    assert result <= planned.memory.result <= 1.25 * result
    # On some processors a position's gradient is exactly zero, and left out, that is 1e-9 on others.
    assert sample_bytes <= planned.memory.samples <= 1.6 * sample_bytes


def test_without_examples_the_sum_is_bounded_by_its_dense_form():
    model = tiny_llama()
    planned = describe(model)
    assert planned.workload is None
    entries = sum(parameter.numel() for parameter in model.parameters())
    assert planned.memory.result == 4 * entries + 8 * model.config.vocab_size
    assert planned.memory.samples == 0
    assert describe(model, form="factored").memory.result is None
    assert describe(model, per_sample=True).memory.samples is None
    assert "grow with the tokens; give examples" in str(describe(model, form="factored"))


def test_fp64_gradients_are_twice_as_large():
    plain, double = (plan(model, layers="*.mlp.*") for model in (tiny_llama(), tiny_llama().double()))
    assert double.memory.result == 2 * plain.memory.result
    low = plan(tiny_llama().bfloat16(), layers=select(kinds="mlp")).memory
    assert low.result == plain.memory.result  # fp32 whatever the weights are
    assert low.weights == plan(tiny_llama()).memory.weights / 2


# ------------------------------------------------------------------------------------------ the memory of a batch


class Peak(TorchDispatchMode):
    """Tracks the bytes of all tensors in memory, except those of a model."""

    def __init__(self, model):
        super().__init__()
        self.known = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        self.now = self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self.known:
                    self.known.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self.drop, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return out

    def drop(self, key, size):
        self.known.discard(key)
        self.now -= size


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gemma 2", "gpt-2", "opt", "qwen3-moe"])
def test_the_peak(name, dtype, per_sample):
    """The described memory is between 1 and 2.5 times the peak of the tensors in memory."""
    architecture, vocabulary, examples, length = ARCHITECTURES[name], 2000, 4, 96
    widths = ("hidden_size", "intermediate_size", "n_embd", "ffn_dim", "head_dim", "moe_intermediate_size")
    wider = {key: 8 * value if key in widths else value for key, value in architecture.settings.items()}
    settings = wider | {"vocab_size": vocabulary, "max_position_embeddings": 256}
    model = replace(architecture, settings=settings).build(tied=False).to(dtype)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, vocabulary, (examples, length), generator=generator)
    rows = [Tokens(tuple(row.tolist()), (False,) * (length // 2) + (True,) * (length // 2)) for row in ids]
    planned = describe(model, per_sample=per_sample, tokens_per_batch=examples * length).memory
    with Peak(model) as peak:
        found = collect_from_tokens(model, rows, 0, per_sample=per_sample)
    result = sum(bytes_of(gradient) for gradients in (found, *found.samples) for gradient in gradients.values())
    assert peak.most <= planned.logits + planned.activations + result <= 2.5 * peak.most


# ------------------------------------------------------------------------------------------- parameters and work


def test_parameters_and_how_their_gradients_are_obtained():
    model = tiny_llama(tied=True)
    model.model.layers[0].mlp.requires_grad_(False)
    planned = describe(model, layers=select(kinds=["mlp", "norm", "head"]))
    named = by_name(planned)
    assert list(named) == [name for name, _ in model.named_parameters()]
    tied = named["model.embed_tokens.weight"]
    assert (tied.others, tied.module, tied.way, tied.chosen) == (
        ("lm_head.weight",),
        "Embedding + Linear",
        "closed form",
        True,  # by its other name
    )
    norm = named["model.layers.1.input_layernorm.weight"]
    assert (norm.kind, norm.layer, norm.shape, norm.module, norm.way) == (
        "norm",
        1,
        (16,),
        "LlamaRMSNorm",
        "autograd, samples by replay",
    )
    frozen = named["model.layers.0.mlp.up_proj.weight"]
    assert (frozen.trainable, frozen.chosen, frozen.result) == (False, False, None)
    attention = named["model.layers.0.self_attn.q_proj.weight"]
    assert (attention.trainable, attention.chosen) == (True, False)
    found = collect_gradients(model, TOKENIZER, UTILITY, layers=select(kinds=["mlp", "norm", "head"]), progress=False)
    assert [plan.name for plan in planned.parameters if plan.chosen] == list(found)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert planned.share == pytest.approx(sum(torch.Size(g.shape).numel() for g in found.values()) / trainable)
    assert "mlp        3 of 6 (3 frozen)" in str(planned)
    assert "closed form, tied" in str(planned)


def test_experts_and_a_patched_module_go_through_autograd():
    model = ARCHITECTURES["mixtral"].build(tied=False)
    model.lm_head.forward = lambda value: nn.functional.linear(value, model.lm_head.weight)
    named = by_name(describe(model))
    assert named["model.layers.0.mlp.experts.down_proj"].way == "autograd, samples by replay"
    assert named["lm_head.weight"].way == "autograd, samples by replay"
    assert named["model.layers.0.self_attn.q_proj.weight"].way == "closed form"


@pytest.mark.parametrize("tokens_per_batch", [1, 30, 4096])
def test_the_work(tokens_per_batch):
    seen = []
    model = tiny_llama()
    model.register_forward_pre_hook(
        lambda _module, _inputs, keywords: seen.append(keywords["input_ids"].shape), with_kwargs=True
    )
    work = plan(model, tokens_per_batch=tokens_per_batch).workload
    assert not seen  # nothing runs
    found = collect_gradients(model, TOKENIZER, UTILITY, tokens_per_batch=tokens_per_batch, progress=False)
    rows = encode(TOKENIZER, UTILITY)
    assert (work.examples, work.tokens, work.loss_tokens) == (4, sum(map(len, rows)), found.loss_tokens)
    assert work.batches == len(seen)
    assert work.positions == max(shape.numel() for shape in seen)
    assert work.padding == pytest.approx(1 - work.tokens / sum(shape.numel() for shape in seen))


def test_a_large_model_that_was_never_loaded():
    settings = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_key_value_heads": 8}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=32, **settings))
    planned = plan(model, per_sample=True)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert planned.share == 1
    assert planned.memory.weights == 4 * 8_030_261_248
    shown = str(planned)
    assert "LlamaForCausalLM: 8.03B parameters, 8.03B trainable, 100.0% of these chosen" in shown
    assert len(shown.splitlines()) <= 25
    assert max(map(len, shown.splitlines())) <= 120
    with pytest.raises(CollectionError, match="on the meta device; load the model"):
        collect_gradients(model, TOKENIZER, UTILITY, progress=False)


def test_a_frame_of_it():
    planned = plan(tiny_llama(tied=True), layers=select(kinds="mlp"))
    frame = planned.to_frame().set_index("parameter")
    assert len(frame) == len(planned.parameters)
    assert frame.loc["model.embed_tokens.weight", "also"] == "lm_head.weight"
    assert frame.loc["model.layers.1.mlp.up_proj.weight", "shape"] == "24×16"
    assert list(frame.index[frame["chosen"]]) == [name for name in frame.index if "mlp" in name]
    assert "estimated" in planned._repr_html_()


def test_what_cannot_be_described():
    with pytest.raises(DataError, match="found only a tokenizer; give examples too"):
        describe(tiny_llama(), TOKENIZER)
    with pytest.raises(DataError, match="found only examples; give a tokenizer too"):
        describe(tiny_llama(), examples=SAFETY)
    with pytest.raises(CollectionError, match="found none among"):
        describe(tiny_llama(), layers="nothing")


def test_a_model_that_names_no_head():
    planned = describe(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9)))
    assert planned.memory.logits == 0
    assert planned.share == 1
