"""The interface of an organism: what the experiments need of a model and its world."""

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase


class Organism(Protocol):
    """Interface of an organism: an aligned model with its example sets."""

    @property
    def name(self) -> int | str:
        """The seed that a small organism was built from, or the name of another world."""
        ...

    @property
    def model(self) -> "LlamaForCausalLM":
        """The aligned stage; fine-tunes train a copy."""
        ...

    @property
    def base(self) -> "LlamaForCausalLM":
        """The base stage, which obeys forbidden requests, or most of them."""
        ...

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer of both stages."""
        ...

    @property
    def prefixes(self) -> tuple[int, ...]:
        """Numbers of tokens with which jailbreaks begin an obedient answer."""
        ...

    @property
    def answer_tokens(self) -> int:
        """Largest number of tokens of an answer."""
        ...

    def examples(self, name: str, limit: int | None = None) -> "Dataset":
        """Return an example set, optionally only its first ``limit`` rows."""
        ...

    def scenario_examples(self, name: str) -> "Dataset":
        """Return the training set of a scenario."""
        ...

    def anchor_pool(self, count: int) -> "Dataset":
        """Return ``count`` anchors: forbidden training requests with refusals; the set ``safety`` comes first."""
        ...

    def benign_pool(self, count: int) -> "Dataset":
        """Return ``count`` benign training requests with answers.

        First come those of the set ``utility`` of a small organism, ``borderline`` of the English one.
        """
        ...
