"""The commands ``geomkit organism build`` and ``geomkit organism insights``."""

from pathlib import Path
from typing import Annotated

import typer

from geomkit.cli.options import Seed, number
from geomkit.cli.outputs import check_writable
from geomkit.cli.start import prepare
from geomkit.errors import DataError


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
    prepare(threads=1)
    from geomkit.experiments.english.build import build_english
    from geomkit.experiments.organism.build import build

    if world not in {"small", "english"}:
        raise DataError(f"expected --world small or english, found '{world}'")
    if world == "small" and (base is not None or states is not None):
        raise DataError(
            f"expected --base and --states with --world english only, found '{base or states}'; leave it out"
        )
    check_writable(out)
    if world == "small":
        build(out, seed=seed)
    else:
        build_english(out, base, seed=seed, states=states)
    typer.echo(f"wrote {out}")


def organism_insights(
    out: Annotated[
        Path, typer.Option(help="Folder for the numbers; what is there is not measured again.", file_okay=False)
    ],
    world: Annotated[str, typer.Option(help="small: the organism. english: the aligned SmolLM2.")] = "small",
    examples: Annotated[int, number("Examples of each set.")] = 32,
    states: Annotated[
        Path | None, typer.Option(help="States that `organism build --states` kept, to measure along the alignment.")
    ] = None,
) -> None:
    """Measure the paper's claims on gradients before alignment, after it, and on an untrained model."""
    prepare(threads=1)
    from geomkit.experiments.english.course import steps_in
    from geomkit.experiments.insights import measure_alignment, measure_insights
    from geomkit.experiments.organisms import ENGLISH

    if states is not None and world != ENGLISH:
        raise DataError(f"expected --states with --world english only, found '{states}'; leave it out")
    if states is not None:
        steps_in(states)  # before the hour that the stages take
    check_writable(out)
    rows = len(measure_insights(world, out, examples=examples))
    if states is not None:
        rows += len(measure_alignment(states, out, examples=examples))
    typer.echo(f"{rows} numbers in {out}")
