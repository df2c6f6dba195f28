"""One thread for everybody, and the notebooks' kernels: two were many times slower on models of this size."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # read when numpy and torch are first imported, here and in every child
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Where pytest-xdist runs several processes, the notebooks come first: left for last, all would wait for one."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: not str(getattr(item, "originalname", "")).startswith("test_notebook_runs"))


@pytest.fixture(scope="session")
def organism():
    from geomkit.experiments.organisms import load_organism

    return load_organism()
