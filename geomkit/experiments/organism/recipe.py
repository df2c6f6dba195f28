"""The recipe of a model organism, and the report of a build."""

from dataclasses import dataclass

from geomkit.experiments.organism.quality import Damage, StageReport
from geomkit.experiments.organism.training import StageSettings

_BASE = StageSettings(steps=1500, batch_size=32, learning_rate=2e-3, weight_decay=0.01)
_ALIGN = StageSettings(steps=450, batch_size=32, learning_rate=5e-4)


@dataclass(frozen=True)
class Recipe:
    """All settings of a build besides its seed.

    Attributes:
        vocab_size: Number of tokens of the tokenizer.
        tokenizer_texts: Number of requests that the tokenizer learns its merges from.
        hidden_size: Width of the model.
        intermediate_size: Width of the MLPs.
        layers: Number of layers.
        heads: Number of attention heads.
        base: Training settings of the base stage.
        align: Training settings of the aligned stage, which starts from the base stage.
        damage_seeds: Number of fine-tuning seeds over which the model card states the damage of each scenario.
    """

    vocab_size: int = 768
    tokenizer_texts: int = 12_000
    hidden_size: int = 128
    intermediate_size: int = 256
    layers: int = 4
    heads: int = 4
    base: StageSettings = _BASE
    align: StageSettings = _ALIGN
    damage_seeds: int = 3


@dataclass(frozen=True)
class BuildReport:
    """The measurements of a build.

    Attributes:
        stages: The evaluation of ``base`` and ``aligned`` on held-out requests.
        damage: The evaluation after plain fine-tuning, by scenario and seed.
    """

    stages: tuple[StageReport, ...]
    damage: tuple[Damage, ...]
