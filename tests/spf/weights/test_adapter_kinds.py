"""Every kind of layer that PEFT adapts: the promise on the product where that is the layer's whole change, else factor
by factor, which is said. References: autograd on the merged model for products, and on the model itself for factors."""

import copy
import logging
import re
from functools import partial

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from geomkit.errors import CollectionError, SPFError
from geomkit.spf.settings import SPF
from geomkit.spf.weights import guarded
from geomkit.spf.weights.adapters import Adapters, find_adapters
from tests.helpers.spf_training import (
    TOKENIZER,
    anchors_loss,
    change_of_loss,
    run,
    safety_gradients,
    weights_of,
)
from tests.helpers.tiny import SAFETY, SPECIAL, WORDS, tiny_llama

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension:UserWarning"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor:UserWarning"),
]

WORD_IDS = {"vocab_size": len(SPECIAL + WORDS), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
CAUSAL = {"task_type": "CAUSAL_LM"}


def seeded_model(make, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def gpt2(*, tied=False):
    settings = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.2}
    config = GPT2Config(**WORD_IDS, **settings, tie_word_embeddings=tied, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0)
    return seeded_model(lambda: GPT2LMHeadModel(config))


def mixtral():
    config = MixtralConfig(
        **WORD_IDS, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=2, initializer_range=0.2,
        tie_word_embeddings=False,
    )  # fmt: skip
    return seeded_model(lambda: MixtralForCausalLM(config))


def adapted(model, *configs, spread=0.3):
    """The model with these adapters, all active, whose zeros are replaced by random numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        first, *others = configs
        model = peft.get_peft_model(model, first)
        for index, config in enumerate(others):
            model.add_adapter(f"other{index}", config)
        if others:
            model.base_model.set_adapter(["default", *(f"other{index}" for index in range(len(others)))])
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad and not parameter.any():
                    parameter.copy_(spread * torch.randn_like(parameter))
    return model


def lora(*targets, r=3, **settings):
    return peft.LoraConfig(**CAUSAL, r=r, lora_alpha=6, target_modules=list(targets), **settings)


def embedding_with_a():
    """An embedding's adapter whose A is not zero, except at the padding token."""
    model = adapted(tiny_llama(), lora("embed_tokens"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_embedding_A" in name:
                parameter[:, 0] = 0.0
    return model


def hooked():
    """As accelerate dispatches a model: with a forward of its own on the instance of each layer, which PEFT wraps."""
    model = tiny_llama()
    for layer in model.model.layers:
        add_hook_to_module(layer.self_attn.q_proj, ModelHook())
    return adapted(model, lora("q_proj"))


PRODUCTS = {
    "Linear": (lambda: adapted(tiny_llama(), lora("q_proj", "down_proj")), 4),
    "Conv1D": (lambda: adapted(gpt2(), lora("c_attn", "mlp.c_proj", fan_in_fan_out=True)), 4),
    "Conv1D, B zero": (lambda: adapted(gpt2(), lora("c_attn", fan_in_fan_out=True), spread=0.0), 2),
    "Embedding, A zero": (lambda: adapted(tiny_llama(), lora("embed_tokens", "v_proj"), spread=0.0), 3),
    "Embedding": (embedding_with_a, 1),
    "position embedding": (lambda: adapted(gpt2(), lora("wpe")), 1),
    "with hooks of accelerate": (hooked, 2),
    "head": (lambda: adapted(tiny_llama(), lora("lm_head")), 1),
    "bias": (lambda: adapted(tiny_llama(attention_bias=True), lora("q_proj", lora_bias=True)), 2),
    "rsLoRA": (lambda: adapted(tiny_llama(), lora("q_proj", use_rslora=True)), 2),
    "PiSSA": (lambda: adapted(tiny_llama(), lora("q_proj", init_lora_weights="pissa")), 2),
    "OLoRA": (lambda: adapted(tiny_llama(), lora("q_proj", init_lora_weights="olora")), 2),
    "two adapters": (lambda: adapted(tiny_llama(), lora("q_proj", "v_proj"), lora("q_proj", r=2)), 4),
    "two adapters of Conv1D": (
        lambda: adapted(gpt2(), lora("c_attn", fan_in_fan_out=True), lora("c_attn", r=2, fan_in_fan_out=True)), 2,
    ),
    "A alone": (lambda: frozen(adapted(tiny_llama(), lora("q_proj")), "lora_B"), 2),
    "B alone": (lambda: frozen(adapted(gpt2(), lora("c_attn", fan_in_fan_out=True)), "lora_A"), 2),
}  # fmt: skip


def frozen(model, part):
    for name, parameter in model.named_parameters():
        if part in name:
            parameter.requires_grad_(False)
    return model


def merged(model):
    return copy.deepcopy(model).merge_and_unload().eval().requires_grad_(True)


def merged_change(model):
    """A watcher for :func:`run`, and the list of ⟨ΔW, G⟩ by merged weight of every step, by autograd in fp32."""
    seen, steps = {}, []

    def watch(when, model):
        plain = merged(model)
        parameters = dict(plain.named_parameters())
        if when == "before":
            gradients = torch.autograd.grad(anchors_loss(plain), list(parameters.values()))
            seen.update(gradients=dict(zip(parameters, gradients, strict=True)), weights=weights_of(plain))
            return
        change = change_of_loss(seen["weights"], weights_of(plain), seen["gradients"])
        moved = {name for name, weight in parameters.items() if not torch.equal(weight.double(), seen["weights"][name])}
        steps.append({name: value for name, value in change.items() if name in moved})

    return watch, steps


def steep(parameters):
    return torch.optim.AdamW(parameters, lr=0.05)


@pytest.mark.parametrize("rule", ["rank1", "left", "two-sided"])
@pytest.mark.parametrize("kind", PRODUCTS)
def test_no_weight_moves_against_safety_with_its_product(kind, rule):
    """⟨ΔW, G⟩ ≤ 0 of the merged weight, to 5e-6 (merging rounds to fp32), in steps where ΔB ΔA matters."""
    make, count = PRODUCTS[kind]
    model = make()
    watch, steps = merged_change(model)
    spf = SPF(SAFETY, rule=rule, tokenizer=TOKENIZER, drift_correction=False)
    certificate = run(model, spf, steep, steps=3, watch=watch)
    assert certificate.violations == 0
    assert not certificate.by_factor
    assert any(record.fired > 0 for record in certificate.records)
    for change, record in zip(steps, certificate.records, strict=True):
        assert sum("lora" not in name for name in record.blocks) == count
        assert len(change) >= count
        assert max(change.values()) < 5e-6
        assert sum(change.values()) == pytest.approx(record.first_order, abs=2e-5)


def test_a_plain_run_moves_each_kind_of_weight_against_safety():
    """What the test above forbids does happen without a rule, for GPT-2, an embedding and two adapters."""
    for kind in ("Conv1D", "Embedding, A zero", "two adapters"):
        model = PRODUCTS[kind][0]()
        watch, steps = merged_change(model)
        run(model, SPF(SAFETY, rule="monitor", tokenizer=TOKENIZER), steep, steps=3, watch=watch)
        assert max(max(change.values()) for change in steps) > 1e-3, kind


def test_factor_by_factor_misses_the_bilinear_term(monkeypatch):
    """Why a product is one block: with A and B apart the same rule keeps its promise, and ⟨ΔB ΔA, G⟩ remains."""
    monkeypatch.setattr(guarded, "find_adapters", lambda *_: Adapters({}, {}))
    model = PRODUCTS["Linear"][0]()
    watch, steps = merged_change(model)
    spf = SPF(SAFETY, rule="rank1", tokenizer=TOKENIZER, drift_correction=False)
    assert run(model, spf, steep, steps=3, watch=watch).violations == 0
    assert max(max(change.values()) for change in steps) > 1e-3


def padded():
    """An embedding's adapter whose A is random everywhere, also at the padding token."""
    model = adapted(tiny_llama(), lora("embed_tokens"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_embedding" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
    return model


def base_trained_too():
    model = adapted(tiny_llama(), lora("q_proj"))
    for name, parameter in model.named_parameters():
        if "base_layer" in name:
            parameter.requires_grad_(True)
    return model


def other(kind, *targets, **settings):
    return adapted(tiny_llama(), getattr(peft, f"{kind}Config")(**CAUSAL, target_modules=list(targets), **settings))


def replaced_forward():
    """As X-LoRA does it: another forward pass on the instance of each layer."""
    model = adapted(tiny_llama(), lora("q_proj"))
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.forward = partial(type(module).forward, module)
    return model


FACTORS = {
    "forward replaced": (replaced_forward, "its forward pass is replaced"),
    "tied head": (lambda: adapted(tiny_llama(tied=True), lora("lm_head")), "tied to another layer"),
    "tied embedding": (lambda: adapted(gpt2(tied=True), lora("wte")), "tied to another layer"),
    "padding token": (padded, "not zero at the padding token"),
    "base trained": (base_trained_too, "trained as well"),
    "DoRA": (lambda: adapted(tiny_llama(), lora("q_proj", use_dora=True)), "Dora"),
    "DoRA embedding": (lambda: adapted(tiny_llama(), lora("embed_tokens", use_dora=True)), "Dora"),
    "one of two is DoRA": (
        lambda: adapted(tiny_llama(), lora("q_proj"), lora("q_proj", r=2, use_dora=True)), "Dora",
    ),
    "experts": (
        lambda: adapted(mixtral(), lora(target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])),
        r"lora\.ParamWrapper",
    ),
    "AdaLoRA": (
        lambda: other("AdaLora", "q_proj", init_r=3, target_r=2, tinit=1, tfinal=1, total_step=99), "adalora",
    ),
    "IA3": (lambda: other("IA3", "k_proj", "down_proj", feedforward_modules=["down_proj"]), "ia3"),
    "LoHa": (lambda: other("LoHa", "q_proj", r=2), "loha"),
    "LoKr": (lambda: other("LoKr", "q_proj", r=2), "lokr"),
    "VeRA": (lambda: other("Vera", "q_proj", "v_proj", r=4), "vera"),
    "OFT": (lambda: other("OFT", "q_proj", oft_block_size=4), "oft"),
    "BOFT": (lambda: other("BOFT", "q_proj", boft_block_size=4), "boft"),
    "HRA": (lambda: other("HRA", "q_proj", r=2), "hra"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FACTORS)
def test_other_layers_are_protected_factor_by_factor_and_named(kind, caplog):
    """⟨Δp, g_p⟩ ≤ 0 of each trained parameter, to 1e-6, against autograd; the log names the layers once, with why."""
    make, reason = FACTORS[kind]
    model, seen, steps = make(), {}, []

    def watch(when, model):
        if when == "before":
            seen.update(gradients=safety_gradients(model), weights=weights_of(model))
        else:
            steps.append(change_of_loss(seen["weights"], weights_of(model), seen["gradients"]))

    spf = SPF(SAFETY, tokenizer=TOKENIZER, rule="rank1")
    with caplog.at_level(logging.WARNING, logger="geomkit.spf"):
        certificate = run(model, spf, lambda parameters: torch.optim.AdamW(parameters, lr=1e-3), steps=2, watch=watch)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert certificate.violations == 0
    assert certificate.by_factor
    for change, record in zip(steps, certificate.records, strict=True):
        assert {*record.blocks} <= trained
        assert max(change[name] for name in record.blocks) < 1e-6
        assert sum(change[name] for name in record.blocks) == pytest.approx(record.first_order, abs=2e-6)
    lines = [line for line in caplog.messages if "factor by factor" in line]
    assert len(lines) == len({*certificate.by_factor.values()})
    assert all(dict(model.named_modules())[layer] for layer in certificate.by_factor)
    assert all(re.search(reason, line) for line in lines)
    assert "factor by factor" in str(certificate)


SAYS_NOTHING = {
    "whole modules": lambda: adapted(tiny_llama(), lora("q_proj", modules_to_save=["lm_head"])),
    "rows of tokens": lambda: adapted(
        tiny_llama(), peft.TrainableTokensConfig(**CAUSAL, token_indices=[5, 6, 7], target_modules=["embed_tokens"])
    ),
    "norms": lambda: adapted(tiny_llama(), peft.LNTuningConfig(**CAUSAL, target_modules=["input_layernorm"])),
    "prefix": lambda: adapted(tiny_llama(), peft.PrefixTuningConfig(**CAUSAL, num_virtual_tokens=3)),
}


@pytest.mark.parametrize("kind", SAYS_NOTHING)
def test_weights_and_prefixes_are_what_the_model_uses_and_nothing_is_said(kind, caplog):
    model = SAYS_NOTHING[kind]()
    certificate = run(model, SPF(SAFETY, tokenizer=TOKENIZER), steep, steps=1)
    assert certificate.violations == 0
    assert certificate.records[0].blocks
    assert not certificate.by_factor
    assert "factor by factor" not in caplog.text + str(certificate)


def test_tokens_that_prompt_tuning_adds_are_refused():
    model = adapted(tiny_llama(), peft.PromptTuningConfig(**CAUSAL, num_virtual_tokens=3))
    with pytest.raises(CollectionError, match="prompt tuning"):
        run(model, SPF(SAFETY, tokenizer=TOKENIZER), steep)


def test_a_closed_subspace_stays_closed_for_new_adapters_and_others_are_refused():
    """UᵀBA = 0 can be kept from B = 0 only; ΔA would otherwise move what B cannot bring back."""
    spf = SPF(SAFETY, rule="null-space", rank=2, tokenizer=TOKENIZER)
    certificate = run(adapted(tiny_llama(), lora("q_proj", "embed_tokens"), spread=0.0), spf, steep, steps=3)
    assert certificate.violations == 0
    assert max(record.leak for record in certificate.records) < 1e-3
    for kind in ("Linear", "Conv1D, B zero", "PiSSA"):
        with pytest.raises(SPFError, match=r"whose B is zero, under rule 'null-space'.*merge it"):
            run(PRODUCTS[kind][0](), spf, steep)


def test_parameters_that_share_memory_are_refused():
    """PEFT ties the adapters of embedding and head as two parameters of one memory: an update moves it twice."""
    model = adapted(tiny_llama(tied=True), lora("embed_tokens", "lm_head", ensure_weight_tying=True))
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=0.01)
    with pytest.raises(SPFError, match=r"share memory.*ensure_weight_tying"):
        SPF(SAFETY, tokenizer=TOKENIZER).attach(model, optimizer)


@pytest.mark.parametrize(
    ("layer", "count"),
    [
        (nn.MultiheadAttention(8, 2), 2), (nn.Conv1d(4, 4, 3), 1), (nn.Conv2d(4, 4, 3), 1), (nn.Conv3d(4, 4, 3), 1),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_layers_that_no_language_model_here_has_are_protected_factor_by_factor(layer, count):
    """Of torch's attention, PEFT adapts two weights, and merges the adapters into them before each call."""
    model = peft.get_peft_model(nn.Sequential(layer), peft.LoraConfig(r=2, target_modules=["0"]))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    adapters = find_adapters(model, trained)
    assert not adapters.products
    assert len(adapters.by_factor) == count
