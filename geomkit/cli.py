"""The command line: ``geomkit tour``, ``check``, ``analyze``, ``finetune``, ``bench``, ``organism build``."""

import datetime as dt
import json
import logging
import math
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from geomkit.errors import DataError, GeomkitError
from geomkit.utils.files import write_atomically
from geomkit.version import __version__

if TYPE_CHECKING:
    import pandas as pd

    from geomkit.inputs.tokens import AssistantMask
    from geomkit.plots.report import Section

app = typer.Typer(
    help="Gradient geometry of safety-aligned LLMs, and SPF.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
organism_app = typer.Typer(help="The model organism that ships with geomkit.", no_args_is_help=True)
app.add_typer(organism_app, name="organism")

Out = Annotated[Path, typer.Option(help="Folder for report.html.", file_okay=False)]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the numbers to this file.", dir_okay=False)]
Seed = Annotated[int, typer.Option(help="Seed of everything drawn at random.", min=0)]
ModelOption = Annotated[str, typer.Option(help="Folder, hub id, organism/aligned or organism/base.")]
PadToken = Annotated[str | None, typer.Option(help="Pad token, for tokenizers that name none.")]
Mask = Annotated[str, typer.Option("--assistant-mask", help="template (its markers) or prefix (without markers).")]
MaxLength = Annotated[int | None, typer.Option(help="Cut longer examples to this many tokens.", min=2)]
Layers = Annotated[str, typer.Option(help="Glob pattern on parameter names.")]
TokensPerBatch = Annotated[int, typer.Option(help="Most tokens run at a time, with padding.", min=1)]
Threads = Annotated[int, typer.Option(help="CPU threads.", min=1)]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16, …")]
TrainingDtype = Annotated[
    str, typer.Option("--dtype", help="float32, auto, …; AdamW in pure bfloat16 rounds small updates away.")
]


def main() -> None:
    """Run the command line; a mistake in the input prints one line and exits with 1."""
    _quiet()
    try:
        app()
    except GeomkitError as error:
        sys.stderr.write(f"geomkit: {' '.join(str(error).split())}\n")
        sys.exit(1)


def _quiet() -> None:
    """Keep a line of stages on the terminal, and other libraries' chatter off it."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("geomkit").setLevel(logging.INFO)


def _prepare(threads: int) -> None:
    import datasets
    import huggingface_hub
    import torch
    from transformers.utils import logging as transformers_logging

    huggingface_hub.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    datasets.disable_progress_bars()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # More threads are many times slower on models as small as the organism, when the machine is busy.
    torch.set_num_threads(threads)


def _version(show: bool) -> None:
    if show:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say the version.")
    ] = False,
) -> None:
    """Gradient geometry of safety-aligned LLMs, and SPF."""


@app.command()
def tour(out: Out = Path("geomkit-tour"), json_file: Json = None, seed: Seed = 0) -> None:
    """Walk the whole way once on the shipped organism, and write report.html."""
    _prepare(threads=1)
    from geomkit.analysis.claims import claims_table
    from geomkit.experiments.tour import run_tour
    from geomkit.plots.report_pages import tour_sections

    _check_writable(out, json_file and json_file.parent)
    found = run_tour(seed=seed)
    _show(found.to_frame(), "What fine-tuning did, with and without SPF")
    _show(claims_table(found.analysis.claims()), "What the gradients look like, and what survives its controls")
    _write(out, json_file, "A tour of geomkit", tour_sections(found), found.to_dict())


@app.command()
def check(
    model: ModelOption,
    examples: Annotated[str, typer.Option(help="Conversations: JSONL file, hub id or shipped set.")],
    layers: Layers = "*",
    tokens_per_batch: TokensPerBatch = 4096,
    max_length: MaxLength = None,
    assistant_mask: Mask = "template",
    pad_token: PadToken = None,
    dtype: Dtype = "auto",
    threads: Threads = 1,
) -> None:
    """Say what collecting gradients would need, and measure whether they can be trusted on this model and machine."""
    _prepare(threads)
    from geomkit.collection.check.check import check_collection
    from geomkit.collection.describe.describe import describe
    from geomkit.inputs.examples import load_examples
    from geomkit.inputs.models import load_model
    from geomkit.inputs.tokens import encode

    conversations = load_examples(examples)
    loaded, tokenizer = load_model(model, dtype=dtype, pad_token=pad_token)
    rows = encode(tokenizer, conversations, assistant_mask=_mask(assistant_mask), max_length=max_length)
    plan = describe(
        loaded,
        tokenizer,
        rows,
        layers=layers,
        tokens_per_batch=tokens_per_batch,
    )
    typer.echo(f"{plan}\n")
    found = check_collection(loaded, tokenizer, rows, layers=layers)
    typer.echo(str(found))
    raise typer.Exit(0 if found.ok else 2)


@app.command()
def analyze(
    model: ModelOption,
    safety: Annotated[str, typer.Option(help="Forbidden requests and refusals: JSONL file, hub id or shipped set.")],
    utility: Annotated[str, typer.Option(help="Benign requests and answers.")],
    control: Annotated[
        str | None, typer.Option(help="Benign requests with the safety set's responses; made of the utility set's.")
    ] = None,
    out: Out = Path("geomkit-analysis"),
    json_file: Json = None,
    examples: Annotated[int, typer.Option(help="Use no more than this many of each.", min=3)] = 32,
    layers: Layers = "*",
    tokens_per_batch: TokensPerBatch = 4096,
    max_length: MaxLength = None,
    assistant_mask: Mask = "template",
    pad_token: PadToken = None,
    dtype: Dtype = "auto",
    threads: Threads = 1,
    seed: Seed = 0,
) -> None:
    """Measure rank, conflict and one-sample overlap of a model's gradients, and write report.html."""
    _prepare(threads)
    from geomkit.analysis.claims import claims_table
    from geomkit.analysis.probe import analyze as run_analysis
    from geomkit.inputs.examples import load_examples
    from geomkit.inputs.models import load_model
    from geomkit.inputs.tokens import encode
    from geomkit.plots.report_pages import analysis_sections

    _check_writable(out, json_file and json_file.parent)
    mask = _mask(assistant_mask)
    sets = [load_examples(name) for name in (safety, utility, control) if name is not None]
    loaded, tokenizer = load_model(model, dtype=dtype, pad_token=pad_token)
    safe, useful, *controls = (encode(tokenizer, rows, assistant_mask=mask, max_length=max_length) for rows in sets)
    found = run_analysis(
        loaded,
        tokenizer,
        safe,
        useful,
        control=controls[0] if controls else None,
        examples=examples,
        layers=layers,
        tokens_per_batch=tokens_per_batch,
        seed=seed,
    )
    _show(found.to_frame(), f"{model}: {found.coverage}")
    _show(claims_table(found.claims()), "What survives its controls")
    if found.caution:
        typer.echo(f"caution: {found.caution}")
    _write(out, json_file, f"Gradient geometry of {model}", analysis_sections(found), found.to_dict())


@app.command()
def finetune(
    model: ModelOption,
    train: Annotated[str, typer.Option(help="Conversations: JSONL file, hub id or shipped set.")],
    out: Annotated[Path, typer.Option(help="New folder for the checkpoint.", file_okay=False)],
    anchors: Annotated[str | None, typer.Option(help="Safety examples; SPF is used when given.")] = None,
    rule: Annotated[
        str | None, typer.Option(help="mixed-left (default), rank1, left, cone, …: the README has all.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of a rule that removes a subspace.", min=1)] = None,
    anchors_per_step: Annotated[int, typer.Option(help="Anchors drawn for each step.", min=1)] = 8,
    benign: Annotated[str | None, typer.Option(help="Benign examples that SPF keeps answered.")] = None,
    checkpoints: Annotated[
        Path | None, typer.Option(help="Folder for checkpoints; an interrupted run goes on from it.", file_okay=False)
    ] = None,
    save_steps: Annotated[int, typer.Option(help="Steps between checkpoints.", min=1)] = 100,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.", min=0)] = 2e-5,
    epochs: Annotated[float, typer.Option(help="Passes over the data.", min=0)] = 3,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps, instead of epochs.", min=1)] = None,
    batch_size: Annotated[int, typer.Option(help="Examples per step.", min=1)] = 16,
    max_length: MaxLength = None,
    assistant_mask: Mask = "template",
    pad_token: PadToken = None,
    dtype: TrainingDtype = "float32",
    threads: Threads = 1,
    seed: Seed = 0,
) -> None:
    """Fine-tune a model, under SPF where anchors are given, and write a checkpoint."""
    _prepare(threads)
    from geomkit.inputs.examples import load_examples
    from geomkit.inputs.models import load_model
    from geomkit.inputs.tokens import encode
    from geomkit.spf.rules import DEFAULT_RULE, get_rule
    from geomkit.spf.settings import SPF
    from geomkit.training.finetune import finetune as run_finetune
    from geomkit.training.finetune import free_folder

    _check_writable(out, checkpoints)
    free_folder(out)
    for name, value in (("rule", rule), ("benign", benign)):
        if value is not None and anchors is None:
            raise DataError(f"expected anchors for the {name} '{value}', found none; give --anchors (shipped: safety)")
    if checkpoints is not None and out.resolve() in (checkpoints.resolve(), *checkpoints.resolve().parents):
        raise DataError(f"expected --checkpoints outside of --out {out}, found {checkpoints}; choose another folder")
    chosen = get_rule(rule or DEFAULT_RULE, rank)
    rows = load_examples(train)
    mask = _mask(assistant_mask)
    spf = None
    if anchors is not None:
        safe = load_examples(anchors)
        fence = load_examples(benign) if benign else None
        spf = SPF(safe, rule=chosen, anchors_per_step=anchors_per_step, benign=fence, seed=seed)
    loaded, tokenizer = load_model(model, dtype=dtype, pad_token=pad_token)
    result = run_finetune(
        loaded,
        tokenizer,
        encode(tokenizer, rows, assistant_mask=mask, max_length=max_length),
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
    if result.certificate:
        typer.echo(str(result.certificate))
    typer.echo(f"wrote {result.save(out, tokenizer)}")


@app.command()
def bench(
    grid: Annotated[str, typer.Option(help="default, limits, smoke, or a TOML file.")] = "default",
    out: Annotated[Path, typer.Option(help="Folder for cells and results.", file_okay=False)] = Path("geomkit-bench"),
    processes: Annotated[int, typer.Option(help="Cells run at a time, each on one thread.", min=1)] = 2,
) -> None:
    """Run a grid of fine-tunes on the organism, go on where it was interrupted, and write results.jsonl.gz."""
    _prepare(threads=1)
    from geomkit.experiments.running import run_experiments

    _check_writable(out)
    found = run_experiments(grid, out, processes=processes)
    _show(
        found.table(), f"{len(found)} cells of the grid '{found.name}': 95 % Wilson intervals over prompts in brackets"
    )
    typer.echo(f"wrote {found.save(out / 'results.jsonl.gz')}")


@organism_app.command("build")
def build_organism(
    out: Annotated[Path, typer.Option(help="Folder for the organism's data.", file_okay=False)] = Path("data"),
    seed: Seed = 0,
) -> None:
    """Train the organism again from scratch, both stages, with its sets and its model card."""
    _prepare(threads=1)
    from geomkit.experiments.organism.build import build

    _check_writable(out)
    build(out, seed=seed)
    typer.echo(f"wrote {out}")


def _check_writable(*folders: Path | None) -> None:
    """Refuse, before minutes of work, a folder that the results could not be written to."""
    for folder in filter(None, folders):
        try:
            existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
            # Tried out, as permissions say nothing of a read-only disk or of /proc.
            tempfile.TemporaryFile(dir=existing).close()
        except OSError as error:
            raise DataError(
                f"expected a folder that can be written to at {folder}, found none ({error.strerror}); choose another"
            ) from None


def _mask(name: str) -> "AssistantMask":
    if name == "template":
        return "template"
    if name == "prefix":
        return "prefix"
    raise DataError(f"expected --assistant-mask template or prefix, found '{name}'")


def _show(frame: "pd.DataFrame", title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in frame.columns:
        table.add_column(str(column))
    for row in frame.itertuples(index=False):
        table.add_row(*(_cell(value) for value in row))
    Console().print(table)


def _cell(value: object) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _strict(value: object) -> object:
    """Put null where a number is not finite: JSON knows neither NaN nor infinity."""
    if isinstance(value, Mapping):
        return {key: _strict(held) for key, held in value.items()}
    if isinstance(value, list):
        return [_strict(held) for held in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(
    out: Path, json_file: Path | None, title: str, sections: "list[Section]", numbers: Mapping[str, object]
) -> None:
    from geomkit.plots.report import write_report

    page = write_report(out / "report.html", title, sections, date=dt.datetime.now(tz=dt.UTC).date())
    typer.echo(f"wrote {page}")
    if json_file is not None:
        write_atomically(json_file, json.dumps(_strict(numbers), indent=2, allow_nan=False) + "\n")
        typer.echo(f"wrote {json_file}")
