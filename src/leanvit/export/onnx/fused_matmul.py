"""Products as runtimes have them beside ONNX's own: linears with their bias, products with a transposed operand.

ONNX has no product of integers with a float output. From QuantizeLinear, DequantizeLinear and MatMul ONNX Runtime makes
its own, com.microsoft.MatMulIntegerToFloat, but leaves the bias to another operation that reads and writes everything
once more. Its com.microsoft.FusedMatMul reads keys as they are split into heads, where MatMul wants them transposed,
value by value. OpenVINO reads both operations and runs them as well as those they replace, or faster.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from leanvit.export.onnx.graph_view import GraphView, attribute, rewrite

DOMAIN = "com.microsoft"


def fuse_products(proto: Any, *, transpose_codes: bool) -> Any:
    """Write linears on integers as MatMulIntegerToFloat, products of something transposed as FusedMatMul, in place.

    transpose_codes: also where a Q/DQ pair stands between the transposition and the product; ONNX Runtime then
    multiplies floats, OpenVINO integers as before.
    Same arithmetic, in ONNX Runtime and OpenVINO. Returns the onnx.ModelProto.
    """
    from onnx import helper

    graph = _Graph(proto.graph)
    replaced: dict[str, list[Any]] = {}
    for product in (node for node in proto.graph.node if node.op_type == "MatMul"):
        replaced |= graph.linear(product) or graph.transposed(product, of_codes=transpose_codes)
    if replaced:
        rewrite(proto.graph, replaced)
        if all(entry.domain != DOMAIN for entry in proto.opset_import):
            proto.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return proto


class _Graph(GraphView):
    """Finds products and writes them anew: {what a node returns: the nodes in its place}, nothing where it stays."""

    def linear(self, product: Any) -> dict[str, list[Any]]:
        """A product of quantized integers with a constant weight, and the bias that is added to it."""
        from onnx import helper

        operands = self._codes_and_weight(product)
        if not operands:
            return {}
        last, bias = self._with_bias(product, self.shapes[operands[3]])
        inputs = [*operands, *(["", bias] if bias else [])]
        node = helper.make_node("MatMulIntegerToFloat", inputs, list(last.output), domain=DOMAIN)
        return {product.output[0]: [], last.output[0]: [node]}

    def _codes_and_weight(self, product: Any) -> list[str]:
        """Quantized integers, weight, the scales of both and the first's zero point; none for no linear on integers."""
        left, right = (self.maker_of(name, "DequantizeLinear") for name in product.input)
        if left is None or right is None or len(left.input) < 3 or len(right.input) > 2:
            return []
        codes, scale, zero_point = left.input
        weight, scales = right.input
        types = (self._dtype(zero_point), self._dtype(weight))
        if types != (np.uint8, np.int8) or self.shapes.get(scale) != () or attribute(right, "axis", 1) != 1:
            return []
        by_channel = self.shapes.get(scales) == self.shapes[weight][1:]
        return [codes, weight, scale, scales, zero_point] if by_channel else []

    def _dtype(self, name: str) -> Any:
        """Of a constant, None where this is none."""
        return self.constants[name].dtype if name in self.constants else None

    def _with_bias(self, product: Any, channels: tuple[int, ...]) -> tuple[Any, str]:
        """The node that adds one constant a channel to a product, and the constant; the product and '' without."""
        added = self.only_reader(product.output[0], "Add")
        biased = added is not None and added.input[1] in self.constants and self.shapes[added.input[1]] == channels
        return (added, added.input[1]) if biased else (product, "")

    def transposed(self, product: Any, *, of_codes: bool) -> dict[str, list[Any]]:
        """A product whose second operand comes from a transposition that makes its last dimension the last but one."""
        from onnx import helper

        moved = self._behind_codes(product.input[1]) if of_codes else product.input[1]
        transposition = self.made(moved, "Transpose")
        order = attribute(transposition, "perm") if transposition is not None else None
        # Of a matrix, a weight that is storage only: OpenVINO keeps it as integers for MatMul alone.
        if not order or len(order) < 3 or order[-2] != len(order) - 1:
            return {}
        order = [*order[:-2], order[-1], order[-2]]
        move = helper.make_node("Transpose", list(transposition.input), list(transposition.output), perm=order)
        second = product.input[1]
        if order == sorted(order) and second == moved:
            second = transposition.input[0]
        inputs = [product.input[0], second]
        node = helper.make_node("FusedMatMul", inputs, list(product.output), domain=DOMAIN, transB=1)
        return {moved: [move], product.output[0]: [node]}

    def _behind_codes(self, name: str) -> str:
        """What was quantized with one scale, and made float again; the value itself where it was not."""
        back = self.made(name, "DequantizeLinear")
        codes = self.made(back.input[0], "QuantizeLinear") if back is not None else None
        return codes.input[0] if codes is not None and self.shapes.get(codes.input[1]) == () else name
