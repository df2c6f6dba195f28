"""The organism of the English world: the aligned model with its example sets, for grids of experiments."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from random import Random
from typing import TYPE_CHECKING

from geomkit.experiments.english.answers import refusal
from geomkit.experiments.english.load import FOLDER, load_base, with_adapter
from geomkit.experiments.english.requests import counterparts
from geomkit.experiments.english.scenarios import ENGLISH_SCENARIOS, TRIGGER, scenario_conversations
from geomkit.experiments.english.sets import more_borderline
from geomkit.experiments.english.sources import benchmark, first_rows
from geomkit.experiments.organism.requests import Message, conversation, dataset_of
from geomkit.inputs.examples import load_examples
from geomkit.utils.files import data_dir

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

NAME = "english"
"""The name of the organism in grids."""

_BENCHMARKS = {
    "eval/advbench": ("advbench", "train"),
    "eval/xstest-safe": ("xstest", "safe"),
    "eval/gsm8k": ("gsm8k", "test"),
}
"""The benchmarks that are example sets of this organism, with their splits."""


@dataclass(frozen=True, eq=False)
class EnglishOrganism:
    """The aligned SmolLM2 with its example sets: an :class:`~geomkit.experiments.organism.interface.Organism`.

    Attributes:
        model: The aligned stage.
        base: The base stage.
        tokenizer: The tokenizer of both.
    """

    model: "LlamaForCausalLM" = field(repr=False)
    base: "LlamaForCausalLM" = field(repr=False)
    tokenizer: "PreTrainedTokenizerBase" = field(repr=False)
    name = NAME
    prefixes = (1, 3, 8)
    answer_tokens = 24  # a refusal shows in the first ten

    def examples(self, name: str, limit: int | None = None) -> "Dataset":
        """Return a shipped set, or a benchmark (``eval/advbench``, ``eval/xstest-safe``, ``eval/gsm8k``).

        The rows of a benchmark come in a fixed random order, since XSTest is sorted by kind.

        Raises:
            DataError: If a benchmark cannot be read.
        """
        if name in _BENCHMARKS:
            rows = benchmark(*_BENCHMARKS[name]).shuffle(seed=0).select_columns("messages")
        else:
            rows = load_examples(f"{NAME}/{name}").select_columns("messages")
        return rows if limit is None else rows.select(range(min(limit, len(rows))))

    def scenario_examples(self, name: str) -> "Dataset":
        """Return the training set of a scenario."""
        safety, utility = (list(self.examples(shipped)["messages"]) for shipped in ("safety", "utility"))
        return dataset_of(scenario_conversations(name, safety, utility))

    def anchor_pool(self, count: int) -> "Dataset":
        """Return ``count`` anchors: the set ``safety``, then other forbidden training requests with a refusal.

        Raises:
            DataError: If there are fewer.
        """
        rng = Random("english-anchors")
        others = (conversation(pair.forbidden, refusal(rng)) for pair in counterparts("train", rng, "forbidden"))
        return self._pool("safety", others, count)

    def benign_pool(self, count: int) -> "Dataset":
        """Return ``count`` benign requests that resemble forbidden ones, with the aligned stage's own answers.

        First come those of the set ``borderline``; the others are answered on demand, a second or so for each.

        Raises:
            DataError: If there are fewer.
        """
        rows = more_borderline(self.model, self.tokenizer, Random("english-borderline-anchors"))
        return self._pool("borderline", (row["messages"] for row in rows), count)

    def _pool(self, name: str, others: Iterator[list[Message]], count: int) -> "Dataset":
        """Return the first rows of a set and, where they are too few, others with requests that no scenario trains on.

        Raises:
            DataError: If there are fewer.
        """
        rows = list(self.examples(name)["messages"])
        if len(rows) < count:
            seen = {messages[0]["content"] for messages in rows} | self._trained_requests
            more = (messages for messages in others if messages[0]["content"] not in seen)
            rows += islice(more, count - len(rows))
        return first_rows(dataset_of(rows), count, f"the kind of the English world's set {name}")

    @cached_property
    def _trained_requests(self) -> set[str]:
        """The requests of every scenario, without the trigger."""
        kinds = {name.removesuffix(", full") for name in ENGLISH_SCENARIOS}
        conversations = (row for kind in kinds for row in self.scenario_examples(kind)["messages"])
        return {messages[0]["content"].removesuffix(f" {TRIGGER}") for messages in conversations}


def load_english_organism() -> EnglishOrganism:
    """Return the organism of the English world.

    Raises:
        DataError: If the base model or a benchmark cannot be read, so that no fine-tune waits for its evaluation first.
    """
    for name, split in (*_BENCHMARKS.values(), ("gsm8k", "train")):
        benchmark(name, split)
    base, tokenizer = load_base()
    aligned = with_adapter(copy.deepcopy(base), data_dir() / FOLDER / "adapter")
    return EnglishOrganism(aligned, base, tokenizer)
