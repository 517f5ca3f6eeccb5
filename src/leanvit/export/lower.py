"""From a traced graph to ONNX: uint8 images in, logits out, every site in the form that a profile runs.

Layout facts (measured on AVX512-VNNI): unsigned activations with signed per-channel weights are the fast
pair; a linear must be MatMul + Add with its weight stored transposed; a non-overlapping convolution (patch
embedding) is the same product after a reshape; q, k and v of their own beat one packed product that is cut apart.
"""

from __future__ import annotations

import copy
import itertools
import logging
import operator
import warnings
from collections.abc import Collection, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from leanvit.config import Preprocess
from leanvit.errors import ConfigError, ExportError, require
from leanvit.export.operators import (
    OPSET,
    BlockLinear,
    Branch,
    FloatGrid,
    OnnxLinear,
    OnnxPatchEmbedding,
    OnnxWeight,
    branches_of,
)
from leanvit.export.packing import (
    compute_at_load,
    half_constants,
    number_names,
    pack_four_bits,
    without_defaults,
    without_metadata,
)
from leanvit.quant.graph import (
    CONVOLUTIONS,
    LINEAR,
    PRODUCTS,
    QuantGraph,
    aten,
    get_tensor,
    node_argument,
    quantizer_of,
)
from leanvit.quant.outputs import gives_codes, integer_convolutions, is_patch_embedding, quantize_outputs
from leanvit.quant.quantizers import ActivationQuantizer, WeightQuantizer

LoweredProfile = Literal["fp32", "w8a8", "w4a8", "w4a16", "mixed", "exact", "accelerator"]
FOUR_BIT_STORAGE = ("w4a8", "w4a16", "mixed", "exact", "accelerator")
"""Profiles that store weights of 4 bits and below as INT4."""

SMALL = ("w8a8", "w4a8", "w4a16", "mixed")
"""Profiles whose constants beside the weights are rounded to float16 (in `executed_form` already, so that both
round alike) and lose their names."""

HALF_ROUNDING = 2.0**-11
"""Largest relative error of rounding to float16."""

REWRITER_TOLERANCE = 1e-8
"""Scalars up to here are zero to onnxscript 0.7's patterns (_pattern_ir.Constant)."""

FAST = ("w8a8", "w4a8", "mixed")
"""Profiles for speed. Products of two activations stay in float there: attention gains no time from int8 and loses
accuracy (benchmarks/deploy.py, cases w8a8 and exact-w8a8). So do convolutions without codes for their output."""


