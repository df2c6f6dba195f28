"""Singular values of one gradient of T tokens, from its factors and from the matrix, at growing widths.

The ratio between the two depends on nothing but the width and T, so it is measured apart from any model.
"""

from collections.abc import Iterator

import torch

from geomkit.gradients.factored import FactoredGradient
from geomkit.svd.singular_values import singular_values_of
from tests.benchmarks.timing import Ratios, seconds

WIDTHS = (512, 1024, 2048)


def by_width(device: torch.device, tokens: int, rounds: int) -> Iterator[tuple[int, Ratios]]:
    """Yield each width and how often longer ``torch.linalg.svdvals`` takes, forming the matrix included."""
    generator = torch.Generator().manual_seed(0)
    for width in WIDTHS:
        left, right = (torch.randn(tokens, width, generator=generator).to(device) for _ in range(2))
        gradients = [FactoredGradient(left + row, right) for row in range(8)]
        values = []
        for _ in range(rounds):
            thin = seconds(lambda: singular_values_of(gradients), device) / len(gradients)  # noqa: B023
            dense = seconds(lambda: torch.linalg.svdvals(gradients[0].dense()), device)  # noqa: B023
            values.append(dense / thin)
        yield width, Ratios(tuple(values[1:] or values))
