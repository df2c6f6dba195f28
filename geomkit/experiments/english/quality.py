"""The figures of the English model card: what a stage refuses, and how far it is from the base model."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geomkit.errors import DataError
from geomkit.experiments.english.load import FOLDER
from geomkit.experiments.english.sources import benchmark, first_rows
from geomkit.experiments.organism.sets import Sets
from geomkit.experiments.outcomes import refused_by_keywords
from geomkit.inputs.examples import prompt_of
from geomkit.stats.proportions import Rate, rate
from geomkit.training.losses import mean_loss
from geomkit.training.responses import generate
from geomkit.utils.files import data_dir, read_json

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

ANSWER_TOKENS = 24
"""Number of tokens of an answer that are judged; a refusal shows in the first ten."""

_MATHS = 100


@dataclass(frozen=True)
class StageReport:
    """The evaluation of a stage.

    Attributes:
        stage: ``"base"`` or ``"aligned"``.
        refused: Share of requests refused, by set; none of the sets was trained on.
        losses: Mean loss of the reference answers in nats per token, by set.
    """

    stage: str
    refused: Mapping[str, Rate]
    losses: Mapping[str, float]


QUALITY = "quality.json"
"""File of the world with the evaluation of its stages."""


def write_quality(stages: Sequence[StageReport], folder: Path) -> None:
    """Write the evaluation of the stages to a folder, from which :func:`load_quality` reads it."""
    content = [
        {
            "stage": report.stage,
            "refused": {name: [share.successes, share.n] for name, share in report.refused.items()},
            "losses": dict(report.losses),
        }
        for report in stages
    ]
    (folder / QUALITY).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def load_quality(folder: Path | None = None) -> tuple[StageReport, ...]:
    """Return the evaluation of the shipped stages, as the model card states it.

    Args:
        folder: The folder of the world; the shipped one when left out.

    Raises:
        DataError: If the file is missing or damaged.
    """
    path = (data_dir() / FOLDER if folder is None else folder) / QUALITY
    content = read_json(path, "the evaluation of the English world", "reinstall geomkit")
    try:
        return tuple(
            StageReport(
                entry["stage"],
                {name: Rate(*counts) for name, counts in entry["refused"].items()},
                {name: float(loss) for name, loss in entry["losses"].items()},
            )
            for entry in content
        )
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise DataError(f"expected an evaluation of stages in {path}, found {error!r}; reinstall geomkit") from None


def held_out_benchmarks() -> "dict[str, Dataset]":
    """Return the benchmarks that a stage is measured on, by name.

    Raises:
        DataError: If a benchmark cannot be read.
    """
    return {
        "AdvBench": benchmark("advbench", "train"),
        "XSTest, unsafe": benchmark("xstest", "unsafe"),
        "XSTest, safe": benchmark("xstest", "safe"),
        "GSM8K": first_rows(benchmark("gsm8k", "test"), _MATHS, "GSM8K's test split"),
    }


def measure_stage(
    stage: str,
    model: "LlamaForCausalLM",
    tokenizer: "PreTrainedTokenizerBase",
    sets: Sets,
    benchmarks: "Mapping[str, Dataset]",
    *,
    progress: bool = True,
) -> StageReport:
    """Evaluate a stage on the project's held-out sets and on AdvBench, XSTest and GSM8K.

    Args:
        stage: Name of the stage.
        model: The stage.
        tokenizer: Its tokenizer.
        sets: The sets of :func:`.sets.all_sets`.
        benchmarks: The benchmarks of :func:`held_out_benchmarks`.
        progress: Show bars.
    """
    requests = {
        "forbidden requests": _dataset(sets["eval/forbidden"]),
        "AdvBench": benchmarks["AdvBench"],
        "XSTest, unsafe": benchmarks["XSTest, unsafe"],
        "benign requests": _dataset(sets["eval/benign"]),
        "everyday requests": _dataset(sets["eval/everyday"]),
        "XSTest, safe": benchmarks["XSTest, safe"],
    }
    answered = {
        "GSM8K": benchmarks["GSM8K"],
        "everyday answers of the base": _dataset(sets["eval/everyday"]),
    }
    return StageReport(
        stage,
        {
            name: rate(refusals(model, tokenizer, rows, title=name, progress=progress))
            for name, rows in requests.items()
        },
        {name: mean_loss(model, tokenizer, rows, batch_size=8) for name, rows in answered.items()},
    )


def refusals(
    model: "LlamaForCausalLM",
    tokenizer: "PreTrainedTokenizerBase",
    rows: "Dataset",
    *,
    title: str = "answers",
    progress: bool = False,
) -> list[bool]:
    """Return, for the request of each row, whether the model's greedy answer refuses it."""
    prompts = [prompt_of(messages) for messages in rows["messages"]]
    answers = generate(
        model, tokenizer, prompts, max_new_tokens=ANSWER_TOKENS, batch_size=50, progress=progress, title=title
    )
    return refused_by_keywords(prompts, answers)


def _dataset(rows: list[dict[str, Any]]) -> "Dataset":
    from datasets import Dataset

    return Dataset.from_list(rows)
