"""val --device: the network of every kind of subject computes where it was asked to."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from leanvit.checkpoint import CheckpointInfo
from leanvit.config import Preprocess, ValConfig
from leanvit.evaluation import subject
from leanvit.export import simulated
from leanvit.quant import parts
from leanvit.train import setup


@pytest.mark.parametrize("kind", ["classifier", "task network"])
def test_a_quantized_network_is_put_on_the_device_that_was_asked_for(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # torch's device without memory stands for a GPU, and an unquantized layer for the form of what a folder holds.
    loaded = object(), CheckpointInfo("network", (), Preprocess((32, 32)))
    monkeypatch.setattr(parts, "is_quantized", lambda path: kind == "classifier")
    monkeypatch.setattr(parts, "is_quantized_network", lambda path: kind == "task network")
    monkeypatch.setattr(parts, "load_quantized", lambda path: loaded)
    monkeypatch.setattr(parts, "load_quantized_network", lambda path: loaded)
    monkeypatch.setattr(parts, "of_quantized", lambda info, *rest: info)
    monkeypatch.setattr(simulated, "measured_form", lambda network, profile: (nn.Linear(2, 2), profile))
    monkeypatch.setattr(setup, "pick_device", lambda name: torch.device("meta" if name == "cuda" else "cpu"))
    network, _, device, quantized = subject._open_network(ValConfig(model="folder", data="data", device="cuda"))
    assert (network.weight.device.type, device.type, quantized) == ("meta", "meta", True)
