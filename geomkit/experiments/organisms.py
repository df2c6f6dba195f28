"""Organisms by name: the small organism of any seed, and the English world."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from geomkit.errors import DataError
from geomkit.experiments.english.load import load_english
from geomkit.experiments.english.organism import NAME, load_english_organism
from geomkit.experiments.english.outcomes import evaluate_english
from geomkit.experiments.english.scenarios import ENGLISH_SCENARIOS
from geomkit.experiments.organism.interface import Organism
from geomkit.experiments.organism.load import load_stage
from geomkit.experiments.organism.scenarios import SCENARIOS, VARIANTS, Scenario
from geomkit.experiments.organism.variants import load_variant
from geomkit.experiments.outcomes import Outcomes, evaluate_outcome

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

ENGLISH = NAME
"""The name of the English world in grids."""

_SMALL_SCENARIOS: Mapping[str, Scenario] = {**SCENARIOS, **VARIANTS}

ORGANISM_NAMES = ("aligned", "base", "english/aligned", "english/base")
"""The names that :func:`load_organism` takes besides ``"english"``, which is the aligned stage."""


def load_organism(
    name: str = "aligned", *, source: str | Path | None = None
) -> "tuple[LlamaForCausalLM, PreTrainedTokenizerBase]":
    """Return a stage of a model organism, in evaluation mode, and its tokenizer.

    The small organism ships with geomkit. Of the English world, an aligned SmolLM2-135M-Instruct, only the adapter
    ships; its base model comes from the hub, or from the folder that the environment variable ``GEOMKIT_ENGLISH``
    names.

    Args:
        name: ``"aligned"`` or ``"base"``, before it was trained to refuse; ``"english"`` (or ``"english/aligned"``) or
            ``"english/base"``.
        source: Base model of the English world: a folder, a GGUF file or an id on the hub.

    Returns:
        The model, in fp32 on the CPU, and its tokenizer.

    Raises:
        DataError: If there is no such stage, its files are missing or cannot be loaded, or ``peft`` is missing, which
            the English world needs.

    Example:
        >>> model, tokenizer = load_organism()
        >>> model.config.hidden_size, tokenizer.eos_token
        (128, '<|end|>')
    """
    name = f"{ENGLISH}/aligned" if name == ENGLISH else name
    if name not in ORGANISM_NAMES:
        raise DataError(
            f"expected a stage of an organism, {', '.join(map(repr, ORGANISM_NAMES))} or 'english', found {name!r}"
        )
    world, _, stage = name.rpartition("/")
    if world == ENGLISH:
        return load_english(stage, source)
    if source is not None:
        raise DataError(f"expected source= for the English world only, found it for {name!r}; leave it out")
    return load_stage(stage)


def scenarios_of(organism: int | str) -> Mapping[str, Scenario]:
    """Return the scenarios of an organism by name.

    Args:
        organism: The seed of a small organism, or ``"english"``.
    """
    return ENGLISH_SCENARIOS if organism == ENGLISH else _SMALL_SCENARIOS


def organism_of(name: int | str, folder: Path) -> Organism:
    """Return an organism; a small organism that does not ship is built first if it was not built before.

    Args:
        name: The seed of a small organism, or ``"english"``.
        folder: The folder of the experiment, where small organisms that do not ship are kept.
    """
    return load_english_organism() if isinstance(name, str) else load_variant(name, folder)


def evaluate_organism(model: "PreTrainedModel", organism: Organism, scenario: Scenario, prompts: int) -> Outcomes:
    """Evaluate a fine-tuned model on the held-out sets of its organism.

    Args:
        model: The fine-tuned model; its state is restored.
        organism: The organism before the fine-tune.
        scenario: The scenario of the fine-tune.
        prompts: Largest number of prompts taken from each set.
    """
    evaluate = evaluate_english if organism.name == ENGLISH else evaluate_outcome
    return evaluate(model, organism, scenario, prompts)
