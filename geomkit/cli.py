"""The command line: ``geomkit tour``, ``check``, ``analyze``, ``screen``, ``finetune``, ``evaluate``, ``bench``, …."""

import atexit
import errno
import json
import logging
import math
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from geomkit.errors import DataError, GeomkitError
from geomkit.utils.files import write_atomically
from geomkit.utils.options import check_option
from geomkit.utils.terminal import say, show_table
from geomkit.version import __version__

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from geomkit.analysis.analysis import Analysis
    from geomkit.experiments.tour import Tour
    from geomkit.inputs.parameters import Layers
    from geomkit.inputs.tokens import AssistantMask, EncodedExamples
    from geomkit.utils.display import Result

Read = TypeVar("Read")

app = typer.Typer(
    help="Gradient geometry of safety-aligned LLMs, and SPF.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
organism_app = typer.Typer(help="The model organisms that ship with geomkit.", no_args_is_help=True)
app.add_typer(organism_app, name="organism")


def _in_range(parameter: typer.CallbackParam, value: float | None) -> float | None:
    """Return the value of a numeric option, after a check against the table of all options.

    Raises:
        typer.BadParameter: If the value is out of range.
    """
    if value is not None:
        try:
            check_option(str(parameter.name), value, shown=parameter.opts[0])
        except DataError as error:
            raise typer.BadParameter(str(error)) from None
    return value


def _number(text: str) -> Any:  # typer's own options are untyped
    """Return a numeric option with a help text, whose range is that of its name in the table of all options."""
    return typer.Option(help=text, callback=_in_range)


Out = Annotated[Path, typer.Option(help="Folder for report.html.", file_okay=False)]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the numbers to this file.", dir_okay=False)]
Seed = Annotated[int, _number("Seed of all random draws.")]
ModelOption = Annotated[
    str, typer.Option(help="Folder, hub id, GGUF file, PEFT adapter, or {organism,english}/{aligned,base}.")
]
PadToken = Annotated[str | None, typer.Option(help="Pad token, for tokenizers without one.")]
Mask = Annotated[
    str,
    typer.Option(
        "--assistant-mask",
        help="auto, template (by its markers) or prefix (without markers).",
    ),
]
ColumnsOption = Annotated[
    str | None,
    typer.Option(help="Which column is what, as in prompt=goal,response=target; for the sets that have these columns."),
]
MaxLength = Annotated[int | None, _number("Cut longer examples to this many tokens.")]
LayersOption = Annotated[
    str, typer.Option("--layers", help="Glob pattern on parameter names, or numbers of decoder layers, as in 10,20.")
]
TokensPerBatch = Annotated[int, _number("Largest number of tokens in a batch, padding included.")]
Threads = Annotated[int, _number("CPU threads.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …; a GPU if there is one when left out.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16, …")]
TrainingDtype = Annotated[
    str, typer.Option("--dtype", help="float32, auto, …; AdamW in pure bfloat16 rounds small updates away.")
]


_INTERRUPTED = 130
"""Exit status after Ctrl-C."""

_OF_FILES = {errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO, errno.EMFILE}
"""Errors of a disk, which need not name a file."""


def main() -> None:
    """Run the command line; a wrong input, a full disk or too little memory prints one line and exits with status 1."""
    _quiet()
    try:
        app()
    except GeomkitError as error:
        _end(str(error))
    except OSError as error:
        if error.filename is None and error.errno not in _OF_FILES:
            _end(f"expected files, the hub and servers within reach, found {type(error).__name__}: {error}")
        where = f" at {error.filename}" if error.filename else ""
        _end(f"expected to read and write files, found {error.strerror or error}{where}; what was complete is kept")
    except (MemoryError, RuntimeError) as error:
        if not _of_memory(error):
            raise
        _end(
            "expected enough memory, found too little; lower --tokens-per-batch or --batch-size, cut the examples with "
            "--max-length, or take fewer"
        )


def _end(message: str) -> None:
    sys.stderr.write(f"geomkit: {' '.join(message.split())}\n")
    sys.exit(1)


def _of_memory(error: MemoryError | RuntimeError) -> bool:
    """Return whether an error is one of memory; torch raises a RuntimeError for memory that the CPU lacks."""
    words = f"{type(error).__name__} {error}".lower()
    return isinstance(error, MemoryError) or any(
        said in words for said in ("outofmemory", "out of memory", "not enough memory", "can't allocate memory")
    )


def _quiet() -> None:
    """Show geomkit's own messages on the terminal, and no messages of other libraries."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("geomkit").setLevel(logging.INFO)


def _prepare(threads: int) -> None:
    """Silence the libraries that load models and data, and set the number of CPU threads."""
    import datasets
    import huggingface_hub
    import torch
    from transformers.utils import logging as transformers_logging

    huggingface_hub.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    datasets.disable_progress_bars()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # On a busy machine, more threads make models as small as the organism many times slower.
    torch.set_num_threads(threads)


def _join_processes(device: str | None) -> None:
    """Join the processes that ``accelerate launch`` or ``torchrun`` has started, of which only the first prints.

    They divide the examples of every call from then on.

    Args:
        device: The device that was asked for.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    import torch
    from accelerate import PartialState

    from geomkit.utils.workers import first_process

    state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available())  # it also gives each process its GPU
    atexit.register(state.destroy_process_group)
    if not first_process():
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - until the process ends


