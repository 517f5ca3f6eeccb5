"""From a model to one small graph in which every product of two tensors is a named site.

torch.export returns the graph of any vision model; this module removes what does nothing at inference,
writes scaled_dot_product_attention out as matmul, softmax, matmul, and names the sites after the module
path, so that every pass, report and exporter speaks of the same things.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from leanvit.errors import ExportError
from leanvit.quant.constants import depends_on_input, fold_constants, hides_nothing
from leanvit.quant.einsum import write_einsum_out
from leanvit.quant.ops import (
    ADD,
    CARRIES,
    CHOICES,
    CONVOLUTIONS,
    ELEMENTWISE,
    EXPONENTIAL,
    GELU,
    IDENTITIES,
    LAYER_NORM,
    LINEAR,
    OTHER_PRODUCTS,
    PRODUCTS,
    SOFTMAX,
    SUMS,
    aten,
)
from leanvit.quant.simplify import fold_batch_norm, inline_regions, without_in_place

Pair = tuple[int, int]
SiteKind = Literal["linear", "conv2d", "matmul", "norm", "softmax", "activation", "add"]
Scope = Literal["matmul", "full"]
OPERANDS = {"linear": 1, "conv2d": 1, "matmul": 2, "norm": 1, "softmax": 1, "activation": 1, "add": 2}
"""How many activations a site of each kind reads."""


@dataclass(frozen=True)
class Site:
    """One operation whose inputs can be quantized: a product, or in scope "full" also what stands between them.

    name: module path, e.g. 'blocks.0.attn.qkv'; attention products end in '.qk' and '.av'.
    node: name of its node in the graph. macs: multiply-adds for one image, 0 where nothing is multiplied.
    weight: name of the weight parameter, None for a product of two activations.
    weight_shape: shape of the weight, () for a product of two activations.
    elements: of the activations that the site reads, for one image, by operand.
    """

    name: str
    kind: SiteKind
    node: str
    macs: int
    weight: str | None = None
    weight_shape: tuple[int, ...] = ()
    elements: tuple[int, ...] = ()


Outputs = tuple[Tensor, ...]
"""What a network returns for N images: logits (N, classes) alone, or maps (N, ...) of a network with another task."""

Measure = Callable[[Outputs, Outputs], float]
"""How far outputs (the second) are from the float ones."""


@dataclass
class QuantGraph:
    """A traced model and its sites in execution order.

    unquantized: products that no quantizer supports, by operation and module path.
    outputs: {convolution: (scale, zero point)} of the 8-bit quantizer of its output, see `convolution_outputs`.
    measure: how far outputs (second) are from the float ones, where the network has a measure of its own.
    """

    module: GraphModule
    sites: dict[str, Site]
    unquantized: list[str] = field(default_factory=list)
    outputs: dict[str, tuple[float, int]] = field(default_factory=dict)
    measure: Measure | None = None

    def node(self, name: str) -> Node:
        """The node called `name`."""
        return next(n for n in self.module.graph.nodes if n.name == name)

    def nodes(self) -> dict[str, Node]:
        """All nodes by name."""
        return {n.name: n for n in self.module.graph.nodes}

    def parameter(self, node: Node) -> Tensor:
        """The tensor that a get_attr node stands for."""
        return get_tensor(self.module, str(node.target))


def get_tensor(module: nn.Module, path: str) -> Tensor:
    """The parameter or buffer at a dotted path."""
    tensor: Tensor = operator.attrgetter(path)(module)
    return tensor


def set_tensor(module: nn.Module, path: str, value: Tensor) -> None:
    """Replace the data of the parameter or buffer at a dotted path."""
    get_tensor(module, path).data = value.detach().to(get_tensor(module, path).dtype)


def only_user(node: Node) -> Node | None:
    """The node that alone reads a value; None where there are none or several."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def node_argument(node: Node, index: int) -> Node:
    """Argument `index` of a node, which must be a node. Raises ExportError where it is a constant."""
    argument = node.args[index]
    if not isinstance(argument, Node):
        raise ExportError(f"{node.name}: argument {index} is {argument!r}, expected the output of another operation.")
    return argument


