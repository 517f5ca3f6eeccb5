"""Put quantizers into a graph: one in front of everything that a plan quantizes."""

from __future__ import annotations

import itertools

from torch import nn
from torch.fx import GraphModule, Node

from leanvit.quant.graph import OPERANDS, QuantGraph, node_argument
from leanvit.quant.plan import Plan
from leanvit.quant.quantizers import Form, WeightQuantizer, make_quantizer

Forms = dict[str, tuple[Form, int | None]]
"""{name of an activation quantizer: (form, heads or None)}; those that are absent are uniform, one for the tensor."""

ROLES = ("input", "other")


def quantizer_name(site: str, role: str) -> str:
    """Name of the submodule that holds a site's quantizer; role is input, other, weight or output."""
    return f"quantizer_{site}_{role}".replace(".", "_").replace("#", "_")


def attach(graph: QuantGraph, plan: Plan, forms: Forms | None = None, *, share: bool = True) -> None:
    """Put quantizers with the plan's bits in front of every site; their parameters are set later.

    forms: of quantizers that are not uniform. share: sites that read one tensor with the same bits share one
    quantizer. A quantizer stands right before the first site that reads it, so that all operands are known.
    """
    nodes = graph.nodes()
    shared: dict[tuple[str, int, bool], Node] = {}
    for name in (n for n in graph.sites if n in plan):
        site = graph.sites[name]
        weight_bits, activation_bits = plan[name]
        node = nodes[site.node]
        arguments = list(node.args)
        for index, bits in enumerate((activation_bits, weight_bits)[: OPERANDS[site.kind]]):
            source = node_argument(node, index)
            # Products may have quantizers by head, which no other site can read.
            key = (source.name, bits, site.kind == "matmul")
            if key not in shared or not share:
                own = quantizer_name(name, ROLES[index])
                form, heads = (forms or {}).get(own, ("uniform", None))
                shared[key] = insert(graph.module, node, own, make_quantizer(form, bits, heads), source)
            arguments[index] = shared[key]
        if site.weight:
            quantizer = WeightQuantizer(site.weight_shape, weight_bits)
            arguments[1] = insert(graph.module, node, quantizer_name(name, "weight"), quantizer)
        node.args = tuple(arguments)
    graph.module.graph.eliminate_dead_code()
    graph.module.delete_all_unused_submodules()
    _drop_unused_parameters(graph.module)
    graph.module.recompile()


def insert(module: GraphModule, before: Node, name: str, quantizer: nn.Module, *inputs: Node) -> Node:
    """Put a quantizer before a node, as the submodule `name` on the module's device; returns its node."""
    like = next(itertools.chain(module.parameters(), module.buffers()), None)
    module.add_submodule(name, quantizer if like is None else quantizer.to(like.device))
    with module.graph.inserting_before(before):
        node = module.graph.call_module(name, tuple(inputs))
    if inputs:
        node.meta = {"val": inputs[0].meta["val"]}
    return node


def _drop_unused_parameters(module: GraphModule) -> None:
    used = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    for name, _ in list(module.named_parameters()):
        if name not in used and not name.startswith("quantizer_"):
            owner, _, leaf = name.rpartition(".")
            delattr(module.get_submodule(owner), leaf)