def _version(show: bool) -> None:
    if show:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Gradient geometry of safety-aligned LLMs, and SPF."""


@app.command()
def tour(out: Out = Path("geomkit-tour"), json_file: Json = None, seed: Seed = 0) -> None:
    """Run every stage once on the shipped organism, and write report.html."""
    _prepare(threads=1)
    from geomkit.experiments.tour import run_tour

    _check_writable(out, json_file and json_file.parent)
    result = run_tour(seed=seed)
    show_table(result.to_frame(), "What fine-tuning did, with and without SPF")
    _show_analysis(result.analysis, "What the gradients look like")
    _write(out, json_file, result)


@app.command()
def check(
    model: ModelOption,
    examples: Annotated[str, typer.Option(help="Conversations: file, hub id or shipped set.")],
    layers: LayersOption = "*",
    tokens_per_batch: TokensPerBatch = 4096,
    max_length: MaxLength = None,
    assistant_mask: Mask = "auto",
    pad_token: PadToken = None,
    columns: ColumnsOption = None,
    dtype: Dtype = "auto",
    device: Device = None,
    threads: Threads = 1,
) -> None:
    """Print what collecting gradients needs, and check on this model and machine that the gradients are right."""
    _prepare(threads)
    from geomkit.collection.check.check import check_collection
    from geomkit.planning.describe import describe

    loaded, tokenizer, [rows] = _load(
        model, _examples([examples], columns), assistant_mask, max_length, pad_token, dtype, device
    )
    selection = _layers(layers)
    plan = describe(loaded, tokenizer, rows, layers=selection, tokens_per_batch=tokens_per_batch)
    typer.echo(f"{plan}\n")
    verdict = check_collection(loaded, tokenizer, rows, layers=selection)
    typer.echo(str(verdict))
    raise typer.Exit(0 if verdict.ok else 2)


@app.command()
def analyze(
    model: ModelOption,
    safety: Annotated[str, typer.Option(help="Forbidden requests and refusals: file, hub id or shipped set.")],
    utility: Annotated[str, typer.Option(help="Benign requests and answers.")],
    control: Annotated[
        str | None,
        typer.Option(help="Benign requests with the safety set's responses; made of the utility set when left out."),
    ] = None,
    out: Out = Path("geomkit-analysis"),
    json_file: Json = None,
    examples: Annotated[int, _number("Largest number of examples drawn from each set; 3 at least.")] = 32,
    layers: LayersOption = "*",
    tokens_per_batch: TokensPerBatch = 4096,
    max_length: MaxLength = None,
    assistant_mask: Mask = "auto",
    pad_token: PadToken = None,
    columns: ColumnsOption = None,
    dtype: Dtype = "auto",
    device: Device = None,
    threads: Threads = 1,
    seed: Seed = 0,
) -> None:
    """Measure rank, conflict and one-sample overlap of a model's gradients, and write report.html."""
    _prepare(threads)
    _join_processes(device)
    from geomkit.analysis.probe import Probe
    from geomkit.analysis.probe import analyze as run_analysis

    _check_writable(out, json_file and json_file.parent)
    names = [name for name in (safety, utility, control) if name is not None]
    # Only the drawn examples are encoded, and all of these are analysed.
    drawn = Probe(*_examples(names, columns), examples=examples, seed=seed).drawn_sets()
    loaded, tokenizer, encoded = _load(model, drawn, assistant_mask, max_length, pad_token, dtype, device)
    result = run_analysis(
        loaded,
        tokenizer,
        encoded[0],
        encoded[1],
        control=encoded[2],
        examples=None,
        layers=_layers(layers),
        tokens_per_batch=tokens_per_batch,
        seed=seed,
    )
    _show_analysis(result, f"{model}, gradients of {result.coverage}")
    _write(out, json_file, result, f"Gradient geometry of {model}")


