"""Attention as one ONNX operation: against numpy in float64, and what must stay as it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import leanvit.models  # noqa: F401 - registers our architectures
from leanvit import export
from leanvit.checkpoint import preprocess_for
from leanvit.config import ExportOptions
from leanvit.export.onnx import attention
from leanvit.export.onnx.lower import lower
from leanvit.quant.graph import trace
from leanvit.runtime.bundle import read_manifest
from sessions import open_model

onnx = pytest.importorskip("onnx")
ir = pytest.importorskip("onnx_ir")
onnxruntime = pytest.importorskip("onnxruntime")
helper, numpy_helper = onnx.helper, onnx.numpy_helper

BATCH, TOKENS, HEADS, DEPTH, VALUE_DEPTH = 2, 5, 3, 4, 6
KEY_BIAS = np.linspace(-3, 3, TOKENS * HEADS * DEPTH, dtype=np.float32).reshape(TOKENS, HEADS * DEPTH)
MASKS = {"none": None, "heads": (1, HEADS, TOKENS, TOKENS), "rows": (TOKENS, TOKENS), "all": (BATCH, 1, TOKENS, TOKENS)}


@dataclass(frozen=True)
class Form:
    """One way to write attention."""

    scaled: str = "queries"
    divided: bool = False
    mask: str = "none"
    mask_first: bool = False
    windows: bool = False
    behind: str = "tokens"
    axis: int = -1
    logits_out: bool = False
    codes: bool = False
    key_bias: str = "none"
    moved: tuple[int, ...] = (0, 2, 1, 3)


def tensor(value: Any, name: str) -> Any:
    return numpy_helper.from_array(np.asarray(value), name)


def model(form: Form) -> Any:
    """Attention written out; inputs q, k, v as (B, N, C), or (B, 1, N, C) with windows."""
    nodes: list[Any] = []
    depth = {"q": DEPTH, "k": DEPTH, "v": VALUE_DEPTH}
    constants = [tensor(np.float32(4.0 if form.divided else 0.25), "number"), tensor([-1, 1], "unused")]

    def op(op_type: str, inputs: list[str], output: str, **options: Any) -> str:
        nodes.append(helper.make_node(op_type, inputs, [output], **options))
        return output

    def scaled(name: str, where: str) -> str:
        return op("Div" if form.divided else "Mul", [name, "number"], f"{name}s") if form.scaled == where else name

    heads = {}
    for name, perm in (("q", form.moved), ("k", (0, 2, 3, 1)), ("v", (0, 2, 1, 3))):
        constants.append(tensor([-1, TOKENS, HEADS, depth[name]], f"{name}_shape"))
        value = name
        if name == "k" and form.key_bias != "none":
            constants.append(tensor(KEY_BIAS if form.key_bias == "tokens" else KEY_BIAS[0], "k_bias"))
            value = op("Add", ["k_bias", name] if form.key_bias == "first" else [name, "k_bias"], "kb")
        heads[name] = op("Transpose", [op("Reshape", [value, f"{name}_shape"], f"{name}r")], f"{name}t", perm=perm)
    if form.moved != (0, 2, 1, 3):
        heads["q"] = op("Transpose", [heads["q"]], "qtt", perm=(1, 0, 2, 3))
    logits = scaled(op("MatMul", [scaled(heads["q"], "queries"), scaled(heads["k"], "keys")], "l"), "logits")
    if MASKS[form.mask]:
        logits = op("Add", ["mask", logits] if form.mask_first else [logits, "mask"], "lm")
    shares = op("Softmax", [logits], "p", axis=form.axis)
    if form.codes:
        constants += [tensor(np.float32(1 / 255), "step"), tensor(np.uint8(0), "zero")]
        shares = op("DequantizeLinear", [op("QuantizeLinear", [shares, "step", "zero"], "c"), "step", "zero"], "pc")
    mixed = op("Transpose", [op("MatMul", [shares, heads["v"]], "o")], "ot", perm=(0, 2, 1, 3))
    joined = {"tokens": [-1, TOKENS, HEADS * VALUE_DEPTH], "grid": [-1, 1, TOKENS, HEADS * VALUE_DEPTH]}
    constants.append(tensor(joined[form.behind], "joined"))
    op("Reshape", [mixed, "joined"], "y")

    def info(name: str, dims: list[Any]) -> Any:
        return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, dims)

    inner = [1, TOKENS] if form.windows else [TOKENS]
    inputs = [info(name, ["b", *inner, HEADS * depth[name]]) for name in "qkv"]
    if MASKS[form.mask]:
        inputs.append(info("mask", list(MASKS[form.mask] or ())))
    outputs = [info("y", ["b", *joined[form.behind][1:]])]
    if form.logits_out:
        outputs.append(info(logits, ["b", HEADS, TOKENS, TOKENS]))
    body = helper.make_graph(nodes, "attention", inputs, outputs, constants)
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def operands(form: Form, seed: int) -> dict[str, Any]:
    generator = np.random.default_rng(seed)
    widths = {"q": DEPTH, "k": DEPTH, "v": VALUE_DEPTH}
    inner = (1, TOKENS) if form.windows else (TOKENS,)
    given = {n: generator.normal(0, 2, (BATCH, *inner, HEADS * w)).astype(np.float32) for n, w in widths.items()}
    shape = MASKS[form.mask]
    return given | ({"mask": generator.normal(0, 2, shape).astype(np.float32)} if shape else {})


def expected(given: dict[str, Any], form: Form) -> Any:
    """Attention in float64: (B, N, heads * depth)."""
    bias = {"none": np.zeros(1), "tokens": KEY_BIAS}.get(form.key_bias, KEY_BIAS[0])
    given = given | {"k": given["k"].astype(np.float64) + bias}
    split = {n: x.astype(np.float64).reshape(BATCH, TOKENS, HEADS, -1) for n, x in given.items() if n != "mask"}
    logits = np.einsum("bihd,bjhd->bhij", split["q"], split["k"]) / 4 + given.get("mask", 0)
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    return np.einsum("bhij,bjhd->bihd", shares, split["v"]).reshape(BATCH, TOKENS, -1)


def fuse_attention(proto: Any) -> Any:
    return ir.to_proto(attention.fuse_attention(ir.from_proto(proto)))


def operations(proto: Any) -> list[str]:
    return [node.op_type for node in proto.graph.node]


def outputs(proto: Any, given: dict[str, Any]) -> list[Any]:
    session = open_model(proto)
    found: list[Any] = session.run(None, given)
    return found


@given(
    st.builds(
        Form,
        scaled=st.sampled_from(["queries", "keys", "logits"]),
        divided=st.booleans(),
        mask=st.sampled_from(list(MASKS)),
        mask_first=st.booleans(),
        windows=st.booleans(),
        behind=st.sampled_from(["tokens", "grid"]),
        key_bias=st.sampled_from(["none", "first", "last"]),
    ),
    st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None)
def test_every_way_to_write_it_is_found_and_computes_attention(form: Form, seed: int) -> None:
    proto = fuse_attention(model(form))
    onnx.checker.check_model(proto, full_check=True)
    assert operations(proto).count("Attention") == 1
    assert not {"Softmax", "MatMul", "Transpose", "Add"} & set(operations(proto))
    assert "unused" not in [constant.name for constant in proto.graph.initializer]
    given = operands(form, seed)
    found = outputs(proto, given)[0]
    assert np.abs(found.reshape(BATCH, TOKENS, -1) - expected(given, form)).max() < 1e-5


def test_what_differs_between_keys_is_no_bias_to_leave_out() -> None:
    form = Form(key_bias="tokens")
    proto, given = fuse_attention(model(form)), operands(form, 0)
    assert operations(proto).count("Attention") == operations(proto).count("Add") == 1
    assert np.abs(outputs(proto, given)[0] - expected(given, form)).max() < 1e-5


def test_the_plain_form_becomes_one_operation() -> None:
    assert operations(fuse_attention(model(Form()))) == ["Attention"]


@pytest.mark.parametrize(
    "form",
    [
        Form(logits_out=True),
        Form(mask="heads", logits_out=True),
        Form(codes=True),
        Form(axis=2),
        Form(moved=(2, 0, 1, 3)),
    ],
    ids=["logits are read elsewhere", "masked logits are", "codes in between", "another axis", "another order"],
)
def test_what_is_no_such_attention_stays(form: Form) -> None:
    proto, given = model(form), operands(form, 0)
    before, count = outputs(proto, given), operations(proto)
    fused = fuse_attention(proto)
    assert operations(fused) == count
    assert all(np.array_equal(a, b) for a, b in zip(before, outputs(fused, given), strict=True))


def test_an_older_opset_keeps_the_products(tmp_path: Path) -> None:
    network = timm.create_model("vit_micro").eval()
    bundle = export(network, tmp_path / "bundle", ExportOptions(opset=21, runtimes=("onnxruntime",)))
    assert read_manifest(bundle).opset == 21
    proto = onnx.load(bundle / "model.onnx")
    assert [entry.version for entry in proto.opset_import if not entry.domain] == [21]
    assert operations(proto).count("Softmax") == 6
    assert "Attention" not in operations(proto)


@pytest.mark.parametrize(
    ("name", "fused", "left"),
    [
        ("vit_micro", 6, 0),
        ("deit_micro", 6, 0),
        # Shifted windows have a mask by window, which no dynamic batch of windows can be added to.
        ("swin_micro", 4, 2),
        # Residual attention reads the logits of the layer before.
        ("revit_micro", 0, 6),
        ("exmobilevit_micro", 6, 0),
        ("vitae_micro", 3, 0),
    ],
)
def test_attention_of_the_families(name: str, fused: int, left: int) -> None:
    network = timm.create_model(name).eval()
    graph = trace(network, torch.zeros(2, *network.pretrained_cfg["input_size"]))
    found = operations(lower(graph, preprocess_for(network), "fp32"))
    assert (found.count("Attention"), found.count("Softmax")) == (fused, left)
