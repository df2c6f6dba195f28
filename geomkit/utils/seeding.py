"""Random generators from explicit seeds, and a context that restores the global random state."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from zlib import crc32

import numpy as np
import torch


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Restore the global random states of Python, numpy and torch, which the Trainer seeds, when the block ends."""
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - the global state is the point
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002


def parameter_generator(seed: int, parameter: str) -> torch.Generator:
    """Return a CPU generator for the random draws of one parameter, which do not depend on the other parameters.

    Args:
        seed: The seed of the whole measurement.
        parameter: Name of the parameter.
    """
    # torch's CPU generator reads only the low 32 bits of a seed, so seed and name are mixed rather than packed.
    mixed = np.random.SeedSequence([seed, crc32(parameter.encode())]).generate_state(1)[0]
    return torch.Generator().manual_seed(int(mixed))