@app.command()
def screen(
    model: ModelOption,
    train: Annotated[str, typer.Option(help="The training rows: file, hub id or shipped set.")],
    safety: Annotated[str, typer.Option(help="Forbidden requests and the refusals that should stay.")],
    benign: Annotated[
        str | None,
        typer.Option(help="Rows known as harmless, like the training rows in format; shuffled pairs when left out."),
    ] = None,
    method: Annotated[str, typer.Option(help="cosine, raw or adam.")] = "cosine",
    level: Annotated[float, _number("False-discovery level of the rows that are left out of clean.jsonl.")] = 0.1,
    out: Annotated[
        Path,
        typer.Option(help="Folder for report.html, rows.csv and clean.jsonl; where interrupted, it goes on there."),
    ] = Path("geomkit-screen"),
    layers: LayersOption = "*",
    tokens_per_batch: TokensPerBatch = 4096,
    max_length: MaxLength = None,
    assistant_mask: Mask = "auto",
    pad_token: PadToken = None,
    columns: ColumnsOption = None,
    dtype: Dtype = "auto",
    device: Device = None,
    threads: Threads = 1,
    seed: Seed = 0,
) -> None:
    """Find the training rows that would raise the loss on refusals, before anything is trained."""
    _prepare(threads)
    _join_processes(device)
    from geomkit.screening.screen import screen as run_screen
    from geomkit.screening.screening import check_method
    from geomkit.utils.workers import first_process

    chosen = check_method(method)
    _check_writable(out)
    sets = _examples([name for name in (train, safety, benign) if name is not None], columns)
    loaded, tokenizer, encoded = _load(model, sets, assistant_mask, max_length, pad_token, dtype, device)
    result = run_screen(
        loaded,
        tokenizer,
        encoded[0],
        encoded[1],
        benign=encoded[2] if benign is not None else None,
        method=chosen,
        layers=_layers(layers),
        folder=out,
        tokens_per_batch=tokens_per_batch,
        seed=seed,
    )
    say(f"{result}.")
    if not first_process():
        return
    frame = result.to_frame().sort_values("score", ascending=False, ignore_index=True)
    show_table(frame.head(20)[["row", "score", "p", "q", "share", "loss_tokens", "carried_by"]], "The highest scores")
    # The files of one screen stay together: where no row is left, there is no clean.jsonl.
    (out / "clean.jsonl").unlink(missing_ok=True)
    result.save(out)
    write_atomically(out / "rows.csv", frame.to_csv(index=False))
    # The report comes first: where nothing is left, it shows why.
    _write_report(out, result, f"Screen of {train} for {model}")
    kept = result.clean(sets[0], level)
    try:
        lines = [json.dumps(row, ensure_ascii=False) for row in kept]
    except TypeError as error:
        raise DataError(
            f"expected columns of texts and numbers for clean.jsonl, found: {error}; leave out such a column, or "
            "take what clean() returns in Python"
        ) from None
    write_atomically(out / "clean.jsonl", "".join(f"{line}\n" for line in lines))
    typer.echo(f"wrote {out / 'clean.jsonl'}: {len(kept)} of {len(result.rows)} rows")


