"""The recipe of a model organism, and the report of a build."""

from dataclasses import dataclass

from geomkit.experiments.organism.quality import Damage, StageReport
from geomkit.experiments.organism.training import Course

_BASE = Course(steps=1500, batch_size=32, learning_rate=2e-3, weight_decay=0.01)
_ALIGN = Course(steps=450, batch_size=32, learning_rate=5e-4)


@dataclass(frozen=True)
class Recipe:
    """Everything a build depends on besides its seed.

    Attributes:
        vocab_size: Tokens of the tokenizer.
        tokenizer_texts: Requests that the tokenizer learns its merges from.
        hidden_size: Width of the model.
        intermediate_size: Width of its MLPs.
        layers: Its depth.
        heads: Its attention heads.
        base: How the base stage is trained.
        align: How the aligned stage is fine-tuned from it.
        damage_seeds: Fine-tuning seeds over which the card states each scenario's damage.
    """

    vocab_size: int = 768
    tokenizer_texts: int = 12_000
    hidden_size: int = 128
    intermediate_size: int = 256
    layers: int = 4
    heads: int = 4
    base: Course = _BASE
    align: Course = _ALIGN
    damage_seeds: int = 3


@dataclass(frozen=True)
class BuildReport:
    """What a build measured.

    Attributes:
        stages: The figures of ``base`` and ``aligned`` on held-out requests.
        damage: What plain fine-tuning did to the aligned stage, by scenario and seed.
    """

    stages: tuple[StageReport, ...]
    damage: tuple[Damage, ...]
