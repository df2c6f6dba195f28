"""Random generators from explicit seeds, and the global random state kept as it was."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from zlib import crc32

import numpy as np
import torch


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Restore Python's, numpy's and torch's global random states, which the Trainer seeds, when the block ends."""
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - the global state is the point
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002


# --------------------------------------------------------------------------------------------- null gradients


def parameter_generator(seed: int, parameter: str) -> torch.Generator:
    """Return a generator for the draws of one parameter, the same whichever other parameters are measured."""
    # torch's CPU generator reads the low 32 bits of a seed only, so the two are mixed rather than packed.
    mixed = np.random.SeedSequence([seed, crc32(parameter.encode())]).generate_state(1)[0]
    return torch.Generator().manual_seed(int(mixed))
