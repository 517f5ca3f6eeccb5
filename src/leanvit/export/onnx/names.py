"""Names of what an ONNX file holds: module paths, so that Netron, profilers and error messages say where one is.

A product has the name of its module (`blocks.3.attn.proj`), or of its site (`blocks.3.attn.qk`, `blocks.3.attn.qkv.q`);
other operations have path and kind (`blocks.3.attn/Softmax`). A value is called as the node that makes it, a constant
as the parameter (`blocks.3.attn.proj.weight`) or the quantizer (`blocks.3.attn.proj.input.scale`) that it comes from.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn
from torch._ops import OpOverload
from torch.fx import GraphModule

from leanvit.export.onnx.storage import VECTORS, rename
from leanvit.quant.attach import quantizer_name
from leanvit.quant.graph import QuantGraph, module_path
from leanvit.quant.ops import aten

if TYPE_CHECKING:
    import onnx_ir as ir

PATH = "leanvit_path"
"""Key of a node's path in its meta."""

SCOPES = "pkg.torch.onnx.name_scopes"
"""Where torch.onnx notes the modules that a node was made in, the outermost first, its own name last."""

QUANTIZER_ROLES = ("input", "other", "weight", "output")
"""Of quantizers at a site, see leanvit.quant.attach.quantizer_name."""

NETWORK = "network."
"""Prefix of everything after the normalisation of images (inputs.ImageInput)."""

PARTS = {
    "codes": "weight", "codes4": "weight", "packed": "weight", "zero_point4": "zero_point", "load_scale": "scale",
    "activation": "input", "linear": "",
}  # fmt: skip
"""Names inside of lowered modules (leanvit.export.onnx.quantizers), as a reader of the file knows them."""

STORED = ("_half", "_int4", "_values")
"""What leanvit.export.onnx.storage puts after the name of a constant that is stored in another form."""

NAMED_AS_MODULE = frozenset(
    {
        "MatMul", "Gemm", "Conv", "MatMulIntegerToFloat", "FusedMatMul", "MatMulNBits", "Attention",
        "LayerNormalization",
    }
)  # fmt: skip
"""Kinds of operation that a module or a site is there for."""


class Operation(nn.Module):
    """One operation of a traced graph as a module: torch.onnx notes it beside what it makes of it."""

    def __init__(self, target: OpOverload) -> None:
        """target: what it calls."""
        super().__init__()
        self.target = target

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """What the operation returns."""
        return self.target(*arguments, **options)


def mark_paths(graph: QuantGraph, module: GraphModule) -> None:
    """Note at every node of a copy of the graph's module its site, or the path of its module, in its meta."""
    sites = {site.node: name for name, site in graph.sites.items()}
    quantizers = {quantizer_name(site, role): f"{site}.{role}" for site in graph.sites for role in QUANTIZER_ROLES}
    for node in module.graph.nodes:
        found = quantizers.get(str(node.target)) if node.op == "call_module" else sites.get(node.name)
        node.meta[PATH] = found or module_path(node)


def with_scopes(module: GraphModule) -> dict[str, str]:
    """Make every operation a module of its own, in place; returns {name of the submodule: path}."""
    paths: dict[str, str] = {}
    for node in list(module.graph.nodes):
        if not isinstance(node.target, OpOverload) or node.target is aten.sym_size.int:
            continue
        name = f"operation_{len(paths)}"
        paths[name] = node.meta.get(PATH, "")
        module.add_submodule(name, Operation(node.target))
        with module.graph.inserting_before(node):
            scoped = module.graph.call_module(name, node.args, node.kwargs)
        scoped.meta = dict(node.meta)
        node.replace_all_uses_with(scoped)
        module.graph.erase_node(node)
    module.recompile()
    return paths


def paths_of_values(model: ir.Model, paths: Mapping[str, str], outside: str) -> dict[str, str]:
    """{value: path of the operation that makes it} of a model as torch.onnx wrote it.

    paths: of submodules. outside: path of what is in none of them.
    """
    found: dict[str, str] = {}
    for node in model.graph:
        path = outside
        for scope in ast.literal_eval(node.metadata_props.get(SCOPES, "[]")):
            inside = _inside(scope, paths)
            path = path if inside is None else inside
        found |= dict.fromkeys((value.name for value in node.outputs if value.name), path)
    return found


def _inside(name: str, paths: Mapping[str, str]) -> str | None:
    """Path of something in a submodule, None where it is in none."""
    top, *parts = name.removeprefix(NETWORK).split(".")
    if top not in paths:
        return None
    return ".".join(part for part in (paths[top], *(PARTS.get(part, part) for part in parts)) if part)


def name_by_path(proto: Any, values: Mapping[str, str], paths: Mapping[str, str], known: Collection[str]) -> Any:
    """Name all nodes, values and constants of an onnx.ModelProto, in place; returns it.

    values: as from `paths_of_values`. paths: of submodules. known: names of parameters and buffers of the network.
    """
    graph = proto.graph
    new = {name: name for name in (value.name for value in (*graph.input, *graph.output))}
    taken = Counter(new.values())
    for name in (*(tensor.name for tensor in graph.initializer), *(out for node in graph.node for out in node.output)):
        if name not in new and (constant := _constant(name, paths, known)):
            new[name] = _unique(constant, taken)
    nodes: Counter[str] = Counter()
    for node in graph.node:
        node.name = _unique(_label(node, values, new), nodes)
        for place, output in enumerate(node.output):
            if output and output not in new:
                new[output] = _unique(node.name if not place else f"{node.name}.{place}", taken)
        for place, name in enumerate(node.input):
            if name and name not in new:
                new[name] = _unique(f"{node.name}.{_input_name(node, place)}", taken)
    rename(graph, new)
    return proto


def _constant(name: str, paths: Mapping[str, str], known: Collection[str]) -> str:
    """Name of a constant that comes from a parameter or a quantizer, '' for others and for what is computed."""
    stored = next((suffix for suffix in STORED if name.endswith(suffix)), "")
    whole = name.removesuffix(stored)
    if whole not in known:
        return ""
    return f"{_inside(whole, paths) or whole.removeprefix(NETWORK)}{stored}"


def _label(node: Any, values: Mapping[str, str], new: Mapping[str, str]) -> str:
    """Name of a node: its module's, or path and kind."""
    first = node.output[0]
    path = values.get(first) or next((values[name] for name in node.input if values.get(name)), "")
    if VECTORS in (first, *node.input):
        path = "constants"
    elif first in new and first not in values:
        # A constant that is stored in another form.
        path = new[first]
    if path and node.op_type in NAMED_AS_MODULE:
        return path
    return f"{path}/{node.op_type}".removeprefix("/")


def _input_name(node: Any, place: int) -> str:
    """What an operation's definition calls one of its inputs."""
    from onnx import defs

    if node.domain or not defs.has(node.op_type):
        return f"input{place}"
    inputs = defs.get_schema(node.op_type).inputs
    # The last of Concat and the like stands for all that follow.
    return str(inputs[min(place, len(inputs) - 1)].name)


def _unique(name: str, taken: Counter[str]) -> str:
    """The name, with a number after it where it is taken."""
    taken[name] += 1
    if taken[name] == 1:
        return name
    return _unique(f"{name}_{taken[name]}", taken)
