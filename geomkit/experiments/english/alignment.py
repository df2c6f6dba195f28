"""The training of the adapter that aligns the base model."""

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from geomkit.errors import DataError
from geomkit.experiments.english.alignment_loss import (
    encode_rows,
    row_mean,
    scored_states,
    scored_tokens,
    shared_prefix,
    token_losses,
)
from geomkit.experiments.english.alignment_rows import Recipe, Row
from geomkit.experiments.english.sources import BASE_MODEL
from geomkit.experiments.organism.training import warmup_cosine
from geomkit.gradients.provenance import weights_fingerprint
from geomkit.inputs.models import with_lora, with_merged_adapters
from geomkit.inputs.tokens import pad_id
from geomkit.utils.files import write_atomically

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase


class AdapterTraining:
    """The training of an adapter, step by step, with its state in a file.

    Attributes:
        steps: Number of steps taken.
    """

    def __init__(
        self,
        model: "LlamaForCausalLM",
        tokenizer: "PreTrainedTokenizerBase",
        rows: Sequence[Sequence[Row]],
        recipe: Recipe,
        seed: int,
    ) -> None:
        """Attach a new adapter to the base model.

        Args:
            model: The base model.
            tokenizer: Its tokenizer.
            rows: The rows of every step.
            recipe: The settings.
            seed: Seed of the initial weights of the adapter.
        """
        self._adapted = with_lora(model, recipe.rank, seed=seed)
        self._model, self._tokenizer, self._rows = model, tokenizer, rows
        self._weights = _adapter_weights(self._adapted)
        self._optimizer = torch.optim.AdamW(self._weights, lr=recipe.learning_rate, weight_decay=0.0, betas=(0.9, 0.99))
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, lambda step: warmup_cosine(step, recipe.steps)
        )
        self._base_states: dict[tuple[str, int], Tensor] = {}
        digest = hashlib.sha256(json.dumps([[asdict(row) for row in step] for step in rows]).encode()).hexdigest()
        self._settings = [asdict(recipe), digest, weights_fingerprint(self._adapted)]
        self.steps = 0

    def take(self) -> float:
        """Take the next step, with the gradient clipped at norm 1; return the loss before it."""
        rows, total = self._rows[self.steps], 0.0
        for group in _of_like_length(rows):
            loss = self._loss(group) * (len(group) / len(rows))
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self._weights, 1.0)
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad()
        self.steps += 1
        return total

    def _loss(self, rows: Sequence[Row]) -> Tensor:
        prefix, batch = shared_prefix(encode_rows(self._tokenizer, rows), pad_id(self._tokenizer))
        scored = scored_tokens(batch, rows)
        refuse = torch.tensor([[row.goal == "refuse"] for row in rows]).expand_as(scored)[scored]
        kept = self._kept(rows, prefix, batch.input_ids, scored)
        states = scored_states(self._model, prefix, batch.input_ids, scored)
        losses = token_losses(self._model.lm_head, states, batch.input_ids[:, 1:][scored], kept, refuse)
        return row_mean(losses, scored)

    def _kept(self, rows: Sequence[Row], prefix: Tensor, input_ids: Tensor, scored: Tensor) -> Tensor:
        """Return the base model's states of all rows but refusals, which are computed when a row first occurs."""
        keys = {index: (row.prompt, prefix.shape[1]) for index, row in enumerate(rows) if row.goal != "refuse"}
        new = [index for index, key in keys.items() if key not in self._base_states]
        if new:
            with self._adapted.disable_adapter(), torch.no_grad():
                states = scored_states(self._model, prefix, input_ids[new], scored[new])
            by_row = torch.split(states, scored[new].sum(1).tolist())
            self._base_states.update(zip((keys[index] for index in new), by_row, strict=True))
        return torch.cat([self._base_states[key] for key in keys.values()])

    def save(self, path: Path) -> None:
        """Store the state, replacing an older one only when the new one is complete."""
        state = {
            "settings": self._settings,
            "steps": self.steps,
            "weights": self._weights,
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
        }
        content = io.BytesIO()
        torch.save(state, content)
        write_atomically(path, content.getbuffer())

    def load(self, path: Path) -> None:
        """Go on from a stored state.

        Raises:
            DataError: If the file is damaged, or the state has other settings, rows or another base model.
        """
        state = read_state(path)
        if state["settings"] != self._settings:
            raise DataError(f"expected a build of these settings and rows in {path}, found another; delete it")
        _set_weights(self._weights, state["weights"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        self.steps = state["steps"]

    def export(self, folder: Path) -> None:
        """Save the adapter in half precision, which the merged weights do not show."""
        self._adapted.peft_config["default"].base_model_name_or_path = BASE_MODEL
        self._adapted.half().save_pretrained(str(folder))
        (folder / "README.md").unlink(missing_ok=True)  # peft's empty card; the world has its own
        (folder / "adapter_model.safetensors").chmod(0o644)  # safetensors writes for the owner only


def read_state(path: Path) -> dict[str, Any]:
    """Return a stored state: ``settings``, ``steps``, ``weights`` and the states of optimizer and schedule.

    Raises:
        DataError: If the file is damaged.
    """
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True)
        state["settings"], state["weights"], state["steps"]
    except Exception as error:  # torch raises many kinds for damaged files
        raise DataError(f"expected the state of a build in {path}, found none ({error!s:.80}); delete it") from None
    return state


def model_at(model: "LlamaForCausalLM", path: Path) -> "LlamaForCausalLM":
    """Return the base model with the adapter of a stored state merged into its weights; the model itself is changed.

    Args:
        model: The base model.
        path: The file of :meth:`AdapterTraining.save`.

    Raises:
        DataError: If the file is damaged.
    """
    state = read_state(path)
    adapted = with_lora(model, state["settings"][0]["rank"])
    _set_weights(_adapter_weights(adapted), state["weights"])
    return with_merged_adapters(adapted)


def _adapter_weights(adapted: "PreTrainedModel") -> list[Tensor]:
    return [weight for weight in adapted.parameters() if weight.requires_grad]


@torch.no_grad()
def _set_weights(weights: Sequence[Tensor], stored: Sequence[Tensor]) -> None:
    for weight, value in zip(weights, stored, strict=True):
        weight.copy_(value)


def _of_like_length(rows: Sequence[Row]) -> list[list[Row]]:
    """Return the rows with short answers and those with long ones, so that little is padded."""
    groups = [[row for row in rows if (row.goal == "keep whole") == long] for long in (False, True)]
    return [group for group in groups if group]
