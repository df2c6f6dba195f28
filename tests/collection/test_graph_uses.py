"""The search of the graph counts all uses of a parameter."""

import pytest
import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from geomkit.collection.graph_uses import graph_uses
from geomkit.errors import CollectionError


def test_uses_are_counted_by_operation():
    a, b, unused = nn.Linear(3, 3, bias=False), nn.Linear(3, 3), nn.Linear(3, 3)
    hidden = a(torch.ones(2, 5, 3))
    hidden = b(hidden) + functional.linear(hidden, a.weight) + torch.einsum("blm,mn->bln", hidden, a.weight)
    reached, ignored = get_gradient_edge(hidden), get_gradient_edge(unused(hidden))
    uses = graph_uses((hidden @ a.weight.T).sum())
    assert [uses.of(parameter) for parameter in (a.weight, b.weight, b.bias, unused.weight)] == [4, 1, 1, 0]
    assert uses.reaches(reached)
    assert not uses.reaches(ignored)
    assert {id(leaf) for leaf in uses.leaves} == {id(parameter) for parameter in (a.weight, b.weight, b.bias)}


def test_a_loss_without_a_graph_uses_nothing():
    assert graph_uses(torch.zeros(())).leaves == ()


def test_the_two_kinds_of_checkpoint():
    layer = nn.Linear(3, 3)
    given = torch.ones(3, requires_grad=True)
    assert graph_uses(checkpoint(layer, given, use_reentrant=False).sum()).of(layer.weight) == 1
    with pytest.raises(CollectionError, match="reentrant checkpoint; checkpoint with use_reentrant=False"):
        graph_uses(checkpoint(layer, given, use_reentrant=True).sum())
