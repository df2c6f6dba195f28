"""The command ``geomkit bench``: a grid of fine-tunes."""

from pathlib import Path
from typing import Annotated

import typer

from geomkit.cli.options import number
from geomkit.cli.outputs import check_writable
from geomkit.cli.start import prepare
from geomkit.errors import DataError, GeomkitError
from geomkit.utils.terminal import show_table


def bench(
    grid: Annotated[str, typer.Option(help="default, english, limits, smoke, or a TOML file.")] = "default",
    out: Annotated[Path, typer.Option(help="Folder for cells and results.", file_okay=False)] = Path("geomkit-bench"),
    processes: Annotated[int, number("Cells run at a time, each on one thread.")] = 2,
    shard: Annotated[
        str | None, typer.Option(help="Run only part I of N, as 3/8, where jobs share the folder; the last one joins.")
    ] = None,
    earlier: Annotated[
        str | None, typer.Option(help="Earlier results, whose cells are not run again: a file, or a shipped grid.")
    ] = None,
) -> None:
    """Run a grid of fine-tunes on the organism, or the rest of an interrupted grid, and write results.jsonl.gz."""
    prepare(threads=1)
    from geomkit.experiments.grid import load_grid
    from geomkit.experiments.results import load_results
    from geomkit.experiments.running import run_experiments, stored_results, take_over

    whole = load_grid(grid)
    part = whole if shard is None else whole.shard(*_shard(shard))
    check_writable(out)
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
    """Return the number of a part and the number of parts: ``"3/8"`` gives (3, 8).

    Raises:
        DataError: If the text has another form.
    """
    number, slash, count = text.partition("/")
    if not (slash and number.strip().isdecimal() and count.strip().isdecimal()):
        raise DataError(f"expected --shard as I/N, such as 3/8 for the third of eight parts, found '{text}'")
    return int(number), int(count)
