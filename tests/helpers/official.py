"""What the authors' programs wrote down: golden files, and the recipes that fill published networks."""

from __future__ import annotations

import importlib.util
import json
from types import ModuleType
from typing import Any

import timm
import torch
from safetensors import safe_open
from torch import Tensor

from common import GOLDEN_FOLDER
from leanvit.models._convert_exmobilevit import _authors_names


def load_golden(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Weights under the authors' names, all tensors, and what the file says of the network."""
    with safe_open(GOLDEN_FOLDER / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    weights = {key[3:]: value for key, value in tensors.items() if key[:3] in ("sd/", "sd.")}
    return weights, tensors, json.loads(metadata.get("meta") or metadata["config"])


def gradient_norms(name: str) -> dict[str, float]:
    """L2 norms of the gradients of mean(logits^2), under the authors' names."""
    with safe_open(GOLDEN_FOLDER / f"{name}.safetensors", "pt") as file:
        return json.loads(file.metadata()["grad_l2_of_mean_sq_logits"])


def fill_module(name: str) -> ModuleType:
    """A script of tests/golden that says which value each weight of a published network has."""
    spec = importlib.util.spec_from_file_location(name, GOLDEN_FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def official_keys(name: str) -> dict[str, torch.Size]:
    """The authors' key names and shapes of a published network."""
    with torch.device("meta"):
        ours = timm.create_model(name).state_dict()
    scales = ("conv2",) if name == "mobilevit_s_exbase" else ("conv2_1", "conv2_2", "conv2")
    names = _authors_names(scales)
    split = ((key.rpartition("."), value.shape) for key, value in ours.items())
    return {f"{names[module]}.{leaf}": shape for (module, _, leaf), shape in split}
