"""What makes a small file smaller: ONNX Runtime gives the same bits, and what must stay stays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from leanvit.export.onnx.storage import half_constants, shortest_names, without_defaults
from sessions import open_model

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
helper, numpy_helper = onnx.helper, onnx.numpy_helper


def model(nodes: list[Any], constants: dict[str, Any], shape: tuple[int, ...]) -> Any:
    """One input x (float32 of `shape`), one output y."""
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, list(shape))
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "graph", [x], [y], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def run(proto: Any, x: Any) -> Any:
    session = open_model(proto)
    return session.run(None, {"x": x})[0]


def copied(proto: Any) -> Any:
    other = onnx.ModelProto()
    other.CopyFrom(proto)
    return other


CONSTANTS = {
    "vector": np.linspace(-2, 2, 16, dtype=np.float16).astype(np.float32),
    "another": np.full(16, 3.5, np.float32),
    "matrix": np.arange(256, dtype=np.float32).reshape(16, 16),
    "third": np.full(16, 1 / 3, np.float32),
    "large": np.full(16, 1e6, np.float32),
    "short": np.float32([2.0]),
}


def sums() -> Any:
    nodes, last = [], "x"
    for name in CONSTANTS:
        nodes.append(helper.make_node("Add", [last, name], [f"after_{name}"]))
        last = f"after_{name}"
    nodes.append(helper.make_node("Identity", [last], ["y"]))
    return model(nodes, CONSTANTS, (16, 16))


def test_constants_that_float16_holds_are_stored_so() -> None:
    proto, x = sums(), np.random.default_rng(0).normal(size=(16, 16)).astype(np.float32)
    packed = half_constants(copied(proto))
    assert np.array_equal(run(packed, x), run(proto, x))
    kinds = {tensor.name: (tensor.data_type, tuple(tensor.dims)) for tensor in packed.graph.initializer}
    half = onnx.TensorProto.FLOAT16
    assert {name for name, (kind, _) in kinds.items() if kind == onnx.TensorProto.FLOAT} == {"third", "large", "short"}
    assert sorted(dims for kind, dims in kinds.values() if kind == half) == [(16, 16), (32,)]


def test_names_are_short_valid_and_leave_the_interface_alone() -> None:
    nodes = [helper.make_node("Add", ["x" if i == 0 else f"value_{i - 1}", "c"], [f"value_{i}"]) for i in range(200)]
    nodes.append(helper.make_node("Identity", ["value_199"], ["y"]))
    proto, x = model(nodes, {"c": np.float32(0.5)}, (2,)), np.float32([1, -1])
    short = shortest_names(copied(proto))
    names = [name for node in short.graph.node for name in node.output]
    assert len(set(names)) == 201
    assert all(name.isidentifier() and len(name) <= 2 for name in names)
    assert (short.graph.input[0].name, names[-1]) == ("x", "y")
    assert np.array_equal(run(short, x), run(proto, x))


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"dilations": [1, 1], "strides": [1, 1], "pads": [0, 0, 0, 0], "group": 1, "auto_pad": "NOTSET"}, set()),
        ({"dilations": [2, 1], "strides": [1, 2], "pads": [0, 1, 0, 0], "group": 2}, {"dilations", "strides", "pads"}),
        ({"auto_pad": "SAME_UPPER"}, {"auto_pad"}),
    ],
)
def test_defaults_of_a_convolution_are_dropped(options: dict[str, Any], kept: set[str]) -> None:
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(4, 4 // options.get("group", 1), 3, 3)).astype(np.float32)
    proto = model([helper.make_node("Conv", ["x", "w"], ["y"], **options)], {"w": weight}, (1, 4, 9, 9))
    x = generator.normal(size=(1, 4, 9, 9)).astype(np.float32)
    plain = without_defaults(copied(proto))
    left = {attribute.name for attribute in plain.graph.node[0].attribute}
    assert left == kept | ({"group"} if options.get("group", 1) > 1 else set())
    assert np.array_equal(run(plain, x), run(proto, x))


@pytest.mark.parametrize(("target", "kept"), [([-1, 4], False), ([0, 4], True)])
def test_a_reshape_says_allowzero_where_it_has_one(target: list[int], kept: bool) -> None:
    nodes = [helper.make_node("Reshape", ["x", "shape"], ["y"], allowzero=1)]
    proto = model(nodes, {"shape": np.array(target, np.int64)}, (0, 2) if kept else (2, 2))
    x = np.zeros((0, 2) if kept else (2, 2), np.float32)
    plain = without_defaults(copied(proto))
    assert [attribute.name for attribute in plain.graph.node[0].attribute] == (["allowzero"] if kept else [])
    assert run(plain, x).shape == run(proto, x).shape == ((0, 4) if kept else (1, 4))
