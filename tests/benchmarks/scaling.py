"""What collection costs by tokens and width, as ratios to one plain forward and backward of the same tokens.

    python -m tests.benchmarks.scaling                                   # nine cells, ten minutes
    python -m tests.benchmarks.scaling --sizes d2048 --tokens 2000        # one of them
    python -m tests.benchmarks.scaling --out cells.jsonl                 # goes on where an earlier run was stopped
    python -m tests.benchmarks.scaling --device cuda --dtype bfloat16 --sizes 1b --tokens 400 2000 8000

The tokens are those of examples of ``--row`` tokens: 50 is one anchor, 400 the eight anchors of a step of SPF, 2,000 a
batch of fine-tuning. With ``--row 2000`` every cell has one example. Norms, Grams, sketches and factors are of every
example.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits

from tests.benchmarks import toolkit
from tests.benchmarks.contender import Piece
from tests.benchmarks.resumable import Cell, measured_cells
from tests.benchmarks.shapes import SHAPES
from tests.benchmarks.timing import interleaved
from tests.benchmarks.workload import Workload

TOKENS = (50, 400, 2000)
SIZES = ("d128", "d576", "d2048")

COLLECTED: dict[str, Callable[[Workload], Any]] = {
    "sum": toolkit.summed,
    "norms": toolkit.norms,
    "Gram": toolkit.grams,
    "sketch": toolkit.sketches,
    "factors": toolkit.factors,
}
"""What is collected: the summed gradient, and of every example the rest."""


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    table = Table("model", "tokens", "plain, s", *COLLECTED, title="time / plain forward and backward (min to max)")
    with threadpool_limits(1):
        cells = measured_cells(_wanted(options), partial(_measured, rounds=options.rounds), options.out)
        for cell in cells:
            table.add_row(cell["size"], f"{cell['tokens']:,}", f"{cell['plain']:.2f}", *map(_said, cell["ratios"]))
    Console(width=140).print(table)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=SIZES)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--row", type=int, default=50, help="tokens of an example")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, help="file with a cell a line; its cells are not run again")
    return parser.parse_args()


def _wanted(options: argparse.Namespace) -> Iterator[Cell]:
    common = {name: getattr(options, name) for name in ("row", "device", "dtype")}
    for size, tokens in product(options.sizes, options.tokens):
        yield common | {"size": size, "tokens": tokens}


def _measured(cell: Cell, rounds: int) -> Cell:
    row = min(cell["row"], cell["tokens"])
    workload = Workload.build(
        cell["size"],
        device=cell["device"],
        dtype=getattr(torch, cell["dtype"]),
        batch=cell["tokens"] // row,
        tokens=row,
    )
    pieces = {name: [Piece(lambda run=run: run(workload))] for name, run in COLLECTED.items()}
    Console(stderr=True).print(f"{cell['size']}, {cell['tokens']} tokens")
    workload.plain_step()  # the first run of anything is slower
    toolkit.sketches(workload)
    units, ratios = interleaved(workload.plain_step, pieces, rounds=rounds, device=workload.device)
    return {"plain": sorted(units)[len(units) // 2], "ratios": [ratios[name].values for name in COLLECTED]}


def _said(values: Sequence[float]) -> str:
    ordered = sorted(values)
    return f"{ordered[len(ordered) // 2]:.2f} ({ordered[0]:.2f} to {ordered[-1]:.2f})"


if __name__ == "__main__":
    main()
