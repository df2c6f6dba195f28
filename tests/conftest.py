"""One thread for everybody: two were many times slower on models of this size."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def organism():
    from geomkit.organism import load_organism

    return load_organism()
