"""From a traced graph to ONNX: uint8 images in, logits out, every site in the form that a profile runs.

Layout facts (measured on AVX512-VNNI): unsigned activations with signed per-channel weights are the fast
pair; a linear must read its weight stored transposed; a non-overlapping convolution (patch
embedding) is the same product after a reshape; q, k and v of their own beat one packed product that is cut apart.
"""

from __future__ import annotations

import itertools
import logging
import operator
import warnings
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from leanvit.config import Opset, Preprocess
from leanvit.errors import ExportError, require
from leanvit.export.onnx.attention import fuse_attention
from leanvit.export.onnx.decomposition import with_one_table, without_needless_decompositions
from leanvit.export.onnx.fused_matmul import fuse_products
from leanvit.export.onnx.inputs import ImageInput, PartInput
from leanvit.export.onnx.int8_weights import add_zero_points, copy_shared_weights, name_left_out_inputs
from leanvit.export.onnx.names import PATH, mark_paths, name_by_path, paths_of_values, with_scopes
from leanvit.export.onnx.profiles import Profile, find
from leanvit.export.onnx.quantizers import (
    OPSET,
    BlockLinear,
    Branch,
    OnnxLinear,
    OnnxPatchEmbedding,
    OnnxWeight,
    QDQPair,
    branches_of,
)
from leanvit.export.onnx.refusal import refusal
from leanvit.export.onnx.simulation import executed_form, moves_before
from leanvit.export.onnx.storage import (
    compute_at_load,
    half_constants,
    pack_four_bits,
    short_names,
    shortest_names,
    without_defaults,
    without_metadata,
)
from leanvit.quant.convolution_outputs import is_patch_embedding, only_quantizers_read
from leanvit.quant.graph import (
    QuantGraph,
    get_tensor,
    node_argument,
    only_user,
    quantizer_of,
)
from leanvit.quant.ops import CONVOLUTIONS, LINEAR, PRODUCTS, aten
from leanvit.quant.quantizers import ActivationQuantizer, WeightQuantizer

IMAGES = "images"
"""The input, and the path of its normalisation."""

REWRITER_TOLERANCE = 1e-8
"""Scalars up to here are zero to onnxscript 0.7's patterns (_pattern_ir.Constant)."""


def lower(
    graph: QuantGraph,
    preprocess: Preprocess | None,
    profile: Profile | str = "w8a8",
    lifted: Collection[str] = (),
    outputs: Sequence[str] = ("logits",),
    opset: Opset = 23,
    *,
    smallest: bool = False,
) -> Any:
    """Write a traced graph, quantized or not, as an ONNX model (onnx.ModelProto, opset 21 or 23, dynamic batch).

    profile: how sites are stored and run: a row, or its name. lifted: sites that run in float all the same, their
    weights' bits being storage only.
    preprocess: None for a part of a network that reads no image. outputs: names of what the network returns, in order.
    opset: 23 writes float attention as one operation, 21 as products, for older runtimes.
    smallest: leave out names that only people read; else they are module paths (leanvit.export.onnx.names).
    Input `images`: (batch, H, W, 3) uint8, or `cells`: (batch, ...) float32 without preprocess. Output `logits`:
    (batch, classes) float32.
    Raises ConfigError that names the sites which the profile can't run, ExportError that names an operation without
    translation, MissingDependencyError without the onnx extra.
    """
    require("onnxscript")
    row = find(profile)
    module = executed_form(graph, row, lifted).cpu()
    mark_paths(graph, module)
    paths = _lower_quantizers(module, row)
    _keep_small_terms(module)
    channels_last = _reads_patches(module)
    paths |= with_scopes(module)
    network: nn.Module = PartInput(module)
    if preprocess:
        network = ImageInput(module, preprocess, channels_last=channels_last).eval()
        example = torch.zeros(2, *preprocess.input_size, preprocess.channels, dtype=torch.uint8)
    else:
        example = torch.zeros(2, *_input_of(module).meta["val"].shape[1:])
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad(), without_needless_decompositions(), with_one_table():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                network,
                (example,),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
                opset_version=OPSET,
                input_names=[IMAGES if preprocess else "cells"],
                output_names=list(outputs),
                verbose=False,
            )
    except Exception as error:
        raise refusal(error) from error
    if program is None:
        raise ExportError("torch.onnx gave no program. Report this with the model's name.")
    values = paths_of_values(program.model, paths, IMAGES)
    if opset != OPSET:
        fuse_attention(program.model)
    if row.fused_products:
        fuse_products(program.model, transpose_quantized=row.attention == "integer around zero")
    proto = without_metadata(program.model_proto)
    proto = pack_four_bits(compute_at_load(short_names(proto) if smallest else proto), cast=not row.four_bit_types)
    proto = name_left_out_inputs(copy_shared_weights(add_zero_points(proto)))
    if row.compact:
        proto = without_defaults(half_constants(proto))
    if not smallest:
        return name_by_path(proto, values, paths, network.state_dict().keys())
    return shortest_names(proto) if row.compact else proto