def conv_options(node: Node) -> tuple[Pair, Pair, Pair, int]:
    """Stride, padding, dilation and groups of a convolution node, each axis on its own."""
    given: list[Any] = [*node.args[3:], *(None,) * 4][:4]
    stride, padding, dilation = (_pair(value, default) for value, default in zip(given[:3], (1, 0, 1), strict=True))
    return stride, padding, dilation, int(given[3] or 1)


def _pair(value: Any, default: int) -> Pair:
    if isinstance(value, int):
        return value, value
    first, last = (value[0], value[-1]) if value else (default, default)
    return first, last


def quantizer_of(module: GraphModule, node: Node) -> nn.Module | None:
    """The submodule that a call_module node runs, None for any other node."""
    return module.get_submodule(str(node.target)) if node.op == "call_module" else None


def trace(model: nn.Module, example: Tensor, scope: Scope = "matmul") -> QuantGraph:
    """Export `model` to a graph with a dynamic batch and find its sites.

    model: any vision model; it is copied, not changed. example: (B, C, H, W) float32, B at least 1.
    scope: "matmul" takes products only; "full" also the inputs of norms, softmax, GELU and SiLU, and both
        operands of additions.
    Raises ExportError that names the operation where torch.export can't follow the model.
    """
    model = _copied(model)
    example = torch.cat([example[:1], example[:1]])
    batch = torch.export.Dim("batch", min=1)
    try:
        with torch.no_grad():
            program = torch.export.export(model, (example,), dynamic_shapes=({0: batch},), strict=False)
    except Exception as error:
        raise ExportError(
            f"torch.export can't follow {type(model).__name__}: {_first_line(error)}. "
            "Expected a forward without data-dependent control flow and with a free batch size."
        ) from error
    module = program.module()
    if not isinstance(module, GraphModule):
        raise ExportError(f"torch.export returned {type(module).__name__}, expected a GraphModule.")
    inline_regions(module)
    _remove_identities(module)
    without_in_place(module)
    fold_constants(module)
    fold_batch_norm(module)
    for node in list(module.graph.nodes):
        if node.target is aten.scaled_dot_product_attention.default:
            _write_attention_out(module, node)
    write_einsum_out(module)
    module.graph.eliminate_dead_code()
    # A plain GraphModule: the exported one forbids eval() and drags the tracer's guards along.
    module = GraphModule(module, module.graph).eval()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return QuantGraph(module, *_find_sites(module, scope))


def _copied(model: nn.Module) -> nn.Module:
    """A copy in eval mode; the model keeps its modes.

    What a network caches while it evaluates (LeViT its attention biases) is dropped first, as `eval` does: it may be of
    older weights, and can't be copied where it was computed with gradients.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    copied = copy.deepcopy(model)
    for module, training in modes.items():
        module.training = training
    return copied


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300].rstrip(".")


def _remove_identities(module: GraphModule) -> None:
    for node in list(module.graph.nodes):
        if node.op == "call_module" and node.target == "_guards_fn":
            # It only compares the batch size with the traced range; the range here is every size.
            module.graph.erase_node(node)
        elif node.op == "call_function" and (node.target in IDENTITIES or _pads_nothing(node)):
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)


def _pads_nothing(node: Node) -> bool:
    """Whether a padding adds zero rows everywhere, as Swin's does where windows fit the map."""
    amounts = node.args[1] if node.target is aten.pad.default else None
    return isinstance(amounts, list | tuple) and all(isinstance(n, int) and n == 0 for n in amounts)


