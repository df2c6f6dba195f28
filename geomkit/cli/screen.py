"""The command ``geomkit screen``: what each training row would do to the refusals."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from geomkit.cli.inputs import layers_by_text, load_and_encode, read_sets
from geomkit.cli.options import (
    ColumnsOption,
    Device,
    Dtype,
    LayersOption,
    Mask,
    MaxLength,
    ModelOption,
    PadToken,
    Seed,
    Threads,
    TokensPerBatch,
    number,
)
from geomkit.cli.outputs import check_writable, write_report
from geomkit.cli.start import join_processes, prepare
from geomkit.errors import DataError
from geomkit.utils.files import write_atomically
from geomkit.utils.terminal import say, show_table

if TYPE_CHECKING:
    from datasets import Dataset

    from geomkit.screening.screening import Screening


def screen(
    model: ModelOption,
    train: Annotated[str, typer.Option(help="The training rows: file, hub id or shipped set.")],
    safety: Annotated[str, typer.Option(help="Forbidden requests and the refusals that should stay.")],
    benign: Annotated[
        str | None,
        typer.Option(help="Rows known as harmless, like the training rows in format; shuffled pairs when left out."),
    ] = None,
    obeyed: Annotated[
        str | None, typer.Option(help="Forbidden requests with answers that obey: rows are compared with both sides.")
    ] = None,
    method: Annotated[str, typer.Option(help="cosine, raw or adam.")] = "cosine",
    level: Annotated[float, number("False-discovery level of the rows that are left out of clean.jsonl.")] = 0.1,
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
    prepare(threads)
    join_processes(device)
    from geomkit.screening.screen import screen as run_screen
    from geomkit.screening.screening import check_method
    from geomkit.utils.workers import first_process

    chosen = check_method(method)
    check_writable(out)
    names = {"train": train, "safety": safety, "benign": benign, "obeyed": obeyed}
    given = {role: name for role, name in names.items() if name is not None}
    sets = read_sets(list(given.values()), columns)
    loaded, tokenizer, encoded = load_and_encode(model, sets, assistant_mask, max_length, pad_token, dtype, device)
    by_role = dict(zip(given, encoded, strict=True))
    result = run_screen(
        loaded,
        tokenizer,
        by_role["train"],
        by_role["safety"],
        benign=by_role.get("benign"),
        obeyed=by_role.get("obeyed"),
        method=chosen,
        layers=layers_by_text(layers),
        folder=out,
        tokens_per_batch=tokens_per_batch,
        seed=seed,
    )
    say(f"{result}.")
    if first_process():
        _write_screen(out, result, sets[0], level, f"Screen of {train} for {model}")


def _write_screen(out: Path, result: "Screening", rows: "Dataset", level: float, title: str) -> None:
    """Print the highest scores, and write the screen, its table, its report and the rows that it leaves.

    Args:
        out: The folder.
        result: The screen.
        rows: The rows that were screened, in their order.
        level: False-discovery level of the rows that are left out of ``clean.jsonl``.
        title: Title of the report.
    """
    frame = result.to_frame().sort_values("score", ascending=False, ignore_index=True)
    show_table(frame.head(20)[["row", "score", "p", "q", "share", "loss_tokens", "carried_by"]], "The highest scores")
    # The files of one screen stay together: where no row is left, there is no clean.jsonl.
    (out / "clean.jsonl").unlink(missing_ok=True)
    result.save(out)
    write_atomically(out / "rows.csv", frame.to_csv(index=False))
    # The report comes first: where nothing is left, it shows why.
    write_report(out, result, title)
    _write_clean(out / "clean.jsonl", result.clean(rows, level), len(rows))


def _write_clean(file: Path, kept: "Dataset", of: int) -> None:
    """Write the rows that are left, and print how many of all rows they are.

    Raises:
        DataError: If a row has a value that JSON does not have.
    """
    try:
        lines = [json.dumps(row, ensure_ascii=False) for row in kept]
    except TypeError as error:
        raise DataError(
            f"expected columns of texts and numbers for clean.jsonl, found: {error}; leave out such a column, or "
            "take what clean() returns in Python"
        ) from None
    write_atomically(file, "".join(f"{line}\n" for line in lines))
    typer.echo(f"wrote {file}: {len(kept)} of {of} rows")
