"""What torch.onnx can't say, put into the model it wrote: 4-bit storage, short names, nothing of this machine."""

from __future__ import annotations

from typing import Any

import numpy as np

CODES_SUFFIX = ".codes4"
ZERO_POINT_SUFFIX = ".zero_point4"


def pack_four_bits(proto: Any, *, cast: bool = True) -> Any:
    """Store every int8 initializer called *.codes4 as INT4, every zero point called *.zero_point4 as UINT4.

    cast: a Cast to INT8 behind INT4 weights, which runtimes fold at load. Without it neither ONNX Runtime nor
    OpenVINO fuses a per-channel INT4 weight into an int8 product, but compilers for accelerators see its type.
    """
    from onnx import TensorProto, helper, numpy_helper

    casts = []
    for tensor in proto.graph.initializer:
        if not tensor.name.endswith((CODES_SUFFIX, ZERO_POINT_SUFFIX)):
            continue
        signed = tensor.name.endswith(CODES_SUFFIX)
        codes, dims, name = numpy_helper.to_array(tensor).reshape(-1), list(tensor.dims), tensor.name
        stored = f"{name}_int4" if signed and cast else name
        kind = TensorProto.INT4 if signed else TensorProto.UINT4
        tensor.CopyFrom(helper.make_tensor(stored, kind, dims, _nibbles(codes), raw=True))
        if signed and cast:
            casts.append(helper.make_node("Cast", [stored], [name], to=TensorProto.INT8))
    nodes = [*casts, *proto.graph.node]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    return proto


def _nibbles(codes: np.ndarray[Any, Any]) -> bytes:
    """Two codes a byte, the first in the low half."""
    padded = np.append(codes, 0) if codes.size % 2 else codes
    halves = padded.astype(np.int8).view(np.uint8) & 0x0F
    return bytes((halves[0::2] | (halves[1::2] << 4)).astype(np.uint8))


def without_metadata(proto: Any) -> Any:
    """Drop the exporter's notes on every node: stack traces with paths of this machine, a third of the file."""
    del proto.graph.value_info[:]
    _shorten_names(proto.graph)
    for item in (
        proto,
        proto.graph,
        *proto.graph.node,
        *proto.graph.initializer,
        *proto.graph.input,
        *proto.graph.output,
    ):
        del item.metadata_props[:]
    return proto


def _shorten_names(graph: Any) -> None:
    """Number what nobody looks up: nodes lose their names, values between them become v0, v1, ...

    Constants keep theirs, without the exporter's prefixes. Together a tenth of a small model's file.
    """
    kept = {value.name for value in (*graph.input, *graph.output)}
    short: dict[str, str] = {}
    for tensor in graph.initializer:
        name = tensor.name.removeprefix("network.").removeprefix("quantizer_")
        if name not in kept:
            short[tensor.name] = name
            kept.add(name)
            tensor.name = name
    for node in graph.node:
        node.ClearField("name")
        for name in node.output:
            if name and name not in kept:
                short.setdefault(name, f"v{len(short)}")
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [short.get(name, name) for name in names]