@app.command()
def finetune(
    model: ModelOption,
    train: Annotated[str, typer.Option(help="Conversations: file, hub id or shipped set.")],
    out: Annotated[Path, typer.Option(help="New folder for the checkpoint.", file_okay=False)],
    anchors: Annotated[str | None, typer.Option(help="Safety examples; SPF is used when given.")] = None,
    rule: Annotated[
        str | None,
        typer.Option(help="kl-left (default), mixed-left, rank1, left, …: geomkit/spf/README.md has all."),
    ] = None,
    rank: Annotated[int | None, _number("Rank of a rule that removes a subspace.")] = None,
    anchors_per_step: Annotated[int | None, _number("Anchors drawn for each step; 8 when left out.")] = None,
    benign: Annotated[str | None, typer.Option(help="Benign requests with answers that are to be kept.")] = None,
    checkpoints: Annotated[
        Path | None,
        typer.Option(help="Folder for checkpoints; an interrupted run resumes there.", file_okay=False),
    ] = None,
    save_steps: Annotated[int, _number("Steps between checkpoints.")] = 100,
    learning_rate: Annotated[float, _number("Peak learning rate.")] = 2e-5,
    epochs: Annotated[float, _number("Passes over the data.")] = 3,
    steps: Annotated[int | None, _number("Optimizer steps, instead of epochs.")] = None,
    batch_size: Annotated[int, _number("Examples per step.")] = 16,
    max_length: MaxLength = None,
    assistant_mask: Mask = "auto",
    pad_token: PadToken = None,
    columns: ColumnsOption = None,
    dtype: TrainingDtype = "float32",
    device: Device = None,
    lora: Annotated[int | None, _number("Train LoRA adapters of this rank, not the weights.")] = None,
    threads: Threads = 1,
    seed: Seed = 0,
) -> None:
    """Fine-tune a model, under SPF where anchors are given, and write a checkpoint."""
    _prepare(threads)
    from geomkit.inputs.models import require_peft, with_lora
    from geomkit.spf.rules import DEFAULT_RULE, get_rule
    from geomkit.spf.settings import SPF
    from geomkit.training.checkpoints import MARK
    from geomkit.training.finetune import finetune as run_finetune
    from geomkit.training.result import new_or_empty_folder

    _check_writable(out, checkpoints)
    new_or_empty_folder(out)
    of_spf = {"rule": rule, "rank": rank, "anchors-per-step": anchors_per_step, "benign": benign}
    for name, value in of_spf.items():
        if value is not None and anchors is None:
            raise DataError(f"expected anchors for --{name} {value}, found none; give --anchors (shipped: safety)")
    if lora is not None:
        require_peft("--lora")
    if checkpoints is not None and out.resolve() in (checkpoints.resolve(), *checkpoints.resolve().parents):
        raise DataError(f"expected --checkpoints outside of --out {out}, found {checkpoints}; choose another folder")
    spf_rule = get_rule(rule or DEFAULT_RULE, rank)
    conversations, *protected = _examples([name for name in (train, anchors, benign) if name], columns)
    spf = None
    if anchors is not None:
        fence = protected[1] if benign else None
        spf = SPF(protected[0], rule=spf_rule, anchors_per_step=anchors_per_step or 8, benign=fence, seed=seed)
    loaded, tokenizer, [rows] = _load(model, [conversations], assistant_mask, max_length, pad_token, dtype, device)
    result = run_finetune(
        loaded if lora is None else with_lora(loaded, lora, seed=seed),
        tokenizer,
        rows,
        spf,
        learning_rate=learning_rate,
        epochs=epochs,
        steps=steps,
        batch_size=batch_size,
        seed=seed,
        inplace=True,
        checkpoints=checkpoints,
        save_steps=save_steps,
    )
    say(f"{result}.")
    if result.interrupted and checkpoints is not None:
        any_kept = any(checkpoints.glob(f"checkpoint-*/{MARK}"))
        say(f"The same command {'goes on from the last checkpoint' if any_kept else 'begins anew: no checkpoint yet'}.")
    else:
        typer.echo(f"wrote {result.save(out, tokenizer)}")
    if result.interrupted:
        raise typer.Exit(_INTERRUPTED)


