"""What torch.onnx can't say, put into the model it wrote: 4-bit storage, short names, nothing of this machine."""

from __future__ import annotations

import itertools
import string
from typing import Any

import numpy as np

CODES_SUFFIX = ".codes4"
ZERO_POINT_SUFFIX = ".zero_point4"
LOAD_SCALE_SUFFIX = ".load_scale"
CONVOLUTION_DEFAULTS = {"dilations": 1, "strides": 1, "pads": 0, "group": 1, "auto_pad": b"NOTSET"}
"""Of Conv, whose schema says them in words only."""

VECTORS = "vectors"
"""All vectors as one value, before it is cut apart."""

SHORTEST_HALF = 32
SHORTEST_VECTOR = 8


def pack_four_bits(proto: Any, *, cast: bool = True) -> Any:
    """Store every int8 initializer called *.codes4 as INT4, every zero point called *.zero_point4 as UINT4.

    cast: a Cast to INT8 after INT4 weights, which runtimes fold at load. Without it neither ONNX Runtime nor
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
    put(proto.graph.node, [*casts, *proto.graph.node])
    return proto


def put(field: Any, items: list[Any]) -> None:
    """Let a repeated field of a message hold `items`, which may be its own, and nothing else."""
    del field[:]
    field.extend(items)


def _nibbles(codes: np.ndarray[Any, Any]) -> bytes:
    """Two integers a byte, the first in the low half."""
    padded = np.append(codes, 0) if codes.size % 2 else codes
    halves = padded.astype(np.int8).view(np.uint8) & 0x0F
    return bytes((halves[0::2] | (halves[1::2] << 4)).astype(np.uint8))


def compute_at_load(proto: Any) -> Any:
    """Write DequantizeLinear of a weight whose scale is called *.load_scale as Cast and Mul of constants.

    torch.onnx itself would compute those, and store the weight in float again.
    """
    from onnx import TensorProto, helper

    scales = {tensor.name: tensor for tensor in proto.graph.initializer if tensor.name.endswith(LOAD_SCALE_SUFFIX)}
    shapes = {tensor.name: len(tensor.dims) for tensor in proto.graph.initializer}
    nodes = []
    for node in proto.graph.node:
        if node.op_type != "DequantizeLinear" or node.input[1] not in scales:
            nodes.append(node)
            continue
        codes, scale = node.input[:2]
        tensor = scales[scale]
        channels = tensor.dims[0]
        del tensor.dims[:]
        tensor.dims.extend([channels, *[1] * (shapes[codes] - 1)])
        values = f"{codes}_values"
        nodes += [
            helper.make_node("Cast", [codes], [values], to=TensorProto.FLOAT),
            helper.make_node("Mul", [values, scale], list(node.output)),
        ]
    put(proto.graph.node, nodes)
    return proto


def half_constants(proto: Any) -> Any:
    """Store constants that float16 holds exactly as such; runtimes turn them into float32 at load.

    Vectors are stored as one, which a Cast and a Split cut apart; those of more dimensions have a Cast each. Short ones
    stay, where this costs more bytes than it saves.
    """
    from onnx import TensorProto, helper, numpy_helper

    vectors: dict[str, Any] = {}
    nodes = []
    for tensor in proto.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT:
            continue
        values = numpy_helper.to_array(tensor)
        with np.errstate(over="ignore"):
            halves = values.astype(np.float16)
        shortest = SHORTEST_VECTOR if values.ndim == 1 else SHORTEST_HALF
        if values.size < shortest or not np.array_equal(halves.astype(np.float32), values):
            continue
        if values.ndim == 1:
            vectors[tensor.name] = halves
            continue
        stored = f"{tensor.name}_half"
        nodes.append(helper.make_node("Cast", [stored], [tensor.name], to=TensorProto.FLOAT))
        tensor.CopyFrom(numpy_helper.from_array(halves, stored))
    if vectors:
        nodes += _one_vector(proto.graph, vectors)
    put(proto.graph.node, [*nodes, *proto.graph.node])
    return proto


def _one_vector(graph: Any, vectors: dict[str, Any]) -> list[Any]:
    """Store constants, by name their float16 values, as one; returns the nodes that return them in float32."""
    from onnx import TensorProto, helper, numpy_helper

    stored = {
        f"{VECTORS}_half": np.concatenate(list(vectors.values())),
        f"{VECTORS}_sizes": np.array([halves.size for halves in vectors.values()], np.int64),
    }
    others = [tensor for tensor in graph.initializer if tensor.name not in vectors]
    put(graph.initializer, [*others, *(numpy_helper.from_array(values, name) for name, values in stored.items())])
    return [
        helper.make_node("Cast", [f"{VECTORS}_half"], [VECTORS], to=TensorProto.FLOAT),
        helper.make_node("Split", [VECTORS, f"{VECTORS}_sizes"], list(vectors)),
    ]


def opset_of(proto: Any) -> int:
    """Version of ONNX's own operations that a model imports, 0 where none."""
    return next((int(entry.version) for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), 0)


