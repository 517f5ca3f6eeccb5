"""The one interpreter: a graph run node by node, with a hand on every value.

`walk` says which node is next and forgets values that nothing reads any more; `compute` returns the value of one node.
`run` is both; calibration walks two networks at once, and the evaluator of a search begins in the middle.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node, map_arg

from leanvit.quant.graph import get_tensor

Values = dict[Node, Any]
"""The values of nodes that are still to be read."""


def last_uses(nodes: list[Node]) -> dict[Node, int]:
    """Index of the node that reads a value last, for every value that is read."""
    return {source: index for index, node in enumerate(nodes) for source in node.all_input_nodes}


def walk(module: GraphModule, *values: Values, start: int = 0) -> Iterator[tuple[int, Node]]:
    """Each node with its index, from `start` on, for the caller to compute.

    values: what the caller keeps, of one network or of several with the same nodes; what a node reads last is
    removed as soon as the next node is asked for.
    """
    nodes = list(module.graph.nodes)
    last_use = last_uses(nodes)
    for index in range(start, len(nodes)):
        yield index, nodes[index]
        for source in nodes[index].all_input_nodes:
            if last_use[source] == index:
                for held in values:
                    held.pop(source, None)


def compute(module: GraphModule, node: Node, values: Values, images: Tensor) -> Any:
    """The value of one node from those of its sources; of the output node, what the network returns."""
    if node.op == "placeholder":
        return images
    if node.op == "get_attr":
        return get_tensor(module, str(node.target))
    arguments = map_arg(node.args, lambda n: values[n])
    if node.op == "output":
        return arguments[0]
    function = module.get_submodule(str(node.target)) if node.op == "call_module" else node.target
    return function(*arguments, **map_arg(node.kwargs, lambda n: values[n]))  # type: ignore[operator]


@torch.no_grad()
def run(module: GraphModule, images: Tensor, step: Callable[[Node, Any], Any] | None = None) -> Any:
    """Run a graph on all images at once and return its output.

    step: sees every value and returns what goes on in its place.
    """
    values: Values = {}
    value: Any = None
    for _, node in walk(module, values):
        value = compute(module, node, values, images)
        values[node] = value = value if step is None else step(node, value)
    return value


@torch.no_grad()
def values_of(
    module: GraphModule, wanted: Collection[str], images: Tensor, given: dict[str, Any] | None = None
) -> Iterator[tuple[str, Any]]:
    """Name and value of each node named in `wanted`, in execution order, as the graph runs on all images at once.

    given: values by name that nodes have in place of their own, once they are in it.
    """
    values: Values = {}
    given = {} if given is None else given
    for _, node in walk(module, values):
        value = given[node.name] if node.name in given else compute(module, node, values, images)
        values[node] = value
        if node.name in wanted:
            yield node.name, value


@torch.no_grad()
def observe_nodes(module: GraphModule, wanted: set[str], images: Tensor, record: Callable[[str, Any], None]) -> None:
    """Run a graph and call record(name, value) for each node named in `wanted`, in execution order."""
    for name, value in values_of(module, wanted, images):
        record(name, value)
