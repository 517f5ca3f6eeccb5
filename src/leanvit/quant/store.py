"""Quantized models as files: the integers, the ranges, the plan, and the checkpoint they came from."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from leanvit.checkpoint import CheckpointInfo, info_from_metadata, read_tensors, with_merged_tokens
from leanvit.config import MPTQConfig, from_dict, to_dict
from leanvit.errors import CheckpointError
from leanvit.files import write_atomic, write_json
from leanvit.load.api import build_classifier as build_network
from leanvit.load.own import PLAIN_TASKS
from leanvit.quant.attach import Forms, attach
from leanvit.quant.graph import trace
from leanvit.quant.mptq import QuantizedModel
from leanvit.quant.plan import Plan
from leanvit.quant.sq_b import add_missing_biases

QUANTIZED_NAME = "quantized.safetensors"


def save_quantized(folder: str | Path, quantized: QuantizedModel, info: CheckpointInfo) -> Path:
    """Write quantized.safetensors, plan.json and quantize.json (the report) into `folder`."""
    folder = Path(folder)
    tensors = {name: t.detach().cpu().contiguous() for name, t in quantized.module.state_dict().items()}
    metadata = {
        "leanvit": json.dumps(info.as_dict()),
        "config": json.dumps(to_dict(quantized.config)),
        "plan": json.dumps(quantized.plan),
        "forms": json.dumps(quantized.forms),
        "outputs": json.dumps(quantized.graph.outputs),
        "report": json.dumps(quantized.report),
    }
    write_atomic(folder / QUANTIZED_NAME, save(tensors, metadata))
    write_json(folder / "plan.json", quantized.plan)
    write_json(folder / "quantize.json", quantized.report)
    return folder / QUANTIZED_NAME


def is_quantized(path: str | Path) -> bool:
    """Whether `path` is a quantized model: its file, or the folder that holds it."""
    path = Path(path)
    return (path / QUANTIZED_NAME).is_file() or path.name == QUANTIZED_NAME


Build = Callable[[CheckpointInfo], tuple[nn.Module, Tensor]]
"""From what a checkpoint says to its network and an example input (2, ...)."""


def build_classifier(info: CheckpointInfo) -> tuple[nn.Module, Tensor]:
    """The float classifier that a quantized model is of, with random weights, and an example of its input."""
    if info.task not in PLAIN_TASKS:
        raise CheckpointError(f"the quantized model is a network for the task '{info.task}', expected a classifier.")
    return build_network(info), torch.zeros(2, info.preprocess.channels, *info.preprocess.input_size)


def load_quantized(path: str | Path, make: Build = build_classifier) -> tuple[QuantizedModel, CheckpointInfo]:
    """Build a quantized model from its file or folder.

    make: returns the float network that was quantized.
    Raises CheckpointError where the file is missing, damaged, or does not fit the architecture.
    """
    path = Path(path)
    path = path / QUANTIZED_NAME if path.is_dir() else path
    tensors, metadata = read_tensors(path)
    if "plan" not in metadata or "leanvit" not in metadata:
        raise CheckpointError(f"{path}: no quantization plan inside. Quantize first: leanvit quantize CHECKPOINT")
    info = info_from_metadata(metadata["leanvit"], path)
    config = from_dict(MPTQConfig, json.loads(metadata["config"]), f"{path}: config")
    plan: Plan = {site: (bits[0], bits[1]) for site, bits in json.loads(metadata["plan"]).items()}
    model, example = make(info)
    if config.keep_tokens != 1.0:
        model = with_merged_tokens(model, config.keep_tokens)
    forms: Forms = {name: (form, heads) for name, (form, heads) in json.loads(metadata.get("forms", "{}")).items()}
    graph = trace(model, example, config.scope)
    add_missing_biases(graph, set(tensors))
    attach(graph, plan, forms)
    missing, unexpected = graph.module.load_state_dict(tensors, strict=False)
    if missing or unexpected:
        raise CheckpointError(
            f"{path} does not fit {info.architecture}: missing {missing[:3]}, unknown {unexpected[:3]}. "
            "It was written by another version of leanvit or timm: quantize again."
        )
    report: dict[str, Any] = json.loads(metadata["report"])
    graph.outputs = {site: (scale, zero) for site, (scale, zero) in json.loads(metadata.get("outputs", "{}")).items()}
    return QuantizedModel(graph, plan, report, config, example[:1], info.preprocess, forms), info


def with_preprocess(quantized: QuantizedModel, info: CheckpointInfo) -> QuantizedModel:
    """The same model with the preprocessing of its checkpoint, so that export needs no further argument."""
    return replace(quantized, preprocess=info.preprocess)
