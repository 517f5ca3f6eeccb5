"""Codes for what convolutions give: integer kernels of convolutions write codes and not floats.

A linear has an int8 kernel with float output; a convolution has none, so that one which reads codes and gives floats is
slower than a float one, and one that gives codes as well two to three times as fast (benchmarks/convolutions.py). The
grid of its output is set with the others; a profile that runs the convolution in float leaves it out.

ONNX Runtime takes whatever stands between two grids for an integer product, also a convolution with float weights,
which it then rounds by itself. So a convolution gets no codes where a float one would come to stand between them and
the next grid.
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
"""Channels in and out, multiply-adds for an image, and those for each value read or written, below which turning values
into codes and back costs about what an integer convolution gains; every grid costs accuracy, too."""


def output_node(convolution: Node) -> Node:
    """Where the codes stand: behind the ReLU, where a convolution has one of its own, as kernels take it in."""
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


def wants_output_codes(convolution: Node, site: Site) -> bool:
    """Whether a convolution is dense and large, one that gains from integers.

    Not those in groups, whose float kernels are faster (depthwise ones too), and not patch embeddings, which run as
    linears.
    """
    small = min(site.weight_shape[:2]) < MIN_CHANNELS or site.macs < MIN_MACS
    if small or conv_options(convolution)[3] != 1 or is_patch_embedding(convolution, site.weight_shape):
        return False
    # What it gives has as many values as the multiply-adds have weights' fan-in.
    values = sum(site.elements) + site.macs // math.prod(site.weight_shape[1:])
    return site.macs >= MIN_INTENSITY * values


def sites_with_outputs(graph: QuantGraph) -> dict[str, str]:
    """Names of the nodes whose grid is wanted, and of the convolution behind each.

    The last ones of the network have none: logits would become coarse. An answer that the network itself reads on is
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
        if node in inner and wants_output_codes(node, site)
    }


def fit_output(x: Tensor) -> tuple[float, int]:
    """Scale and zero point of 8-bit codes with the least squared error on x, a tensor of any shape."""
    quantizer = fit_tensor(x, OUTPUT_BITS)
    return float(quantizer.scale), int(quantizer.zero_point)


def integer_convolutions(graph: QuantGraph, module: GraphModule, lifted: Collection[str]) -> set[str]:
    """Names of the nodes of convolutions that run on integers: those with a grid for their output which read 8 bits.

    module: of the graph or a copy, with all its quantizers. lifted: nodes that run in float all the same.
    """
    with_codes = {graph.sites[name].node for name in graph.outputs} - set(lifted)
    chosen = {node for node in module.graph.nodes if node.name in with_codes and _reads_bytes(module, node)}
    while blocked := {node for node in chosen if _leads_into_float(module, node, chosen)}:
        chosen -= blocked
    return {node.name for node in chosen}


def _leads_into_float(module: GraphModule, convolution: Node, integer: Collection[Node]) -> bool:
    """Whether a float convolution reads the codes, and another grid stands behind it."""
    return any(
        reader.target in ANY_CONVOLUTION and reader not in integer and any(_grids_behind(module, reader, integer))
        for reader in _readers(module, output_node(convolution))
    )


def _readers(module: GraphModule, node: Node) -> Iterator[Node]:
    """What reads a value, over grids and operations that keep codes."""
    for user in node.users:
        if user.target in KEEPS_INTEGERS or isinstance(quantizer_of(module, user), ActivationQuantizer):
            yield from _readers(module, user)
        else:
            yield user


def _grids_behind(module: GraphModule, node: Node, integer: Collection[Node]) -> Iterator[bool]:
    """For each grid next behind a node, whether it is read by anything but float convolutions, which have none."""
    for user in node.users:
        if user.target in KEEPS_INTEGERS:
            yield from _grids_behind(module, user, integer)
        elif isinstance(quantizer_of(module, user), ActivationQuantizer):
            yield any(reader.target not in ANY_CONVOLUTION or reader in integer for reader in user.users)


def _reads_bytes(module: GraphModule, convolution: Node) -> bool:
    """Whether a convolution reads uniform 8-bit codes and has a quantized weight."""
    activation = quantizer_of(module, node_argument(convolution, 0))
    weight = quantizer_of(module, node_argument(convolution, 1))
    return _gives_bytes(activation) and isinstance(weight, WeightQuantizer)


def _gives_bytes(quantizer: nn.Module | None) -> bool:
    if not isinstance(quantizer, ActivationQuantizer):
        return False
    return quantizer.form == "uniform" and quantizer.bits == OUTPUT_BITS and quantizer.heads is None


def gives_codes(module: GraphModule, convolution: Node) -> bool:
    """Whether nothing reads a convolution's output but quantizers, so that an integer kernel can write it."""
    readers = output_node(convolution).users
    return all(isinstance(quantizer_of(module, user), ActivationQuantizer) for user in readers)


def quantize_outputs(graph: QuantGraph, module: GraphModule, integer: Collection[str]) -> None:
    """Put codes behind every convolution that `integer` names, in place.

    module: a copy of the graph's, where what runs in float reads no codes any more. Where an 8-bit quantizer reads the
    output already, everything else reads its codes too.
    """
    names = {site.node: name for name, site in graph.sites.items() if site.node in integer}
    for node in [node for node in module.graph.nodes if node.name in names]:
        source = output_node(node)
        codes = next((user for user in source.users if _gives_bytes(quantizer_of(module, user))), None)
        if codes is None:
            site = names[node.name]
            scale, zero_point = graph.outputs[site]
            quantizer = UniformQuantizer(OUTPUT_BITS)
            quantizer.set_parameters(torch.tensor(scale), torch.tensor(zero_point))
            codes = insert(module, source.next, quantizer_name(site, "output"), quantizer, source)
        else:
            source.append(codes)
        for user in [user for user in source.users if user is not codes]:
            user.replace_input_with(source, codes)
