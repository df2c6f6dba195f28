"""What a command does before anything else: silence other libraries, set threads, join other processes."""

import atexit
import logging
import os
import sys
from pathlib import Path


def quiet() -> None:
    """Show geomkit's own messages on the terminal, and no messages of other libraries."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("geomkit").setLevel(logging.INFO)


def prepare(threads: int) -> None:
    """Silence the libraries that load models and data, and set the number of CPU threads."""
    import datasets
    import huggingface_hub
    import torch
    from transformers.utils import logging as transformers_logging

    huggingface_hub.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    datasets.disable_progress_bars()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # On a busy machine, more threads make models as small as the organism many times slower.
    torch.set_num_threads(threads)


def join_processes(device: str | None) -> None:
    """Join the processes that ``accelerate launch`` or ``torchrun`` has started, of which only the first prints.

    The processes divide the examples of every call from then on.

    Args:
        device: The device that was asked for.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    import torch
    from accelerate import PartialState

    from geomkit.utils.workers import first_process

    state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available())  # it also gives each process its GPU
    atexit.register(state.destroy_process_group)
    if not first_process():
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - until the process ends
