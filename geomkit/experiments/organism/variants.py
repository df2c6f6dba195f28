"""The organisms that cells are run on, with all their sets; those that do not ship are built once."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from geomkit.experiments.organism.build import build
from geomkit.experiments.organism.load import load_organism, without_bars
from geomkit.experiments.organism.recipe import Recipe
from geomkit.experiments.organism.scenarios import scenario_rows
from geomkit.experiments.organism.sets import evaluation_sets, training_sets
from geomkit.experiments.organism.world import World

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

SHIPPED = 0
"""Seed of the organism that ships."""


@dataclass(frozen=True, eq=False)
class Organism:
    """An organism with what is known of its world.

    Attributes:
        seed: The seed that it was built from.
        model: The aligned stage; never trained itself.
        base: The stage before alignment.
        tokenizer: Their tokenizer.
    """

    seed: int
    model: "LlamaForCausalLM" = field(repr=False)
    base: "LlamaForCausalLM" = field(repr=False)
    tokenizer: "PreTrainedTokenizerFast" = field(repr=False)

    @cached_property
    def world(self) -> World:
        """The world that it was trained on."""
        return World(self.seed)

    @cached_property
    def _sets(self) -> Mapping[str, list[dict[str, object]]]:
        return training_sets(self.world, self.seed) | evaluation_sets(self.world, self.seed)

    def examples(self, name: str, most: int | None = None) -> "Dataset":
        """Return a set by the name that it has where it ships, or its first rows."""
        from datasets import Dataset

        return Dataset.from_list([{"messages": row["messages"]} for row in self._sets[name][:most]])

    def scenario(self, name: str) -> "Dataset":
        """Return the training set of a scenario, also of one that does not ship."""
        from datasets import Dataset

        return Dataset.from_list([{"messages": rows} for rows in scenario_rows(name, self.world, self.seed)])


def folder_of(seed: int, folder: Path) -> Path:
    """Return where an organism lies that does not ship."""
    return folder / "organisms" / str(seed)


def build_organism(seed: int, folder: Path) -> None:
    """Build an organism that does not ship, if that has not been done; it appears whole or not at all."""
    target = folder_of(seed, folder)
    if seed != SHIPPED and not (target / "organism").exists():
        build(target, seed, progress=False, recipe=replace(Recipe(), damage_seeds=0))


def load(seed: int, folder: Path) -> Organism:
    """Load an organism with its sets; build it first if it neither ships nor lies in the folder."""
    if seed == SHIPPED:
        model, tokenizer = load_organism()
        return Organism(seed, model, load_organism("base")[0], tokenizer)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    build_organism(seed, folder)
    stages = folder_of(seed, folder) / "organism"
    with without_bars():
        aligned, base = (
            AutoModelForCausalLM.from_pretrained(stages / stage, local_files_only=True).eval()
            for stage in ("aligned", "base")
        )
    return Organism(seed, aligned, base, AutoTokenizer.from_pretrained(stages / "aligned", local_files_only=True))
