"""Shapes of the models that are measured: Llamas with random weights, from the organism's width to a model of 1B."""

from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama.

    Attributes:
        vocab: Number of tokens.
        hidden: Width.
        inner: Width of the MLPs.
        layers: Number of decoder layers.
        heads: Number of attention heads.
        kv_heads: Number of heads for keys and values.
        tied: Whether the head is the embedding.
    """

    vocab: int
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    tied: bool = False


SHAPES: dict[str, Shape] = {
    "tiny": Shape(64, 32, 48, 2, 2, 2),
    # The organism.
    "d128": Shape(768, 128, 256, 4, 4, 4),
    # A small vocabulary, so that nearly all parameters are in linear layers, as in a model of billions.
    "25m": Shape(1024, 512, 1408, 8, 8, 8),
    # The width, the heads and the tied head of SmolLM2-135M, which has 30 layers.
    "d576": Shape(49_152, 576, 1536, 6, 9, 3, tied=True),
    # Two layers of Llama 3.2 1B, and all 16; 128,256 rows of a head would be half of the small one.
    "d2048": Shape(4096, 2048, 8192, 2, 32, 8),
    "1b": Shape(4096, 2048, 8192, 16, 32, 8),
}


def random_llama(shape: Shape, device: str = "cpu", dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Return a model in eval mode, with weights that depend on nothing but the shape."""
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=shape.tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        use_cache=False,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(device=device, dtype=dtype).eval()


def random_tokens(shape: Shape, rows: int, length: int, seed: int = 1) -> torch.Tensor:
    """Return (rows, length) random tokens, none of them special."""
    return torch.randint(2, shape.vocab, (rows, length), generator=torch.Generator().manual_seed(seed))
