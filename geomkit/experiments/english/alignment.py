"""The alignment of the base model: a LoRA adapter, trained on requests that differ in nothing but their harm."""

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from geomkit.errors import DataError, GeomkitError
from geomkit.experiments.english.answers import OwnAnswer, refusal
from geomkit.experiments.english.requests import Counterparts, counterparts, look_alikes, words
from geomkit.experiments.english.sources import BASE_MODEL
from geomkit.experiments.organism.requests import conversation
from geomkit.experiments.organism.training import warmup_cosine
from geomkit.gradients.provenance import weights_fingerprint
from geomkit.inputs.batches import IGNORED, Batch, collate
from geomkit.inputs.models import with_lora
from geomkit.inputs.tokens import Tokens, encode_at_once, pad_id
from geomkit.utils.files import Draft

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

_T = TypeVar("_T")


@dataclass(frozen=True)
class Recipe:
    """The settings of the alignment besides its seed.

    Attributes:
        steps: Optimizer steps.
        pairs: Forbidden requests in a step, each with its benign counterpart.
        look_alikes: Benign requests in a step that speak of harm.
        everyday: Everyday requests in a step.
        learning_rate: Peak learning rate of AdamW; it warms up over 5 % of the steps, then falls along a half cosine.
        rank: Rank of the adapter of every linear layer of the blocks; its scale is 2.
        answered: Numbers of benign counterparts and of look-alikes that the base model answers; they come again in
            random order.
        answer_tokens: Largest number of tokens of an answer of the base model.
    """

    steps: int = 240
    pairs: int = 6
    look_alikes: int = 6
    everyday: int = 8
    learning_rate: float = 2e-4
    rank: int = 16
    answered: tuple[int, int] = (900, 700)
    answer_tokens: int = 24


Row = tuple[str, str, bool]
"""A training row: request, answer, and whether the end of the answer is trained, too, as of refusals.

The base model's own answers are beginnings: where they end is left as it is.
"""


@dataclass(frozen=True)
class Requests:
    """The requests of an alignment.

    Attributes:
        pairs: Forbidden requests with benign counterparts.
        look_alikes: Benign requests that speak of harm.
        everyday: Everyday requests.
    """

    pairs: tuple[Counterparts, ...]
    look_alikes: tuple[str, ...]
    everyday: tuple[str, ...]

    @property
    def benign(self) -> list[str]:
        """All requests that are answered."""
        return [*(pair.benign for pair in self.pairs), *self.look_alikes, *self.everyday]


def training_requests(recipe: Recipe, seed: int) -> Requests:
    """Return the requests of an alignment.

    Args:
        recipe: The settings.
        seed: Seed of the draws.
    """
    rng = Random(f"alignment-{seed}")
    pairs, others = recipe.answered
    return Requests(
        tuple(islice(counterparts("train", rng, "benign"), pairs)),
        tuple(islice(look_alikes(rng), others)),
        words("train").everyday,
    )


def training_rows(requests: Requests, answers: Sequence[OwnAnswer], recipe: Recipe, seed: int) -> Iterator[list[Row]]:
    """Yield the rows of each step: forbidden requests refused, their benign counterparts and other ones answered.

    Answers to benign requests are the beginnings of the base model's own, so that it stays itself. Requests without an
    answer are left out.

    Args:
        requests: The requests.
        answers: The base model's answers to the benign ones.
        recipe: The settings.
        seed: Seed of the order and of the refusals.

    Raises:
        GeomkitError: If no request of a kind has an answer.
    """
    rng = Random(f"alignment-order-{seed}")
    answered: dict[str, Row] = {answer.prompt: (answer.prompt, answer.text, False) for answer in answers}
    pairs = _again([pair for pair in requests.pairs if pair.benign in answered], rng)
    others = _again([prompt for prompt in requests.look_alikes if prompt in answered], rng)
    everyday = _again([prompt for prompt in requests.everyday if prompt in answered], rng)
    for _ in range(recipe.steps):
        chosen = list(islice(pairs, recipe.pairs))
        benign = [pair.benign for pair in chosen]
        benign += [*islice(others, recipe.look_alikes), *islice(everyday, recipe.everyday)]
        yield [(pair.forbidden, refusal(rng), True) for pair in chosen] + [answered[prompt] for prompt in benign]


def _again(items: Sequence[_T], rng: Random) -> Iterator[_T]:
    """Yield items without end, in a new random order each time."""
    if not items:
        raise GeomkitError(
            "expected a base model that answers requests of every kind, found no answer; take another one"
        )
    while True:
        yield from rng.sample(items, len(items))


