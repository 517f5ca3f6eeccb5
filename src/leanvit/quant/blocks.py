"""A quantized graph in blocks, that each end where few tensors are alive, as after a residual addition."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import SymInt, Tensor
from torch.fx import GraphModule, Node

from leanvit.quant.graph import QuantGraph
from leanvit.quant.interpret import Values, compute, last_uses

MOST_ALIVE = 2
"""Tensors between two blocks: the residual stream, and the attention logits of ReViT beside it."""

LEAST_SITES, MOST_SITES = 4, 16
"""Of a block: the attention of a layer has four; more than two layers are too much to be learned at once."""


@dataclass(frozen=True)
class Block:
    """A part of a network between two cuts. Names of nodes are the same in the float and the quantized graph.

    reads, writes: tensors that go in and come out. quantized, reference: nodes that lead from these to those in either
    graph. rest: float nodes that lead from `writes` to the features; empty where the features lie in the block.
    macs, rest_macs: multiply-adds of either for one image.
    """

    name: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    quantized: tuple[Node, ...]
    reference: tuple[Node, ...]
    rest: tuple[Node, ...]
    macs: int
    rest_macs: int


def blocks_of(graph: QuantGraph, reference: GraphModule, features: Collection[str]) -> list[Block]:
    """A quantized graph in blocks. features: names of the float graph's nodes whose values the global error is of."""
    cuts = _cuts(graph, reference)
    nodes = _values_of(graph.module)
    places = {node.name: index for index, node in enumerate(nodes)}
    sites = {site.node: site.name for site in graph.sites.values()}
    macs = {site.node: site.macs for site in graph.sites.values()}
    found: list[Block] = []
    reads: tuple[str, ...] = ()
    first = 0
    for last, writes in cuts:
        own = [sites[node.name] for node in nodes[first : last + 1] if node.name in sites]
        is_ahead = all(places[name] > last for name in features)
        inside = needed(graph.module, writes, reads)
        rest = needed(reference, features, writes) if is_ahead else ()
        found.append(
            Block(
                own[0].rpartition(".")[0] or own[0] if own else writes[0], reads, writes,
                inside, needed(reference, writes, reads), rest,
                *(sum(macs.get(node.name, 0) for node in nodes) for nodes in (inside, rest)),
            )
        )  # fmt: skip
        reads, first = writes, last + 1
    return found


def _cuts(graph: QuantGraph, reference: GraphModule) -> list[tuple[int, tuple[str, ...]]]:
    """Where blocks end, by the index among the nodes that are values, and the tensors that are alive there: as few as
    leave blocks of a size that can be learned."""
    for most_alive in range(1, MOST_ALIVE + 1):
        cuts = _cuts_of(graph, reference, most_alive)
        if len(cuts) * MOST_SITES >= len(graph.sites):
            break
    return cuts


def _cuts_of(graph: QuantGraph, reference: GraphModule, most_alive: int) -> list[tuple[int, tuple[str, ...]]]:
    nodes = _values_of(graph.module)
    *_, output = graph.module.graph.nodes
    batch = next(node.meta["val"].shape[0] for node in reference.graph.nodes if node.op == "placeholder")
    names = {node.name: node for node in reference.graph.nodes}
    sites = {site.node for site in graph.sites.values()}
    last_use = last_uses(list(graph.module.graph.nodes))
    places = {node: index for index, node in enumerate(graph.module.graph.nodes)}
    alive: list[Node] = []
    cuts, count = [], 0
    for index, node in enumerate(nodes[:-1]):
        count += node.name in sites
        alive = [held for held in (*alive, node) if last_use.get(held, -1) > places[node]]
        is_narrow = len(alive) <= most_alive and all(_has_images(names.get(held.name), batch) for held in alive)
        if count >= LEAST_SITES and is_narrow and node in alive:
            cuts.append((index, tuple(held.name for held in alive)))
            count = 0
    return [*cuts, (len(nodes) - 1, tuple(node.name for node in output.all_input_nodes))]


def _has_images(node: Node | None, batch: Any) -> bool:
    """Whether a node of the float graph is a tensor with one entry an image, unlike the windows of Swin."""
    value = None if node is None else node.meta.get("val")
    return isinstance(value, Tensor) and value.dim() > 0 and str(value.shape[0]) == str(batch)


def _values_of(module: GraphModule) -> list[Node]:
    """The nodes that depend on the values of the image, in order: no constants, sizes or weights."""
    found: dict[Node, None] = {}
    for node in module.graph.nodes:
        computes = node.op in ("call_function", "call_module")
        is_size = isinstance(node.meta.get("val"), int | SymInt)
        reads = any(source.op == "placeholder" or source in found for source in node.all_input_nodes)
        if computes and reads and not is_size:
            found[node] = None
    return list(found)


def needed(module: GraphModule, wanted: Collection[str], given: Collection[str]) -> tuple[Node, ...]:
    """The nodes that compute the values named `wanted` from those named `given`, constants and sizes, in order."""
    nodes = list(module.graph.nodes)
    asked = set(wanted) - set(given)
    found = []
    for node in reversed(nodes):
        if node.name in asked:
            found.append(node)
            asked |= {source.name for source in node.all_input_nodes} - set(given)
    return tuple(reversed(found))


def run_nodes(module: GraphModule, nodes: Sequence[Node], given: dict[str, Tensor], images: Tensor) -> dict[str, Any]:
    """The values of nodes by name, of those given too. images: (B, C, H, W), for the first block and for sizes."""
    values: Values = {}
    named = {source.name: source for node in nodes for source in node.all_input_nodes}
    values.update({named[name]: value for name, value in given.items() if name in named})
    for node in nodes:
        values[node] = compute(module, node, values, images)
    return {**given, **{node.name: value for node, value in values.items()}}