def _input_of(module: GraphModule) -> Node:
    return next(node for node in module.graph.nodes if node.op == "placeholder")


def _reads_patches(module: GraphModule) -> bool:
    """Whether nothing but lowered patch embeddings reads the image's values."""
    readers = [user for user in _input_of(module).users if user.target is not aten.sym_size.int]
    return all(
        user.op == "call_module" and isinstance(module.get_submodule(str(user.target)), OnnxPatchEmbedding)
        for user in readers
    )


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


def _lower_quantizers(module: GraphModule, profile: Profile) -> dict[str, str]:
    """Swap simulated quantizers for their ONNX forms, and products for the layout that runs fast, in place.

    Returns the paths of new submodules and constants by name.
    """
    lowering = _Lowering(module, profile)
    for node in list(module.graph.nodes):
        if node.op == "call_function" and node.target in (LINEAR, *CONVOLUTIONS, *PRODUCTS):
            lowering.product(node)
    lowering.rest()
    module.graph.eliminate_dead_code()
    if profile.attention == "integer around zero":
        _quantize_before_moves(module)
    module.delete_all_unused_submodules()
    module.graph.lint()
    module.recompile()
    return lowering.paths


def _quantize_before_moves(module: GraphModule) -> None:
    """Quantize what a product returns before it is transposed: a quarter of the bytes are moved, in place."""
    for node in list(module.graph.nodes):
        if not _is_pair(module, node):
            continue
        moved = node_argument(node, 0)
        moves, source = moves_before(moved)
        of_quantized = any(_is_pair(module, value) for value in source.all_input_nodes)
        read_once = all(len(value.users) == 1 for value in (*moves, source))
        if not moves or source.target not in PRODUCTS or not read_once or not of_quantized:
            continue
        node.replace_all_uses_with(moved)
        with module.graph.inserting_after(source):
            quantized = module.graph.call_module(str(node.target), (source,))
        moves[-1].replace_input_with(source, quantized)
        module.graph.erase_node(node)


def _tokens(convolution: Node) -> Node | None:
    """The node that makes tokens (B, H W, C) of a map (B, C, H, W), where nothing else reads the map."""
    flat = only_user(convolution)
    tokens = only_user(flat) if flat is not None else None
    if flat is None or tokens is None or tokens.target is not aten.transpose.int:
        return None
    batch, channels, height, width = convolution.meta["val"].shape
    value = flat.meta["val"]
    is_flat = isinstance(value, Tensor) and tuple(value.shape) == (batch, channels, height * width)
    return tokens if is_flat and sorted(int(i) % 3 for i in tokens.args[1:]) == [1, 2] else None  # type: ignore[arg-type]


def _is_pair(module: GraphModule, node: Node) -> bool:
    return node.op == "call_module" and isinstance(module.get_submodule(str(node.target)), QDQPair)


