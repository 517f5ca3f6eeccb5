"""Codes for what convolutions give: integer kernels of convolutions write codes and not floats.

A linear has an int8 kernel with float output; a convolution has none, so that one which reads codes and gives floats is
slower than a float one, and one that gives codes as well two to three times as fast (benchmarks/convolutions.py). The
grid of its output is set with the others; a profile that runs the convolution in float leaves it out.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from leanvit.quant.graph import QuantGraph, Site, aten, last_sites, node_argument, quantizer_of
from leanvit.quant.quantizers import ActivationQuantizer, WeightQuantizer
from leanvit.quant.search import fit_tensor

OUTPUT_BITS = 8
MIN_CHANNELS = 16
MIN_MACS = 2**20
MIN_INTENSITY = 64
"""Channels in and out, multiply-adds for an image, and those for each value read or written, below which turning values
into codes and back costs about what an integer convolution gains; every grid costs accuracy, too."""

RELU = aten.relu.default


def output_node(convolution: Node) -> Node:
    """Where the codes stand: behind the ReLU, where a convolution has one of its own, as kernels take it in."""
    users = list(convolution.users)
    return users[0] if len(users) == 1 and users[0].target is RELU else convolution


def wants_output_codes(graph: QuantGraph, site: Site, last: set[str]) -> bool:
    """Whether a site is a dense and large convolution inside the network, one that gains from integers.

    Not those in groups, whose float kernels are faster (depthwise ones too), and not the last ones: logits would
    become coarse.
    """
    if site.kind != "conv2d" or site.name in last:
        return False
    node = graph.node(site.node)
    in_groups = len(node.args) > 6 and node.args[6] != 1
    small = min(site.weight_shape[:2]) < MIN_CHANNELS or site.macs < MIN_MACS
    # What it gives has as many values as the multiply-adds have weights' fan-in.
    values = sum(site.elements) + site.macs // math.prod(site.weight_shape[1:])
    return not in_groups and not small and site.macs >= MIN_INTENSITY * values


def sites_with_outputs(graph: QuantGraph) -> dict[str, str]:
    """Names of the nodes whose grid is wanted, and of the convolution behind each."""
    last = last_sites(graph)
    sites = [site for site in graph.sites.values() if wants_output_codes(graph, site, last)]
    return {output_node(graph.node(site.node)).name: site.name for site in sites}


def fit_output(x: Tensor) -> tuple[float, int]:
    """Scale and zero point of 8-bit codes with the least squared error on x, a tensor of any shape."""
    quantizer = fit_tensor(x, OUTPUT_BITS)
    return float(quantizer.scale), int(quantizer.zero_point)


def reads_bytes(module: GraphModule, convolution: Node) -> bool:
    """Whether a convolution reads uniform 8-bit codes and has a quantized weight."""
    activation = quantizer_of(module, node_argument(convolution, 0))
    weight = quantizer_of(module, node_argument(convolution, 1))
    return _gives_bytes(activation) and isinstance(weight, WeightQuantizer)


def gives_codes(module: GraphModule, convolution: Node) -> bool:
    """Whether nothing reads a convolution's output but quantizers, so that an integer kernel can write it."""
    readers = output_node(convolution).users
    return all(isinstance(quantizer_of(module, user), ActivationQuantizer) for user in readers)


def _gives_bytes(quantizer: nn.Module | None) -> bool:
    if not isinstance(quantizer, ActivationQuantizer):
        return False
    return quantizer.form == "uniform" and quantizer.bits == OUTPUT_BITS and quantizer.heads is None


def quantize_outputs(graph: QuantGraph, module: GraphModule) -> None:
    """Put codes behind every convolution in `module` that still reads codes, in place.

    module: a copy of the graph's, where what runs in float reads no codes any more. Where an 8-bit quantizer reads the
    output already, everything else reads its codes too.
    """
    names = {site.node: name for name, site in graph.sites.items() if name in graph.outputs}
    # All before the first change: behind it, a float convolution may read the codes of the one before it.
    integer = [node for node in module.graph.nodes if node.name in names and reads_bytes(module, node)]
    for node in integer:
        source = output_node(node)
        codes = next((user for user in source.users if _gives_bytes(quantizer_of(module, user))), None)
        if codes is None:
            codes = _insert(module, source, names[node.name], graph.outputs[names[node.name]])
        else:
            source.append(codes)
        for user in [user for user in source.users if user is not codes]:
            user.replace_input_with(source, codes)


def _insert(module: GraphModule, source: Node, site: str, parameters: tuple[float, int]) -> Node:
    quantizer = ActivationQuantizer(OUTPUT_BITS)
    scale, zero_point = parameters
    quantizer.set_parameters(torch.tensor(scale), torch.tensor(zero_point))
    like = next(iter(module.buffers()), None)
    name = f"quantizer_{site}_output".replace(".", "_").replace("#", "_")
    module.add_submodule(name, quantizer if like is None else quantizer.to(like.device))
    with module.graph.inserting_after(source):
        node = module.graph.call_module(name, (source,))
    node.meta = {"val": source.meta["val"]}
    return node