def _write_attention_out(module: GraphModule, node: Node) -> None:
    """Replace softmax(q k^T * scale + mask) v in one operation by its parts."""
    bound: dict[str, Any] = dict(
        zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), node.args, strict=False)
    )
    bound |= node.kwargs
    if bound.get("is_causal") or bound.get("enable_gqa"):
        raise ExportError(
            f"{module_path(node)}: scaled_dot_product_attention with is_causal or enable_gqa is not supported, "
            "expected plain attention of a vision model."
        )
    query, key, value, mask = bound["query"], bound["key"], bound["value"], bound.get("attn_mask")
    scale = bound.get("scale") or 1.0 / math.sqrt(query.meta["val"].shape[-1])
    graph = module.graph

    def call(target: Callable[..., Any], *args: Any) -> Node:
        created = graph.call_function(target, args)
        values = [a.meta["val"] if isinstance(a, Node) else a for a in args]
        created.meta = {"val": _result(target, values), "nn_module_stack": node.meta.get("nn_module_stack", {})}
        return created

    with graph.inserting_before(node):
        scaled = call(aten.mul.Tensor, query, scale)
        scores = call(aten.matmul.default, scaled, call(aten.transpose.int, key, -2, -1))
        if mask is not None:
            if mask.meta["val"].dtype != torch.bool:
                scores = call(aten.add.Tensor, scores, mask)
            elif not hides_nothing(module, mask):
                # Not -inf: a bundle's constants are finite, and the softmax of this is 0 as well.
                blocked = call(aten.logical_not.default, mask)
                scores = call(aten.masked_fill.Scalar, scores, blocked, torch.finfo(torch.float32).min)
        output = call(aten.matmul.default, call(aten.softmax.int, scores, -1), value)
    node.replace_all_uses_with(output)
    graph.erase_node(node)


def _result(target: Callable[..., Any], values: Sequence[Any]) -> Any:
    """The example value of a call, from those of its arguments."""
    if target is aten.matmul.default:
        # PyTorch 2.12 takes a free batch for the example's when it multiplies (a guard that the batch is 2).
        left, right = values
        return left.new_empty((*left.shape[:-1], right.shape[-1]))
    return target(*values)


def module_path(node: Node) -> str:
    """Path of the module whose forward made `node`, '' for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values() if not path.startswith("_empty")]
    return paths[-1] if paths else ""


def _find_sites(module: GraphModule, scope: Scope) -> tuple[dict[str, Site], list[str]]:
    sites: dict[str, Site] = {}
    unquantized = []
    computed = depends_on_input(module)
    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        if node.target is LINEAR or node.target in CONVOLUTIONS:
            weight = node_argument(node, 1)
            if weight.op != "get_attr":
                unquantized.append(f"{node.target} with a computed weight at {module_path(node)}")
                continue
            site = _weighted_site(module, node, str(weight.target), sites)
            sites[site.name] = site
        elif node.target in PRODUCTS and any(_is_exponential(node_argument(node, i)) for i in (0, 1)):
            unquantized.append(f"{node.target} of exponentials at {module_path(node)}")
        elif node.target in PRODUCTS and all(user.target in CHOICES for user in node.users):
            # Token merging: rounded likenesses would merge others, and the product is small.
            unquantized.append(f"{node.target} that only chooses tokens at {module_path(node)}")
        elif node.target in PRODUCTS:
            site = _product_site(node, sites)
            sites[site.name] = site
        elif node.target in OTHER_PRODUCTS:
            unquantized.append(f"{node.target} at {module_path(node)}")
        elif scope == "full" and (kind := _elementwise_kind(node, computed)):
            name = _unique(f"{module_path(node)}.{kind}".lstrip("."), sites)
            operands = [node_argument(node, i) for i in range(OPERANDS[kind])]
            elements = tuple(_numel_per_image(operand) for operand in operands)
            sites[name] = Site(name, kind, node.name, 0, elements=elements)
    return sites, unquantized


def _weighted_site(module: GraphModule, node: Node, path: str, taken: dict[str, Site]) -> Site:
    kind: SiteKind = "linear" if node.target is LINEAR else "conv2d"
    shape = tuple(get_tensor(module, path).shape)
    macs = _numel_per_image(node) * math.prod(shape[1:])
    elements = (_numel_per_image(node_argument(node, 0)),)
    return Site(_unique(path.removesuffix(".weight"), taken), kind, node.name, macs, path, shape, elements)


def _product_site(node: Node, taken: dict[str, Site]) -> Site:
    name = _unique(f"{module_path(node)}.{_role(node)}".lstrip("."), taken)
    left, right = node_argument(node, 0), node_argument(node, 1)
    macs = _numel_per_image(node) * int(left.meta["val"].shape[-1])
    return Site(name, "matmul", node.name, macs, elements=(_numel_per_image(left), _numel_per_image(right)))


def _elementwise_kind(node: Node, computed: set[Node]) -> SiteKind | None:
    """The kind of a site between products, None for operations whose inputs stay as they are."""
    if node.target is LAYER_NORM:
        return "norm"
    if node.target in SOFTMAX:
        return "softmax"
    if node.target in GELU:
        return "activation"
    if node.target in ADD and all(isinstance(a, Node) and a in computed for a in node.args[:2]):
        return "add"
    return None


def end_sites(graph: QuantGraph) -> set[str]:
    """Sites that read the image or return the logits: the patch embedding and the classifiers."""
    nodes = graph.nodes()
    weighted = [site for site in graph.sites.values() if site.weight]
    return head_sites(graph) | {site.name for site in weighted if _reads_image(node_argument(nodes[site.node], 0))}


def head_sites(graph: QuantGraph) -> set[str]:
    """Sites that return the logits: the classifiers."""
    nodes = graph.nodes()
    output = next(n for n in graph.module.graph.nodes if n.op == "output")
    return {site.name for site in graph.sites.values() if site.weight and _is_output(nodes[site.node], output)}


def _reads_image(node: Node) -> bool:
    follow = (*ELEMENTWISE, *CARRIES)
    while node.op == "call_module" or (node.op == "call_function" and node.target in follow):
        node = _first_source(node)
    return node.op == "placeholder"


def _first_source(node: Node) -> Node:
    """The first operand of an operation; of aten.stack, which takes a list, its first member."""
    return node.all_input_nodes[0] if isinstance(node.args[0], list | tuple) else node_argument(node, 0)


def _is_output(node: Node, output: Node) -> bool:
    """Whether nothing but averages, shape operations and quantizers follow."""
    follow = (*ELEMENTWISE, *CARRIES)
    return all(
        u is output or ((u.op == "call_module" or u.target in follow) and _is_output(u, output)) for u in node.users
    )


def source_kind(node: Node) -> str | None:
    """'softmax' or 'gelu' (SiLU too) where a tensor is such an output, perhaps reshaped or quantized; else None."""
    while node.op in ("call_function", "call_module") and node.args:
        if node.op == "call_module":
            node = node_argument(node, 0)
            continue
        if node.target in SOFTMAX:
            return "softmax"
        if node.target in GELU:
            return "gelu"
        if node.target not in CARRIES:
            return None
        node = _first_source(node)
    return None


def _numel_per_image(node: Node) -> int:
    """Elements of a node's output for one image; the traced batch is symbolic and may be folded into windows."""
    value = node.meta["val"]
    total = value.numel()
    if isinstance(total, int):
        return total
    expression = total.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, 1)))


