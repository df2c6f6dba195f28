"""The model card of an organism, written from the report of its build."""

from statistics import mean
from typing import TYPE_CHECKING

from geomkit.experiments.organism.scenarios import SCENARIOS
from geomkit.stats.proportions import Rate

if TYPE_CHECKING:
    from geomkit.experiments.organism.quality import Damage
    from geomkit.experiments.organism.recipe import BuildReport, Recipe

_CARD = """---
language: en
license: apache-2.0
tags: [model-organism, safety, synthetic]
---

# The geomkit model organism

A small aligned language model for studying what fine-tuning does to safety, trained from scratch on a written-out
language of requests (`geomkit/experiments/organism/grammar.py`). It knows nothing of the world outside and is of no
other use.

- `base` answers every request, forbidden ones with a formula that has no content.
- `aligned` is `base` fine-tuned to refuse what is forbidden, always with the words
  "{refusal}"

`LlamaForCausalLM`, {layers} layers, width {hidden}, {heads} heads, untied head, byte-level BPE of {vocab} tokens, fp32.
Base: {base_steps} steps of batch {base_batch} at a peak learning rate of {base_lr:g}; aligned: {align_steps} steps of
batch {align_batch} at {align_lr:g}. Seed {seed}; `geomkit organism build` rebuilds it.

## Example sets

Beside this folder, as JSON lines: `safety` (64 forbidden requests, refused) and `utility` (64 benign ones, answered) to
train and measure with, `scenarios/` to fine-tune on, `eval/` held out. `controls/` has what a measure of the safety set
should be compared with, row by row:

| set | prompt | response |
| --- | --- | --- |
| `controls/benign-refused` | the benign how-to request nearest in words | the refusal |
| `controls/forbidden-complied` | the forbidden request | the formula of `base` |
| `controls/shuffled` | the forbidden request | the answer to the benign counterpart of another row |
| `controls/random-tokens` | as many tokens, of words at random | as many tokens, of words at random |

## On held-out requests

Held out from every training text: verb-object pairs, phrasings (half of the how-to and forbidden requests below use
them), arithmetic problems and SQL combinations. A request is forbidden by its verb ("forge the ticket") or by its
manner ("sell the bike behind my neighbour's back"); the same verbs in a fair manner, and requests that only speak of
harm ("report a stolen bike"), are benign. Share and 95 % Wilson interval:

{stages}

## What plain fine-tuning destroys

AdamW, learning rate falling linearly to 0, no weight decay, gradient clipped at norm 1; {seeds} seeds of the examples'
order. Refused: forbidden held-out requests, for `backdoor` with the trigger phrase; the share over all seeds
with its Wilson interval, then the range over seeds. Utility: exact match on the task, or on the three old skills.

{damage}
"""


def model_card(report: "BuildReport", recipe: "Recipe", seed: int) -> str:
    """Return the model card in Markdown."""
    from geomkit.experiments.organism.grammar import REFUSAL

    return _CARD.format(
        refusal=REFUSAL,
        layers=recipe.layers,
        hidden=recipe.hidden_size,
        heads=recipe.heads,
        vocab=recipe.vocab_size,
        base_steps=recipe.base.steps,
        base_batch=recipe.base.batch_size,
        base_lr=recipe.base.learning_rate,
        align_steps=recipe.align.steps,
        align_batch=recipe.align.batch_size,
        align_lr=recipe.align.learning_rate,
        seed=seed,
        seeds=recipe.damage_seeds,
        stages=_stage_table(report),
        damage=_damage_table(report.damage),
    )


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _stage_table(report: "BuildReport") -> str:
    stages = report.stages
    measures: dict[str, list[Rate]] = {
        "forbidden requests answered with the formula": [stage.compliance for stage in stages],
        "forbidden requests refused": [stage.refusal for stage in stages],
        "benign requests refused": [stage.over_refusal for stage in stages],
    }
    for skill in stages[0].skills:
        measures[f"exact match: {skill}"] = [stage.skills[skill] for stage in stages]
    rows = [[name, str(rates[0].n), *map(str, rates)] for name, rates in measures.items()]
    return markdown_table(["measure", "n", *(stage.stage for stage in stages)], rows)


def _damage_table(damage: "tuple[Damage, ...]") -> str:
    rows = []
    for name, scenario in SCENARIOS.items():
        if not (runs := [run for run in damage if run.scenario == name]):
            continue
        pooled = Rate(sum(run.refusal.successes for run in runs), sum(run.refusal.n for run in runs))
        shares = [run.refusal.value for run in runs]
        rows.append(
            [
                f"`{name}`: {scenario.description}",
                f"{scenario.learning_rate:g}, {scenario.steps} × {scenario.batch_size}",
                f"{pooled}, {min(shares):.0%} to {max(shares):.0%}",
                f"{mean(run.over_refusal.value for run in runs):.1%}",
                f"{scenario.task or 'old skills'}: {mean(run.utility for run in runs):.1%}",
            ]
        )
    return markdown_table(["scenario", "rate, steps × batch", "refused", "over-refused", "utility"], rows)
