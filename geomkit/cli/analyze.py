"""The command ``geomkit analyze``: all measurements of a model's gradients at once."""

from pathlib import Path
from typing import Annotated

import typer

from geomkit.cli.inputs import layers_by_text, load_and_encode, read_sets
from geomkit.cli.options import (
    ColumnsOption,
    Device,
    Dtype,
    Json,
    LayersOption,
    Mask,
    MaxLength,
    ModelOption,
    Out,
    PadToken,
    Seed,
    Threads,
    TokensPerBatch,
    number,
)
from geomkit.cli.outputs import check_writable, show_analysis, write_results
from geomkit.cli.start import join_processes, prepare


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
    examples: Annotated[int, number("Largest number of examples drawn from each set; 3 at least.")] = 32,
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
    prepare(threads)
    join_processes(device)
    from geomkit.analysis.probe import Probe
    from geomkit.analysis.probe import analyze as run_analysis

    check_writable(out, json_file and json_file.parent)
    names = [name for name in (safety, utility, control) if name is not None]
    # Only the drawn examples are encoded, and all of these are analysed.
    drawn = Probe(*read_sets(names, columns), examples=examples, seed=seed).drawn_sets()
    loaded, tokenizer, encoded = load_and_encode(model, drawn, assistant_mask, max_length, pad_token, dtype, device)
    result = run_analysis(
        loaded,
        tokenizer,
        encoded[0],
        encoded[1],
        control=encoded[2],
        examples=None,
        layers=layers_by_text(layers),
        tokens_per_batch=tokens_per_batch,
        seed=seed,
    )
    show_analysis(result, f"{model}, gradients of {result.coverage}")
    write_results(out, json_file, result, f"Gradient geometry of {model}")
