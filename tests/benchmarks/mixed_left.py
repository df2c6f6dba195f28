"""What a step of mixed-left costs by width and number of anchors, as ratios to mixing with the same anchors.

    python -m tests.benchmarks.mixed_left                                    # an hour on one CPU thread
    python -m tests.benchmarks.mixed_left --sizes d576 --anchors 8           # one cell, minutes
    python -m tests.benchmarks.mixed_left --contenders plain mixed-left      # without the opponents
    python -m tests.benchmarks.mixed_left --out cells.jsonl                  # goes on where an earlier run was stopped
    python -m tests.benchmarks.mixed_left --device cuda --dtype bfloat16 --sizes 1b

A step is forward, backward, AdamW and zero_grad on 1,024 tokens, with anchors of 50 tokens, 17 of them scored. Mixing
adds the same anchors' gradient and reads the same certificate, so that the difference is the price of the projection.
On random tokens mixing leaves no conflict: ``left``, with rank 1 and without mixing, projects half of
the blocks. The opponents get the directions from an exact SVD of every gradient, and from ``torch.svd_lowrank`` of
copies of the gradients (which promises nothing under AdamW).
"""

import argparse
import gc
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits

from geomkit.gradients.layer_gradient import LayerGradient
from geomkit.spf.projection import protection
from geomkit.svd.subspace_iteration import LeadingVectors
from geomkit.svd.subspaces import layer_subspace
from tests.benchmarks.contender import Piece
from tests.benchmarks.resumable import Cell, measured_cells
from tests.benchmarks.shapes import SHAPES
from tests.benchmarks.steps import CopiedStep, GuardedStep, PlainStep, Setting, Step, Training, project_left
from tests.benchmarks.timing import interleaved

SIZES = ("d128", "d576", "d2048")
ANCHORS = (1, 8, 40)
"""Numbers of anchors of 50 tokens: 50, 400 and 2,000 tokens."""

_TOO_SLOW = 1024
"""Width from which the exact decomposition takes minutes a step."""


class ExactStep(GuardedStep):
    """A step whose directions come from an exact SVD of every gradient, as those of geomkit 0.1.0 did."""

    def run(self) -> None:
        with patch.object(protection, "leading_vectors", _exact_vectors):
            super().run()


def _exact_vectors(gradient: LayerGradient, rank: int, generator: torch.Generator) -> LeadingVectors:
    layer = layer_subspace(gradient, rank=rank, side="both")
    assert layer.partner is not None
    return LeadingVectors(layer.basis, layer.partner, layer.energy, 0.0)


CONTENDERS: dict[str, Callable[[Training, int], Step]] = {
    "plain": lambda training, _: PlainStep(training),
    "mixed-left": lambda training, anchors: GuardedStep(training, "mixed-left", anchors),
    "left, k = 1": lambda training, anchors: GuardedStep(training, "left", anchors, rank=1),
    "mixed-left, exact SVD": lambda training, anchors: ExactStep(training, "mixed-left", anchors),
    "copies, svd_lowrank": lambda training, anchors: CopiedStep(training, partial(project_left, 1), anchors),
}


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    table = Table("model", "anchors' tokens", "mixing, s", *CONTENDERS, title="time / mixing (min to max); projected")
    with threadpool_limits(1):
        cells = measured_cells(_wanted(options), partial(_measured, rounds=options.rounds), options.out)
        for cell in cells:
            said = [_said(cell["ratios"].get(name)) for name in CONTENDERS]
            table.add_row(cell["size"], f"{50 * cell['anchors']:,}", f"{cell['mixing']:.2f}", *said)
    Console(width=150).print(table)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=SIZES)
    parser.add_argument("--anchors", nargs="+", type=int, default=ANCHORS)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, help="file with a cell a line; its cells are not run again")
    return parser.parse_args()


def _wanted(options: argparse.Namespace) -> Iterator[Cell]:
    for size, anchors in product(options.sizes, options.anchors):
        common = {name: getattr(options, name) for name in ("device", "dtype", "contenders")}
        yield common | {"size": size, "anchors": anchors}


def _measured(cell: Cell, rounds: int) -> Cell:
    setting = Setting(cell["size"], cell["device"], 4, 256, 50, 17, cell["dtype"])
    mixing = GuardedStep(Training(setting), "mixing", cell["anchors"])
    mixing.check()
    ratios, units = {}, []
    for name in cell["contenders"]:
        if name == "mixed-left, exact SVD" and SHAPES[cell["size"]].hidden >= _TOO_SLOW:
            continue
        Console(stderr=True).print(f"{cell['size']}, {cell['anchors']} anchors: {name}")
        step = CONTENDERS[name](Training(setting), cell["anchors"])
        step.check()
        more, found = interleaved(
            mixing.run, {name: [Piece(step.run)]}, rounds=rounds, device=torch.device(cell["device"])
        )
        units += more
        ratios[name] = {"values": found[name].values, "fired": step.fired}
        del step
        gc.collect()
    return {"mixing": sorted(units)[len(units) // 2], "ratios": ratios}


def _said(result: dict[str, Any] | None) -> str:
    if result is None:
        return "–"
    ordered = sorted(result["values"])
    fired = "" if result["fired"] is None else f"; {result['fired']:.0%}"
    return f"{ordered[len(ordered) // 2]:.2f} ({ordered[0]:.2f} to {ordered[-1]:.2f}){fired}"


if __name__ == "__main__":
    main()
