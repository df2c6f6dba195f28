"""Random gradients of every form, and the matrix that each stands for, made from its parts by numpy."""

import numpy as np
import torch
from hypothesis import strategies as st

from geomkit.gradients.arithmetic import zero_gradient
from geomkit.gradients.dense import DenseGradient
from geomkit.gradients.factored import FactoredGradient
from geomkit.gradients.indexed import IndexedGradient, coalesce
from geomkit.gradients.summed import SumGradient

FORMS = ("factored", "indexed", "dense", "tied", "sum", "zero")
THIN = ("factored", "indexed", "tied", "zero")

shapes = st.tuples(st.integers(1, 9), st.integers(1, 9))
forms = st.sampled_from(FORMS)
seeds = st.integers(0, 2**31)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def drawn(form, shape, generator):
    """A random gradient of a form, with a random number of tokens."""
    tokens = int(torch.randint(1, 7, (), generator=generator))
    rows, columns = shape

    def normal(*size):
        return torch.randn(*size, generator=generator)

    if form == "zero":
        return zero_gradient(shape)
    if form == "tied":
        return SumGradient(tuple(drawn(part, shape, generator) for part in ("factored", "indexed")))
    if form == "sum":
        return SumGradient(tuple(drawn(part, shape, generator) for part in ("dense", "factored", "indexed", "zero")))
    if form == "factored":
        return FactoredGradient(normal(tokens, rows), normal(tokens, columns))
    if form == "indexed":
        return coalesce(
            torch.randint(0, rows, (tokens,), generator=generator), normal(tokens, columns), size=rows, tokens=tokens
        )
    return DenseGradient(normal(rows, columns), tokens)


def dense(gradient):
    """The matrix in fp64."""
    if isinstance(gradient, SumGradient):
        return sum(map(dense, gradient.parts))
    if isinstance(gradient, FactoredGradient):
        return gradient.left.double().numpy().T @ gradient.right.double().numpy()
    if isinstance(gradient, IndexedGradient):
        matrix = np.zeros(gradient.shape)
        np.add.at(matrix, gradient.indices.numpy(), gradient.rows.double().numpy())
        return matrix
    return gradient.tensor.double().numpy()