class ImageInput(nn.Module):
    """A network behind its normalisation: uint8 images (B, H, W, 3) in, its own answers out."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, preprocess: Preprocess) -> None:
        """Put `preprocess` in front of `network`."""
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(preprocess.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(preprocess.std).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Any:
        """images: (B, H, W, 3) uint8. Returns logits (B, classes) float32, or what else the network gives."""
        x = images.permute(0, 3, 1, 2).float() / 255.0
        return self.network((x - self.mean) / self.std)


def lower(
    graph: QuantGraph,
    preprocess: Preprocess | None,
    profile: LoweredProfile = "w8a8",
    lifted: Collection[str] = (),
    outputs: Sequence[str] = ("logits",),
) -> Any:
    """Write a traced graph, quantized or not, as an ONNX model (onnx.ModelProto, opset 21, dynamic batch).

    profile: how sites are stored and run, see `leanvit.export`. lifted: sites that run in float all the same, their
    weights' bits being storage only.
    preprocess: None for a part of a network that reads no image. outputs: names of what the network gives, in order.
    Input `images`: (batch, H, W, 3) uint8, or `cells`: (batch, ...) float32 without preprocess. Output `logits`:
    (batch, classes) float32.
    Raises ConfigError that names the sites which the profile can't run, ExportError that names an operation without
    translation, MissingDependencyError without the onnx extra.
    """
    require("onnxscript")
    module = executed_form(graph, profile, lifted).cpu()
    _lower_quantizers(module, profile)
    _keep_small_terms(module)
    network: nn.Module = module
    if preprocess:
        network = ImageInput(module, preprocess).eval()
        example = torch.zeros(2, *preprocess.input_size, 3, dtype=torch.uint8)
    else:
        placeholder = next(node for node in module.graph.nodes if node.op == "placeholder")
        example = torch.zeros(2, *placeholder.meta["val"].shape[1:])
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                network,
                (example,),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
                opset_version=OPSET,
                input_names=["images" if preprocess else "cells"],
                output_names=list(outputs),
                verbose=False,
            )
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ExportError(f"torch.onnx can't translate the graph: {lines[0][:300]}. Report the operation.") from error
    if program is None:
        raise ExportError("torch.onnx gave no program. Report this with the model's name.")
    proto = compute_at_load(without_metadata(program.model_proto))
    proto = pack_four_bits(proto, cast=profile != "accelerator")
    return number_names(without_defaults(half_constants(proto))) if profile in SMALL else proto


def _keep_small_terms(module: GraphModule) -> None:
    """Give scalars that are added a dimension where they are below 1e-8: onnxscript takes such ones for 0.

    Its rewriter drops `x + 1e-8`, which is all that a denominator of Performer attention has where exponents are low.
    """
    for node in list(module.graph.nodes):
        small = [a for a in node.args if isinstance(a, float) and 0 < abs(a) <= REWRITER_TOLERANCE]
        if node.target not in (aten.add.Tensor, aten.sub.Tensor) or not small:
            continue
        name = f"{node.name}_term"
        module.register_buffer(name, torch.tensor(small))
        with module.graph.inserting_before(node):
            node.update_arg(node.args.index(small[0]), module.graph.get_attr(name))
    module.recompile()


def executed_form(graph: QuantGraph, profile: LoweredProfile, lifted: Collection[str] = ()) -> GraphModule:
    """The simulated network as a profile runs it: without the activation quantizers of products that run in float.

    A copy; (B, 3, H, W) float32 -> logits. This is what an exported file is compared with.
    Raises ConfigError where the profile can't run a quantizer.
    """
    module = GraphModule(copy.deepcopy(graph.module), copy.deepcopy(graph.module.graph)).eval()
    raised = {graph.sites[name].node for name in lifted}
    integer = integer_convolutions(graph, module, raised) if profile in FAST else set()
    for node in list(module.graph.nodes):
        in_float = node.name in raised or _runs_in_float(module, node, profile, integer)
        if node.op == "call_function" and in_float:
            for source in list(node.all_input_nodes):
                if isinstance(quantizer_of(module, source), ActivationQuantizer):
                    node.replace_input_with(source, node_argument(source, 0))
    module.graph.eliminate_dead_code()
    if profile in FAST:
        quantize_outputs(graph, module, integer)
    module.delete_all_unused_submodules()
    if profile in SMALL:
        _round_constants(module)
    module.recompile()
    _require_runnable(module, profile)
    return module


@torch.no_grad()
def _round_constants(module: GraphModule) -> None:
    """Round biases, gains, tables and weights' scales to float16 where that loses no more than its rounding, in place.

    Values far below the largest of their tensor may lose more: nothing depends on their last bits.
    """
    constants = [get_tensor(module, name) for name in _constants_of(module)]
    scales = [quantizer.scale for quantizer in module.modules() if isinstance(quantizer, WeightQuantizer)]
    for value in (*constants, *scales):
        if value.dtype != torch.float32 or not value.numel():
            continue
        rounded = value.half().float()
        allowed = HALF_ROUNDING * value.abs().clamp(min=float(value.abs().max()) / 256)
        if ((rounded - value).abs() <= allowed).all():
            value.data = rounded


def _constants_of(module: GraphModule) -> set[str]:
    return {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}


def _runs_in_float(module: GraphModule, node: Node, profile: LoweredProfile, integer: Collection[str]) -> bool:
    """Whether a profile leaves an operation to float kernels, with its weight's bits as storage only.

    integer: nodes of convolutions that a fast profile runs on integers.
    """
    if profile == "w4a16":
        return True
    if profile not in FAST:
        return False
    if node.target in CONVOLUTIONS:
        weight = quantizer_of(module, node_argument(node, 1))
        if not isinstance(weight, WeightQuantizer) or is_patch_embedding(node, tuple(weight.codes.shape)):
            return False
        return node.name not in integer
    return node.target in PRODUCTS


def _lower_quantizers(module: GraphModule, profile: LoweredProfile) -> None:
    """Swap simulated quantizers for their ONNX forms, and products for the layout that runs fast, in place."""
    lowering = _Lowering(module, profile)
    for node in list(module.graph.nodes):
        if node.op == "call_function" and node.target in (LINEAR, *CONVOLUTIONS, *PRODUCTS):
            lowering.product(node)
    lowering.rest()
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    module.graph.lint()
    module.recompile()


def activation_quantizers(network: nn.Module) -> dict[str, ActivationQuantizer]:
    """All activation quantizers of a network by the name of their submodule."""
    return {name: module for name, module in network.named_modules() if isinstance(module, ActivationQuantizer)}


def _require_runnable(module: GraphModule, profile: LoweredProfile) -> None:
    quantizers = activation_quantizers(module)
    if profile in ("w8a8", "w4a8"):
        low = [f"{name} ({q.bits} bits)" for name, q in quantizers.items() if q.bits != 8]
        if low:
            raise ConfigError(
                f"profile {profile} runs 8-bit activations, {len(low)} quantizers have fewer: {', '.join(low[:3])}. "
                "Quantize with --activation-bits 8, or export with --profile exact, which runs the plan as it is."
            )
    if profile == "exact":
        without = [
            f"{name} ({q.form}{', by head' if q.heads else ''}, {q.bits} bits)"
            for name, q in quantizers.items()
            if any(isinstance(branch.module, FloatGrid) for branch in branches_of(q))
        ]
        if without:
            raise ConfigError(
                f"profile exact runs every product on integer kernels, {len(without)} quantizers have none: "
                f"{', '.join(without[:3])}. Export with --profile mixed, which leaves those products in float, or "
                "quantize with --mode paper."
            )


class _Lowering:
    """Products one by one; quantizers that several products read are written once."""

    def __init__(self, module: GraphModule, profile: LoweredProfile) -> None:
        self.module = module
        self.profile = profile
        self.written: dict[Node, list[tuple[Node, Tensor | None]]] = {}
        self.matrices: set[Node] = set()
        self.constants = 0

    def product(self, node: Node) -> None:
        """Rewrite one linear, convolution or matmul in the profile's form."""
        weight = quantizer_of(self.module, node_argument(node, 1))
        if isinstance(weight, WeightQuantizer):
            reads_codes = isinstance(quantizer_of(self.module, node_argument(node, 0)), ActivationQuantizer)
            if node.target is LINEAR and (reads_codes or self.profile == "w4a16"):
                self._linear(node, weight)
            elif not self._patch_embedding(node, weight):
                # A float convolution may read the codes of the one before it: its weight is still computed at load.
                integer = reads_codes and (self.profile not in FAST or gives_codes(self.module, node))
                self._weight_only_or_convolution(node, weight, folded=not integer)
        elif node.target in PRODUCTS:
            with self.module.graph.inserting_before(node):
                left, right = (self._branches(node_argument(node, i)) for i in (0, 1))
                if left or right:
                    products = [
                        self._scaled(self._call(node.target, a, b), first, second)
                        for (a, first), (b, second) in itertools.product(
                            left or [(node_argument(node, 0), None)], right or [(node_argument(node, 1), None)]
                        )
                    ]
                    self._replace(node, products)
        elif node.target is LINEAR and self._parts(node):
            self._float_parts(node)

    def rest(self) -> None:
        """Quantizers in front of what is no product (scope full)."""
        for node in list(self.module.graph.nodes):
            quantizer = quantizer_of(self.module, node)
            if isinstance(quantizer, ActivationQuantizer) and node.users:
                with self.module.graph.inserting_after(node):
                    branches = self._branches(node)
                with self.module.graph.inserting_after(branches[-1][0]):
                    self._replace(node, [self._scaled(value, factor) for value, factor in branches])

    def _branches(self, node: Node) -> list[tuple[Node, Tensor | None]]:
        """The lowered summands of a quantizer node and their factors; none where it is something else."""
        quantizer = quantizer_of(self.module, node)
        if not isinstance(quantizer, ActivationQuantizer):
            return []
        if node not in self.written:
            source = node_argument(node, 0)
            with self.module.graph.inserting_before(node):
                if node.meta["val"].dim() == 2 and all(user.target is LINEAR for user in node.users):
                    # ONNX Runtime makes a Gemm of two matrices and a bias before it looks for integer kernels, and has
                    # none for a Gemm with float output.
                    self.matrices.add(node)
                    source = self._call(aten.unsqueeze.default, source, 0)
                self.written[node] = [
                    (self._submodule(f"{node.target}_{i}", branch.module, source), branch.factor)
                    for i, branch in enumerate(self._branches_of(quantizer))
                ]
        return self.written[node]

    def _branches_of(self, quantizer: ActivationQuantizer) -> list[Branch]:
        return branches_of(quantizer, four_bit_types=self.profile == "accelerator")

    def _linear(self, node: Node, quantizer: WeightQuantizer) -> None:
        bias = node.args[2] if len(node.args) > 2 else None
        source = node_argument(node, 0)
        branches = self._branches(source) or [(source, None)]
        parts = self._parts(node)
        pieces = 3 if parts else 1
        codes, scales = quantizer.codes.chunk(pieces), quantizer.scale.chunk(pieces)
        values = []
        with self.module.graph.inserting_before(node):
            for piece in range(pieces):
                name = f"{node_argument(node, 1).target}_{piece}"
                module = self._linear_module(codes[piece], scales[piece], quantizer.bits)
                own = self._piece(bias, piece, pieces)
                summands = [
                    self._submodule(name, module, value, own if i == 0 else None)
                    for i, (value, _) in enumerate(branches)
                ]
                total = self._sum(summands)
                values.append(self._call(aten.squeeze.dim, total, 0) if source in self.matrices else total)
        if parts:
            self._replace_parts(node, parts, values)
        else:
            self._replace(node, values)

    def _packs(self, bits: int) -> bool:
        """Whether a weight of so many bits is stored as INT4."""
        return bits <= 4 and self.profile in FOUR_BIT_STORAGE

    def _linear_module(self, codes: Tensor, scale: Tensor, bits: int) -> nn.Module:
        four_bit = self._packs(bits)
        if self.profile == "w4a16" and codes.dim() == 2:
            return BlockLinear(codes, scale, four_bit=four_bit)
        return OnnxLinear(codes, scale, four_bit=four_bit)

    def _float_parts(self, node: Node) -> None:
        """A packed float product of q, k and v as three."""
        parts = self._parts(node)
        bias = node.args[2] if len(node.args) > 2 else None
        source = node_argument(node, 0)
        with self.module.graph.inserting_before(node):
            values = [
                self._call(LINEAR, source, self._piece(node_argument(node, 1), i, 3), self._piece(bias, i, 3))
                for i in range(3)
            ]
        self._replace_parts(node, parts, values)

    def _parts(self, node: Node) -> list[Node]:
        """reshape, permute and unbind behind a packed product of q, k and v, as timm and leanvit write it."""
        chain: list[Node] = []
        for target in (aten.reshape.default, aten.permute.default, aten.unbind.int):
            users = list((chain[-1] if chain else node).users)
            if len(users) != 1 or users[0].target is not target:
                return []
            chain.append(users[0])
        shape, order = chain[0].args[1], chain[1].args[1]
        leading = order[0] if isinstance(order, list) and isinstance(order[0], int) else -1
        if not isinstance(shape, list) or leading != len(shape) - 3 or shape[leading] != 3:
            return []
        return chain if all(user.target is operator.getitem for user in chain[2].users) else []

    def _replace_parts(self, node: Node, parts: list[Node], values: list[Node]) -> None:
        """Reshape and permute each of q, k, v alone, in place of reshape, permute and unbind."""
        reshape, permute, unbind = parts
        shape, order = list(reshape.args[1]), list(permute.args[1])  # type: ignore[arg-type]
        leading = order[0]
        del shape[leading]
        kept = [i - (i > leading) for i in order[1:]]
        for getitem in list(unbind.users):
            with self.module.graph.inserting_before(getitem):
                value = values[int(getitem.args[1])]  # type: ignore[arg-type]
                moved = self._call(aten.permute.default, self._call(aten.reshape.default, value, shape), kept)
            moved.meta = dict(getitem.meta)
            getitem.replace_all_uses_with(moved)
            self.module.graph.erase_node(getitem)
        for old in (unbind, permute, reshape, node):
            self.module.graph.erase_node(old)

    def _piece(self, source: Any, piece: int, pieces: int) -> Any:
        """One of `pieces` equal parts of a parameter along dimension 0, as a constant of its own."""
        if pieces == 1 or source is None:
            return source
        value = get_tensor(self.module, str(source.target)).chunk(pieces)[piece].clone()
        return self._constant(value)

    def _constant(self, value: Tensor) -> Node:
        name = f"lowered_{self.constants}"
        self.constants += 1
        self.module.register_buffer(name, value)
        return self.module.graph.get_attr(name)

    def _patch_embedding(self, node: Node, quantizer: WeightQuantizer) -> bool:
        """A non-overlapping convolution as a product; False where it isn't one."""
        source, bias = node_argument(node, 0), (node.args[2] if len(node.args) > 2 else None)
        activation = quantizer_of(self.module, source)
        if not isinstance(activation, ActivationQuantizer) or not is_patch_embedding(
            node, tuple(quantizer.codes.shape)
        ):
            return False
        branches = self._branches_of(activation)
        if len(branches) > 1:
            return False
        linear = self._linear_module(quantizer.codes, quantizer.scale, quantizer.bits)
        rows, columns = quantizer.codes.shape[2:]
        module = OnnxPatchEmbedding(branches[0].module, linear, (rows, columns))
        name = f"{node_argument(node, 1).target}_patches"
        with self.module.graph.inserting_before(node):
            self._replace(node, [self._submodule(name, module, node_argument(source, 0), bias)])
        return True

    def _weight_only_or_convolution(self, node: Node, quantizer: WeightQuantizer, *, folded: bool) -> None:
        """An operation with its weight dequantized in front; folded: at load, as the product runs in float."""
        branches = self._branches(node_argument(node, 0)) or [(node_argument(node, 0), None)]
        with self.module.graph.inserting_before(node):
            module = OnnxWeight(quantizer, four_bit=self._packs(quantizer.bits), folded=folded)
            weight = self._submodule(f"{node_argument(node, 1).target}_onnx", module)
            bias = node.args[2] if len(node.args) > 2 else None
            options = node.args[3:]
            values = [
                self._call(node.target, value, weight, bias if i == 0 else None, *options)
                for i, (value, _) in enumerate(branches)
            ]
            self._replace(node, values)

    def _submodule(self, name: str, module: nn.Module, *arguments: Any) -> Node:
        if not hasattr(self.module, name):
            self.module.add_submodule(name, module)
        return self.module.graph.call_module(name, tuple(arguments))

    def _call(self, target: Any, *arguments: Any) -> Node:
        return self.module.graph.call_function(target, arguments)

    def _scaled(self, value: Node, *factors: Tensor | None) -> Node:
        given = [factor for factor in factors if factor is not None]
        if not given:
            return value
        factor = given[0] if len(given) == 1 else given[0] * given[1]
        return self._call(aten.mul.Tensor, value, self._constant(factor))

    def _sum(self, values: list[Node]) -> Node:
        total = values[0]
        for value in values[1:]:
            total = self._call(aten.add.Tensor, total, value)
        return total

    def _replace(self, node: Node, values: list[Node]) -> None:
        total = self._sum(values)
        total.meta = dict(node.meta)
        node.replace_all_uses_with(total)
        self.module.graph.erase_node(node)
