"""What the directions of one matrix cost under mixed-left and kl-left, and what an exact SVD of the matrix costs.

    python -m tests.benchmarks.directions                      # widths 128, 576 and 2,048; minutes on one CPU thread
    python -m tests.benchmarks.directions --widths 128 576

The matrix is that of an MLP, d × 4 d, and its gradient that of random factors of as many tokens as the anchors have: in
thin form as long as that is smaller, as the guard has it. Singular values fall as i^-1/2. The exact decomposition of
the largest is run once.
"""

import argparse
from collections.abc import Iterator, Sequence
from itertools import product

import torch
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits

from geomkit.gradients.accumulator import add
from geomkit.gradients.factored import FactoredGradient
from geomkit.gradients.layer_gradient import LayerGradient
from geomkit.spf.rules import get_rule
from geomkit.svd.subspace_iteration import leading_vectors
from geomkit.svd.subspaces import LayerSubspace, layer_subspace
from tests.benchmarks.timing import seconds

WIDTHS = (128, 576, 2048)
TOKENS = (50, 400, 2000)
_LARGE = 1024
"""Width from which the exact decomposition is run once."""


def random_gradient(width: int, tokens: int) -> LayerGradient:
    """Return a random gradient of width × 4 width, in the form of a sum over two batches."""
    generator = torch.Generator().manual_seed(0)
    falling = torch.arange(1, width + 1).rsqrt()
    sizes = (tokens // 2, tokens - tokens // 2)
    return add(
        [
            FactoredGradient(
                torch.randn(count, width, generator=generator) * falling,
                torch.randn(count, 4 * width, generator=generator),
            )
            for count in sizes
        ]
    )


def measured(widths: Sequence[int], rounds: int) -> Iterator[tuple[int, int, float, float, float]]:
    """Yield width, tokens, the least seconds of the iteration and of the exact SVD, and the energy shared with it."""
    rank = get_rule("mixed-left").rank
    device = torch.device("cpu")
    for width, tokens in product(widths, TOKENS):
        gradient = random_gradient(width, tokens)
        vectors = leading_vectors(gradient, rank, torch.Generator().manual_seed(1))
        iterated = [
            seconds(lambda: leading_vectors(gradient, rank, torch.Generator().manual_seed(1)), device)  # noqa: B023
            for _ in range(rounds)
        ]
        kept: list[LayerSubspace] = []
        exact = [
            seconds(lambda: kept.append(layer_subspace(gradient, rank=rank, side="both")), device)  # noqa: B023
            for _ in range(1 if width >= _LARGE else rounds)
        ]
        yield width, tokens, min(iterated), min(exact), vectors.energy / kept[0].energy


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", nargs="+", type=int, default=WIDTHS)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = Table("width", "tokens", "iteration, ms", "exact SVD, ms", "exact / iteration", "energy / exact")
    with threadpool_limits(1):
        for width, tokens, iterated, exact, share in measured(options.widths, options.rounds):
            times = (f"{1e3 * iterated:,.1f}", f"{1e3 * exact:,.1f}", f"{exact / iterated:,.0f}")
            table.add_row(f"{width:,}", f"{tokens:,}", *times, f"{share:.4f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
