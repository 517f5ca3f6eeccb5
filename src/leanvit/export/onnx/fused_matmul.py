"""Products as runtimes have them beside ONNX's own: linears with their bias, products with a transposed operand.

ONNX has no product of integers with a float output. From QuantizeLinear, DequantizeLinear and MatMul ONNX Runtime makes
its own, com.microsoft.MatMulIntegerToFloat, but leaves the bias to another operation that reads and writes everything
once more. Its com.microsoft.FusedMatMul reads keys as they are split into heads, where MatMul wants them transposed,
value by value. OpenVINO reads both operations and runs them as well as those they replace, or faster.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from leanvit.export.onnx.matching import constant, made, maker_of, only_reader, sizes

if TYPE_CHECKING:
    import onnx_ir as ir

DOMAIN = "com.microsoft"


@dataclass(frozen=True)
class _Linear:
    """A product of quantized integers with a constant weight: what one operation reads in place of all up to `end`."""

    inputs: tuple[ir.Value | None, ...]
    end: ir.Node


@dataclass(frozen=True)
class _Transposed:
    """A product, and the transposition that its second operand comes from, which does with `order`, or is left out."""

    product: ir.Node
    transposition: ir.Node
    order: list[int]
    left_out: bool


def fuse_products(model: ir.Model, *, transpose_quantized: bool) -> ir.Model:
    """Write linears on integers as MatMulIntegerToFloat, products of something transposed as FusedMatMul, in place.

    transpose_quantized: also where a Q/DQ pair stands between the transposition and the product; ONNX Runtime then
    multiplies floats, OpenVINO integers as before.
    Same arithmetic, in ONNX Runtime and OpenVINO. Returns the model.
    """
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    products = [node for node in model.graph if node.op_type == "MatMul"]
    # All are found before one is written: what is written reads values once more.
    found = [_linear(node) or _transposed(node, of_quantized=transpose_quantized) for node in products]
    for match in found:
        if isinstance(match, _Linear):
            _write_linear(match, model.graph)
        elif match is not None:
            _write_transposed(match, model.graph)
    if any(found):
        RemoveUnusedNodesPass()(model)
        model.graph.opset_imports.setdefault(DOMAIN, 1)
    return model


def _linear(product: ir.Node) -> _Linear | None:
    """A product of quantized integers with a constant weight, and the bias that is added to it."""
    left, right = (maker_of(value, "DequantizeLinear") for value in product.inputs)
    if left is None or right is None or len(left.inputs) < 3 or len(right.inputs) > 2:
        return None
    integers, scale, zero_point = left.inputs
    weight, scales = right.inputs
    types = [None if found is None else found.dtype for found in (constant(zero_point), constant(weight))]
    if types != [np.uint8, np.int8] or sizes(scale) != () or right.attributes.get_int("axis", 1) != 1:
        return None
    channels = (sizes(weight) or ())[1:]
    if sizes(scales) != channels:
        return None
    operands = (integers, weight, scale, scales, zero_point)
    added = only_reader(product.outputs[0], "Add")
    if added is not None and constant(added.inputs[1]) is not None and sizes(added.inputs[1]) == channels:
        return _Linear((*operands, None, added.inputs[1]), added)
    return _Linear(operands, product)


def _write_linear(match: _Linear, graph: ir.Graph) -> None:
    import onnx_ir as ir

    fused = ir.node("MatMulIntegerToFloat", match.inputs, domain=DOMAIN)
    ir.convenience.replace_nodes_and_values(graph, match.end, [match.end], [fused], match.end.outputs, fused.outputs)


def _transposed(product: ir.Node, *, of_quantized: bool) -> _Transposed | None:
    """A product whose second operand comes from a transposition that makes its last dimension the last but one."""
    moved = _before_pair(product.inputs[1]) if of_quantized else product.inputs[1]
    transposition = made(moved, "Transpose")
    order = list(transposition.attributes.get_ints("perm", ())) if transposition is not None else []
    # Of a matrix, a weight that is storage only: OpenVINO keeps it as integers for MatMul alone.
    if transposition is None or len(order) < 3 or order[-2] != len(order) - 1:
        return None
    order = [*order[:-2], order[-1], order[-2]]
    return _Transposed(product, transposition, order, order == sorted(order) and moved is product.inputs[1])


def _write_transposed(match: _Transposed, graph: ir.Graph) -> None:
    import onnx_ir as ir

    first, second = match.product.inputs
    match.transposition.attributes["perm"] = ir.AttrInt64s("perm", match.order)
    source = match.transposition.inputs[0] if match.left_out else second
    fused = ir.node("FusedMatMul", [first, source], {"transB": 1}, domain=DOMAIN)
    old = match.product
    ir.convenience.replace_nodes_and_values(graph, old, [old], [fused], old.outputs, fused.outputs)


def _before_pair(value: ir.Value | None) -> ir.Value | None:
    """What was quantized with one scale, and made float again; the value itself where it was not."""
    back = made(value, "DequantizeLinear")
    quantized = made(back.inputs[0], "QuantizeLinear") if back is not None else None
    return quantized.inputs[0] if quantized is not None and sizes(quantized.inputs[1]) == () else value
