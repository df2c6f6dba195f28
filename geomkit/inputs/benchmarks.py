"""Benchmarks by name: source, licence, columns, splits and metric of each benchmark; none ships with geomkit."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Benchmark:
    """A public set of prompts, with or without reference answers.

    Attributes:
        name: Name for :func:`geomkit.load_examples`.
        source: Id on the hub, or the address of a CSV file.
        licence: Licence of the set, as its source states it.
        prompt: Columns that make up the user's message, in order, with an empty line between those that have text.
            Names in one string, separated by ``|``, are alternatives.
        main: Column of the prompt that must have text; the first when left out.
        response: Column of the reference answer; empty where there is none.
        instruction: Text before the prompt.
        between: Text between the columns of the prompt.
        split: Split that is taken when none is named; empty for all rows.
        splits: All splits.
        part: Column that divides a local file into splits; empty where each split is a file of its own.
        config: Configuration on the hub.
        metric: Name of the judge (``geomkit.training.model_judges``) or metric (``geomkit.training.metrics``) that the
            set is scored by.
        roles: Split that has the requests to refuse (``"forbidden"``) and those to answer (``"benign"``), where a set
            has both.
    """

    name: str
    source: str
    licence: str
    prompt: tuple[str, ...]
    metric: str
    main: str = ""
    response: str = ""
    instruction: str = ""
    between: str = "\n\n"
    split: str = "train"
    splits: tuple[str, ...] = ("train",)
    part: str = ""
    config: str | None = None
    roles: Mapping[str, str] = field(default_factory=dict)


_HARMBENCH = "https://raw.githubusercontent.com/centerforaisafety/HarmBench/main/data/behavior_datasets/"

_ALL = (
    Benchmark(
        name="advbench",
        source="https://raw.githubusercontent.com/llm-attacks/llm-attacks/main/data/advbench/harmful_behaviors.csv",
        licence="MIT",
        prompt=("goal|prompt",),
        metric="gcg",
    ),
    Benchmark(
        name="harmbench",
        source=_HARMBENCH + "harmbench_behaviors_text_{split}.csv",
        licence="MIT",
        prompt=("ContextString", "Behavior"),
        main="Behavior",
        between="\n\n---\n\n",
        metric="harmbench",
        split="all",
        splits=("all", "val", "test"),
    ),
    Benchmark(
        name="xstest",
        source="https://raw.githubusercontent.com/paul-rottger/xstest/main/xstest_prompts.csv",
        licence="CC BY 4.0",
        prompt=("prompt",),
        metric="xstest",
        split="",
        splits=("safe", "unsafe"),
        part="label",
        roles={"forbidden": "unsafe", "benign": "safe"},
    ),
    Benchmark(
        name="jailbreakbench",
        source="JailbreakBench/JBB-Behaviors",
        config="behaviors",
        licence="MIT",
        prompt=("Goal",),
        metric="llama-guard",
        split="harmful",
        splits=("harmful", "benign"),
        roles={"forbidden": "harmful", "benign": "benign"},
    ),
    Benchmark(
        name="strongreject",
        source="https://raw.githubusercontent.com/alexandrasouly/strongreject/main/strongreject_dataset/strongreject_dataset.csv",
        licence="MIT",
        prompt=("forbidden_prompt|prompt",),
        metric="strongreject",
    ),
    Benchmark(
        name="hex-phi",
        source="LLM-Tuning-Safety/HEx-PHI",
        licence="HEx-PHI license (gated)",
        prompt=("prompt|Instruction",),
        metric="score",
        split="",
        splits=(),
    ),
    Benchmark(
        name="beavertails",
        source="PKU-Alignment/BeaverTails",
        licence="CC BY-NC 4.0",
        prompt=("prompt",),
        response="response",
        metric="llama-guard",
        split="30k_test",
        splits=("30k_train", "30k_test", "330k_train", "330k_test"),
    ),
    Benchmark(
        name="gsm8k",
        source="openai/gsm8k",
        config="main",
        licence="MIT",
        prompt=("question",),
        response="answer",
        metric="gsm8k",
        split="test",
        splits=("train", "test"),
    ),
    Benchmark(
        name="alpaca",
        source="tatsu-lab/alpaca",
        licence="CC BY-NC 4.0",
        prompt=("instruction", "input"),
        response="output",
        metric="perplexity",
    ),
    Benchmark(
        name="dolly",
        source="databricks/databricks-dolly-15k",
        licence="CC BY-SA 3.0",
        prompt=("instruction", "context"),
        response="response",
        metric="perplexity",
    ),
    Benchmark(
        name="sql-create-context",
        source="b-mc2/sql-create-context",
        licence="CC BY 4.0",
        prompt=("context", "question"),
        main="question",
        response="answer",
        metric="exact",
    ),
    Benchmark(
        name="samsum",
        source="knkarthick/samsum",
        licence="CC BY-NC-ND 4.0",
        prompt=("dialogue",),
        response="summary",
        instruction="Summarize this dialogue:\n",
        metric="rouge1",
        split="test",
        splits=("train", "validation", "test"),
    ),
)

BENCHMARKS: Mapping[str, Benchmark] = {benchmark.name: benchmark for benchmark in _ALL}
"""The benchmarks by name."""


def benchmarks() -> "pd.DataFrame":
    """Return the benchmarks that geomkit knows, one a row: name, source, licence, columns, splits and metric.

    Example:
        >>> benchmarks().set_index("name").loc["gsm8k", ["licence", "metric"]].tolist()
        ['MIT', 'gsm8k']
    """
    import pandas as pd

    return pd.DataFrame(
        {
            "name": entry.name,
            "source": entry.source,
            "licence": entry.licence,
            "columns": ", ".join(filter(None, (*entry.prompt, entry.response))),
            "split": entry.split or "all rows",
            "splits": ", ".join(entry.splits),
            "metric": entry.metric,
        }
        for entry in _ALL
    )