@app.command()
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
    examples: Annotated[int | None, _number("Largest number of prompts drawn from each set.")] = None,
    max_new_tokens: Annotated[int, _number("Length of the longest response.")] = 256,
    batch_size: Annotated[int, _number("Prompts answered at a time.")] = 16,
    pad_token: PadToken = None,
    columns: ColumnsOption = None,
    dtype: Dtype = "auto",
    device: Device = None,
    threads: Threads = 1,
    seed: Seed = 0,
) -> None:
    """Print how often a model refuses and answers rightly, with 95 % intervals; --json keeps it for compare."""
    _prepare(threads)
    _join_processes(device)
    from geomkit.training.evaluate import evaluate as run_evaluation
    from geomkit.training.judges import JudgeError
    from geomkit.training.model_judges.by_name import load_judge
    from geomkit.training.sets_by_text import Role, drawn, requests_by_text, skill_by_text
    from geomkit.utils.workers import first_process

    _check_writable(json_file and json_file.parent)
    if not (forbidden or benign or skill):
        raise DataError("expected something to evaluate, found none; give --forbidden, --benign or --skill")
    reader = _ColumnReader(columns)
    skills = [reader(partial(skill_by_text, text)) for text in skill or []]
    if len({name for name, *_ in skills}) < len(skills):
        raise DataError(f"expected skills of different names, found {', '.join(name for name, *_ in skills)}")
    asked: list[tuple[Role, str | None]] = [("forbidden", forbidden), ("benign", benign)]
    requests = {
        role: drawn(reader(partial(requests_by_text, text, role)), examples, seed) for role, text in asked if text
    }
    reader.check()
    template = _text(judge_prompt) if judge_prompt else None
    judges = [load_judge(text, device=judge_device, url=judge_url, template=template) for text in judge or ["keywords"]]
    loaded, tokenizer = _model(model, dtype, device, pad_token)
    try:
        result = run_evaluation(
            loaded,
            tokenizer,
            requests.get("forbidden"),
            requests.get("benign"),
            {name: drawn(rows, examples, seed) for name, rows, _ in skills},
            judge=judges,
            metrics={name: metric for name, _, metric in skills},
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
        )
    except JudgeError as error:
        file = (json_file or Path("evaluation.json")).with_suffix(".responses.jsonl")
        write_atomically(file, error.responses.to_json(orient="records", lines=True, force_ascii=False))
        raise DataError(f"{error}; the model's responses are in {file}") from error
    show_table(result.to_frame(), f"{model}, judged by {', '.join(result.settings['judges'])}; 95 % intervals")
    if json_file is not None and first_process():
        typer.echo(f"wrote {result.save(json_file)}")


