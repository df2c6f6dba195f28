"""The command line ``geomkit``: its commands in the order of its help, and errors as one line."""

import errno
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from geomkit.cli.analyze import analyze
from geomkit.cli.bench import bench
from geomkit.cli.check import check
from geomkit.cli.compare import compare
from geomkit.cli.evaluate import evaluate
from geomkit.cli.finetune import finetune
from geomkit.cli.organism import build_organism, organism_insights
from geomkit.cli.screen import screen
from geomkit.cli.start import quiet
from geomkit.cli.tour import tour
from geomkit.errors import GeomkitError
from geomkit.version import __version__

COMMANDS: tuple[Callable[..., None], ...] = (tour, check, analyze, screen, finetune, evaluate, compare, bench)

app = typer.Typer(
    help="Gradient geometry of safety-aligned LLMs, and SPF.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
organism_app = typer.Typer(help="The model organisms that ship with geomkit.", no_args_is_help=True)

for command in COMMANDS:
    app.command()(command)
organism_app.command("build")(build_organism)
organism_app.command("insights")(organism_insights)
app.add_typer(organism_app, name="organism")

_OF_FILES = {errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO, errno.EMFILE}
"""Errors of a disk, which need not name a file."""


def main() -> None:
    """Run the command line; a wrong input, a full disk or too little memory prints one line and exits with status 1."""
    quiet()
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
    """Write a message as one line to standard error, and exit with status 1."""
    sys.stderr.write(f"geomkit: {' '.join(message.split())}\n")
    sys.exit(1)


def _of_memory(error: MemoryError | RuntimeError) -> bool:
    """Return whether an error is one of memory; torch raises a RuntimeError for memory that the CPU lacks."""
    words = f"{type(error).__name__} {error}".lower()
    return isinstance(error, MemoryError) or any(
        said in words for said in ("outofmemory", "out of memory", "not enough memory", "can't allocate memory")
    )


def _version(show: bool) -> None:
    """Print the version and exit, where ``--version`` is given."""
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
