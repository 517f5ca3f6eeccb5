"""What a graph becomes before its sites are found: one graph, nothing in place, BatchNorm inside its convolution."""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node, map_arg

from leanvit.errors import ExportError
from leanvit.quant.ops import CONVOLUTIONS, VIEWS, aten

REGIONS = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}
"""Operations that run a graph of their own under some setting, by the operand that is the graph."""


def inline_regions(module: GraphModule) -> None:
    """Put what runs without autocast or without gradients (EfficientViT's attention) into the graph itself, in place.

    Raises ExportError for autocast that is on: a float32 network of other dtypes inside is not what was trained.
    """
    for node in list(module.graph.nodes):
        if _region_name(node) in REGIONS:
            _inline(module, node)
    module.recompile()


def _region_name(node: Node) -> str:
    target: Any = node.target
    return str(target.__name__) if isinstance(target, torch._ops.HigherOrderOperator) else ""


def _inline(module: GraphModule, node: Node) -> None:
    name = _region_name(node)
    if name == "wrap_with_autocast" and node.args[2]:
        raise ExportError(
            f"the network turns autocast on inside of its forward ({node.args[1]}), expected float32 throughout. "
            "Take torch.autocast out of the forward; quantize and export choose the precision."
        )
    place: Any = REGIONS[name]
    source: Any = node.args[place]
    inner: Any = operator.attrgetter(str(source.target))(module)
    inline_regions(inner)
    given = iter(node.args[place + 1 :])
    copies: dict[Node, Any] = {}
    with module.graph.inserting_before(node):
        for own in inner.graph.nodes:
            if own.op == "placeholder":
                copies[own] = next(given)
            elif own.op == "output":
                outputs = map_arg(own.args[0], copies.__getitem__)
            elif own.target is not aten._assert_tensor_metadata.default:
                copies[own] = module.graph.node_copy(own, copies.__getitem__)
                if own.op == "get_attr":
                    copies[own].target = f"{source.target}.{own.target}"
    for user in list(node.users):
        user.replace_all_uses_with(outputs[user.args[1]])
        module.graph.erase_node(user)
    module.graph.erase_node(node)
    module.graph.erase_node(source)


def without_in_place(module: GraphModule) -> None:
    """Write operations that overwrite their input (relu_, add_, silu_) as those that do not.

    Values that are recorded would change afterwards otherwise. What overwrites a view stays, for its base changes too.
    """
    nodes = list(module.graph.nodes)
    order = {node: index for index, node in enumerate(nodes)}
    for node in nodes:
        plain = _plain_operation(node)
        if plain is None:
            continue
        overwritten = node.args[0]
        for user in list(overwritten.users):
            if order[user] > order[node]:
                user.replace_input_with(overwritten, node)
        node.target = plain
    module.recompile()


def _plain_operation(node: Node) -> Any:
    """aten.relu.default for aten.relu_.default, None where there is no such thing or it would not be the same."""
    target: Any = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload) or not node.args:
        return None
    name = target.overloadpacket.__name__
    source = node.args[0]
    if not name.endswith("_") or name.endswith("__") or not isinstance(source, Node) or source.target in VIEWS:
        return None
    packet = getattr(aten, name[:-1], None)
    return getattr(packet, target._overloadname, None)


def fold_batch_norm(module: GraphModule) -> None:
    """Fold BatchNorm with its running averages into the convolution before it: w' = w g / s, b' = (b - m) g / s + beta.

    With s = sqrt(variance + epsilon) (Jacob et al., arXiv 1712.05877, section 3.2). The weight that is quantized is
    then the one that runs. Weights that several operations share stay as they are.
    """
    uses = Counter(str(n.target) for n in module.graph.nodes if n.op == "get_attr" for _ in n.users)
    for node in list(module.graph.nodes):
        source = node.args[0] if node.target is aten.batch_norm.default else None
        if not isinstance(source, Node) or source.target not in CONVOLUTIONS or list(source.users) != [node]:
            continue
        constants = [*source.args[1:3], *node.args[1:5]]
        own = all(a is None or (isinstance(a, Node) and a.op == "get_attr") for a in constants)
        shared = any(isinstance(a, Node) and uses[str(a.target)] > 1 for a in source.args[1:3])
        if own and not shared and not node.args[5]:
            _fold(module, source, node)
    module.graph.eliminate_dead_code()
    module.recompile()


@torch.no_grad()
def _fold(module: GraphModule, convolution: Node, norm: Node) -> None:
    weight, bias = convolution.args[1], (convolution.args[2] if len(convolution.args) > 2 else None)
    gain, shift, mean, variance = norm.args[1:5]
    epsilon: Any = norm.args[7]
    center = _value(module, mean)
    factor = _value(module, gain, 1.0, center) / (_value(module, variance) + epsilon).sqrt()
    moved = (_value(module, bias, 0.0, center) - center) * factor + _value(module, shift, 0.0, center)
    kernel = operator.attrgetter(str(weight.target))(module)  # type: ignore[union-attr]
    kernel.data = (kernel.double() * factor.view(-1, 1, 1, 1)).to(kernel.dtype)
    if bias is None:
        bias = _new_bias(module, convolution, moved.to(kernel.dtype))
        convolution.args = (*convolution.args[:2], bias, *convolution.args[3:])
    else:
        operator.attrgetter(str(bias.target))(module).data = moved.to(kernel.dtype)  # type: ignore[union-attr]
    norm.replace_all_uses_with(convolution)
    module.graph.erase_node(norm)


def _value(module: GraphModule, node: Any, otherwise: float = 0.0, like: Tensor | None = None) -> Tensor:
    """The constant that a node stands for, in float64; `otherwise` in the shape of `like` where there is none."""
    if node is None and like is not None:
        return torch.full_like(like, otherwise)
    found: Tensor = operator.attrgetter(str(node.target))(module)
    return found.detach().double()


def _new_bias(module: GraphModule, convolution: Node, value: Tensor) -> Node:
    """A bias beside the weight of a convolution that has none."""
    owner, _, leaf = str(convolution.args[1].target).rpartition(".")  # type: ignore[union-attr]
    name = f"{leaf.removesuffix('weight')}bias"
    module.get_submodule(owner).register_parameter(name, torch.nn.Parameter(value))
    with module.graph.inserting_before(convolution):
        node = module.graph.get_attr(f"{owner}.{name}".lstrip("."))
    node.meta = {"val": value}
    return node
