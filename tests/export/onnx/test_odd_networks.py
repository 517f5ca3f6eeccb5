"""Networks that are written otherwise than a ViT: their files compute what the network does, and what is simulated."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from leanvit.checkpoint import CheckpointInfo
from leanvit.config import MPTQConfig, Preprocess
from leanvit.data.loader import to_input
from leanvit.export.gate.golden import synthetic_images
from leanvit.export.onnx.lower import lower
from leanvit.export.onnx.simulation import executed_form
from leanvit.quant import QuantizedModel, quantize
from leanvit.quant.graph import trace
from leanvit.quant.store import load_quantized, save_quantized
from leanvit.runtime.bundle import sqnr_db
from odd_networks import NETWORKS, PackedAttention
from sessions import open_model

PREPROCESS = Preprocess(input_size=(16, 16))
PIXELS = np.stack(synthetic_images(32, (16, 16)))
IMAGES = to_input(torch.from_numpy(PIXELS), PREPROCESS)


def _network(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval()


@cache
def _quantized(kind: type[nn.Module]) -> QuantizedModel:
    return quantize(_network(kind), IMAGES, MPTQConfig(range_search=False, smoothing="none"))


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_float_file_computes_the_network(kind: type[nn.Module]) -> None:
    found = open_model(lower(trace(_network(kind), IMAGES), PREPROCESS, "fp32")).run(None, {"images": PIXELS})[0]
    with torch.no_grad():
        expected = _network(kind)(IMAGES).numpy()
    assert sqnr_db(expected, found) > 90


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_w8a8_file_computes_its_simulation(kind: type[nn.Module]) -> None:
    quantized = _quantized(kind)
    assert quantized.report["unquantized"] == []
    proto = lower(quantized.graph, PREPROCESS, "w8a8")
    found = open_model(proto).run(None, {"images": PIXELS})[0]
    with torch.no_grad():
        expected = executed_form(quantized.graph, "w8a8")(IMAGES).numpy()
    assert sqnr_db(expected, found) > 50
    # Linears read uint8; the patch embedding is one of them.
    linears = sum(site.kind == "linear" for site in quantized.graph.sites.values())
    assert sum(node.op_type == "MatMulIntegerToFloat" for node in proto.graph.node) >= linears


def test_a_quantized_network_with_a_computed_bias_is_stored(tmp_path: Path) -> None:
    quantized = _quantized(PackedAttention)
    save_quantized(tmp_path, quantized, CheckpointInfo("packed", ("a",) * 12, PREPROCESS))
    torch.manual_seed(1)
    loaded, _ = load_quantized(tmp_path, lambda info: (PackedAttention(), IMAGES[:2]))
    with torch.no_grad():
        assert torch.equal(loaded.module(IMAGES), quantized.module(IMAGES))