def _unique(name: str, taken: dict[str, Site]) -> str:
    candidate, count = name, 1
    while candidate in taken:
        count += 1
        candidate = f"{name}#{count}"
    return candidate


def _role(node: Node) -> str:
    """'qk' for scores on their way to a softmax, 'av' for a product with softmax output, else 'matmul'."""
    if _comes_from_softmax(node.args[0]):
        return "av"
    return "qk" if reaches_softmax(node) else "matmul"


def _is_exponential(node: Node) -> bool:
    """Whether a tensor holds exponentials: the features of linear attention, over orders of magnitude.

    One quantizer for all of them has a step that most are smaller than, and their sums divide: outputs become infinite.
    """
    while node.op == "call_function" and node.target in (*CARRIES, *ELEMENTWISE, *SUMS):
        node = _first_source(node)
    return node.target in EXPONENTIAL


def _comes_from_softmax(node: Any) -> bool:
    while isinstance(node, Node) and node.op == "call_function":
        if node.target in SOFTMAX:
            return True
        if node.target not in ELEMENTWISE:
            return False
        node = node.args[0]
    return False


def reaches_softmax(node: Node, depth: int = 12) -> bool:
    """Whether elementwise operations lead from a node to a softmax, `depth` of them at most."""
    if depth == 0:
        return False
    return any(
        user.target in SOFTMAX or (user.target in ELEMENTWISE and reaches_softmax(user, depth - 1))
        for user in node.users
    )


def site_inputs(graph: QuantGraph, site: Site) -> list[Node]:
    """Nodes whose values a site reads and that need an activation quantizer: one, or two for matmul and add."""
    node = graph.node(site.node)
    return [node_argument(node, i) for i in range(OPERANDS[site.kind])]
