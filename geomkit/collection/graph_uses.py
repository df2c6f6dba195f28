"""How a loss depends on parameters, read off the autograd graph: nothing that is used can hide from it."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from geomkit.errors import CollectionError


@dataclass(frozen=True)
class GraphUses:
    """Which nodes a loss reaches, and how often each parameter is used on the way.

    Attributes:
        nodes: Every node of the graph, leaves included.
        counts: For each leaf in the graph, by identity, the number of operations that read it.
        leaves: The leaves.
    """

    nodes: frozenset[Node]
    counts: Mapping[int, int]
    leaves: tuple[Tensor, ...]

    def reaches(self, edge: GradientEdge) -> bool:
        """Tell whether the loss depends on the output at an edge."""
        return edge.node in self.nodes

    def of(self, parameter: nn.Parameter) -> int:
        """Return how many operations read a parameter; a module's call reads each of its own once."""
        return self.counts.get(id(parameter), 0)


def graph_uses(loss: Tensor) -> GraphUses:
    """Walk the graph of a loss down to its leaves.

    Raises:
        CollectionError: If a part of the graph is hidden in a reentrant checkpoint.
    """
    counts: Counter[int] = Counter()
    leaves: dict[int, Tensor] = {}
    seen: set[Node] = set()
    waiting = [loss.grad_fn] if loss.grad_fn is not None else []
    seen.update(waiting)
    while waiting:
        node = waiting.pop()
        if node.name() == "CheckpointFunctionBackward":
            raise CollectionError(
                "expected a graph that can be seen whole, found a reentrant checkpoint; checkpoint with "
                "use_reentrant=False"
            )
        for following, _ in node.next_functions:
            if following is None:
                continue
            if (leaf := getattr(following, "variable", None)) is not None:
                counts[id(leaf)] += 1
                leaves[id(leaf)] = leaf
            if following not in seen:
                seen.add(following)
                waiting.append(following)
    return GraphUses(frozenset(seen), counts, tuple(leaves.values()))
