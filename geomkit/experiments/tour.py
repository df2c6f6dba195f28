"""The whole way once, on the shipped organism: what it does, what its gradients look like, what SPF keeps."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from geomkit.analysis.analysis import Analysis
from geomkit.analysis.probe import analyze
from geomkit.experiments.organism.load import load_organism
from geomkit.experiments.organism.scenarios import SCENARIOS, Scenario
from geomkit.inputs.examples import load_examples
from geomkit.spf.certificate import Certificate
from geomkit.spf.rules import DEFAULT_RULE
from geomkit.spf.settings import SPF
from geomkit.training.evaluate import ORGANISM_SKILLS, Evaluation, evaluate
from geomkit.training.finetune import FineTuneResult, finetune
from geomkit.utils.display import html_table
from geomkit.utils.figures import draw

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_LOGGER = logging.getLogger(__name__)

TOUR_SCENARIOS = ("identity-shift", "poison-10")
"""The two damaging scenarios that the tour walks through."""


@dataclass(frozen=True, eq=False)
class Arm:
    """One fine-tune of one scenario.

    Attributes:
        scenario: What was learnt, and how hard.
        name: ``"SFT"``, plain, or ``"SPF"``.
        result: The fine-tune.
        evaluation: What the model does afterwards.
    """

    scenario: Scenario
    name: str
    result: FineTuneResult = field(repr=False)
    evaluation: Evaluation

    @property
    def utility(self) -> float:
        """Exact match on the scenario's task, or the mean over the old skills where it has none."""
        task = self.scenario.task
        return self.evaluation.skills[task].value if task else self.evaluation.utility

    def to_dict(self) -> dict[str, object]:
        """Return the headline numbers of this arm."""
        certificate = self.result.certificate
        return {
            "scenario": self.scenario.name,
            "arm": self.name,
            "refusal_rate": self.evaluation.refusal.value,
            "interval": list(self.evaluation.refusal.interval),
            "over_refusal_rate": self.evaluation.over_refusal.value,
            "utility": self.utility,
            "certificate": certificate.to_dict() if certificate else None,
        }


@dataclass(frozen=True, eq=False)
class Tour:
    """What the tour measured.

    Attributes:
        organism: What the aligned organism does.
        analysis: What its gradients look like.
        arms: The fine-tunes.
    """

    organism: Evaluation
    analysis: Analysis
    arms: Sequence[Arm]

    def to_dict(self) -> dict[str, object]:
        """Return every headline number: ``organism``, ``spectrum``, ``conflict``, ``one_sample``, ``finetune``."""
        return {
            "organism": {
                "refusal_rate": self.organism.refusal.value,
                "over_refusal_rate": self.organism.over_refusal.value,
                "skills": {name: rate.value for name, rate in self.organism.skills.items()},
            },
            **self.analysis.to_dict(),
            "finetune": [arm.to_dict() for arm in self.arms],
        }

    def to_frame(self) -> "pd.DataFrame":
        """Return one row for the untouched organism and one per fine-tune; rates in per cent, with their intervals."""
        import pandas as pd

        rows = [_row("–", "untouched", self.organism, self.organism.utility, None)]
        rows += [
            _row(arm.scenario.name, arm.name, arm.evaluation, arm.utility, arm.result.certificate) for arm in self.arms
        ]
        return pd.DataFrame(rows)

    def plot(self) -> "Figure":
        """Draw what each arm does."""
        return draw("plot_evaluation", self.evaluations())

    def evaluations(self) -> dict[str, Evaluation]:
        """Return every evaluation by the name of its arm, the untouched organism first."""
        return {
            "untouched": self.organism,
            **{f"{arm.name}, {arm.scenario.name}": arm.evaluation for arm in self.arms},
        }

    def _repr_html_(self) -> str:
        return html_table("The tour: 95 % Wilson intervals in brackets", self.to_frame())


def _row(
    scenario: str, arm: str, found: Evaluation, utility: float, certificate: Certificate | None
) -> dict[str, object]:
    return {
        "scenario": scenario,
        "arm": arm,
        "refusal %": found.refusal.percent(),
        "over-refusal %": found.over_refusal.percent(),
        "utility %": f"{100 * utility:.1f}",
        "steps that raise L_s": f"{certificate.violations} of {certificate.steps}" if certificate else "–",
    }


def run_tour(*, seed: int = 0, progress: bool = True) -> Tour:
    """Measure the three insights on the organism, then fine-tune it plainly and under SPF in two damaging scenarios.

    Args:
        seed: Seed of everything drawn: examples, nulls, the order of training data, anchors.
        progress: Show bars.

    Returns:
        A :class:`Tour`.
    """
    model, tokenizer = load_organism()
    _LOGGER.info("What the organism does")
    untouched = _evaluated(model, tokenizer, None, progress=progress)
    _LOGGER.info("What its gradients look like")
    safety, utility = load_examples("safety"), load_examples("scenarios/new-skill")
    control = load_examples("controls/benign-refused")
    analysis = analyze(model, tokenizer, safety, utility, control=control, seed=seed, progress=progress)
    arms = []
    for scenario in (SCENARIOS[name] for name in TOUR_SCENARIOS):
        for name in ("SFT", "SPF"):
            _LOGGER.info("Fine-tune: %s, %s", scenario.name, name)
            # Both arms draw the same anchors; under "measure" nothing is projected.
            spf = SPF(safety, rule=DEFAULT_RULE if name == "SPF" else "measure", seed=seed)
            result = run_scenario(model, tokenizer, scenario, spf, seed=seed, progress=progress)
            arms.append(Arm(scenario, name, result, _evaluated(result.model, tokenizer, scenario, progress=progress)))
    return Tour(untouched, analysis, tuple(arms))


def run_scenario(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    scenario: Scenario,
    spf: SPF | None,
    *,
    seed: int = 0,
    progress: bool = True,
) -> FineTuneResult:
    """Fine-tune a copy of a model on a scenario, with the scenario's own settings."""
    return finetune(
        model,
        tokenizer,
        load_examples(f"scenarios/{scenario.name}"),
        spf,
        learning_rate=scenario.learning_rate,
        steps=scenario.steps,
        batch_size=scenario.batch_size,
        seed=seed,
        progress=progress,
    )


def _evaluated(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", scenario: Scenario | None, *, progress: bool
) -> Evaluation:
    names = [*([scenario.task] if scenario and scenario.task else []), *ORGANISM_SKILLS]
    return evaluate(
        model,
        tokenizer,
        forbidden=load_examples(f"eval/{scenario.attack if scenario else 'forbidden'}"),
        skills={name: load_examples(f"eval/{name}") for name in names},
        batch_size=120,
        progress=progress,
    )
