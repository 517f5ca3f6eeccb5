"""What a file holds is called by module paths, in Netron, in ONNX Runtime's profile, and nothing else changes by it."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

import leanvit.models  # noqa: F401 - registers our architectures
from leanvit.checkpoint import preprocess_for
from leanvit.config import MPTQConfig, Preprocess
from leanvit.data.loader import to_input
from leanvit.export.gate.golden import synthetic_images
from leanvit.export.onnx.detection import assemble
from leanvit.export.onnx.lower import lower
from leanvit.quant import quantize
from leanvit.quant.graph import trace
from leanvit.tasks.detect import PART_OUTPUTS, Detector, DetectorConfig
from leanvit.tasks.features import BackboneConfig
from sessions import open_model

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

WITH_A_NAME = (nn.Linear, nn.Conv2d, nn.LayerNorm)


@functools.cache
def network(name: str) -> nn.Module:
    return timm.create_model(name, pretrained=True).eval()


@functools.cache
def pixels_for(name: str) -> np.ndarray:
    return np.stack(synthetic_images(32, preprocess_for(network(name)).input_size))


@functools.cache
def written(name: str, profile: str, smallest: bool = False) -> Any:
    preprocess = preprocess_for(network(name))
    x = to_input(torch.from_numpy(pixels_for(name)), preprocess)
    graph = trace(network(name), x) if profile == "fp32" else quantize(network(name), x, MPTQConfig()).graph
    return lower(graph, preprocess, profile, smallest=smallest)


def expected_names(model: nn.Module) -> set[str]:
    """Paths of all modules that are one operation, as timm itself names them; q, k and v are three."""
    paths = {path for path, module in model.named_modules() if isinstance(module, WITH_A_NAME)}
    packed = {path for path in paths if path.endswith("qkv")}
    return (paths - packed) | {f"{path}.{part}" for path in packed for part in "qkv"}


def require_unique_and_local(proto: Any) -> list[str]:
    """The nodes' names, where they and those of values and constants are unique and say nothing of this machine."""
    names = [node.name for node in proto.graph.node]
    made = [value for node in proto.graph.node for value in node.output]
    constants = [tensor.name for tensor in proto.graph.initializer]
    assert all(names)
    assert len(set(names)) == len(names)
    assert len({*made, *constants}) == len(made) + len(constants)
    for text in (*names, *made, *constants):
        assert "site-packages" not in text
        assert str(Path.cwd()) not in text
    return names


@pytest.mark.parametrize(("name", "profile"), [("vit_micro", "w8a8"), ("swin_micro", "w8a8"), ("vit_micro", "fp32")])
def test_nodes_are_called_as_the_modules(name: str, profile: str) -> None:
    proto = written(name, profile)
    onnx.checker.check_model(proto, full_check=True)
    names = require_unique_and_local(proto)
    assert expected_names(network(name)) <= set(names)
    # Values are called as the nodes that make them, but for constants stored as float16 and the output.
    computed = [node for node in proto.graph.node if not node.input[0].endswith("_half") and node.op_type != "Split"]
    assert [node.output[0] for node in computed[:-1]] == [node.name for node in computed[:-1]]
    assert computed[-1].output[0] == "logits"


def test_constants_are_called_as_parameters_and_quantizers() -> None:
    proto = written("vit_micro", "w8a8")
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    weight = stored["blocks.3.attn.qkv.k.weight"]
    assert weight.dtype == np.int8
    own = network("vit_micro").get_parameter("blocks.3.attn.qkv.weight").detach().chunk(3)[1].t().numpy()
    # Each output channel has its own scale, and SQ-b one for each input channel: signs stay.
    assert np.mean(np.sign(weight[weight != 0]) == np.sign(own[weight != 0])) > 0.95
    assert stored["blocks.3.attn.qkv.input.scale"].shape == ()
    assert {"blocks.3.mlp.fc1.bias", "blocks.3.mlp.fc1.scale", "blocks.3.norm1.weight", "cls_token_half"} <= {
        *stored,
        *(value for node in proto.graph.node for value in node.output),
    }


def test_names_are_the_same_every_time() -> None:
    first = written("vit_micro", "fp32").SerializeToString()
    preprocess = preprocess_for(network("vit_micro"))
    x = to_input(torch.from_numpy(pixels_for("vit_micro")), preprocess)
    assert lower(trace(network("vit_micro"), x), preprocess, "fp32").SerializeToString() == first


def test_the_smallest_file_computes_the_same_bits_without_names() -> None:
    named, smallest = written("vit_micro", "w8a8"), written("vit_micro", "w8a8", smallest=True)
    assert not any(node.name for node in smallest.graph.node)
    assert max(len(value) for node in smallest.graph.node for value in (*node.input, *node.output)) <= len("logits")
    assert smallest.ByteSize() < 0.98 * named.ByteSize()
    assert [node.op_type for node in named.graph.node] == [node.op_type for node in smallest.graph.node]
    outputs = []
    for proto in (named, smallest):
        session = open_model(proto)
        outputs.append(session.run(None, {"images": pixels_for("vit_micro")})[0])
    assert np.array_equal(*outputs)


def test_the_profile_of_onnxruntime_says_which_module_takes_time() -> None:
    options = onnxruntime.SessionOptions()
    with tempfile.TemporaryDirectory() as folder:
        options.enable_profiling, options.profile_file_prefix = True, f"{folder}/profile"
        proto = written("vit_micro", "w8a8").SerializeToString()
        session = open_model(proto, options)
        session.run(None, {"images": pixels_for("vit_micro")})
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    timed = {event["name"].removesuffix("_kernel_time") for event in events if event.get("cat") == "Node"}
    linears = {path for path in expected_names(network("vit_micro")) if ".norm" not in path and path != "norm"}
    assert {path for path in linears if path.startswith("blocks.")} <= timed


def test_a_detector_says_which_part_a_node_belongs_to() -> None:
    size = (64, 64)
    config = DetectorConfig(anchor_scale=1, head_width=32, mask_width=16, mask_layers=1, proposals=20, detections=5)
    torch.manual_seed(0)
    detector = Detector(BackboneConfig("test_resnet", size, 8), 3, config).eval()
    inputs = {"pyramid": (3, *size), "box": (8, 7, 7), "mask": (8, 14, 14)}
    parts = {
        name: lower(
            trace(part, torch.zeros(2, *inputs[name])), Preprocess(size) if name == "pyramid" else None, "fp32",
            outputs=PART_OUTPUTS[name], opset=21,
        )
        for name, part in detector.parts().items()
    }  # fmt: skip
    names = require_unique_and_local(assemble(parts, detector, size))
    for part, module in detector.parts().items():
        paths = {f"{part}.{path}" for path, child in module.named_modules() if isinstance(child, nn.Linear)}
        assert paths <= set(names)
    assert {name.partition(".")[0] for name in names} == {"pyramid", "box", "mask", "glue"} | {
        name for name in names if name in PART_OUTPUTS or "." not in name
    }
