"""Products as runtimes' own operations: against whole numbers and float64 in numpy, and what must stay as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leanvit.export.onnx import fused_matmul
from sessions import needs_vnni, open_model

onnx = pytest.importorskip("onnx")
ir = pytest.importorskip("onnx_ir")
onnxruntime = pytest.importorskip("onnxruntime")
helper, numpy_helper = onnx.helper, onnx.numpy_helper

TOKENS, INPUTS, OUTPUTS = 5, 12, 7
SCALE, ZERO_POINT = np.float32(0.05), 90
HEADS, DEPTH = 3, 4
RNG = np.random.default_rng(0)
CODES = RNG.integers(-127, 128, (INPUTS, OUTPUTS)).astype(np.int8)
SCALES = RNG.uniform(1e-3, 1e-2, OUTPUTS).astype(np.float32)
BIAS = RNG.normal(0, 1, OUTPUTS).astype(np.float32)


@dataclass(frozen=True)
class Linear:
    """One way to write a linear on codes; the fields after `dimensions` each keep it from being fused whole."""

    bias: bool = True
    dimensions: int = 3
    signed: bool = False
    weight_axis: int = 1
    weight_zero_point: bool = False
    float_weight: bool = False
    float_input: bool = False
    scale_by_token: bool = False
    read_twice: bool = False
    bias_by_token: bool = False


def info(name: str, dims: list[Any]) -> Any:
    return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, dims)


def whole(nodes: list[Any], inputs: list[Any], outputs: list[Any], constants: dict[str, Any]) -> Any:
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    body = helper.make_graph(nodes, "products", inputs, outputs, tensors)
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def linear(form: Linear) -> Any:
    axis_scales = {0: np.full(INPUTS, 0.01, np.float32), 1: SCALES}[form.weight_axis]
    constants: dict[str, Any] = {
        "scale": np.full(TOKENS, SCALE) if form.scale_by_token else SCALE,
        "zero": np.full(TOKENS, 0, np.uint8) if form.scale_by_token else np.uint8(ZERO_POINT),
        "codes": CODES, "scales": axis_scales, "bias": np.tile(BIAS, (TOKENS, 1)) if form.bias_by_token else BIAS,
        "weight_zero": np.zeros(OUTPUTS, np.int8),
    }  # fmt: skip
    if form.signed:
        constants["zero"] = np.int8(ZERO_POINT - 128)
    axis = {"axis": 1} if form.scale_by_token else {}
    weight = ["codes", "scales", *(["weight_zero"] if form.weight_zero_point else [])]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], **axis),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"], **axis),
        helper.make_node("DequantizeLinear", weight, ["w"], axis=form.weight_axis),
    ]
    if form.float_weight:
        nodes[2] = helper.make_node("Identity", ["float"], ["w"])
        constants["float"] = CODES * SCALES
    nodes.append(helper.make_node("MatMul", ["x" if form.float_input else "d", "w"], ["p"]))
    nodes += [helper.make_node("Add", ["p", "bias"], ["y"])] if form.bias else []
    rows = {2: [TOKENS], 3: ["b", TOKENS], 4: ["b", 1, TOKENS]}[form.dimensions]
    answer = "y" if form.bias else "p"
    outputs = [info(answer, [*rows, OUTPUTS])] + ([info("p", [*rows, OUTPUTS])] if form.read_twice else [])
    return whole(nodes, [info("x", [*rows, INPUTS])], outputs, constants)


def operations(proto: Any) -> list[str]:
    return [node.op_type for node in proto.graph.node]


def run(proto: Any, given: dict[str, Any]) -> Any:
    onnx.checker.check_model(proto, full_check=True)
    session = open_model(proto)
    return session.run(None, given)[0]


def fuse_products(proto: Any, *, transpose_quantized: bool) -> Any:
    fused = ir.to_proto(fused_matmul.fuse_products(ir.from_proto(proto), transpose_quantized=transpose_quantized))
    del fused.graph.value_info[:]  # onnx_ir describes constants there once more
    return fused


def in_whole_numbers(x: Any, *, bias: bool) -> Any:
    """The linear in int64 sums and float64."""
    codes = np.clip(np.rint(x / SCALE) + ZERO_POINT, 0, 255).astype(np.int64) - ZERO_POINT
    product = (codes @ CODES.astype(np.int64)) * (float(SCALE) * SCALES.astype(np.float64))
    return product + BIAS if bias else product


@settings(max_examples=25, deadline=None)
@given(st.booleans(), st.sampled_from([2, 3, 4]), st.integers(0, 2**32 - 1))
def test_a_linear_is_one_operation_with_its_bias(bias: bool, dimensions: int, seed: int) -> None:
    form = Linear(bias=bias, dimensions=dimensions)
    proto = fuse_products(linear(form), transpose_quantized=False)
    assert operations(proto) == ["QuantizeLinear", "MatMulIntegerToFloat"]
    shape = {2: (TOKENS,), 3: (2, TOKENS), 4: (2, 1, TOKENS)}[dimensions]
    x = np.random.default_rng(seed).normal(0, 4, (*shape, INPUTS)).astype(np.float32)
    expected = in_whole_numbers(x, bias=bias)
    assert np.abs(run(proto, {"x": x}) - expected).max() <= 1e-6 * np.abs(expected).max()


def test_a_bias_is_left_where_the_product_is_read_twice_or_it_is_none() -> None:
    for form in (Linear(read_twice=True), Linear(bias_by_token=True)):
        proto = fuse_products(linear(form), transpose_quantized=False)
        assert operations(proto) == ["QuantizeLinear", "MatMulIntegerToFloat", "Add"]
        x = np.random.default_rng(1).normal(0, 4, (2, TOKENS, INPUTS)).astype(np.float32)
        assert np.allclose(run(proto, {"x": x}), in_whole_numbers(x, bias=True), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "form",
    [
        Linear(signed=True),
        Linear(weight_axis=0),
        Linear(weight_zero_point=True),
        Linear(float_weight=True),
        Linear(float_input=True),
        Linear(scale_by_token=True),
    ],
)
def test_what_the_operation_does_not_do_stays(form: Linear) -> None:
    before = linear(form)
    after = fuse_products(linear(form), transpose_quantized=False)
    assert after == before


# ONNX Runtime takes uint8 weights, which don't saturate, only where one product reads them.
@needs_vnni
def test_two_linears_of_one_tensor_read_the_same_codes() -> None:
    proto = linear(Linear())
    proto.graph.node.extend(
        [helper.make_node("MatMul", ["d", "w"], ["p2"]), helper.make_node("Add", ["p2", "y"], ["sum"])]
    )
    proto.graph.output[0].name = "sum"
    fused = fuse_products(proto, transpose_quantized=False)
    assert operations(fused) == ["QuantizeLinear", "MatMulIntegerToFloat", "MatMulIntegerToFloat", "Add"]
    x = np.random.default_rng(2).normal(0, 4, (2, TOKENS, INPUTS)).astype(np.float32)
    expected = in_whole_numbers(x, bias=True) + in_whole_numbers(x, bias=False)
    assert np.allclose(run(fused, {"x": x}), expected, rtol=1e-5, atol=1e-4)


def keys(order: tuple[int, ...], *, codes: bool, read_twice: bool = False) -> Any:
    """queries (b, heads, TOKENS, DEPTH) @ keys (b, TOKENS, HEADS, DEPTH) moved in `order`."""
    constants = {"scale": SCALE, "zero": np.uint8(ZERO_POINT)}
    nodes = [helper.make_node("Transpose", ["k"], ["t"], perm=order)]
    if codes:
        nodes.append(helper.make_node("QuantizeLinear", ["t", "scale", "zero"], ["c"]))
        nodes.append(helper.make_node("DequantizeLinear", ["c", "scale", "zero"], ["d"]))
    nodes.append(helper.make_node("MatMul", ["q", "d" if codes else "t"], ["y"]))
    sizes: list[Any] = ["b", TOKENS, HEADS, DEPTH]
    moved = [sizes[i] for i in order]
    outputs = [info("y", ["b", moved[1], TOKENS, moved[3]])] + ([info("t", moved)] if read_twice else [])
    return whole(nodes, [info("q", ["b", moved[1], TOKENS, moved[2]]), info("k", sizes)], outputs, constants)


@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize("order", [(0, 2, 3, 1), (0, 1, 3, 2)])
def test_keys_are_read_as_they_lie(order: tuple[int, ...], codes: bool) -> None:
    proto = fuse_products(keys(order, codes=codes), transpose_quantized=codes)
    assert operations(proto)[-1] == "FusedMatMul"
    moves = [list(node.attribute[0].ints) for node in proto.graph.node if node.op_type == "Transpose"]
    # The grid between may stay behind a transposition that moves nothing.
    assert moves == ([[0, 2, 1, 3]] if order[1] == 2 else [[0, 1, 2, 3]] * codes)
    generator = np.random.default_rng(3)
    k = generator.normal(0, 2, (2, TOKENS, HEADS, DEPTH)).astype(np.float32)
    moved = k.transpose(order).astype(np.float64)
    if codes:
        moved = (np.clip(np.rint(moved / SCALE) + ZERO_POINT, 0, 255) - ZERO_POINT) * SCALE
    q = generator.normal(0, 2, (2, moved.shape[1], TOKENS, moved.shape[2])).astype(np.float32)
    assert np.abs(run(proto, {"q": q, "k": k}) - q.astype(np.float64) @ moved).max() < 1e-4


def test_a_weight_that_is_storage_stays_as_it_is() -> None:
    nodes = [
        helper.make_node("DequantizeLinear", ["codes", "scales"], ["w"], axis=1),
        helper.make_node("Transpose", ["w"], ["t"], perm=(1, 0)),
        helper.make_node("MatMul", ["x", "t"], ["y"]),
    ]
    proto = whole(nodes, [info("x", ["b", OUTPUTS])], [info("y", ["b", INPUTS])], {"codes": CODES, "scales": SCALES})
    before = proto.SerializeToString()
    assert fuse_products(proto, transpose_quantized=True).SerializeToString() == before


def test_a_transposition_stays_where_it_gains_nothing_or_is_read_elsewhere() -> None:
    for given_form, transpose_quantized in (
        (keys((0, 2, 1, 3), codes=False), True),
        (keys((0, 2, 3, 1), codes=False, read_twice=True), True),
        (keys((0, 2, 3, 1), codes=True), False),
    ):
        before = given_form.SerializeToString()
        assert fuse_products(given_form, transpose_quantized=transpose_quantized).SerializeToString() == before
