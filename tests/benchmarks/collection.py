"""What per-sample gradients cost, as ratios to one plain forward and backward of the same batch, all from one run.

    python -m tests.benchmarks.collection                          # 27M parameters, one CPU thread, ten minutes
    python -m tests.benchmarks.collection --device cuda --size 1b  # on a GPU

Every contender's result is first compared with ``loss.backward()``, one example at a time; one that is wrong is not
timed. opacus and bergson take part where they are installed.
"""

import argparse
import gc
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits

from tests.benchmarks import memory
from tests.benchmarks.agreement import Reference
from tests.benchmarks.contender import Contender, Piece
from tests.benchmarks.field import CONTENDERS
from tests.benchmarks.shapes import SHAPES
from tests.benchmarks.timing import Ratios, interleaved
from tests.benchmarks.widths import by_width
from tests.benchmarks.workload import Workload

OPPONENTS_WARNINGS = ("There is a performance drop", "Full backward hook is firing", "`torch.jit")
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}


PROGRESS = Console(stderr=True)


@dataclass
class Row:
    """What the table says about a contender."""

    contender: Contender
    pieces: Sequence[Piece] = ()
    error: float | None = None
    trouble: str = ""
    ratios: Ratios | None = None
    peak: int | None = None


def main() -> None:
    options = _options()
    console = Console(width=140)
    for message in OPPONENTS_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    torch.set_num_threads(1)
    with threadpool_limits(1):
        workload = Workload.build(
            options.size,
            device=options.device,
            dtype=getattr(torch, options.dtype),
            batch=options.batch,
            tokens=options.tokens,
        )
        chosen = [contender for contender in CONTENDERS if any(part in contender.name for part in options.only)]
        rows = [Row(contender) for contender in chosen]
        _check(rows, workload, TOLERANCE[options.dtype])
        running = {row.contender.name: row.pieces for row in rows if row.pieces}
        PROGRESS.print(f"timing {len(running)} contenders in {options.rounds} rounds")
        units, ratios = interleaved(workload.plain_step, running, rounds=options.rounds, device=workload.device)
        for row in rows:
            row.ratios = ratios.get(row.contender.name)
        plain_peak = _measure_memory(rows, workload, options) if options.memory else None
        _print(console, rows, workload, units, plain_peak)
        if options.widths:
            for width, ratio in by_width(workload.device, options.tokens, 3):
                console.print(f"{width}×{width}, {options.tokens} tokens: dense svdvals take {ratio} × the factors'")
    sys.exit(any(row.trouble.startswith("wrong") for row in rows))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="25m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=TOLERANCE, default="float32")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=[""], help="parts of the names of the contenders that take part")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--widths", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args()


def _check(rows: Sequence[Row], workload: Workload, tolerance: float) -> None:
    """Run every contender once and compare; it also warms up what is timed later."""
    reference = Reference.of(workload, workload.checked)
    for row in rows:
        PROGRESS.print(f"checking {row.contender.name}")
        try:
            row.pieces = row.contender.prepare(workload)
            results = [piece.run() for piece in row.pieces]
            if row.contender.error is not None:
                row.error = row.contender.error(results[0], workload, reference)
        except ModuleNotFoundError as error:
            row.pieces, row.trouble = (), f"{error.name} is not installed"
        except Exception as error:  # one that cannot run here is said so, the others still are compared
            row.pieces, row.trouble = (), f"{type(error).__name__}: {error}"
        if row.error is not None and not row.error <= tolerance:
            row.pieces, row.trouble = (), f"wrong by {row.error:.1e}"
        results = None
        gc.collect()


def _measure_memory(rows: Sequence[Row], workload: Workload, options: argparse.Namespace) -> int | None:
    """Fill in the peaks; return the plain step's."""
    PROGRESS.print("measuring memory")
    if workload.device.type == "cuda":
        for row in rows:
            if row.pieces and row.contender.memory:
                row.peak = memory.on_cuda(lambda pieces=row.pieces: [piece.run() for piece in pieces])
        return memory.on_cuda(workload.plain_step)
    settings = [f"--{name}={getattr(options, name)}" for name in ("size", "batch", "tokens", "dtype")]
    for row in rows:
        if row.pieces and row.contender.memory:
            row.peak = memory.in_own_process(row.contender.name, settings)
    return memory.in_own_process(memory.PLAIN, settings)


def _print(
    console: Console, rows: Sequence[Row], workload: Workload, units: Sequence[float], plain_peak: int | None
) -> None:
    batch, tokens = workload.input_ids.shape
    console.print(
        f"Llama of {workload.parameters / 1e6:.1f}M parameters, {workload.linear_share:.0%} of them in linear layers; "
        f"{batch} × {tokens} tokens, {workload.model.dtype}, {workload.device}, torch {torch.__version__}\n"
        f"plain forward + backward: {median(units):.2f} s ({min(units):.2f} to {max(units):.2f}), "
        f"peak {_mb(plain_peak)} MB; one gradient for each example: {_mb(workload.stored_bytes)} MB"
    )
    table = Table("contender", "error", "time / plain (min to max)", "target", "extra MB", "of storing")
    for row in rows:
        extra = None if row.peak is None or plain_peak is None else row.peak - plain_peak
        table.add_row(
            row.contender.name,
            "" if row.error is None else f"{row.error:.0e}",
            row.trouble or str(row.ratios),
            _verdict(row),
            _mb(extra),
            "" if extra is None else f"{extra / workload.stored_bytes:.0%}",
        )
    console.print(table)


def _verdict(row: Row) -> str:
    if row.contender.target is None or row.ratios is None:
        return ""
    return f"≤ {row.contender.target:g} {'met' if row.ratios.median <= row.contender.target else 'missed'}"


def _mb(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:.0f}"


if __name__ == "__main__":
    main()
