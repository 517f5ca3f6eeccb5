"""What a profile runs: the simulated network with the quantizers that its kernels have, and no others."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from leanvit.errors import ConfigError
from leanvit.export.onnx.profiles import Profile, find
from leanvit.export.onnx.quantizers import CENTRE, FloatQuantizer, branches_of
from leanvit.quant.convolution_outputs import (
    integer_convolutions,
    is_patch_embedding,
    only_quantizers_read,
    quantize_outputs,
)
from leanvit.quant.graph import (
    QuantGraph,
    get_tensor,
    node_argument,
    only_user,
    quantizer_of,
    set_tensor,
)
from leanvit.quant.ops import CONVOLUTIONS, MOVES, PRODUCTS, SCALES, SOFTMAX
from leanvit.quant.quantizers import ActivationQuantizer, WeightQuantizer

HALF_ROUNDING = 2.0**-11
"""Largest relative error of rounding to float16."""

SMALLEST_SHARE = 1 / 256
"""Of the largest value of a constant: below it values are rounded as if they had this size."""


def executed_form(graph: QuantGraph, profile: Profile | str, lifted: Collection[str] = ()) -> GraphModule:
    """The simulated network as a profile runs it: without the activation quantizers of operations that run in float.

    A copy; (B, 3, H, W) float32 -> logits. This is what an exported file is compared with.
    Raises ConfigError where the profile is unknown or can't run a quantizer.
    """
    row = find(profile)
    module = GraphModule(copy.deepcopy(graph.module), copy.deepcopy(graph.module.graph)).eval()
    raised = {graph.sites[name].node for name in lifted}
    chosen = row.convolutions == "integer where faster"
    convolutions = integer_convolutions(graph, module, raised) if chosen else set()
    integer = convolutions | (_plain_attention(module) if row.attention == "integer around zero" else set())
    for node in list(module.graph.nodes):
        in_float = node.name in raised or (node.name not in integer and _runs_in_float(module, node, row))
        if node.op == "call_function" and in_float:
            for source in list(node.all_input_nodes):
                if isinstance(quantizer_of(module, source), ActivationQuantizer):
                    node.replace_input_with(source, node_argument(source, 0))
    module.graph.eliminate_dead_code()
    if chosen:
        quantize_outputs(graph, module, convolutions)
    if row.attention == "integer around zero":
        _centre_products(module)
    module.delete_all_unused_submodules()
    _scale_dead_channels(module)
    if row.compact:
        _round_constants(module)
    _round_biases(module)
    module.recompile()
    _require_runnable(module, row)
    return module


@torch.no_grad()
def _round_constants(module: GraphModule) -> None:
    """Round biases, gains, tables and weights' scales to float16 where that loses no more than its rounding, in place.

    Of what is added, values far below the largest of their tensor may lose more: nothing depends on their last bits.
    Scales multiply, and may not.
    """
    for name in {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}:
        _round_to_half(get_tensor(module, name), SMALLEST_SHARE)
    for quantizer in _weight_quantizers(module):
        _round_to_half(quantizer.scale, 0.0)


def _round_to_half(value: Tensor, smallest_share: float) -> None:
    """Round a float32 tensor in place where no value moves by more than float16's rounding of it.

    smallest_share: values below this share of the largest may move as far as one of that size.
    """
    if value.dtype != torch.float32 or not value.numel():
        return
    sizes = value.abs()
    rounded = value.half().float()
    if ((rounded - value).abs() <= HALF_ROUNDING * sizes.clamp(min=float(sizes.max()) * smallest_share)).all():
        value.data = rounded


def _weight_quantizers(module: GraphModule) -> list[WeightQuantizer]:
    return [quantizer for quantizer in module.modules() if isinstance(quantizer, WeightQuantizer)]


@torch.no_grad()
def _scale_dead_channels(module: GraphModule) -> None:
    """Give channels without weights the largest scale of their tensor, in place: their products stay 0.

    Runtimes count the bias of an integer convolution in steps of the scale, and there are none so small.
    """
    for quantizer in _weight_quantizers(module):
        dead = ~quantizer.codes.flatten(1).any(1)
        quantizer.scale[dead] = quantizer.scale.max()


@torch.no_grad()
def _round_biases(module: GraphModule) -> None:
    """Round the biases of convolutions between integers to whole steps of their products, in place.

    ONNX Runtime counts them so (its WeightBiasQuantization): half a step is far more than the rounding of a float sum,
    and where the simulation left it out, networks that make much of small changes came out 5 to 16 dB further from it.
    """
    read = Counter(str(node.target) for node in module.graph.nodes if node.op == "get_attr" for _ in node.users)
    for node in module.graph.nodes:
        bias = node.args[2] if node.target in CONVOLUTIONS and len(node.args) > 2 else None
        if not isinstance(bias, Node) or bias.op != "get_attr" or read[str(bias.target)] > 1:
            continue
        activation, weight = (quantizer_of(module, node_argument(node, i)) for i in (0, 1))
        if not isinstance(activation, ActivationQuantizer) or not isinstance(weight, WeightQuantizer):
            continue
        # A patch embedding is written as a linear, whose bias stays a float.
        as_linear = is_patch_embedding(node, tuple(weight.codes.shape))
        if _uniform_8(activation) and not as_linear and only_quantizers_read(module, node):
            step = (activation.scale * weight.scale).flatten()
            set_tensor(module, str(bias.target), (get_tensor(module, str(bias.target)) / step).round() * step)


def _runs_in_float(module: GraphModule, node: Node, profile: Profile) -> bool:
    """Whether a profile leaves an operation that was not chosen for integers to float kernels.

    Its weight's bits are then storage only.
    """
    if node.target in CONVOLUTIONS and profile.convolutions == "integer where faster":
        weight = quantizer_of(module, node_argument(node, 1))
        return isinstance(weight, WeightQuantizer) and not is_patch_embedding(node, tuple(weight.codes.shape))
    if node.target in CONVOLUTIONS:
        return profile.convolutions == "float"
    if node.target in PRODUCTS:
        return profile.attention != "integer"
    # What is no product (scope full) follows the linears.
    return profile.linears == "float"


def _plain_attention(module: GraphModule) -> set[str]:
    """Names of the products of plain attention, both of which read uniform integers of 8 bits with one scale.

    Plain: queries @ keys, perhaps scaled, softmax, @ values. With a bias, a mask or logits of the layer before in
    between (Swin, ReViT), OpenVINO 2026.4 takes more time for integers than for bfloat16, and computes sums that are
    read twice wrongly.
    """
    found = set()
    for softmax in (node for node in module.graph.nodes if node.target in SOFTMAX):
        logits = node_argument(softmax, 0)
        while _scales(logits) and len(logits.users) == 1:
            logits = node_argument(logits, 0)
        grid = only_user(softmax)
        mixed = only_user(grid) if grid else None
        if mixed is None or logits.target not in PRODUCTS or mixed.target not in PRODUCTS:
            continue
        read_once = only_user(logits) is not None and node_argument(mixed, 0) is grid
        if read_once and _reads_plain_codes(module, logits) and _reads_plain_codes(module, mixed):
            found |= {logits.name, mixed.name}
    return found


def _scales(node: Node) -> bool:
    """Whether a value is multiplied with or divided by one number."""
    return node.target in SCALES and not (isinstance(node.args[1], Node) and node.args[1].op != "get_attr")


def _reads_plain_codes(module: GraphModule, product: Node) -> bool:
    operands = [quantizer_of(module, node_argument(product, i)) for i in (0, 1)]
    return all(isinstance(quantizer, ActivationQuantizer) and _uniform_8(quantizer) for quantizer in operands)


def _uniform_8(quantizer: ActivationQuantizer) -> bool:
    return (quantizer.form, quantizer.bits, quantizer.scale.dim()) == ("uniform", 8, 0)


def moves_before(value: Node) -> tuple[list[Node], Node]:
    """The operations that moved a value's elements and changed none, the last first, and what they moved."""
    moves: list[Node] = []
    while value.target in MOVES:
        moves.append(value)
        value = node_argument(value, 0)
    return moves, value


