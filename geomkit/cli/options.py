"""Options that several commands share, and numeric options with a check of their range."""

from pathlib import Path
from typing import Annotated, Any

import typer

from geomkit.errors import DataError
from geomkit.utils.options import check_option


def number(text: str) -> Any:  # typer's own options are untyped
    """Return a numeric option with a help text, whose range is that of its name in the table of all options."""
    return typer.Option(help=text, callback=_in_range)


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


Out = Annotated[Path, typer.Option(help="Folder for report.html.", file_okay=False)]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the numbers to this file.", dir_okay=False)]
Seed = Annotated[int, number("Seed of all random draws.")]
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
MaxLength = Annotated[int | None, number("Cut longer examples to this many tokens.")]
LayersOption = Annotated[
    str, typer.Option("--layers", help="Glob pattern on parameter names, or numbers of decoder layers, as in 10,20.")
]
TokensPerBatch = Annotated[int, number("Largest number of tokens in a batch, padding included.")]
Threads = Annotated[int, number("CPU threads.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …; a GPU if there is one when left out.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16, …")]
TrainingDtype = Annotated[
    str, typer.Option("--dtype", help="float32, auto, …; AdamW in pure bfloat16 rounds small updates away.")
]
