"""What a network makes of its parameters alone is computed once: each such operand becomes a parameter of its own.

BEiT, EVA-02 and Swin V2 put the bias of q, k and v together in every forward; weight standardisation scales a kernel;
Swin V2 makes its relative positions by a small network. Folded, the operation that reads them is a site like others,
and a product of constants is none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node, map_arg

from leanvit.quant.ops import ANY_CONVOLUTION, LINEAR, OTHER_PRODUCTS, PRODUCTS, VIEWS, aten

WEIGHTED = (LINEAR, *ANY_CONVOLUTION)
"""Operations whose operands 1 and 2 are weight and bias."""

MULTIPLIES = (*WEIGHTED, *PRODUCTS, *OTHER_PRODUCTS)


def depends_on_input(module: GraphModule) -> set[Node]:
    """Nodes whose value changes with the image."""
    found: set[Node] = set()
    for node in module.graph.nodes:
        if node.op == "placeholder" or any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def fold_constants(module: GraphModule) -> None:
    """Make parameters of computed weights and biases, and of products of parameters, in place.

    Other operations on parameters stay: a table of relative positions is smaller than what is picked of it.
    """
    constants = _constants(module)
    values: dict[Node, Any] = {}
    folded: list[tuple[Node, str, Tensor]] = []
    for node in module.graph.nodes:
        if node in constants and node.target in MULTIPLIES:
            folded.append((node, f"{_owner(node)}.product", _value(module, node, values)))
        elif node.target in WEIGHTED:
            for operand, leaf in zip(node.args[1:3], ("weight", "bias"), strict=False):
                if isinstance(operand, Node) and operand.op == "call_function" and operand in constants:
                    folded.append((operand, f"{_owner(node)}.{leaf}", _value(module, operand, values)))
    if not folded:
        return
    written = [
        (_replace(module, node, path, value), path) for node, path, value in {row[0]: row for row in folded}.values()
    ]
    module.graph.eliminate_dead_code()
    for constant, path in written:
        if constant.users:
            _rename(module, constant, path)
    module.recompile()


def hides_nothing(module: GraphModule, mask: Node) -> bool:
    """Whether a boolean mask of attention is True everywhere, for every image: transformers passes one under export."""
    while mask.target is aten.expand.default:
        mask = mask.all_input_nodes[0]
    return mask in _constants(module) and bool(_value(module, mask, {}).all())


def _constants(module: GraphModule) -> set[Node]:
    """Nodes that return the same at every run: parameters, and what is computed of these alone."""
    overwritten = _overwritten(module)
    found: set[Node] = set()
    for node in module.graph.nodes:
        own = node.op == "get_attr" or (node.op == "call_function" and _is_function(node))
        if own and node not in overwritten and all(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _is_function(node: Node) -> bool:
    """Whether an operation returns the same for the same operands, and changes none of them."""
    schema = getattr(node.target, "_schema", None)
    return schema is None or not (schema.is_mutable or torch.Tag.nondeterministic_seeded in node.target.tags)  # type: ignore[union-attr]


def _overwritten(module: GraphModule) -> set[Node]:
    """Values that an operation overwrites, themselves or in a view."""
    found: set[Node] = set()
    for node in reversed(module.graph.nodes):
        schema = getattr(node.target, "_schema", None)
        if (schema is not None and schema.is_mutable) or (node in found and node.target in VIEWS):
            found.update(node.all_input_nodes)
    return found


@torch.no_grad()
def _value(module: GraphModule, node: Node, values: dict[Node, Any]) -> Any:
    """The value of a constant node; `values` keeps those that were computed."""
    if node not in values:
        if node.op == "get_attr":
            values[node] = _attribute(module, str(node.target))
        else:
            arguments = map_arg(node.args, lambda source: _value(module, source, values))
            options = map_arg(node.kwargs, lambda source: _value(module, source, values))
            values[node] = node.target(*arguments, **options)  # type: ignore[operator]
    return values[node]


def _attribute(module: nn.Module, path: str) -> Any:
    owner, _, leaf = path.rpartition(".")
    return getattr(module.get_submodule(owner), leaf)


def _owner(node: Node) -> str:
    """Path of the module whose parameter an operation reads first, its weight before others; '' where it has none."""
    operands = [*node.args[1:2], *node.all_input_nodes]
    while operands:
        operand = operands.pop(0)
        if isinstance(operand, Node):
            if operand.op == "get_attr":
                return str(operand.target).rpartition(".")[0]
            operands = [*operand.all_input_nodes, *operands]
    return ""


def _replace(module: GraphModule, node: Node, path: str, value: Tensor) -> Node:
    """Put a parameter in the place of a node, as `path` with an ending that is free; returns what reads it."""
    owner_path, _, leaf = path.rpartition(".")
    owner = module.get_submodule(owner_path)
    while hasattr(owner, leaf):
        leaf = f"{leaf}_folded"
    owner.register_parameter(leaf, nn.Parameter(value.detach().clone(), requires_grad=False))
    with module.graph.inserting_before(node):
        constant = module.graph.get_attr(f"{owner_path}.{leaf}".lstrip("."))
    constant.meta = dict(node.meta)
    node.replace_all_uses_with(constant)
    return constant


def _rename(module: GraphModule, constant: Node, path: str) -> None:
    """Call a parameter as `path` says, where nothing that is read has that name (any more)."""
    path = path.lstrip(".")
    if path in {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}:
        return
    value = _attribute(module, str(constant.target))
    owner_path, _, leaf = path.rpartition(".")
    owner = module.get_submodule(owner_path)
    if hasattr(owner, leaf):
        delattr(owner, leaf)
    owner.register_parameter(leaf, value)
    constant.target = path
