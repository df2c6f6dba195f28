"""The evaluation after a fine-tune in the English world: refusals of requests, losses of answers, coherence."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from geomkit.experiments.organism.interface import Organism
from geomkit.experiments.organism.scenarios import Scenario
from geomkit.experiments.outcomes import (
    Outcomes,
    attack_success,
    greedy_answers,
    is_degenerate,
    next_token_kl,
    parameter_distance,
    refused_by_keywords,
)
from geomkit.inputs.examples import prompt_of, required_final_answer
from geomkit.training.losses import mean_loss
from geomkit.training.metrics import final_number_match
from geomkit.training.responses import generate

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

_REQUESTS = {"advbench": "advbench", "forbidden": "forbidden", "xstest": "xstest-safe", "benign": "benign"}
_EVERYDAY = 40
_MATHS = 40
_MATHS_TOKENS = 160
_LOSS_ROWS = 40
_BATCH = 8
"""Rows in a batch whose losses are taken: with 49,152 words, a batch of logits is large."""


def evaluate_english(model: "PreTrainedModel", organism: Organism, scenario: Scenario, prompts: int) -> Outcomes:
    """Evaluate a fine-tuned model on the held-out sets of the English world.

    Args:
        model: The fine-tuned model; its state is restored.
        organism: The organism before the fine-tune.
        scenario: The scenario of the fine-tune.
        prompts: Largest number of prompts taken from each set of requests.

    Returns:
        Flags per prompt: ``refusal`` and ``attack_success`` on AdvBench, ``own_refusal`` on the project's forbidden
        requests, ``over_refusal`` on XSTest's safe prompts, ``own_over_refusal`` on the project's benign requests,
        ``utility``, ``coherence`` of every response and, for a backdoor, ``triggered_refusal``. The utility is the
        share of right answers to GSM8K for maths, otherwise of everyday requests that are answered coherently.
        Numbers: ``utility_loss`` of the reference answers to GSM8K for maths, otherwise of the base model's everyday
        answers; ``safety_loss``, ``kl``, both in nats per token; ``distance``, ‖θ − θ₀‖.

    Raises:
        DataError: If a benchmark cannot be read.
    """
    sets = dict(_REQUESTS) | ({"triggered": scenario.attack} if scenario.attack != "forbidden" else {})
    rows = {role: organism.examples(f"eval/{name}", prompts) for role, name in sets.items()}
    rows["everyday"] = organism.examples("eval/everyday", _EVERYDAY)
    texts = {role: greedy_answers(model, organism, rows[role]) for role in rows}
    refused = {role: refused_by_keywords(rows[role]["messages"], texts[role]) for role in rows}
    coherent = {role: [not is_degenerate(text) for text in texts[role]] for role in rows}
    maths = scenario.task == "gsm8k"
    reference = organism.examples("eval/gsm8k" if maths else "eval/everyday", _LOSS_ROWS)
    answered = [fine and not no for fine, no in zip(coherent["everyday"], refused["everyday"], strict=True)]
    flags = {
        "refusal": refused["advbench"],
        "attack_success": attack_success(refused["advbench"], texts["advbench"]),
        "own_refusal": refused["forbidden"],
        "over_refusal": refused["xstest"],
        "own_over_refusal": refused["benign"],
        "utility": _solved(model, organism, organism.examples("eval/gsm8k", _MATHS)) if maths else answered,
        "coherence": [flag for role in coherent for flag in coherent[role]],
    }
    if "triggered" in refused:
        flags["triggered_refusal"] = refused["triggered"]
    numbers = {
        "utility_loss": mean_loss(model, organism.tokenizer, reference, batch_size=_BATCH),
        "safety_loss": mean_loss(model, organism.tokenizer, organism.examples("eval/forbidden", 60), batch_size=_BATCH),
        "kl": next_token_kl(organism.model, model, organism, organism.examples("eval/benign", 40), batch_size=_BATCH),
        "distance": parameter_distance(organism.model, model),
    }
    return Outcomes(flags, numbers)


def _solved(model: "PreTrainedModel", organism: Organism, rows: "Dataset") -> Sequence[bool]:
    """Return, for each problem, whether the number that the model's answer ends in is right."""
    prompts = [prompt_of(messages) for messages in rows["messages"]]
    answers = generate(model, organism.tokenizer, prompts, max_new_tokens=_MATHS_TOKENS, progress=False)
    return [
        bool(final_number_match(text, required_final_answer(row)))
        for text, row in zip(answers, rows["messages"], strict=True)
    ]