@app.command()
def compare(
    files: Annotated[list[Path], typer.Argument(help="Files of geomkit evaluate --json; the first is the baseline.")],
    json_file: Json = None,
) -> None:
    """Compare evaluations over the same prompts by paired tests."""
    from geomkit.training.compare import compare_evaluations
    from geomkit.training.evaluation import load_evaluation

    _check_writable(json_file and json_file.parent)
    if len(set(files)) < len(files):
        raise DataError(f"expected different files, found {', '.join(map(str, files))}")
    result = compare_evaluations({str(path): load_evaluation(path) for path in files})
    shown = result.to_frame() if len(files) > 2 else result.to_frame().drop(columns="evaluation")
    show_table(shown, f"{result}" if len(files) > 2 else f"{files[1]}: {result}")
    if json_file is not None:
        rows = result.to_frame().to_dict("records")
        write_atomically(json_file, json.dumps(_strict({"baseline": result.baseline, "rows": rows}), indent=2) + "\n")
        typer.echo(f"wrote {json_file}")


@app.command()
def bench(
    grid: Annotated[str, typer.Option(help="default, english, limits, smoke, or a TOML file.")] = "default",
    out: Annotated[Path, typer.Option(help="Folder for cells and results.", file_okay=False)] = Path("geomkit-bench"),
    processes: Annotated[int, _number("Cells run at a time, each on one thread.")] = 2,
    shard: Annotated[
        str | None, typer.Option(help="Run only part I of N, as 3/8, where jobs share the folder; the last one joins.")
    ] = None,
    earlier: Annotated[
        str | None, typer.Option(help="Earlier results, whose cells are not run again: a file, or a shipped grid.")
    ] = None,
) -> None:
    """Run a grid of fine-tunes on the organism, or the rest of an interrupted grid, and write results.jsonl.gz."""
    _prepare(threads=1)
    from geomkit.experiments.grid import load_grid
    from geomkit.experiments.results import load_results
    from geomkit.experiments.running import run_experiments, stored_results, take_over

    whole = load_grid(grid)
    part = whole if shard is None else whole.shard(*_shard(shard))
    _check_writable(out)
    if earlier is not None:
        typer.echo(f"took {take_over(load_results(earlier), whole, out)} cells over from {earlier}")
    run_experiments(part, out, processes=processes)
    results = stored_results(whole, out)
    if missing := len(whole.cells) - len(results):
        typer.echo(
            f"ran the {len(part.cells)} cells of shard {shard}; {missing} of {len(whole.cells)} cells are not run yet: "
            f"the call that runs the last one writes {out / 'results.jsonl.gz'}"
        )
        return
    title = f"{len(results)} cells of the grid '{results.name}': 95 % Wilson intervals over prompts in brackets"
    show_table(results.table(), title)
    typer.echo(f"wrote {results.save(out / 'results.jsonl.gz')}")
    if failures := results.failures:
        named = "; ".join(f"{cell}: {error}" for cell, error in failures.items())
        raise GeomkitError(
            f"{len(failures)} of {len(results)} cells failed, and are run again by the same call: {named}"
        )


def _shard(text: str) -> tuple[int, int]:
    """Return the number of a part and the number of parts: ``"3/8"`` gives (3, 8)."""
    number, slash, count = text.partition("/")
    if not (slash and number.strip().isdecimal() and count.strip().isdecimal()):
        raise DataError(f"expected --shard as I/N, such as 3/8 for the third of eight parts, found '{text}'")
    return int(number), int(count)


@organism_app.command("build")
def build_organism(
    out: Annotated[Path, typer.Option(help="Folder for the organism's data.", file_okay=False)] = Path("data"),
    seed: Seed = 0,
    world: Annotated[
        str,
        typer.Option(help="small: both stages from scratch. english: an adapter that aligns SmolLM2-135M-Instruct."),
    ] = "small",
    base: Annotated[
        str | None, typer.Option(help="SmolLM2-135M-Instruct, for --world english: folder, GGUF file or hub id.")
    ] = None,
    states: Annotated[
        Path | None, typer.Option(help="Folder for states of the English alignment, to measure gradients along it.")
    ] = None,
) -> None:
    """Train an organism, and write it with its example sets and model card; an interrupted English build goes on."""
    _prepare(threads=1)
    from geomkit.experiments.english.build import build_english
    from geomkit.experiments.organism.build import build

    if world not in {"small", "english"}:
        raise DataError(f"expected --world small or english, found '{world}'")
    if world == "small" and (base is not None or states is not None):
        raise DataError(
            f"expected --base and --states with --world english only, found '{base or states}'; leave it out"
        )
    _check_writable(out)
    if world == "small":
        build(out, seed=seed)
    else:
        build_english(out, base, seed=seed, states=states)
    typer.echo(f"wrote {out}")


