"""Workers that tests start with ``accelerate launch``: modules that write what they found to ``FOLDER/RANK.pt``."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

PROCESSES = 2
_ROOT = Path(__file__).parents[2]


def launched(module: str, folder: Path, *arguments: str) -> list[Any]:
    """Run ``python -m MODULE *arguments FOLDER`` in two processes on the CPU, and return what each of them wrote."""
    status, said = launch("--module", module, *arguments, str(folder))
    assert status == 0, said[-6000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(PROCESSES)]


def launch(*arguments: str, seconds: int = 240) -> tuple[int, str]:
    """Run ``accelerate launch`` with two processes on the CPU; return its status, and what all of them wrote."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        # "multi_gpu" starts a process per device; without a GPU they are processes on the CPU, with gloo.
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", f"--num_processes={PROCESSES}",
        "--num_machines=1", f"--main_process_port={port}", "--mixed_precision=no", "--dynamo_backend=no", *arguments,
    ]  # fmt: skip
    running = subprocess.Popen(  # noqa: S603
        command, cwd=_ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        said, _ = running.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(running.pid, signal.SIGKILL)
        said, _ = running.communicate()
    return running.returncode, said
