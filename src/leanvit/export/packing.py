"""What torch.onnx can't say, put into the model it wrote: 4-bit storage, and nothing of this machine."""

from __future__ import annotations

from typing import Any

import numpy as np

PACKED_SUFFIX = ".codes4"


def pack_four_bits(proto: Any) -> Any:
    """Store every int8 initializer called *.codes4 as INT4, with a Cast to INT8 behind it (both runtimes fold it).

    Without the Cast neither runtime fuses a per-channel INT4 weight into an int8 product.
    """
    from onnx import TensorProto, helper, numpy_helper

    casts = []
    for tensor in proto.graph.initializer:
        if not tensor.name.endswith(PACKED_SUFFIX):
            continue
        codes = numpy_helper.to_array(tensor).reshape(-1)
        name, stored = tensor.name, f"{tensor.name}_int4"
        dims = list(tensor.dims)
        tensor.CopyFrom(helper.make_tensor(stored, TensorProto.INT4, dims, _nibbles(codes), raw=True))
        casts.append(helper.make_node("Cast", [stored], [name], name=f"{name}_cast", to=TensorProto.INT8))
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
