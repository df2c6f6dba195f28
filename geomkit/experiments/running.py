"""Running a grid: cells in a few processes of one thread each, every one stored when it is done."""

import multiprocessing
import os
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from geomkit.errors import GeomkitError
from geomkit.experiments.cells import run_cell
from geomkit.experiments.grid import Cell, Grid, load_grid
from geomkit.experiments.organism.variants import SHIPPED, build_variant
from geomkit.experiments.results import Record, Results


def run_experiments(
    grid: str | Path | Grid = "default",
    folder: str | Path = "geomkit-experiments",
    *,
    processes: int = 2,
    progress: bool = True,
) -> Results:
    """Run every cell of a grid that has not been run, and return the results of all.

    A cell is stored when it is complete, so that a run which was interrupted goes on where it was. A cell that asks for
    something else, or a changed arm or scenario, is another cell.

    Args:
        grid: A shipped grid (``"default"``, ``"limits"``, ``"smoke"``), a TOML file, or a grid.
        folder: Where cells are stored, and organisms that do not ship.
        processes: How many run at a time, each on one thread; with 1 this process does it all.
        progress: Show a bar with the time that remains.

    Returns:
        The :class:`Results`, in the order of the grid.

    Raises:
        DataError: If there is no such grid.
        GeomkitError: If a process was killed; cells that were done are kept.

    Example:
        >>> results = run_experiments("smoke", "experiments")  # doctest: +SKIP
    """
    from tqdm.auto import tqdm

    grid = grid if isinstance(grid, Grid) else load_grid(grid)
    kept = Path(folder).resolve()
    kept.mkdir(parents=True, exist_ok=True)
    found: dict[str, Record] = {}
    with tqdm(total=len(grid.cells), desc=grid.name, unit="cell", disable=not progress) as bar:
        for cell, record in _one_by_one(grid, kept) if processes == 1 else _at_once(grid, kept, processes):
            found[cell.file_name] = record
            bar.update()
            bar.set_postfix_str(f"{cell.scenario}, {cell.arm.name}", refresh=False)
    return Results(grid.name, tuple(found[cell.file_name] for cell in grid.cells))


def _one_by_one(grid: Grid, folder: Path) -> Iterator[tuple[Cell, Record]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for cell in grid.cells:
            yield cell, run_cell(cell, folder)
    finally:
        torch.set_num_threads(threads)


def _at_once(grid: Grid, folder: Path, processes: int) -> Iterator[tuple[Cell, Record]]:
    """Yield cells as they are done; those of an organism wait until it is built, which comes first."""
    # A forked child of a process that has run torch may hang.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_prepare)
    try:
        waiting: dict[Future[object], Cell | int] = {
            pool.submit(build_variant, seed, folder): seed for seed in grid.organisms if seed != SHIPPED
        }
        waiting |= {pool.submit(run_cell, cell, folder): cell for cell in grid.cells if cell.organism == SHIPPED}
        while waiting:
            done, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                what, value = waiting.pop(future), future.result()
                if isinstance(what, Cell):
                    yield what, value  # type: ignore[misc]
                    continue
                ready = [cell for cell in grid.cells if cell.organism == what]
                waiting |= {pool.submit(run_cell, cell, folder): cell for cell in ready}
    except BrokenProcessPool:
        raise GeomkitError(
            f"a process was killed, perhaps for its memory; what was done is kept in {folder}: run it again, with "
            "fewer processes"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _prepare() -> None:
    from transformers.utils import logging

    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    logging.set_verbosity_error()


def _end_with_parent() -> None:
    """Wait for the process that started this one, and end with it: killed, it leaves nobody to tell the others."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
