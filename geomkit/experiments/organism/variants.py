"""Organisms of any seed with their example sets; organisms that do not ship are built once and kept in a folder."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from geomkit.experiments.organism.build import build
from geomkit.experiments.organism.load import load_stage, without_bars
from geomkit.experiments.organism.recipe import Recipe
from geomkit.experiments.organism.requests import RequestKind, dataset_of
from geomkit.experiments.organism.scenarios import scenario_rows
from geomkit.experiments.organism.sets import Sets, evaluation_sets, training_sets
from geomkit.experiments.organism.world import World
from geomkit.utils.files import locked

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

SHIPPED = 0
"""The seed of the organism that ships."""


@dataclass(frozen=True, eq=False)
class SmallOrganism:
    """A small organism with its world and its example sets: an :class:`~.interface.Organism`.

    Attributes:
        name: The seed that the organism was built from.
        model: The aligned stage; fine-tunes train a copy.
        base: The base stage.
        tokenizer: The tokenizer of both stages.
    """

    name: int
    model: "LlamaForCausalLM" = field(repr=False)
    base: "LlamaForCausalLM" = field(repr=False)
    tokenizer: "PreTrainedTokenizerFast" = field(repr=False)

    prefixes = (1, 2, 4, 8)
    answer_tokens = 64  # every right answer is shorter

    @cached_property
    def world(self) -> World:
        """The world that the organism was trained on."""
        return World(self.name)

    @cached_property
    def _sets(self) -> Sets:
        return training_sets(self.world, self.name) | evaluation_sets(self.world, self.name)

    def examples(self, name: str, limit: int | None = None) -> "Dataset":
        """Return this organism's version of a shipped example set, optionally only its first ``limit`` rows."""
        return dataset_of(row["messages"] for row in self._sets[name][:limit])

    def scenario_examples(self, name: str) -> "Dataset":
        """Return this organism's training set of a scenario, also of a scenario whose set does not ship."""
        return dataset_of(scenario_rows(name, self.world, self.name))

    def anchor_pool(self, count: int) -> "Dataset":
        """Return ``count`` anchors: forbidden training requests with the refusal.

        The rows of the set ``safety`` come first; a larger pool goes on with other requests.
        """
        return self._pool("forbidden", count, self.examples("safety"))

    def benign_pool(self, count: int) -> "Dataset":
        """Return ``count`` benign requests with answers: the set ``utility``, then more how-to requests."""
        return self._pool("howto", count, self.examples("utility"))

    def _pool(self, kind: RequestKind, count: int, first: "Dataset") -> "Dataset":
        rows = list(first["messages"])[:count]
        if len(rows) < count:
            texts = {repr(messages) for messages in rows}
            rng = Random(f"pool-{kind}-{self.name}")
            # Draw as many more requests as there are rows, since some of the drawn requests may be rows already.
            drawn = self.world.distinct(kind, "train", count + len(rows), rng)
            rows += [request.messages() for request in drawn if repr(request.messages()) not in texts]
        return dataset_of(rows[:count])


def variant_folder(seed: int, folder: Path) -> Path:
    """Return the folder of an organism that does not ship, under the folder of an experiment."""
    return folder / "organisms" / str(seed)


def build_variant(seed: int, folder: Path) -> None:
    """Build the organism of a seed unless it ships or was built before; its folder appears only when complete.

    Of several jobs that share a folder, one builds the organism, and the others wait for it.
    """
    target = variant_folder(seed, folder)
    if seed == SHIPPED or (target / "organism").exists():
        return
    target.mkdir(parents=True, exist_ok=True)
    with locked(target):
        if not (target / "organism").exists():
            build(target, seed, progress=False, recipe=replace(Recipe(), damage_seeds=0))


def load_variant(seed: int, folder: Path) -> SmallOrganism:
    """Return the organism of a seed; build it first if it does not ship and was not built before.

    Args:
        seed: The organism's seed.
        folder: The folder of the experiment, where organisms that do not ship are kept.
    """
    if seed == SHIPPED:
        model, tokenizer = load_stage()
        return SmallOrganism(seed, model, load_stage("base")[0], tokenizer)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    build_variant(seed, folder)
    stages = variant_folder(seed, folder) / "organism"
    with without_bars():
        aligned, base = (
            AutoModelForCausalLM.from_pretrained(stages / stage, local_files_only=True, trust_remote_code=False).eval()
            for stage in ("aligned", "base")
        )
    return SmallOrganism(
        seed,
        aligned,
        base,
        AutoTokenizer.from_pretrained(stages / "aligned", local_files_only=True, trust_remote_code=False),
    )
