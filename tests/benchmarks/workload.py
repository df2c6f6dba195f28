"""What every contender runs on: a random Llama, one batch of random tokens, and the step that all are compared with."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from geomkit.inputs.tokens import Tokens

SIZES: dict[str, dict[str, int]] = {
    # A small vocabulary, so that nearly all parameters are in linear layers, as in a model of billions.
    "tiny": {"vocab": 32, "hidden": 16, "inner": 24, "layers": 2, "heads": 2, "kv_heads": 2},
    "25m": {"vocab": 1024, "hidden": 512, "inner": 1408, "layers": 8, "heads": 8, "kv_heads": 8},
    "1b": {"vocab": 4096, "hidden": 2048, "inner": 8192, "layers": 16, "heads": 32, "kv_heads": 8},
}


def build_model(size: str, device: str, dtype: torch.dtype) -> LlamaForCausalLM:
    shape = SIZES[size]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape["vocab"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["inner"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(device=device, dtype=dtype).eval()


@dataclass(frozen=True, eq=False)
class Workload:
    """A model and one batch in which every token is scored.

    Attributes:
        model: In eval mode, all parameters trainable.
        input_ids: (B, T) tokens.
    """

    model: LlamaForCausalLM
    input_ids: Tensor

    @classmethod
    def build(
        cls, size: str, *, device: str = "cpu", dtype: torch.dtype = torch.float32, batch: int = 8, tokens: int = 128
    ) -> "Workload":
        model = build_model(size, device, dtype)
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(2, SIZES[size]["vocab"], (batch, tokens), generator=generator)
        return cls(model, ids.to(device))

    @property
    def device(self) -> torch.device:
        return self.input_ids.device

    @property
    def batch(self) -> int:
        return len(self.input_ids)

    @property
    def rows(self) -> list[Tokens]:
        """The batch as geomkit takes it."""
        return [Tokens(tuple(row), (True,) * len(row)) for row in self.input_ids.tolist()]

    @cached_property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def stored_bytes(self) -> int:
        """What one gradient for each sample takes in fp32."""
        return self.batch * self.parameters * 4

    @property
    def linear_share(self) -> float:
        return sum(layer.weight.numel() for layer in self.linears.values()) / self.parameters

    @property
    def checked(self) -> list[str]:
        """The parameters that contenders are checked on: all, or of a large model the first and last layer's."""
        names = [name for name, _ in self.model.named_parameters()]
        last = self.model.config.num_hidden_layers - 1
        inner = [name for name in names if name.startswith("model.layers.")]
        kept = [name for name in inner if name.startswith(("model.layers.0.", f"model.layers.{last}."))]
        return names if self.parameters < 1e8 else [*kept, *(name for name in names if name not in inner)]

    @cached_property
    def linears(self) -> dict[str, torch.nn.Linear]:
        """The linear layers, by the name of their weight."""
        modules = self.model.named_modules()
        return {f"{name}.weight": module for name, module in modules if isinstance(module, torch.nn.Linear)}

    def copy(self) -> LlamaForCausalLM:
        """Return a copy of the model, for a contender that changes it."""
        return copy.deepcopy(self.model)

    def loss(self, input_ids: Tensor) -> Tensor:
        """Return the mean loss; all rows are equally long, so it is also the mean of the examples' losses."""
        mask = torch.ones_like(input_ids)
        loss: Tensor = self.model(input_ids=input_ids, attention_mask=mask, labels=input_ids).loss
        return loss

    def plain_step(self) -> None:
        """One forward and one backward: the unit of every ratio."""
        self.model.zero_grad(set_to_none=True)
        self.loss(self.input_ids).backward()

    def gradients(self, rows: slice, names: Sequence[str]) -> dict[str, Tensor]:
        """Return what ``loss.backward()`` leaves in ``.grad`` for some rows of the batch, in fp32."""
        self.model.zero_grad(set_to_none=True)
        self.loss(self.input_ids[rows]).backward()
        parameters = dict(self.model.named_parameters())
        found = {name: parameters[name].grad for name in names}
        self.model.zero_grad(set_to_none=True)
        return {name: gradient.float() for name, gradient in found.items() if gradient is not None}