def without_defaults(proto: Any) -> Any:
    """Drop attributes that say what an operation does anyway; runtimes read the same operations."""
    from onnx import defs, helper, numpy_helper

    opset = opset_of(proto)
    shapes = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer if t.data_type == t.INT64}
    for node in (n for n in proto.graph.node if n.domain == ""):
        known = defs.get_schema(node.op_type, opset, "").attributes
        usual = {name: _default(attribute) for name, attribute in known.items()}
        if node.op_type == "Conv":
            usual |= CONVOLUTION_DEFAULTS
        elif node.op_type == "Reshape" and np.all(shapes.get(node.input[1], 0)):
            usual["allowzero"] = 1
        values = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        kept = [a for a in node.attribute if not _same(values[a.name], usual.get(a.name))]
        if len(kept) < len(node.attribute):
            put(node.attribute, kept)
    return proto


def _same(value: Any, usual: Any) -> bool:
    """Whether a value is the usual one; a number stands for a list of any length of it."""
    return value == usual or (isinstance(value, list) and bool(value) and all(each == usual for each in value))


def _default(attribute: Any) -> Any:
    from onnx import helper

    declared = attribute.default_value.type
    return helper.get_attribute_value(attribute.default_value) if declared else None


def shortest_names(proto: Any) -> Any:
    """Call constants and values a, b, ..., Z, aa, ba, ... : with their own names, a tenth of a small model's file."""
    kept = {value.name for value in (*proto.graph.input, *proto.graph.output)}
    constants = [tensor.name for tensor in proto.graph.initializer]
    values = [name for node in proto.graph.node for name in node.output if name]
    named = [name for name in (*constants, *values) if name not in kept]
    free = (name for name in map(_identifier, itertools.count()) if name not in kept)
    rename(proto.graph, dict(zip(named, free, strict=False)))
    return proto


def _identifier(number: int) -> str:
    """An identifier of C for every number from 0, the shortest first."""
    number, first = divmod(number, len(string.ascii_letters))
    name = string.ascii_letters[first]
    following = string.ascii_letters + string.digits
    while number:
        number, last = divmod(number - 1, len(following))
        name += following[last]
    return name


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


def short_names(proto: Any) -> Any:
    """Number what nobody looks up: nodes lose their names, values between them become v0, v1, ...

    Constants keep theirs, without the exporter's prefixes. Together a tenth of a small model's file.
    """
    graph = proto.graph
    kept = {value.name for value in (*graph.input, *graph.output)}
    short: dict[str, str] = {}
    for tensor in graph.initializer:
        name = tensor.name.removeprefix("network.").removeprefix("quantizer_")
        if name not in kept:
            short[tensor.name] = name
            kept.add(name)
    for node in graph.node:
        node.ClearField("name")
        for name in node.output:
            if name and name not in kept:
                short.setdefault(name, f"v{len(short)}")
    rename(graph, short)
    return proto


def rename(graph: Any, short: dict[str, str]) -> None:
    """Give constants and values other names wherever they stand; those that are not in `short` keep theirs."""
    for tensor in graph.initializer:
        tensor.name = short.get(tensor.name, tensor.name)
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [short.get(name, name) for name in names]
