"""What ONNX Runtime needs of int8 weights on CPUs without VNNI, where it takes them as uint8."""

from __future__ import annotations

from typing import Any

ENDING = ".zero_point"


def add_zero_points(proto: Any) -> Any:
    """Give every DequantizeLinear of an int8 constant with a scale per channel its zero points, all 0; returns proto.

    ONNX has 0 where there are none. But where a CPU has no VNNI, ONNX Runtime takes such weights as uint8
    (x64quantprecision, runtime/engines.py), makes one zero point for all channels and then refuses it.
    """
    import numpy as np
    from onnx import TensorProto, numpy_helper

    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type != "DequantizeLinear" or len(node.input) > 2:
            continue
        weight, scale = (constants.get(name) for name in node.input[:2])
        if weight is None or scale is None or weight.data_type != TensorProto.INT8 or not scale.dims:
            continue
        name = f"{scale.name}{ENDING}"
        if name not in constants:
            constants[name] = numpy_helper.from_array(np.zeros(tuple(scale.dims), np.int8), name)
            proto.graph.initializer.append(constants[name])
        node.input.append(name)
    return proto


def name_left_out_inputs(proto: Any) -> Any:
    """Give every MatMulIntegerToFloat of five inputs a sixth without a name, the weight's zero point; returns proto.

    ONNX means the same, 0. But where a CPU has no VNNI, ONNX Runtime before 1.30 reads that input unasked and ends the
    whole process where there is none. onnx_ir leaves it out again: after it.
    """
    for node in proto.graph.node:
        if node.op_type == "MatMulIntegerToFloat" and len(node.input) == 5:
            node.input.append("")
    return proto


def copy_shared_weights(proto: Any) -> Any:
    """Give every MatMulIntegerToFloat a weight of its own, where a network has one layer at two places; returns proto.

    Where a CPU has no VNNI, ONNX Runtime 1.32 puts a uint8 weight in the place of each product's, and does not open a
    file in which it comes to the same weight twice.
    """
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    seen: dict[str, int] = {}
    for node in proto.graph.node:
        if node.op_type != "MatMulIntegerToFloat" or node.input[1] not in constants:
            continue
        weight = node.input[1]
        seen[weight] = seen.get(weight, 0) + 1
        if seen[weight] == 1:
            continue
        copied = proto.graph.initializer.add()
        copied.CopyFrom(constants[weight])
        copied.name = f"{weight}_{seen[weight]}"
        node.input[1] = copied.name
    return proto
