"""The run of a grid: its cells in a few processes of one thread, each cell stored when it is complete."""

import multiprocessing
import os
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from geomkit.errors import DataError, GeomkitError
from geomkit.experiments.cells import completed_record, run_cell, store_record, stored_record
from geomkit.experiments.grid import Cell, Grid, load_grid
from geomkit.experiments.organism.variants import SHIPPED, build_variant
from geomkit.experiments.organisms import ENGLISH
from geomkit.experiments.records import Record
from geomkit.experiments.results import Results
from geomkit.utils.files import writing


def run_experiments(
    grid: str | Path | Grid = "default",
    folder: str | Path = "geomkit-experiments",
    *,
    processes: int = 2,
    progress: bool = True,
) -> Results:
    """Run every cell of a grid that has not been run before or has failed, and return the results of all cells.

    A cell is stored when it is complete, so an interrupted run can be continued. A cell whose fields, arm or scenario
    have changed counts as another cell. Several jobs may share a folder, each with its part of the grid, see
    :meth:`~geomkit.experiments.grid.Grid.shard`.

    Args:
        grid: A shipped grid (``"default"``, ``"limits"``, ``"english"``, ``"smoke"``), a TOML file, or a
            :class:`~geomkit.experiments.grid.Grid`.
        folder: The folder for the cells, and for organisms that do not ship.
        processes: Number of processes, each on one thread; 1 runs all cells in the present process.
        progress: Show a bar with the remaining time.

    Returns:
        The :class:`~geomkit.experiments.results.Results`, in the order of the grid.

    Raises:
        DataError: If there is no such grid, or the folder cannot be written to.
        GeomkitError: If a process was killed; the cells that were complete are kept.

    Example:
        >>> results = run_experiments("smoke", "experiments")  # doctest: +SKIP
    """
    from tqdm.auto import tqdm

    grid = grid if isinstance(grid, Grid) else load_grid(grid)
    target = Path(folder).resolve()
    with writing(target):
        target.mkdir(parents=True, exist_ok=True)
    records: dict[str, Record] = {}
    pairs = _in_this_process(grid, target) if processes == 1 else _in_processes(grid, target, processes)
    with tqdm(total=len(grid.cells), desc=grid.name, unit="cell", disable=not progress) as bar:
        for cell, record in pairs:
            records[cell.file_name] = record
            bar.update()
            bar.set_postfix_str(f"{cell.scenario}, {cell.arm.name}", refresh=False)
    return Results(grid.name, tuple(records[cell.file_name] for cell in grid.cells))


def take_over(results: Results, grid: Grid, folder: str | Path) -> int:
    """Store earlier results in the folder of an experiment, so that :func:`run_experiments` runs the other cells only.

    A record is taken over if its digest says that it is the result of a cell of the grid, and the cell has no result in
    the folder.

    Args:
        results: The earlier results.
        grid: The grid.
        folder: The folder for the cells.

    Returns:
        The number of records that were taken over.

    Raises:
        DataError: If no result is that of a cell of the grid.
    """
    records = {record["digest"]: record for record in results.records if "digest" in record and "error" not in record}
    known = [cell for cell in grid.cells if cell.digest in records]
    if not known:
        raise DataError(
            f"expected earlier results of the grid '{grid.name}', found none of its cells among {len(results)} of "
            f"'{results.name}': they are of another grid or version; leave them out"
        )
    missing = [cell for cell in known if completed_record(cell, Path(folder)) is None]
    for cell in missing:
        store_record(records[cell.digest], cell, Path(folder))
    return len(missing)


def stored_results(grid: Grid, folder: str | Path) -> Results:
    """Return the results of the cells of a grid that were run before, by any job with this folder.

    Args:
        grid: The grid.
        folder: The folder of the cells.

    Returns:
        The :class:`~geomkit.experiments.results.Results`, in the order of the grid, without the cells that are missing.
    """
    records = (stored_record(cell, Path(folder)) for cell in grid.cells)
    return Results(grid.name, tuple(record for record in records if record is not None))


def _in_this_process(grid: Grid, folder: Path) -> Iterator[tuple[Cell, Record]]:
    """Yield the cells in the order of the grid, with their records."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for cell in grid.cells:
            yield cell, run_cell(cell, folder)
    finally:
        torch.set_num_threads(threads)


def _in_processes(grid: Grid, folder: Path, processes: int) -> Iterator[tuple[Cell, Record]]:
    """Yield the cells as they are complete, with their records.

    Organisms that do not ship are built first; the cells of an organism are submitted when it is built.
    """
    # Processes are spawned, since a forked child of a process that has run torch may hang.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_prepare_process)
    try:
        # 1. Submit the builds of organisms, and the cells of those that ship.
        waiting: dict[Future[object], Cell | int] = {
            pool.submit(build_variant, seed, folder): seed for seed in grid.seeds if seed != SHIPPED
        }
        waiting |= {
            pool.submit(run_cell, cell, folder): cell for cell in grid.cells if cell.organism in (SHIPPED, ENGLISH)
        }
        while waiting:
            done, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                job, value = waiting.pop(future), future.result()
                if isinstance(job, Cell):
                    yield job, value  # type: ignore[misc]
                    continue
                # 2. An organism is built: submit its cells.
                ready = [cell for cell in grid.cells if cell.organism == job]
                waiting |= {pool.submit(run_cell, cell, folder): cell for cell in ready}
    except BrokenProcessPool:
        raise GeomkitError(
            f"a process was killed, perhaps for its memory; what was done is kept in {folder}: run it again, with "
            "fewer processes"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _prepare_process() -> None:
    """Set a new process up: one thread, no messages of transformers, and the process ends with its parent."""
    from transformers.utils import logging

    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    logging.set_verbosity_error()


def _end_with_parent() -> None:
    """Wait for the parent process and end with it; a parent that is killed cannot end its children itself."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