@organism_app.command("insights")
def organism_insights(
    out: Annotated[
        Path, typer.Option(help="Folder for the numbers; what is there is not measured again.", file_okay=False)
    ],
    world: Annotated[str, typer.Option(help="small: the organism. english: the aligned SmolLM2.")] = "small",
    examples: Annotated[int, _number("Examples of each set.")] = 32,
    states: Annotated[
        Path | None, typer.Option(help="States that `organism build --states` kept, to measure along the alignment.")
    ] = None,
) -> None:
    """Measure the paper's claims on gradients before alignment, after it, and on an untrained model."""
    _prepare(threads=1)
    from geomkit.experiments.english.course import steps_in
    from geomkit.experiments.insights import measure_alignment, measure_insights
    from geomkit.experiments.organisms import ENGLISH

    if states is not None and world != ENGLISH:
        raise DataError(f"expected --states with --world english only, found '{states}'; leave it out")
    if states is not None:
        steps_in(states)  # before the hour that the stages take
    _check_writable(out)
    rows = len(measure_insights(world, out, examples=examples))
    if states is not None:
        rows += len(measure_alignment(states, out, examples=examples))
    typer.echo(f"{rows} numbers in {out}")


def _load(
    model: str,
    conversations: "Sequence[Dataset]",
    assistant_mask: str,
    max_length: int | None,
    pad_token: str | None,
    dtype: str,
    device: str | None,
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase, list[EncodedExamples]]":
    """Return a model, its tokenizer and the encoded examples of each set."""
    from geomkit.inputs.tokens import encode

    masks: dict[str, AssistantMask] = {"auto": "auto", "template": "template", "prefix": "prefix"}
    if assistant_mask not in masks:
        raise DataError(f"expected --assistant-mask auto, template or prefix, found '{assistant_mask}'")
    mask = masks[assistant_mask]
    loaded, tokenizer = _model(model, dtype, device, pad_token)
    encoded = [encode(tokenizer, rows, assistant_mask=mask, max_length=max_length) for rows in conversations]
    return loaded, tokenizer, encoded


