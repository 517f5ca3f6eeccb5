"""On a GPU: the same as on the CPU, up to the order of sums. Skipped where there is none."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from batches import images
from common import LABELS, Outcome
from leanvit.checkpoint import CheckpointInfo, save_checkpoint
from leanvit.config import Preprocess
from leanvit.testing import randomize_

pytestmark = pytest.mark.cuda


@pytest.fixture
def full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in float32: TF32 keeps ten bits of the mantissa, which is no rounding of the order of sums."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def step_on(device: str, model: nn.Module) -> dict[str, torch.Tensor]:
    """Weights after one step of SGD on eight images."""
    model = copy.deepcopy(model).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    target = torch.arange(8, device=device)
    nn.functional.cross_entropy(model(images(8).to(device)), target).backward()
    optimizer.step()
    return {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}


@pytest.mark.usefixtures("full_precision")
def test_a_training_step_on_a_gpu_is_that_of_the_cpu(micro_model: Any) -> None:
    model = randomize_(copy.deepcopy(micro_model))
    expected, found = step_on("cpu", model), step_on("cuda", model)
    before = model.state_dict()
    assert any(not torch.equal(expected[name], before[name]) for name in expected)
    for name, tensor in expected.items():
        scale = max(float(tensor.float().abs().max()), 1.0)
        torch.testing.assert_close(found[name], tensor, atol=1e-4 * scale, rtol=1e-3)


@pytest.mark.usefixtures("full_precision")
def test_logits_on_a_gpu_are_those_of_the_cpu(micro_model: Any) -> None:
    x = images(16)
    with torch.inference_mode():
        expected = micro_model(x)
        found = copy.deepcopy(micro_model).to("cuda")(x.to("cuda")).cpu()
    torch.testing.assert_close(found, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)


@pytest.mark.usefixtures("full_precision")
def test_val_measures_the_same_on_a_gpu(micro_model: Any, tmp_path: Path, leanvit: Callable[..., Outcome]) -> None:
    digits = tuple(str(number) for number in range(len(LABELS)))
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, micro_model, CheckpointInfo("revit_micro", digits, Preprocess(input_size=(32, 32))))
    measured = [json.loads(leanvit("val", path, "--device", device, "--json").out) for device in ("cpu", "cuda")]
    assert measured[0]["images"] == measured[1]["images"] > 300
    # One image between two classes may fall to either side.
    assert abs(measured[0]["correct"] - measured[1]["correct"]) <= 1
