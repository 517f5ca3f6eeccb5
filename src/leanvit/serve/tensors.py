"""Tensors of the Open Inference Protocol v2: from JSON or raw bytes to arrays, and back. No network is known here.

Source: KServe's Open Inference Protocol v2 and Triton's binary tensor data extension.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leanvit.serve.refusals import Refusal

DATATYPES = {
    "bool": "BOOL", "uint8": "UINT8", "uint16": "UINT16", "uint32": "UINT32", "uint64": "UINT64", "int8": "INT8",
    "int16": "INT16", "int32": "INT32", "int64": "INT64", "float16": "FP16", "float32": "FP32", "float64": "FP64",
}  # fmt: skip
"""The protocol's names of NumPy's types."""

MOST_DIMENSIONS = 8
MOST_ELEMENTS = 2**31


def parse_object(data: bytes) -> dict[str, Any]:
    """A JSON object. Raises Refusal for what is none, or is nested deeper than Python's parser goes."""
    try:
        value = json.loads(data, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise Refusal(400, "the body is not valid JSON, expected an inference request") from None
    if not isinstance(value, dict):
        raise Refusal(400, "the body is not a JSON object, expected an inference request")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(name)


def field(values: dict[str, Any], key: str, kind: type, default: Any = None) -> Any:
    """A value of a JSON object. Raises Refusal for one of another type, or one that is missing without default."""
    value = values.get(key, default)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise Refusal(400, f"'{key}' is not {_KINDS[kind]}")
    return value


_KINDS: dict[type, str] = {str: "a text", int: "an integer", list: "a list", dict: "an object", bool: "true or false"}


def shape_of(tensor: dict[str, Any]) -> tuple[int, ...]:
    """The shape of a tensor. Raises Refusal for dimensions that are no numbers, negative or absurd."""
    shape = field(tensor, "shape", list)
    if not 1 <= len(shape) <= MOST_DIMENSIONS:
        raise Refusal(400, f"'shape' has {len(shape)} dimensions, expected 1 to {MOST_DIMENSIONS}")
    for size in shape:
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= MOST_ELEMENTS:
            raise Refusal(400, "'shape' holds something else than sizes from 0")
    if math.prod(shape) > MOST_ELEMENTS:
        raise Refusal(400, "'shape' is too large")
    return tuple(shape)


def split_binary(body: bytes, header_length: str | None) -> tuple[dict[str, Any], memoryview]:
    """The JSON of a request, and the bytes behind it. Raises Refusal."""
    if header_length is None:
        return parse_object(body), memoryview(b"")
    if not header_length.isascii() or not header_length.isdigit() or int(header_length[:12]) > len(body):
        raise Refusal(400, "Inference-Header-Content-Length is not the length of the JSON at the start of the body")
    length = int(header_length)
    return parse_object(body[:length]), memoryview(body)[length:]


def raw_sizes(tensors: list[Any]) -> list[int | None]:
    """Of each input, its bytes behind the JSON; None where its values are in the JSON. Raises Refusal."""
    sizes: list[int | None] = []
    for tensor in tensors:
        if not isinstance(tensor, dict):
            raise Refusal(400, "'inputs' holds something else than objects")
        parameters = field(tensor, "parameters", dict, {})
        size = field(parameters, "binary_data_size", int) if "binary_data_size" in parameters else None
        if size is not None and size < 0:
            raise Refusal(400, "'binary_data_size' is negative")
        if (size is None) != ("data" in tensor):
            raise Refusal(400, "an input wants either 'data' or 'binary_data_size'")
        sizes.append(size)
    return sizes


def raw_parts(sizes: list[int | None], rest: memoryview) -> list[memoryview | None]:
    """The bytes of each input. Raises Refusal where they are not exactly those that are there."""
    if sum(size or 0 for size in sizes) != len(rest):
        raise Refusal(400, "the bytes behind the JSON are not as many as the inputs say")
    parts: list[memoryview | None] = []
    first = 0
    for size in sizes:
        parts.append(None if size is None else rest[first : first + size])
        first += size or 0
    return parts


def uint8_array(tensor: dict[str, Any], raw: memoryview | None) -> NDArray[np.uint8]:
    """Values of an input of datatype UINT8. Raises Refusal where their number or range is another."""
    shape = shape_of(tensor)
    if raw is not None:
        if len(raw) != math.prod(shape):
            raise Refusal(400, f"{len(raw)} bytes for shape {list(shape)}, expected {math.prod(shape)}")
        return np.frombuffer(raw, np.uint8).reshape(shape)
    try:
        values = np.array(field(tensor, "data", list))
    except (ValueError, OverflowError):
        raise Refusal(400, "'data' is a ragged list, expected numbers") from None
    if values.size != math.prod(shape) or (values.size and values.dtype.kind not in "iu"):
        raise Refusal(400, f"'data' is not {math.prod(shape)} integers")
    if values.size and not (values.min() >= 0 and values.max() <= 255):
        raise Refusal(400, "'data' holds values outside of 0 to 255")
    return values.astype(np.uint8).reshape(shape)


def byte_strings(tensor: dict[str, Any], raw: memoryview | None) -> list[bytes]:
    """Elements of an input of datatype BYTES; in JSON they are base64. Raises Refusal."""
    count = math.prod(shape_of(tensor))
    strings = _raw_strings(raw) if raw is not None else _base64_strings(_flat(field(tensor, "data", list)))
    if len(strings) != count:
        raise Refusal(400, f"{len(strings)} elements, expected {count} by the shape")
    return strings


def _raw_strings(raw: memoryview) -> list[bytes]:
    strings = []
    first = 0
    while first < len(raw):
        if first + 4 > len(raw):
            raise Refusal(400, "a BYTES element is cut off")
        (length,) = struct.unpack_from("<I", raw, first)
        first += 4
        if first + length > len(raw):
            raise Refusal(400, "a BYTES element is longer than what there is")
        strings.append(bytes(raw[first : first + length]))
        first += length
    return strings


def _flat(values: list[Any]) -> list[Any]:
    """A list of lists as one list; deeper ones are no texts, which is then said."""
    return [one for value in values for one in (value if isinstance(value, list) else [value])]


def _base64_strings(values: list[Any]) -> list[bytes]:
    try:
        return [base64.b64decode(value, validate=True) for value in values]
    except (binascii.Error, TypeError, ValueError):
        raise Refusal(400, "'data' of datatype BYTES is not base64") from None


def wanted_outputs(request: dict[str, Any], names: list[str]) -> dict[str, bool]:
    """Names of the outputs that are asked for, and whether each is to come as raw bytes. Raises Refusal."""
    parameters = field(request, "parameters", dict, {})
    binary = field(parameters, "binary_data_output", bool, False)
    asked = field(request, "outputs", list, [])
    if not asked:
        return dict.fromkeys(names, binary)
    found: dict[str, bool] = {}
    for output in asked:
        if not isinstance(output, dict):
            raise Refusal(400, "'outputs' holds something else than objects")
        name = field(output, "name", str)
        if name not in names:
            raise Refusal(400, f"no such output, expected one of {', '.join(names)}")
        if name in found:
            raise Refusal(400, f"output {name} is asked for twice")
        found[name] = field(field(output, "parameters", dict, {}), "binary_data", bool, binary)
    return found


def encode(values: dict[str, NDArray[Any]], wanted: dict[str, bool], about: dict[str, Any]) -> tuple[bytes, int | None]:
    """An inference response, and the length of its JSON where raw bytes follow."""
    described = []
    raw: list[bytes] = []
    for name, binary in wanted.items():
        array = np.ascontiguousarray(values[name])
        tensor: dict[str, Any] = {
            "name": name, "datatype": DATATYPES[array.dtype.name], "shape": list(array.shape),
        }  # fmt: skip
        if binary:
            raw.append(array.tobytes())
            tensor["parameters"] = {"binary_data_size": len(raw[-1])}
        else:
            tensor["data"] = array.ravel().tolist()
        described.append(tensor)
    try:
        head = json.dumps({**about, "outputs": described}, allow_nan=False).encode()
    except ValueError:
        raise Refusal(400, "an output is not finite, which JSON can't hold. Ask for binary_data") from None
    return (b"".join([head, *raw]), len(head)) if raw else (head, None)
