"""Peak memory of one contender, beyond what the process held before: a process of its own on a CPU.

On Linux the kernel's high-water mark of the resident set is reset before the run and read after it. glibc is told to
map every large block on its own, so that what is freed leaves the resident set. Everything has run once on a tiny
model before, so that imports and buffers of libraries do not count.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.contender import Contender, Piece
from tests.benchmarks.workload import Workload

PLAIN = "plain"


def in_own_process(name: str, settings: Sequence[str]) -> int | None:
    """Return a contender's peak in bytes, from a fresh process; None where it cannot be measured."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "tests.benchmarks.memory", name, *settings]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)  # noqa: S603
    return int(json.loads(done.stdout.splitlines()[-1])) if done.returncode == 0 else None


def on_cuda(run: Callable[[], Any]) -> int:
    """Return the peak in bytes that torch allocated beyond what it held."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del result
    return peak


def resident(field: str) -> int:
    """Return a field of the process's status in bytes: ``VmRSS`` now, ``VmHWM`` its high-water mark."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"{field}:")]
    return int(line.split()[1]) * 1024


def on_cpu(run: Callable[[], Any]) -> int:
    """Return the peak in bytes of the resident set beyond what the process held; start it as :func:`in_own_process`."""
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    result = run()
    peak = resident("VmHWM") - before
    del result
    return peak


def _pieces(name: str, contenders: Sequence[Contender], workload: Workload) -> Sequence[Piece]:
    if name == PLAIN:
        return [Piece(workload.plain_step)]
    (contender,) = [contender for contender in contenders if contender.name == name]
    return contender.prepare(workload)


def _peak(name: str, contenders: Sequence[Contender], workload: Workload) -> int:
    pieces = _pieces(name, contenders, workload)
    return on_cpu(lambda: [piece.run() for piece in pieces])


def main() -> None:
    from tests.benchmarks.field import CONTENDERS

    parser = argparse.ArgumentParser(description="Print a contender's peak memory in bytes.")
    parser.add_argument("name")
    parser.add_argument("--size", required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--dtype", required=True)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    dtype = getattr(torch, chosen.dtype)
    _peak(chosen.name, CONTENDERS, Workload.build("tiny", dtype=dtype))
    workload = Workload.build(chosen.size, dtype=dtype, batch=chosen.batch, tokens=chosen.tokens)
    sys.stdout.write(f"{_peak(chosen.name, CONTENDERS, workload)}\n")


if __name__ == "__main__":
    main()
