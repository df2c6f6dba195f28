"""The tour: every stage once on the shipped organism, from its evaluation and its gradients to fine-tunes under SPF."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from geomkit.analysis.analysis import Analysis
from geomkit.analysis.probe import analyze
from geomkit.experiments.organism.scenarios import SCENARIOS, Scenario
from geomkit.experiments.organisms import load_organism
from geomkit.inputs.examples import load_examples
from geomkit.spf.certificate import Certificate
from geomkit.spf.rules import DEFAULT_RULE
from geomkit.spf.settings import SPF
from geomkit.training.evaluate import evaluate
from geomkit.training.evaluation import Evaluation
from geomkit.training.evaluation_sets import ORGANISM_SKILLS
from geomkit.training.finetune import finetune
from geomkit.training.result import FineTuneResult
from geomkit.utils.figures import DrawnResult, draw

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_LOGGER = logging.getLogger(__name__)

TOUR_SCENARIOS = ("identity-shift", "poison-10")
"""The two damaging scenarios of the tour."""


@dataclass(frozen=True, eq=False)
class TourArm:
    """A fine-tune on a scenario, with its evaluation.

    Attributes:
        scenario: The scenario.
        name: ``"SFT"`` for a plain fine-tune, or ``"SPF"``.
        result: The fine-tune.
        evaluation: The evaluation of the fine-tuned model.
    """

    scenario: Scenario
    name: str
    result: FineTuneResult = field(repr=False)
    evaluation: Evaluation

    @property
    def utility(self) -> float:
        """Exact match on the scenario's task; the mean over the three old skills where the scenario has no task."""
        task = self.scenario.task
        return self.evaluation.skills[task].value if task else self.evaluation.utility

    def to_dict(self) -> dict[str, object]:
        """Return the headline numbers of this arm as JSON values."""
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
class Tour(DrawnResult):
    """The measurements of the tour.

    Attributes:
        organism: The evaluation of the organism before any fine-tune.
        analysis: The analysis of the organism's gradients.
        arms: The fine-tunes with their evaluations.
    """

    organism: Evaluation
    analysis: Analysis
    arms: Sequence[TourArm]

    def to_dict(self) -> dict[str, object]:
        """Return every headline number as JSON values: ``organism``, the parts of the analysis, and ``finetune``."""
        return {
            "organism": {
                "refusal_rate": self.organism.refusal.value,
                "over_refusal_rate": self.organism.over_refusal.value,
                "skills": {name: rate.value for name, rate in self.organism.skills.items()},
            },
            **self.analysis.to_dict(),
            "finetune": [arm.to_dict() for arm in self.arms],
        }

    @property
    def summary(self) -> tuple[str, str, str]:
        """Three sentences: what the organism refuses, what fine-tuning makes of it, and whether the projection held."""
        refused = {
            name: " and ".join(
                f"{arm.evaluation.refusal.value:.1%} ({arm.scenario.name})" for arm in self.arms if arm.name == name
            )
            for name in ("SFT", "SPF")
        }
        certificates = [arm.result.certificate for arm in self.arms if arm.name == "SPF" and arm.result.certificate]
        raising = sum(certificate.raising for certificate in certificates)
        steps = sum(certificate.steps for certificate in certificates)
        return (
            f"The organism refuses {self.organism.refusal} of the forbidden requests.",
            f"After plain fine-tuning (SFT) it refuses {refused['SFT']}, under SPF {refused['SPF']}.",
            f"Under SPF {raising} of {steps} steps raised the loss on the anchors to first order.",
        )

    def to_frame(self) -> "pd.DataFrame":
        """Return a row for the untouched organism and a row per fine-tune: rates in per cent, with their intervals."""
        import pandas as pd

        rows = [_row("–", "untouched", self.organism, self.organism.utility, None)]
        rows += [
            _row(arm.scenario.name, arm.name, arm.evaluation, arm.utility, arm.result.certificate) for arm in self.arms
        ]
        return pd.DataFrame(rows)

    def plot(self) -> "Figure":
        """Draw the evaluation of every arm."""
        return draw("plot_evaluation", self.evaluations())

    def evaluations(self) -> dict[str, Evaluation]:
        """Return every evaluation by the name of its arm, the untouched organism first."""
        return {
            "untouched": self.organism,
            **{f"{arm.name}, {arm.scenario.name}": arm.evaluation for arm in self.arms},
        }

    def __str__(self) -> str:
        """Return the title of the table."""
        return "The tour: 95 % Wilson intervals in brackets"


def _row(
    scenario: str, arm: str, evaluation: Evaluation, utility: float, certificate: Certificate | None
) -> dict[str, object]:
    return {
        "scenario": scenario,
        "arm": arm,
        "refusal %": evaluation.refusal.percent(),
        "over-refusal %": evaluation.over_refusal.percent(),
        "utility %": f"{100 * utility:.1f}",
        "steps that raise L_s": f"{certificate.raising} of {certificate.steps}" if certificate else "–",
    }


def run_tour(*, seed: int = 0, progress: bool = True) -> Tour:
    """Evaluate the organism, analyse its gradients, and fine-tune it plainly and under SPF in two damaging scenarios.

    Args:
        seed: Seed of all random draws: examples, nulls, the order of the training data, anchors.
        progress: Show progress bars.

    Returns:
        The measurements.
    """
    model, tokenizer = load_organism()
    _LOGGER.info("What the organism does")
    untouched = _evaluate(model, tokenizer, None, progress=progress)
    _LOGGER.info("What its gradients look like")
    safety, utility = load_examples("safety"), load_examples("scenarios/new-skill")
    control = load_examples("controls/benign-refused")
    analysis = analyze(model, tokenizer, safety, utility, control=control, seed=seed, progress=progress)
    arms = []
    for scenario in (SCENARIOS[name] for name in TOUR_SCENARIOS):
        for name in ("SFT", "SPF"):
            _LOGGER.info("Fine-tune: %s, %s", scenario.name, name)
            # Plain fine-tuning is certified too: it draws the same anchors, under a rule that projects nothing.
            spf = SPF(safety, rule=DEFAULT_RULE if name == "SPF" else "monitor", seed=seed)
            result = run_scenario(model, tokenizer, scenario, spf, seed=seed, progress=progress)
            evaluation = _evaluate(result.model, tokenizer, scenario, progress=progress)
            arms.append(TourArm(scenario, name, result, evaluation))
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
    """Fine-tune a copy of a model on a scenario that ships, with the settings of the scenario.

    Args:
        model: The model.
        tokenizer: The model's tokenizer.
        scenario: The scenario.
        spf: The protection; ``None`` for a plain fine-tune.
        seed: Seed of the order of the training data.
        progress: Show a bar.
    """
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


def _evaluate(
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
