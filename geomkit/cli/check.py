"""The command ``geomkit check``: whether gradients can be collected from a model, and at what cost."""

from typing import Annotated

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
    Threads,
    TokensPerBatch,
)
from geomkit.cli.start import prepare


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
    prepare(threads)
    from geomkit.collection.check.check import check_collection
    from geomkit.planning.describe import describe

    loaded, tokenizer, [rows] = load_and_encode(
        model, read_sets([examples], columns), assistant_mask, max_length, pad_token, dtype, device
    )
    selection = layers_by_text(layers)
    plan = describe(loaded, tokenizer, rows, layers=selection, tokens_per_batch=tokens_per_batch)
    typer.echo(f"{plan}\n")
    verdict = check_collection(loaded, tokenizer, rows, layers=selection)
    typer.echo(str(verdict))
    raise typer.Exit(0 if verdict.ok else 2)
