"""Checks of model.onnx itself: valid, self-contained, finite, deterministic, with the promised input."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from leanvit.errors import is_installed, require
from leanvit.export.gate.check import Check
from leanvit.export.gate.given import Given
from leanvit.export.onnx.storage import opset_of
from leanvit.runtime.bundle import MODEL_NAME, Manifest

RANDOM = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)


TAKES_INFINITY = frozenset({"Pad", "Where", "Max", "Min", "Clip"})
"""Operations that choose between values: what max-pooling pads with and what a mask puts in place is minus infinity."""


def check_file(given: Given) -> list[Check]:
    """onnx.checker, finite weights, one self-contained file with the stated opset and input, nothing random."""
    manifest = given.manifest
    if not is_installed("onnx"):
        return [Check("onnx", None, "onnx is not installed", "a valid model", 'pip install "leanvit[onnx]"')]
    onnx = require("onnx")
    model = onnx.load(str(given.folder / MODEL_NAME), load_external_data=False)
    try:
        onnx.checker.check_model(model, full_check=True)
        problem = ""
    except Exception as error:
        problem = " ".join(str(error).split())[:200]
    opset = opset_of(model)
    tensors = list(_tensors(onnx, model.graph))
    outside = [t.name for t in tensors if t.data_location == onnx.TensorProto.EXTERNAL]
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in tensors if t.name not in outside}
    nodes = list(_nodes(onnx, model.graph))
    not_finite = _not_finite(nodes, arrays)
    random = [n.op_type for n in nodes if n.op_type in RANDOM or _drops(n, arrays)]
    return [
        Check("onnx", not problem, problem or f"valid, opset {opset}", "onnx.checker accepts it", "Report this model."),
        Check("opset", opset == manifest.opset, f"opset {opset}", f"opset {manifest.opset}", "Export again."),
        Check(
            "self-contained", not outside, f"{len(outside)} tensors in other files", "0 tensors in other files",
            "Save the model with its data inside.",
        ),
        Check(
            "finite weights", not not_finite,
            f"{len(not_finite)} tensors with NaN or infinity {' '.join(not_finite[:3])}".rstrip(),
            "0 tensors with NaN or infinity", "Train again with a lower --lr, or use an earlier checkpoint.",
        ),
        Check(
            "deterministic", not random, f"{len(random)} random operations {' '.join(random[:3])}".rstrip(),
            "0 random operations", "Call model.eval(), and give F.dropout its training=self.training.",
        ),
        _check_input(onnx, model.graph, manifest),
    ]  # fmt: skip


def _not_finite(nodes: list[Any], arrays: dict[str, Any]) -> list[str]:
    """Names of the constants with NaN or infinity; those that only TAKES_INFINITY reads may be infinite."""
    readers: dict[str, set[str]] = {}
    for node in nodes:
        for name in node.input:
            readers.setdefault(name, set()).add(node.op_type)
    floats = {name: array for name, array in arrays.items() if array.dtype.kind == "f"}
    chooses = {name for name in floats if (kinds := readers.get(name)) and kinds <= TAKES_INFINITY}
    return [name for name, a in floats.items() if np.isnan(a).any() or (np.isinf(a).any() and name not in chooses)]


def _nodes(onnx: Any, graph: Any) -> Iterator[Any]:
    """All nodes, also those of branches and loops."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _nodes(onnx, attribute.g)


def _tensors(onnx: Any, graph: Any) -> Iterator[Any]:
    """All constant tensors: initializers and values of Constant nodes, named."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                attribute.t.name = attribute.t.name or next(iter(node.output), "")
                yield attribute.t
            elif attribute.type == onnx.AttributeProto.GRAPH:
                yield from _tensors(onnx, attribute.g)


def _drops(node: Any, arrays: dict[str, Any]) -> bool:
    """Whether a node is a Dropout that drops: its third input says that this is training."""
    training = node.input[2] if node.op_type == "Dropout" and len(node.input) > 2 else ""
    return bool(training) and bool(np.any(arrays.get(training, True)))


def _check_input(onnx: Any, graph: Any, manifest: Manifest) -> Check:
    """What a client reads in bundle.json is what the graph takes: images (any batch, H, W, channels) uint8."""
    shape = (*manifest.preprocess.input_size, manifest.preprocess.channels)
    found, expected = "no input", f"images uint8 (any, {', '.join(map(str, shape))})"
    if graph.input:
        kind = graph.input[0].type.tensor_type
        dims = [d.dim_value if d.HasField("dim_value") else "any" for d in kind.shape.dim]
        dtype = onnx.TensorProto.DataType.Name(kind.elem_type).lower()
        found = f"{graph.input[0].name} {dtype} ({', '.join(map(str, dims))})"
    promised = {"name": "images", "dtype": "uint8", "layout": "NHWC", "batch": "dynamic"}
    promised["channels"] = manifest.preprocess.channel_order
    wrong = [f"{key} {manifest.input.get(key)}" for key in promised if manifest.input.get(key) != promised[key]]
    if wrong:
        found += f"; bundle.json says {', '.join(wrong)}"
    return Check("input", found == expected, found, f"{expected}", "Export again with leanvit's own export.")
