"""Quantizers for the outputs of convolutions: integer kernels of convolutions write integers and not floats.

A linear has an int8 kernel with float output; a convolution has none, so that one which reads integers and returns
floats is slower than a float one, and one that returns integers as well two to three times as fast
(benchmarks/convolutions.py). The quantizer of its output is set with the others; a profile that runs the convolution in
float leaves it out.

ONNX Runtime takes whatever stands between two Q/DQ pairs for an integer product, also a convolution with float weights,
which it then rounds by itself. So a convolution's output gets no quantizer where a float convolution would come to
stand between that and the next one.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from leanvit.quant.attach import insert, quantizer_name
from leanvit.quant.graph import (
    QuantGraph,
    Site,
    conv_options,
    node_argument,
    only_user,
    quantizer_of,
)
from leanvit.quant.ops import ANY_CONVOLUTION, KEEPS_INTEGERS, RELU
from leanvit.quant.opt_m import fit_tensor
from leanvit.quant.quantizers import ActivationQuantizer, UniformQuantizer, WeightQuantizer

OUTPUT_BITS = 8
MIN_CHANNELS = 16
MIN_MACS = 2**20
MIN_INTENSITY = 64
"""Channels in and out, multiply-adds for an image, and those for each value read or written, below which quantizing and
dequantizing values costs about what an integer convolution gains (benchmarks/convolutions.py); every quantizer costs
accuracy, too."""


def output_node(convolution: Node) -> Node:
    """What the quantizer follows: the ReLU, where a convolution has one of its own, as kernels take it in."""
    user = only_user(convolution)
    return user if user is not None and user.target is RELU else convolution


def is_patch_embedding(convolution: Node, weight_shape: tuple[int, ...]) -> bool:
    """Whether a convolution's windows are larger than a pixel and tile the map, without padding or groups."""
    # Padding by name ("same") counts as padding.
    stride, padding, dilation, groups = conv_options(convolution)
    kernel = weight_shape[2:]
    height, width = node_argument(convolution, 0).meta["val"].shape[-2:]
    tiles = stride == kernel and height % kernel[0] == 0 and width % kernel[1] == 0
    return bool(tiles and not any(padding) and dilation == (1, 1) and groups == 1 and kernel != (1, 1))


def wants_quantized_output(convolution: Node, site: Site) -> bool:
    """Whether a convolution is dense and large, one that gains from integers.

    Not those in groups, whose float kernels are faster (depthwise ones too), and not patch embeddings, which run as
    linears.
    """
    small = min(site.weight_shape[:2]) < MIN_CHANNELS or site.macs < MIN_MACS
    if small or conv_options(convolution)[3] != 1 or is_patch_embedding(convolution, site.weight_shape):
        return False
    # Its output has as many values as there are multiply-adds for each weight of one channel.
    values = sum(site.elements) + site.macs // math.prod(site.weight_shape[1:])
    return site.macs >= MIN_INTENSITY * values


def sites_with_outputs(graph: QuantGraph) -> dict[str, str]:
    """Names of the nodes whose values get a quantizer, each with the convolution that it belongs to.

    The last ones of the network have none: logits would become coarse. An output that the network itself reads on is
    not last.
    """
    nodes, inner = graph.nodes(), set[Node]()
    products = {nodes[site.node] for site in graph.sites.values() if site.macs}
    for node in reversed(graph.module.graph.nodes):
        if any(user in products or user in inner for user in node.users):
            inner.add(node)
    convolutions = [(nodes[site.node], site) for site in graph.sites.values() if site.kind == "conv2d"]
    return {
        output_node(node).name: site.name
        for node, site in convolutions
        if node in inner and wants_quantized_output(node, site)
    }


def fit_output(x: Tensor) -> tuple[float, int]:
    """Scale and zero point of 8-bit integers with the least squared error on x, a tensor of any shape."""
    quantizer = fit_tensor(x, OUTPUT_BITS)
    return float(quantizer.scale), int(quantizer.zero_point)


