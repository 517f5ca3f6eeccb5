"""Execution profiles are rows: one from outside works everywhere, and reading the table needs no torch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from common import ROOT, Outcome
from leanvit.checkpoint import CheckpointInfo, preprocess_for
from leanvit.config import MPTQConfig
from leanvit.data.loader import to_input
from leanvit.errors import ConfigError
from leanvit.export.gate.golden import synthetic_images
from leanvit.export.onnx.lower import lower
from leanvit.export.onnx.profiles import PROFILES, Profile, find, fitting, pick, register
from leanvit.export.onnx.simulation import executed_form
from leanvit.quant import QuantizedModel, quantize
from leanvit.quant.store import save_quantized
from leanvit.runtime.bundle import read_manifest, sqnr_db
from leanvit.runtime.engines import open_engine


@pytest.fixture(scope="module")
def quantized() -> tuple[QuantizedModel, np.ndarray]:
    model = timm.create_model("vit_micro", pretrained=True).eval()
    preprocess = preprocess_for(model)
    pixels = np.stack(synthetic_images(32, preprocess.input_size))
    result = quantize(model, to_input(torch.from_numpy(pixels), preprocess), MPTQConfig(weight_bits=4))
    return result, pixels


@pytest.fixture
def outside() -> Iterator[Profile]:
    """Weights of 4 bits and linears in float32, attention on the plan's own quantized integers."""
    yield register(Profile("int8-attention", linears="float", convolutions="float", attention="integer"))
    del PROFILES["int8-attention"]


def test_a_profile_from_outside_is_written_by_its_row(
    quantized: tuple[QuantizedModel, np.ndarray], outside: Profile, tmp_path: Path
) -> None:
    result, pixels = quantized
    preprocess = preprocess_for(timm.create_model("vit_micro"))
    proto = lower(result.graph, preprocess, outside.name)
    kinds = [node.op_type for node in proto.graph.node]
    # vit_micro has 6 blocks: q, k, softmax output and v of each are quantized, linears read floats.
    assert kinds.count("QuantizeLinear") == 4 * 6
    assert "MatMulIntegerToFloat" not in kinds
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    with torch.no_grad():
        expected = executed_form(result.graph, outside)(to_input(torch.from_numpy(pixels), preprocess)).numpy()
    assert sqnr_db(expected, open_engine(path, "onnxruntime", 1)(pixels)) >= 35


def test_the_command_line_takes_a_profile_from_outside_and_refuses_unknown_ones(
    quantized: tuple[QuantizedModel, np.ndarray], outside: Profile, tmp_path: Path, leanvit: Callable[..., Outcome]
) -> None:
    labels = tuple(f"label {i}" for i in range(10))
    preprocess = preprocess_for(timm.create_model("vit_micro"))
    save_quantized(tmp_path / "quantized", quantized[0], CheckpointInfo("vit_micro", labels, preprocess))
    done = leanvit("export", tmp_path / "quantized", "--profile", outside.name, "--output", tmp_path / "bundle")
    assert done.code == 0, done.err
    assert read_manifest(tmp_path / "bundle").profile == outside.name
    wrong = leanvit("export", tmp_path / "quantized", "--profile", "int8-atention", "--output", tmp_path / "other")
    assert wrong.code == 2
    measured = leanvit("val", tmp_path / "quantized", "--profile", "int8-atention")
    assert (measured.code, measured.error) == (2, wrong.error)
    assert "Did you mean 'int8-attention'?" in wrong.error


def test_a_name_stands_for_one_row(outside: Profile) -> None:
    assert register(outside) is outside
    with pytest.raises(ConfigError, match="'int8-attention' already"):
        register(Profile("int8-attention", attention="float"))
    with pytest.raises(ConfigError, match="'auto' already"):
        register(Profile("auto"))
    assert "auto" not in PROFILES


def test_kernels_that_read_floats_are_not_given_integers() -> None:
    with pytest.raises(ConfigError, match="profile x stores weights as blocks"):
        Profile("x", weights="blocks")


@pytest.mark.parametrize(
    ("bits", "ends", "name"),
    [
        ({"a": (8, 8), "b": (8, 8)}, (), "w8a8"),
        ({"a": (8, 8), "b": (4, 8)}, (), "mixed"),
        ({"a": (8, 8), "b": (4, 8)}, ("a",), "w4a8"),
        ({"a": (4, 8), "b": (3, 8)}, (), "w4a8"),
        ({"a": (8, 7), "b": (8, 8)}, (), "exact"),
        ({}, (), "w8a8"),
    ],
)
def test_auto_goes_by_the_bits_of_the_linears(bits: dict, ends: tuple, name: str) -> None:
    assert fitting(bits, ends).name == name
    assert pick("auto", bits, ends).name == name


def test_a_profile_is_for_one_kind_of_network() -> None:
    assert pick("auto").name == "fp32"
    with pytest.raises(ConfigError, match="fp32 does not fit a quantized network"):
        pick("fp32", {"a": (8, 8)})
    with pytest.raises(ConfigError, match="w8a8 does not fit a float network"):
        pick("w8a8")
    with pytest.raises(ConfigError, match="Did you mean 'openvino'"):
        find("openvin")


def test_the_documentation_has_a_line_for_every_profile_of_the_package() -> None:
    lines = (ROOT / "docs" / "bundle.md").read_text(encoding="utf-8").splitlines()
    described = [line.split("`")[1] for line in lines if line.startswith("| `") and line.count("|") == 7]
    assert described == own_profiles()


def own_profiles() -> list[str]:
    """Names of the table where nothing registered a row from outside, read without torch."""
    program = (
        "import sys; from leanvit.export.onnx.profiles import PROFILES; assert 'torch' not in sys.modules; "
        "print(*PROFILES)"
    )
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()


def test_the_table_is_read_without_torch() -> None:
    assert "w8a8" in own_profiles()