class _Lowering:
    """Products one by one; quantizers that several products read are written once."""

    def __init__(self, module: GraphModule, profile: Profile) -> None:
        self.module = module
        self.profile = profile
        self.written: dict[Node, list[tuple[Node, Tensor | None]]] = {}
        self.paths: dict[str, str] = {}
        self.constants = 0
        self.origin = ""

    def product(self, node: Node) -> None:
        """Rewrite one linear, convolution or matmul in the profile's form."""
        self.origin = node.meta[PATH]
        weight = quantizer_of(self.module, node_argument(node, 1))
        if isinstance(weight, WeightQuantizer):
            reads_integers = isinstance(quantizer_of(self.module, node_argument(node, 0)), ActivationQuantizer)
            if node.target is LINEAR and (reads_integers or self.profile.weights == "blocks"):
                self._linear(node, weight)
            elif node.target is LINEAR and self._parts(node):
                self._float_parts(node, weight)
            elif not self._patch_embedding(node, weight):
                # A float convolution may read the integers of the one before it: its weight is still computed at load.
                integer = reads_integers and (
                    self.profile.convolutions == "integer" or only_quantizers_read(self.module, node)
                )
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
            self._float_parts(node, None)

    def rest(self) -> None:
        """Quantizers in front of what is no product (scope full)."""
        for node in list(self.module.graph.nodes):
            quantizer = quantizer_of(self.module, node)
            if isinstance(quantizer, ActivationQuantizer) and node.users:
                self.origin = node.meta[PATH]
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
                around_zero = self.profile.attention == "integer around zero"
                signed = around_zero and all(user.target in PRODUCTS for user in node.users)
                branches = self._branches_of(quantizer, signed=signed)
                self.written[node] = [
                    (self._submodule(f"{node.target}_{i}", branch.module, source, path=node.meta[PATH]), branch.factor)
                    for i, branch in enumerate(branches)
                ]
        return self.written[node]

    def _branches_of(self, quantizer: ActivationQuantizer, *, signed: bool = False) -> list[Branch]:
        return branches_of(quantizer, four_bit_types=self.profile.four_bit_types, signed=signed)

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
                path = self._path_of_piece(piece, pieces)
                summands = [
                    self._submodule(name, module, value, own if i == 0 else None, path=path)
                    for i, (value, _) in enumerate(branches)
                ]
                values.append(self._sum(summands))
        if parts:
            self._replace_parts(node, parts, values)
        else:
            self._replace(node, values)

    def _packs(self, bits: int) -> bool:
        """Whether a weight of so many bits is stored as INT4."""
        return bits <= 4 and self.profile.stores_int4

    def _linear_module(self, codes: Tensor, scale: Tensor, bits: int) -> nn.Module:
        four_bit = self._packs(bits)
        if self.profile.weights == "blocks" and codes.dim() == 2:
            return BlockLinear(codes, scale, four_bit=four_bit)
        return OnnxLinear(codes, scale, four_bit=four_bit)

    def _float_parts(self, node: Node, quantizer: WeightQuantizer | None) -> None:
        """A packed float product of q, k and v as three; quantizer: of its weight, whose bits are storage."""
        parts = self._parts(node)
        bias = node.args[2] if len(node.args) > 2 else None
        source = node_argument(node, 0)
        with self.module.graph.inserting_before(node):
            weights = self._float_weights(node_argument(node, 1), quantizer)
            values = [self._call(LINEAR, source, weight, self._piece(bias, i, 3)) for i, weight in enumerate(weights)]
            for i, value in enumerate(values):
                value.meta[PATH] = self._path_of_piece(i, 3)
        self._replace_parts(node, parts, values)

    def _float_weights(self, weight: Node, quantizer: WeightQuantizer | None) -> list[Node]:
        """The weights of q, k and v out of a packed one."""
        if quantizer is None:
            return [self._piece(weight, i, 3) for i in range(3)]
        pieces = zip(quantizer.codes.chunk(3), quantizer.scale.chunk(3), strict=True)
        return [
            self._stored_weight(
                f"{weight.target}_{i}", codes, scale, quantizer.bits, folded=True, path=self._path_of_piece(i, 3)
            )
            for i, (codes, scale) in enumerate(pieces)
        ]

    def _stored_weight(
        self, name: str, codes: Tensor, scale: Tensor, bits: int, *, folded: bool, path: str | None = None
    ) -> Node:
        return self._submodule(name, OnnxWeight(codes, scale, four_bit=self._packs(bits), folded=folded), path=path)

    def _path_of_piece(self, piece: int, pieces: int) -> str:
        """Path of what is lowered, or of its part for q, k or v."""
        return self.origin if pieces == 1 else f"{self.origin}.{'qkv'[piece]}"

    def _parts(self, node: Node) -> list[Node]:
        """reshape, permute and unbind after a packed product of q, k and v, as timm and leanvit write it."""
        if any(isinstance(a, Node) and a.op == "call_function" for a in node.args[1:3]):
            # A weight or a bias that is computed of the image can't be cut at export.
            return []
        chain: list[Node] = []
        for target in (aten.reshape.default, aten.permute.default, aten.unbind.int):
            user = only_user(chain[-1] if chain else node)
            if user is None or user.target is not target:
                return []
            chain.append(user)
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
                split = self._call(aten.reshape.default, value, shape)
                split.meta[PATH] = reshape.meta[PATH]
                moved = self._call(aten.permute.default, split, kept)
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
        return self._constant(value, f"{self._path_of_piece(piece, pieces)}.{str(source.target).rpartition('.')[2]}")

    def _constant(self, value: Tensor, path: str) -> Node:
        name = f"lowered_{self.constants}"
        self.paths[name] = path
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
        # ONNX Runtime 1.32 moves the transposition through the Resize, and then can't run it (CrossViT).
        resized = node_argument(source, 0).target in (aten.upsample_bicubic2d.default, aten.upsample_bicubic2d.vec)
        branches = self._branches_of(activation)
        if len(branches) > 1 or resized:
            return False
        linear = self._linear_module(quantizer.codes.permute(0, 2, 3, 1), quantizer.scale, quantizer.bits)
        rows, columns = quantizer.codes.shape[2:]
        tokens = _tokens(node)
        module = OnnxPatchEmbedding(branches[0].module, linear, (rows, columns), tokens=tokens is not None)
        name = f"{node_argument(node, 1).target}_patches"
        with self.module.graph.inserting_before(node):
            self._replace(tokens or node, [self._submodule(name, module, node_argument(source, 0), bias)])
        return True

    def _weight_only_or_convolution(self, node: Node, quantizer: WeightQuantizer, *, folded: bool) -> None:
        """An operation with its weight dequantized in front; folded: at load, as the product runs in float."""
        branches = self._branches(node_argument(node, 0)) or [(node_argument(node, 0), None)]
        with self.module.graph.inserting_before(node):
            name = f"{node_argument(node, 1).target}_onnx"
            weight = self._stored_weight(name, quantizer.codes, quantizer.scale, quantizer.bits, folded=folded)
            bias = node.args[2] if len(node.args) > 2 else None
            options = node.args[3:]
            values = [
                self._call(node.target, value, weight, bias if i == 0 else None, *options)
                for i, (value, _) in enumerate(branches)
            ]
            self._replace(node, values)

    def _submodule(self, name: str, module: nn.Module, *arguments: Any, path: str | None = None) -> Node:
        if not hasattr(self.module, name):
            self.module.add_submodule(name, module)
            self.paths[name] = self.origin if path is None else path
        return self.module.graph.call_module(name, tuple(arguments))

    def _call(self, target: Any, *arguments: Any) -> Node:
        created = self.module.graph.call_function(target, arguments)
        created.meta[PATH] = self.origin
        return created

    def _scaled(self, value: Node, *factors: Tensor | None) -> Node:
        given = [factor for factor in factors if factor is not None]
        if not given:
            return value
        factor = given[0] if len(given) == 1 else given[0] * given[1]
        return self._call(aten.mul.Tensor, value, self._constant(factor, f"{self.origin}.factor"))

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
