"""The command ``geomkit evaluate``: how often a model refuses, and answers rightly."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from geomkit.cli.columns import ColumnReader
from geomkit.cli.inputs import load_model_by_name
from geomkit.cli.options import ColumnsOption, Device, Dtype, Json, ModelOption, PadToken, Seed, Threads, number
from geomkit.cli.outputs import check_writable
from geomkit.cli.start import join_processes, prepare
from geomkit.errors import DataError
from geomkit.utils.files import write_atomically
from geomkit.utils.options import BATCH_SIZE, MAX_NEW_TOKENS
from geomkit.utils.terminal import show_table

if TYPE_CHECKING:
    from datasets import Dataset

    from geomkit.training.judges import BatchJudge, Judge


def evaluate(
    model: ModelOption,
    forbidden: Annotated[
        str | None, typer.Option(help="Requests to refuse: file, hub id, shipped set, benchmark or BENCHMARK=FILE.")
    ] = None,
    benign: Annotated[str | None, typer.Option(help="Requests to answer, likewise.")] = None,
    skill: Annotated[
        list[str] | None,
        typer.Option(help="NAME=SET[:METRIC]; exact (default), gsm8k, rouge1, rougeL, perplexity, …; repeatable."),
    ] = None,
    judge: Annotated[
        list[str] | None,
        typer.Option(
            help="keywords (default), gcg, RUBRIC=MODEL or RUBRIC=openai:MODEL (harmbench, llama-guard, wildguard, "
            "xstest, strongreject, score), refused:LABEL=MODEL, harmful:LABEL=MODEL; repeatable."
        ),
    ] = None,
    judge_device: Annotated[str | None, typer.Option(help="Device of the judges, such as cuda:1.")] = None,
    judge_url: Annotated[str | None, typer.Option(help="Address of the endpoint of RUBRIC=openai:MODEL.")] = None,
    judge_prompt: Annotated[
        Path | None, typer.Option(help="File with a question in place of the rubric's.", exists=True, dir_okay=False)
    ] = None,
    json_file: Json = None,
    examples: Annotated[int | None, number("Largest number of prompts drawn from each set.")] = None,
    max_new_tokens: Annotated[int, number("Length of the longest response.")] = MAX_NEW_TOKENS,
    batch_size: Annotated[int, number("Prompts answered at a time.")] = BATCH_SIZE,
    pad_token: PadToken = None,
    columns: ColumnsOption = None,
    dtype: Dtype = "auto",
    device: Device = None,
    threads: Threads = 1,
    seed: Seed = 0,
) -> None:
    """Print how often a model refuses and answers rightly, with 95 % intervals; --json keeps it for compare."""
    prepare(threads)
    join_processes(device)
    from geomkit.training.evaluate import evaluate as run_evaluation
    from geomkit.utils.workers import first_process

    check_writable(json_file and json_file.parent)
    if not (forbidden or benign or skill):
        raise DataError("expected something to evaluate, found none; give --forbidden, --benign or --skill")
    sets = _read_sets(forbidden, benign, skill or [], columns, examples, seed)
    judges = _load_judges(judge or ["keywords"], judge_device, judge_url, judge_prompt)
    loaded, tokenizer = load_model_by_name(model, dtype, device, pad_token)
    with _responses_kept(json_file):
        result = run_evaluation(
            loaded,
            tokenizer,
            sets.requests.get("forbidden"),
            sets.requests.get("benign"),
            sets.skills,
            judge=judges,
            metrics=sets.metrics,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
        )
    show_table(result.to_frame(), f"{model}, judged by {', '.join(result.settings['judges'])}; 95 % intervals")
    if json_file is not None and first_process():
        typer.echo(f"wrote {result.save(json_file)}")


class _Sets(NamedTuple):
    """The prompts of an evaluation: requests by role, and examples and metric of each skill by its name."""

    requests: "dict[str, Dataset]"
    skills: "dict[str, Dataset]"
    metrics: dict[str, str]


def _read_sets(
    forbidden: str | None,
    benign: str | None,
    skills: Sequence[str],
    columns: str | None,
    examples: int | None,
    seed: int,
) -> _Sets:
    """Return the sets of an evaluation, with the prompts drawn from each.

    Args:
        forbidden: The value of ``--forbidden``.
        benign: The value of ``--benign``.
        skills: The values of ``--skill``.
        columns: The value of ``--columns``.
        examples: Largest number of prompts drawn from each set.
        seed: Seed of the draws.

    Raises:
        DataError: If a set cannot be read, two skills have the same name, or no set has the named columns.
    """
    from geomkit.training.sets_by_text import Role, drawn, requests_by_text, skill_by_text

    reader = ColumnReader(columns)
    named = [reader(partial(skill_by_text, text)) for text in skills]
    if len({name for name, *_ in named}) < len(named):
        raise DataError(
            f"expected skills of different names, found {', '.join(name for name, *_ in named)}; rename one of them"
        )
    asked: list[tuple[Role, str | None]] = [("forbidden", forbidden), ("benign", benign)]
    requests = {role: reader(partial(requests_by_text, text, role)) for role, text in asked if text}
    reader.check()
    return _Sets(
        {role: drawn(rows, examples, seed) for role, rows in requests.items()},
        {name: drawn(rows, examples, seed) for name, rows, _ in named},
        {name: metric for name, _, metric in named},
    )


def _load_judges(
    names: Sequence[str], device: str | None, url: str | None, prompt: Path | None
) -> "list[Judge | BatchJudge]":
    """Return the judges by their names, all with the device, the endpoint and the question given for judges."""
    from geomkit.training.model_judges.by_name import load_judge

    template = _read_text(prompt) if prompt else None
    return [load_judge(name, device=device, url=url, template=template) for name in names]


def _read_text(path: Path) -> str:
    """Return the text of a file.

    Raises:
        DataError: If the file is not in UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"expected UTF-8 text in {path}, found {error.reason} at byte {error.start}; save it as UTF-8"
        ) from None


@contextmanager
def _responses_kept(json_file: Path | None) -> Iterator[None]:
    """Write the model's responses beside the file of the numbers where a judge fails, so that no response is lost.

    Raises:
        DataError: If a judge fails.
    """
    from geomkit.training.judges import JudgeError

    try:
        yield
    except JudgeError as error:
        file = (json_file or Path("evaluation.json")).with_suffix(".responses.jsonl")
        write_atomically(file, error.responses.to_json(orient="records", lines=True, force_ascii=False))
        raise DataError(f"{error.reason}; the model's responses are in {file}") from error
