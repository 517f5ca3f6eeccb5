"""Zero points of int8 weights, for ONNX Runtime on CPUs without VNNI."""

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