@torch.no_grad()
def _centre_products(module: GraphModule) -> None:
    """Make the quantizers of what products read and return symmetric where values are negative, in place.

    OpenVINO's attention kernel takes and returns int8 without a zero point; one with a zero point it computes in float.
    """
    for node in module.graph.nodes:
        quantizer = quantizer_of(module, node)
        if not isinstance(quantizer, ActivationQuantizer) or not _uniform_8(quantizer):
            continue
        _, source = moves_before(node_argument(node, 0))
        below = int(quantizer.zero_point)
        given = source.target in PRODUCTS and _reads_plain_codes(module, source)
        if below and (given or all(user.target in PRODUCTS for user in node.users)):
            reach = quantizer.scale * max(below, quantizer.high - below)
            quantizer.set_parameters(reach / (quantizer.high - CENTRE), torch.full_like(quantizer.zero_point, CENTRE))


def activation_quantizers(network: nn.Module) -> dict[str, ActivationQuantizer]:
    """All activation quantizers of a network by the name of their submodule."""
    return {name: module for name, module in network.named_modules() if isinstance(module, ActivationQuantizer)}


def _require_runnable(module: GraphModule, profile: Profile) -> None:
    """Raise ConfigError that names the quantizers which the profile's kernels don't have."""
    quantizers = activation_quantizers(module)
    low = [f"{name} ({q.bits} bits)" for name, q in quantizers.items() if q.bits < profile.least_activation_bits]
    if low:
        raise ConfigError(
            f"profile {profile.name} runs {profile.least_activation_bits}-bit activations, {len(low)} quantizers have "
            f"fewer: {', '.join(low[:3])}. Quantize with --activation-bits {profile.least_activation_bits}, or export "
            "with --profile exact, which runs the plan as it is."
        )
    without = [
        f"{name} ({q.form}{', by head' if q.heads else ''}, {q.bits} bits)"
        for name, q in quantizers.items()
        if profile.integer_only and any(isinstance(branch.module, FloatQuantizer) for branch in branches_of(q))
    ]
    if without:
        raise ConfigError(
            f"profile {profile.name} runs every product on integer kernels, {len(without)} quantizers have none: "
            f"{', '.join(without[:3])}. Export with --profile mixed, which leaves those products in float, or "
            "quantize with --mode paper."
        )
