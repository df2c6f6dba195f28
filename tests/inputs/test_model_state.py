import random

import numpy as np
import pytest
import torch

from geomkit.inputs.model_state import model_state_kept
from geomkit.utils.precision import full_precision
from geomkit.utils.seeding import random_state_kept
from tests.helpers.tiny import tiny_llama


def test_modes_and_random_state_return_also_after_an_exception():
    model = tiny_llama().train()
    model.model.layers[1].mlp.eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    for error in (None, ValueError):
        with pytest.raises(error) if error else model_state_kept(model), model_state_kept(model):
            model.eval()
            torch.rand(3)
            if error:
                raise error
        assert [module.training for module in model.modules()] == modes
        assert torch.equal(torch.get_rng_state(), state)


def test_global_random_states_return_also_after_an_exception():
    draws = []

    @random_state_kept()
    def draw_and_fail():
        draws.append((random.random(), np.random.random(), float(torch.rand(()))))  # noqa: NPY002
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        torch.manual_seed(0)
        raise ValueError("stop")

    for _ in range(2):
        with pytest.raises(ValueError, match="stop"):
            draw_and_fail()
    assert draws[0] == draws[1]


def test_full_precision_is_kept_inside_and_the_callers_choice_after() -> None:
    result = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with full_precision():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(result)
