"""Search of the autograd graph for the uses of each parameter, so that no use outside module calls is missed."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from geomkit.errors import CollectionError


@dataclass(frozen=True)
class GraphUses:
    """The nodes and leaves of a loss's autograd graph.

    Attributes:
        nodes: All nodes of the graph, leaves included.
        counts: Number of operations that read each leaf, by ``id`` of the leaf.
        leaves: The leaves: parameters, and other tensors that need a gradient.
    """

    nodes: frozenset[Node]
    counts: Mapping[int, int]
    leaves: tuple[Tensor, ...]

    def reaches(self, edge: GradientEdge) -> bool:
        """Return whether the loss depends on the tensor at an edge."""
        return edge.node in self.nodes

    def of(self, parameter: nn.Parameter) -> int:
        """Return the number of operations that read a parameter; a module call reads each of its parameters once."""
        return self.counts.get(id(parameter), 0)


def graph_uses(loss: Tensor) -> GraphUses:
    """Return the nodes of a loss's autograd graph, and how many operations read each leaf.

    Raises:
        CollectionError: If a reentrant checkpoint hides a part of the graph.
    """
    counts: Counter[int] = Counter()
    leaves: dict[int, Tensor] = {}
    # Depth-first search from the loss along the edges to the inputs of each operation.
    visited: set[Node] = set()
    stack = [loss.grad_fn] if loss.grad_fn is not None else []
    visited.update(stack)
    while stack:
        node = stack.pop()
        if node.name() == "CheckpointFunctionBackward":
            raise CollectionError(
                "expected a graph that can be seen whole, found a reentrant checkpoint; checkpoint with "
                "use_reentrant=False"
            )
        for following, _ in node.next_functions:
            if following is None:
                continue
            # A leaf's node has the leaf as ``variable``; every edge to it is an operation that reads the leaf.
            if (leaf := getattr(following, "variable", None)) is not None:
                counts[id(leaf)] += 1
                leaves[id(leaf)] = leaf
            if following not in visited:
                visited.add(following)
                stack.append(following)
    return GraphUses(frozenset(visited), counts, tuple(leaves.values()))
