"""What a step under SPF costs, as ratios to a plain step of the same batch, all from one run.

    python -m tests.benchmarks.spf            # 27M parameters, one CPU thread, a quarter of an hour
    python -m tests.benchmarks.spf --profile  # and where the time of each rule goes

A step is forward, backward, AdamW and zero_grad on 2,048 tokens. The opponents copy the task's gradients and take the
anchor's through ``.grad``, as the published code does. Every contender is checked before it is timed.
"""

import argparse
import gc
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits

from tests.benchmarks.contender import Piece
from tests.benchmarks.shapes import SHAPES
from tests.benchmarks.stages import Stages
from tests.benchmarks.steps import CopiedStep, GuardedStep, PlainStep, Setting, Step, Training, project_left
from tests.benchmarks.steps import project_rank1 as demo
from tests.benchmarks.timing import Ratios, interleaved

Maker = Callable[[Training], Step]

CONTENDERS: dict[str, tuple[Maker, float | None]] = {
    "monitor, 1 anchor": (lambda own: GuardedStep(own, "monitor"), None),
    "rank1, 1 anchor": (lambda own: GuardedStep(own, "rank1"), 1.06),
    "mixed-left, 1 anchor": (lambda own: GuardedStep(own, "mixed-left"), None),
    "left-20, 1 anchor": (lambda own: GuardedStep(own, "left", rank=20), 1.10),
    "left-20, kept subspaces": (lambda own: GuardedStep(own, "left", rank=20, refresh_energy=0.9), 1.10),
    "two-sided-20, 1 anchor": (lambda own: GuardedStep(own, "two-sided", rank=20), None),
    "rank1, 8 anchors": (lambda own: GuardedStep(own, "rank1", anchors=8), None),
    "mixing, 8 anchors": (lambda own: GuardedStep(own, "mixing", anchors=8), None),
    "mixed-left, 8 anchors": (lambda own: GuardedStep(own, "mixed-left", anchors=8), None),
    "gradient copies, rank 1": (lambda own: CopiedStep(own, demo), None),
    "gradient copies, left-20 by svd_lowrank": (lambda own: CopiedStep(own, partial(project_left, 20)), None),
}
"""What is timed, and the ratio that it should not exceed."""


def main() -> None:
    options = _options()
    console = Console(width=120)
    torch.set_num_threads(1)
    setting = Setting(options.size, options.device, options.batch, options.tokens, 40, 17)
    table = Table("contender", "time / plain (min to max)", "target", "projected", "anchor's factors / weights")
    with threadpool_limits(1):
        plain = PlainStep(Training(setting))
        plain.run()
        for name, (make, target) in CONTENDERS.items():
            if options.only not in name:
                continue
            step = make(Training(setting))
            step.check()
            # One contender at a time: each has a model and an optimizer of its own.
            units, found = interleaved(
                plain.run, {name: [Piece(step.run)]}, rounds=options.rounds, device=torch.device(options.device)
            )
            table.add_row(name, str(found[name]), _verdict(found[name], target), *_more(step))
            if options.profile and isinstance(step, GuardedStep):
                _profile(console, name, make, setting, median(units), options.rounds)
            del step
            gc.collect()
    console.print(f"plain step {median(units):.2f} s; {setting}")
    console.print(table)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="25m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="a part of the names of the contenders that take part")
    parser.add_argument("--profile", action="store_true", help="say where the time of each rule goes")
    return parser.parse_args()


def _verdict(ratios: Ratios, target: float | None) -> str:
    if target is None:
        return ""
    return f"≤ {target:.2f} {'met' if ratios.median <= target else 'missed'}"


def _more(step: Step) -> tuple[str, str]:
    fired = "" if step.fired is None else f"{step.fired:.0%}"
    if not isinstance(step, GuardedStep):
        return fired, ""
    weights = sum(one.numel() * one.element_size() for one in step.training.model.parameters())
    return fired, f"{step.factor_bytes / weights:.1%}"


def _profile(console: Console, name: str, make: Maker, setting: Setting, plain: float, rounds: int) -> None:
    """Run the steps once more, with the functions of SPF wrapped."""
    stages = Stages(torch.device(setting.device))
    with stages.watching():
        step = make(Training(setting))
        step.run()
        stages.seconds.clear()
        for _ in range(rounds):
            step.run()
    table = Table(name, "ms", "of a plain step")
    # The sum is steadier than the ratio of whole steps, whose larger part is the plain step's own noise.
    for stage, seconds in (*stages.seconds.items(), ("both hooks", sum(stages.seconds.values()))):
        table.add_row(stage, f"{1e3 * seconds / rounds:.1f}", f"{seconds / rounds / plain:.2%}")
    console.print(table)


if __name__ == "__main__":
    main()