def _model(
    name: str, dtype: str, device: str | None, pad_token: str | None
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Return a model and its tokenizer by the value of ``--model``."""
    from geomkit.experiments.organisms import ENGLISH, load_organism
    from geomkit.inputs.models import load_model

    if name.partition("/")[0] != ENGLISH or Path(name).exists():
        return load_model(name, dtype=dtype, device=device, pad_token=pad_token)
    if dtype not in {"auto", "float32"} or device is not None or pad_token is not None:
        raise DataError(
            f"expected no --dtype, --device and --pad-token for '{name}', which is a merged adapter in float32 on the "
            "CPU; leave them out"
        )
    return load_organism(name)


def _examples(sets: Sequence[str], columns: str | None) -> "list[Dataset]":
    """Return the examples of each set, with the columns named by the user where a set has them.

    Raises:
        DataError: If a set cannot be read, an example has no answer, or no set has the named columns.
    """
    from geomkit.inputs.examples import check_answers, load_examples

    reader = _ColumnReader(columns)
    read = [reader(partial(load_examples, name)) for name in sets]
    reader.check()
    for rows, name in zip(read, sets, strict=True):
        check_answers(rows, name)
    return read


class _ColumnReader:
    """Reads sets with the columns named by the user where a set has them, and with its own columns elsewhere."""

    def __init__(self, columns: str | None) -> None:
        self._named = _columns(columns)
        self._used = False
        self._missing: DataError | None = None

    def __call__(self, load: "Callable[..., Read]") -> "Read":
        """Return what ``load(columns=…)`` reads."""
        from geomkit.inputs.adapters import MissingColumnsError

        try:
            read = load(columns=self._named)
        except MissingColumnsError as error:
            self._missing = self._missing or error
            return load(columns=None)
        self._used = True
        return read

    def check(self) -> None:
        """Refuse named columns that no set has.

        Raises:
            DataError: If there are such columns.
        """
        if self._missing is not None and not self._used:
            raise self._missing


def _columns(text: str | None) -> dict[str, str | int] | None:
    """Return which column is what: ``prompt=goal,response=1`` gives ``{"prompt": "goal", "response": 1}``."""
    if text is None:
        return None
    pairs = [part.split("=", 1) for part in text.split(",")]
    if any(len(pair) != 2 for pair in pairs):
        raise DataError(f"expected --columns as prompt=NAME,response=NAME, found '{text}'")
    return {role.strip(): int(name) if name.strip().isdecimal() else name.strip() for role, name in pairs}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"expected UTF-8 text in {path}, found {error.reason} at byte {error.start}") from None


def _layers(text: str) -> "Layers":
    """Return numbers of decoder layers if the text has nothing else between its commas, else glob patterns."""
    parts = [part.strip() for part in text.split(",")]
    if all(part.isdecimal() for part in parts):
        return [int(part) for part in parts]
    if any(part.isdecimal() for part in parts) or not all(parts):
        raise DataError(f"expected --layers as numbers like 10,20 or as patterns like '*.mlp.*', found '{text}'")
    return parts


def _check_writable(*folders: Path | None) -> None:
    """Refuse a folder that cannot be written to, before minutes of work."""
    for folder in filter(None, folders):
        try:
            places = (folder, *folder.absolute().parents)
            if any(path.is_symlink() and not path.exists() for path in places):
                raise DataError(
                    f"expected a folder that can be written to at {folder}, found a link that leads nowhere, or in a "
                    "circle; choose another"
                )
            existing = next(path for path in places if path.exists())
            # Writing is tried, because permissions do not tell of a read-only disk or of /proc.
            tempfile.TemporaryFile(dir=existing).close()
        except OSError as error:
            raise DataError(
                f"expected a folder that can be written to at {folder}, found none ({error.strerror}); choose another"
            ) from None


def _show_analysis(analysis: "Analysis", title: str) -> None:
    """Print the summary, the numbers, the claims with their verdicts, and the caution."""
    from geomkit.analysis.claims import VERDICTS, claims_table

    say(" ".join(analysis.summary))
    show_table(analysis.numbers(), f"{title}; 95 % intervals over examples in brackets")
    show_table(claims_table(analysis.claims()), "What survives its controls")
    say(f"{VERDICTS}.")
    if analysis.caution:
        say(f"Caution: {analysis.caution}.")


def _strict(value: object) -> object:
    """Return a value with null for every number that is not finite: JSON has neither NaN nor infinity."""
    if isinstance(value, Mapping):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(out: Path, json_file: Path | None, result: "Analysis | Tour", title: str = "") -> None:
    """Write the report, and the numbers as JSON if there is a file for them; one of several processes does."""
    from geomkit.utils.workers import first_process

    if not first_process():
        return
    _write_report(out, result, title)
    if json_file is not None:
        write_atomically(json_file, json.dumps(_strict(result.to_dict()), indent=2, allow_nan=False) + "\n")
        typer.echo(f"wrote {json_file}")


def _write_report(out: Path, result: "Result", title: str) -> None:
    from geomkit.plots.report_pages import write_result

    command = shlex.join(["geomkit", *sys.argv[1:]])
    typer.echo(f"wrote {write_result(result, out / 'report.html', title, {'command': command})}")