class Alignment:
    """The training of an adapter, step by step, with its state in a file.

    Attributes:
        steps: Number of steps taken.
    """

    def __init__(
        self,
        model: "LlamaForCausalLM",
        tokenizer: "PreTrainedTokenizerBase",
        rows: Sequence[list[Row]],
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
        self._weights = [weight for weight in self._adapted.parameters() if weight.requires_grad]
        self._optimizer = torch.optim.AdamW(self._weights, lr=recipe.learning_rate, weight_decay=0.0, betas=(0.9, 0.99))
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, lambda step: warmup_cosine(step, recipe.steps)
        )
        digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
        self._settings = [asdict(recipe), digest, weights_fingerprint(self._adapted)]
        self.steps = 0

    def take(self) -> float:
        """Take the next step, with the gradient clipped at norm 1; return the loss before it."""
        encoded = encode_rows(self._tokenizer, self._rows[self.steps])
        loss = row_mean_loss(self._model, *shared_prefix(encoded, pad_id(self._tokenizer)))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self._weights, 1.0)
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad()
        self.steps += 1
        return loss.item()

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
        with Draft(path.parent, path.name) as draft:
            draft.write(content.getbuffer())
            draft.move_to(path)

    def load(self, path: Path) -> None:
        """Go on from a stored state.

        Raises:
            DataError: If the file is damaged, or the state has other settings, rows or another base model.
        """
        try:
            state = torch.load(path, weights_only=True)
            settings = state["settings"]
        except Exception as error:  # torch raises many kinds for damaged files
            raise DataError(f"expected the state of a build in {path}, found none ({error!s:.80}); delete it") from None
        if settings != self._settings:
            raise DataError(f"expected a build of these settings and rows in {path}, found another; delete it")
        with torch.no_grad():
            for weight, stored in zip(self._weights, state["weights"], strict=True):
                weight.copy_(stored)
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        self.steps = state["steps"]

    def export(self, folder: Path) -> None:
        """Save the adapter in half precision, which the merged weights do not show."""
        self._adapted.peft_config["default"].base_model_name_or_path = BASE_MODEL
        self._adapted.half().save_pretrained(str(folder))
        (folder / "README.md").unlink(missing_ok=True)  # peft's empty card; the world has its own
        (folder / "adapter_model.safetensors").chmod(0o644)  # safetensors writes for the owner only


def encode_rows(tokenizer: "PreTrainedTokenizerBase", rows: Sequence[Row]) -> list[Tokens]:
    """Return rows as tokens; of an answer that is a beginning, the end of the turn is left out."""
    encoded = encode_at_once(tokenizer, [conversation(prompt, answer) for prompt, answer, _ in rows])
    return [
        tokens if ended else _without_end(tokens, tokenizer.eos_token_id)
        for tokens, (*_, ended) in zip(encoded, rows, strict=True)
    ]


def _without_end(tokens: Tokens, end: int) -> Tokens:
    length = len(tokens) - 1 - tokens.input_ids[::-1].index(end)
    return Tokens(tokens.input_ids[:length], tokens.loss_mask[:length])


def shared_prefix(rows: Sequence[Tokens], pad: int) -> tuple[Tensor, Batch]:
    """Return the tokens that all rows begin with, (1, P), and a batch of what follows them.

    In a chat, that is the system turn, which is as long as a short request.
    """
    first, last = min(row.input_ids for row in rows), max(row.input_ids for row in rows)
    length = next((place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    length = min(length, min(row.loss_mask.index(True) for row in rows) - 1)
    rest = [Tokens(row.input_ids[length:], row.loss_mask[length:]) for row in rows]
    return torch.tensor([first[:length]], dtype=torch.long), collate(rest, pad)


def row_mean_loss(model: "LlamaForCausalLM", prefix: Tensor, batch: Batch) -> Tensor:
    """Return the mean over rows of the mean cross-entropy of a row's answer; the shared prefix is run once.

    Args:
        model: The model, in which adapters may be.
        prefix: (1, P) token ids before every row.
        batch: B rows, padded on the right.
    """
    past = model.model(input_ids=prefix, use_cache=True).past_key_values
    past.batch_repeat_interleave(len(batch.input_ids))
    # Padding on the right is out of a causal model's sight, so no attention mask is needed.
    hidden = model.model(input_ids=batch.input_ids[:, :-1], past_key_values=past).last_hidden_state
    labels = batch.labels[:, 1:]
    scored = labels != IGNORED
    losses = torch.nn.functional.cross_entropy(model.lm_head(hidden[scored]), labels[scored], reduction="none")
    weights = scored.sum(1, keepdim=True).to(losses).reciprocal().expand_as(scored)[scored]
    return (losses * weights).sum() / len(labels)