def integer_convolutions(graph: QuantGraph, module: GraphModule, lifted: Collection[str]) -> set[str]:
    """Names of the nodes of convolutions that run on integers: those which read 8 bits and have an output quantizer.

    module: of the graph or a copy, with all its quantizers. lifted: nodes that run in float all the same.
    """
    with_output = {graph.sites[name].node for name in graph.outputs} - set(lifted)
    chosen = {node for node in module.graph.nodes if node.name in with_output and _reads_bytes(module, node)}
    while blocked := {node for node in chosen if _leads_into_float(module, node, chosen)}:
        chosen -= blocked
    return {node.name for node in chosen}


def _leads_into_float(module: GraphModule, convolution: Node, integer: Collection[Node]) -> bool:
    """Whether a float convolution reads the integers, and another quantizer follows it."""
    return any(
        reader.target in ANY_CONVOLUTION and reader not in integer and any(_next_quantizers(module, reader, integer))
        for reader in _readers(module, output_node(convolution))
    )


def _readers(module: GraphModule, node: Node) -> Iterator[Node]:
    """What reads a value, over quantizers and operations that keep quantized integers."""
    for user in node.users:
        if user.target in KEEPS_INTEGERS or isinstance(quantizer_of(module, user), ActivationQuantizer):
            yield from _readers(module, user)
        else:
            yield user


def _next_quantizers(module: GraphModule, node: Node, integer: Collection[Node]) -> Iterator[bool]:
    """For each quantizer that follows a node next, whether anything but float convolutions reads it: they have none."""
    for user in node.users:
        if user.target in KEEPS_INTEGERS:
            yield from _next_quantizers(module, user, integer)
        elif isinstance(quantizer_of(module, user), ActivationQuantizer):
            yield any(reader.target not in ANY_CONVOLUTION or reader in integer for reader in user.users)


def _reads_bytes(module: GraphModule, convolution: Node) -> bool:
    """Whether a convolution reads uniform 8-bit integers and has a quantized weight."""
    activation = quantizer_of(module, node_argument(convolution, 0))
    weight = quantizer_of(module, node_argument(convolution, 1))
    return _is_bytes(activation) and isinstance(weight, WeightQuantizer)


def _is_bytes(quantizer: nn.Module | None) -> bool:
    if not isinstance(quantizer, UniformQuantizer):
        return False
    return quantizer.bits == OUTPUT_BITS and quantizer.heads is None


def only_quantizers_read(module: GraphModule, convolution: Node) -> bool:
    """Whether nothing reads a convolution's output but quantizers, so that an integer kernel can write it."""
    readers = output_node(convolution).users
    return all(isinstance(quantizer_of(module, user), ActivationQuantizer) for user in readers)


def quantize_outputs(graph: QuantGraph, module: GraphModule, integer: Collection[str]) -> None:
    """Put a quantizer after every convolution that `integer` names, in place.

    module: a copy of the graph's, where what runs in float has no quantizers any more. Where an 8-bit quantizer reads
    the output already, everything else reads that, too.
    """
    names = {site.node: name for name, site in graph.sites.items() if site.node in integer}
    for node in [node for node in module.graph.nodes if node.name in names]:
        source = output_node(node)
        rounded = next((user for user in source.users if _is_bytes(quantizer_of(module, user))), None)
        if rounded is None:
            site = names[node.name]
            scale, zero_point = graph.outputs[site]
            quantizer = UniformQuantizer(OUTPUT_BITS)
            quantizer.set_parameters(torch.tensor(scale), torch.tensor(zero_point))
            rounded = insert(module, source.next, quantizer_name(site, "output"), quantizer, source)
        else:
            source.append(rounded)
        for user in [user for user in source.users if user is not rounded]:
            user.replace_input_with(source, rounded)
