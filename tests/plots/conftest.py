"""Results that the tests of several figures draw."""

import pytest
import torch

from geomkit.experiments.results import Results
from geomkit.gradients.factored import FactoredGradient
from geomkit.svd.principal_angles import Angles, principal_angles
from geomkit.svd.spectrum import Spectrum, spectrum
from geomkit.svd.subspaces import subspace
from tests.helpers.figures import BROKEN, experiment, gradients


@pytest.fixture(scope="session")
def safety() -> Spectrum:
    return spectrum(gradients(6, 0), null_draws=3)


@pytest.fixture(scope="session")
def utility() -> Spectrum:
    return spectrum(gradients(9, 1), null_draws=3)


@pytest.fixture(scope="session")
def small() -> Spectrum:
    """The spectrum of two layers and nothing outside them."""
    names = [f"model.layers.{layer}.mlp.{place}.weight" for layer in range(2) for place in ("up_proj", "down_proj")]
    generator = torch.Generator().manual_seed(0)
    return spectrum(
        {
            name: FactoredGradient(torch.randn(7, 16, generator=generator), torch.randn(7, 12, generator=generator))
            for name in names
        },
        null_draws=3,
    )


@pytest.fixture(scope="session")
def angles() -> Angles:
    return principal_angles(subspace(gradients(6, 0), rank=4), subspace(gradients(9, 1), rank=4))


@pytest.fixture(params=[(), (BROKEN,)], ids=["all done", "one broke off"])
def results(request: pytest.FixtureRequest) -> Results:
    return experiment(*request.param)
