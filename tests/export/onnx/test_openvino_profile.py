"""Profile openvino: attention on int8 around zero, codes before they are moved."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import timm
import torch

import leanvit.models  # noqa: F401 - registers our architectures
from leanvit import export
from leanvit.checkpoint import preprocess_for
from leanvit.config import ExportOptions, MPTQConfig, Preprocess
from leanvit.data.loader import to_input
from leanvit.export.gate import speed
from leanvit.export.gate.golden import synthetic_images
from leanvit.export.gate.verify import leave_out_failed
from leanvit.export.onnx.lower import lower
from leanvit.export.onnx.simulation import executed_form
from leanvit.files import read_json
from leanvit.quant import QuantizedModel, quantize
from leanvit.quant.graph import quantizer_of
from leanvit.quant.quantizers import ActivationQuantizer
from leanvit.runtime.bundle import Manifest, sqnr_db
from leanvit.runtime.engines import available, open_engine
from sessions import exact_runtimes

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

IMAGES = 32


@functools.cache
def quantized(name: str, scope: Literal["matmul", "full"] = "matmul") -> tuple[QuantizedModel, Any]:
    model = timm.create_model(name, pretrained=True).eval()
    preprocess = preprocess_for(model)
    pixels = np.stack(synthetic_images(IMAGES, preprocess.input_size))
    return quantize(model, to_input(torch.from_numpy(pixels), preprocess), MPTQConfig(scope=scope)), pixels


@pytest.fixture(scope="module")
def vit() -> tuple[QuantizedModel, Any]:
    return quantized("vit_micro")


class Graph:
    """What makes each value of an ONNX graph, and its constants."""

    def __init__(self, proto: Any) -> None:
        self.nodes = list(proto.graph.node)
        self.maker = {name: node for node in self.nodes for name in node.output}
        self.constants = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}

    def codes(self, value: str) -> Any:
        """The zero point of the codes that a value is made of, None for floats."""
        node = self.maker.get(value)
        if node is None or node.op_type != "DequantizeLinear" or node.input[0] in self.constants:
            return None
        return self.constants[node.input[2]]


def test_the_products_of_attention_read_int8_around_zero_and_shares_from_zero(vit: tuple[QuantizedModel, Any]) -> None:
    result, _ = vit
    graph = Graph(lower(result.graph, preprocess_for(timm.create_model("vit_micro")), "openvino"))
    softmax = [node for node in graph.nodes if node.op_type == "Softmax"]
    assert len(softmax) == 6
    for node in softmax:
        (logits,) = node.input
        product = graph.maker[logits]
        zero_points = [graph.codes(name) for name in product.input]
        assert [(z.dtype.name, int(z)) for z in zero_points] == [("int8", 0), ("int8", 0)]
        shares = next(n for n in graph.nodes if n.op_type == "QuantizeLinear" and n.input[0] == node.output[0])
        assert graph.constants[shares.input[2]].dtype.name == "uint8"
        assert int(graph.constants[shares.input[2]]) == 0
    assert "Attention" not in {node.op_type for node in graph.nodes}


def test_what_attention_gives_is_quantized_before_its_heads_are_joined(vit: tuple[QuantizedModel, Any]) -> None:
    result, _ = vit
    graph = Graph(lower(result.graph, preprocess_for(timm.create_model("vit_micro")), "openvino"))
    joining = [node for node in graph.nodes if node.op_type == "Transpose" and graph.codes(node.input[0]) is not None]
    assert len(joining) == 6
    for node in joining:
        codes = graph.maker[graph.maker[node.input[0]].input[0]]
        assert graph.maker[codes.input[0]].op_type == "MatMul"
        assert int(graph.codes(node.input[0])) == 128


def test_codes_around_zero_reach_as_far_as_those_of_the_plan(vit: tuple[QuantizedModel, Any]) -> None:
    result, _ = vit
    form = executed_form(result.graph, "openvino")
    compared = 0
    for node in form.graph.nodes:
        centred = quantizer_of(form, node)
        if not isinstance(centred, ActivationQuantizer) or int(centred.zero_point) != 128:
            continue
        original = result.module.get_submodule(str(node.target))
        low, high = (float((code - original.zero_point.float()) * original.scale) for code in (0, 255))
        reached = centred(torch.tensor([low, high]))
        assert (reached - torch.tensor([low, high])).abs().max() <= centred.scale / 2 + 1e-6
        assert centred(torch.zeros(1)) == 0
        compared += 1
    assert compared >= 4 * 6


@pytest.mark.parametrize(
    "name",
    ["deit_micro", "swin_micro", "revit_micro", "reswin_micro", "exmobilevit_micro", "vitae_micro", "vitaev2_micro"],
)
def test_every_family_computes_what_is_simulated(name: str, tmp_path: Path) -> None:
    result, pixels = quantized(name)
    preprocess = preprocess_for(timm.create_model(name))
    with torch.no_grad():
        expected = executed_form(result.graph, "openvino")(to_input(torch.from_numpy(pixels), preprocess)).numpy()
    path = tmp_path / "model.onnx"
    onnx.save(lower(result.graph, preprocess, "openvino"), str(path))
    for runtime in exact_runtimes(available()):
        if runtime != "openvino-bf16":
            assert sqnr_db(expected, open_engine(path, runtime, 1)(pixels)) >= 35, runtime


@pytest.mark.parametrize("name", ["swin_micro", "revit_micro", "reswin_micro"])
def test_attention_with_more_than_a_scale_before_its_softmax_is_that_of_w8a8(name: str) -> None:
    result, _ = quantized(name)
    preprocess = preprocess_for(timm.create_model(name))
    files = [lower(result.graph, preprocess, profile, opset=21) for profile in ("openvino", "w8a8")]
    operations = [[node.op_type for node in proto.graph.node] for proto in files]
    assert operations[0] == operations[1]


def test_products_without_plain_codes_stay_in_float() -> None:
    result, _ = quantized("vit_micro", scope="full")
    form = executed_form(result.graph, "openvino")
    products = [node for node in form.graph.nodes if "matmul" in str(node.target)]
    assert len(products) == 12
    assert not [
        source for node in products for source in node.all_input_nodes if quantizer_of(form, source) is not None
    ]


def test_its_speed_is_that_in_openvino(
    vit: tuple[QuantizedModel, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def timed(targets: list[Any], *, batch_sizes: tuple[int, ...], rounds: int) -> dict[str, Any]:
        seen.extend(target.runtime for target in targets)
        rows = [{"batch_size": size, "ratio": 1.5, "path": str(targets[1].path)} for size in batch_sizes]
        return {"threads": 2, "results": rows}

    monkeypatch.setattr(speed, "benchmark", timed)
    monkeypatch.setattr(speed, "FEWEST_MACS", 0)
    preprocess = preprocess_for(timm.create_model("vit_micro"))
    bundle = export(
        vit[0], tmp_path / "bundle", ExportOptions(profile="openvino", runtimes=("onnxruntime",)), preprocess=preprocess
    )
    assert seen == ["openvino", "openvino"]
    check = next(row for row in read_json(bundle / "verify.json")["checks"] if row["name"] == "speed")
    assert "(OpenVINO, 2 threads" in check["found"]


def test_a_file_for_openvino_that_fails_there_is_not_for_other_runtimes_alone() -> None:
    ratios = {"onnxruntime": 35.0, "openvino": 35.0, "openvino-bf16": 20.0}
    manifest = Manifest("vit_micro", "openvino", ("a",), Preprocess(input_size=(8, 8)), 35.0, runtimes=ratios)
    failed = [
        {"name": f"golden in {runtime}", "passed": False, "found": "3 dB", "expected": "35"} for runtime in ratios
    ]
    kept, result = leave_out_failed(manifest, {"passed": False, "checks": failed})
    assert list(kept.runtimes) == ["onnxruntime", "openvino"]
    assert result["passed"] is False
    assert [row["name"] for row in result["checks"]] == ["golden in onnxruntime", "golden in openvino"]
    other = replace(manifest, profile="w8a8")
    assert list(leave_out_failed(other, {"passed": False, "checks": failed})[0].runtimes) == ["onnxruntime"]
