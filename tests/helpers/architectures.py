"""The families of models that collection is checked on: one tiny random model of each, in one table.

Weights, norms and biases are all drawn at random: with the ones and zeros that a configuration starts from, a wrong
gradient of a norm or a bias could pass for a right one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor

from geomkit.collection.collect import collect_from_tokens
from geomkit.gradients.gradient_set import GradientSet
from geomkit.gradients.layer_gradient import LayerGradient
from geomkit.inputs.batches import collate
from geomkit.inputs.tokens import Tokens, encode
from tests.helpers.tiny import SAFETY, SPECIAL, UTILITY, WORDS, tiny_tokenizer

ROWS = [*encode(tiny_tokenizer(), SAFETY), *encode(tiny_tokenizer(), UTILITY)][:5]
"""Five examples of 9 to 14 tokens."""

_SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
_GROUPED = _SHAPE | {"num_key_value_heads": 1}
_FALCON = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
_OPT = {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
_EXPERTS = {"num_experts_per_tok": 2}


@dataclass(frozen=True)
class Architecture:
    """A family of models, and what makes it tiny.

    Attributes:
        stem: What the names of its classes in transformers begin with.
        settings: Of its configuration.
        model: The class of the model, where it is not the stem's ``ForCausalLM``.
    """

    stem: str
    settings: dict[str, Any] = field(default_factory=dict)
    model: str = ""

    def build(self, *, tied: bool, seed: int = 0, **changes: Any) -> transformers.PreTrainedModel:
        settings = {
            "vocab_size": len(SPECIAL + WORDS),
            "max_position_embeddings": 64,
            "tie_word_embeddings": tied,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 1,
        }
        config = getattr(transformers, f"{self.stem}Config")(**(settings | self.settings | changes))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = getattr(transformers, self.model or f"{self.stem}ForCausalLM")(config)
            randomise(model)
        return model.eval()


def randomise(model: torch.nn.Module) -> None:
    """Draw every parameter: matrices around zero, vectors around what they are."""
    with torch.no_grad():
        for parameter in model.parameters():
            noise = 0.2 * torch.randn_like(parameter)
            parameter.copy_(noise if parameter.ndim > 1 else parameter + noise)


ARCHITECTURES = {
    "llama": Architecture("Llama", _GROUPED),
    "llama with biases": Architecture("Llama", _SHAPE | {"attention_bias": True, "mlp_bias": True}),
    "mistral": Architecture("Mistral", _GROUPED | {"head_dim": 8, "sliding_window": 4}),
    "qwen2": Architecture("Qwen2", _GROUPED),
    "qwen3": Architecture("Qwen3", _GROUPED | {"head_dim": 12}),
    "gemma 2": Architecture("Gemma2", _GROUPED | {"head_dim": 12, "query_pre_attn_scalar": 12, "sliding_window": 4}),
    "gemma 3": Architecture(
        "Gemma3Text",
        _GROUPED
        | {
            "head_dim": 12,
            "query_pre_attn_scalar": 12,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        model="Gemma3ForCausalLM",
    ),
    "phi-3": Architecture("Phi3", _GROUPED),
    "olmo 2": Architecture("Olmo2", _GROUPED),
    "gpt-2": Architecture("GPT2", {"n_embd": 16, "n_layer": 2, "n_head": 2}, model="GPT2LMHeadModel"),
    "gpt-neox": Architecture("GPTNeoX", _SHAPE),
    "gpt-neox, one after the other": Architecture("GPTNeoX", _SHAPE | {"use_parallel_residual": False}),
    "opt": Architecture("OPT", _OPT),
    "opt with projections": Architecture("OPT", _OPT | {"word_embed_proj_dim": 12, "do_layer_norm_before": False}),
    "falcon": Architecture("Falcon", _FALCON),
    "falcon, new decoder": Architecture("Falcon", _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 1}),
    "falcon with alibi and biases": Architecture(
        "Falcon", _FALCON | {"alibi": True, "bias": True, "multi_query": False, "parallel_attn": False}
    ),
    "mixtral": Architecture("Mixtral", _GROUPED | _EXPERTS | {"num_local_experts": 4}),
    "qwen3-moe": Architecture(
        "Qwen3Moe",
        _GROUPED | _EXPERTS | {"head_dim": 12, "num_experts": 4, "moe_intermediate_size": 16, "norm_topk_prob": True},
    ),
    "qwen3-moe, one dense layer": Architecture(
        "Qwen3Moe",
        _GROUPED | _EXPERTS | {"head_dim": 12, "num_experts": 4, "moe_intermediate_size": 16, "mlp_only_layers": [0]},
    ),
}


@cache
def built(name: str, *, tied: bool) -> transformers.PreTrainedModel:
    """One model of the table, built once; no test may change it."""
    return ARCHITECTURES[name].build(tied=tied)


# ---------------------------------------------------------------------------------------------- the reference

NEGLIGIBLE = 1e-2
"""A parameter's error is taken relative to its own gradient, or to this share of the whole gradient if that is larger:
what is zero on paper, such as the bias of OPT's keys, which softmax does not feel, is rounding noise in every form."""


def backward(model: torch.nn.Module, rows: Sequence[Tokens] = ROWS) -> list[dict[str, Tensor]]:
    """One plain backward pass per example through the model's own loss, without padding; zeros where it has no part."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    gradients = []
    for row in rows:
        model.zero_grad(set_to_none=True)
        batch = collate([row], 0)
        model(input_ids=batch.input_ids, labels=batch.labels, use_cache=False).loss.backward()
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        gradients.append({n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in trainable.items()})
    model.zero_grad(set_to_none=True)
    for module, training in modes:
        module.training = training
    return gradients


@cache
def reference(name: str, *, tied: bool) -> list[dict[str, Tensor]]:
    """Of a model of the table."""
    return backward(built(name, tied=tied))


def mean(gradients: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([each[name] for each in gradients]).double().mean(0) for name in gradients[0]}


def errors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """The relative error of each parameter, in the Frobenius norm."""
    whole = math.sqrt(sum(float(gradient.double().norm()) ** 2 for gradient in expected.values()))
    return {
        name: float((found[name].double() - expected[name]).norm())
        / max(float(expected[name].double().norm()), NEGLIGIBLE * whole)
        for name in found
    }


def dense(gradients: Mapping[str, LayerGradient]) -> dict[str, Tensor]:
    return {name: gradient.dense() for name, gradient in gradients.items()}


def collected(
    model: torch.nn.Module,
    rows: Sequence[Tokens] = ROWS,
    *,
    together: int = 3,
    per_sample: bool = True,
    **settings: Any,
) -> GradientSet:
    """Collect ``together`` examples at a time, or a few more where they are short."""
    budget = together * max(map(len, rows))
    return collect_from_tokens(
        model, rows, 0, per_sample=per_sample, tokens_per_batch=budget, progress=False, **settings
    )


def worst_error(found: GradientSet, reference: Sequence[dict[str, Tensor]]) -> float:
    """The largest relative error of any parameter, in the sum and in every sample.

    Every trainable parameter must have been collected, or be named with the reason why it was not.
    """
    sets = [(found, mean(reference)), *zip(found.samples, reference, strict=True)]
    worst = 0.0
    for gradients, expected in sets:
        missing = gradients.coverage.missing
        assert [name for name in expected if name not in missing] == list(gradients)
        assert set(missing) == set(gradients.coverage.reasons) <= set(expected)
        assert list(gradients) == list(found)
        worst = max([worst, *errors(dense(gradients), expected).values()])
    return worst
