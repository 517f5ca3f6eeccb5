"""A task's network from what its checkpoint says, and its answers as the arrays that a bundle gives."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from leanvit.annotations import KeypointScheme, Outputs
from leanvit.checkpoint import CheckpointInfo, find_checkpoint, info_from_metadata, load_weights, read_tensors
from leanvit.config import TaskTrainConfig, from_dict, to_dict
from leanvit.config.tasks import Task
from leanvit.errors import CheckpointError
from leanvit.tasks.detect import Detector, DetectorConfig
from leanvit.tasks.features import BackboneConfig, Features
from leanvit.tasks.pose import PoseConfig, PoseNetwork
from leanvit.tasks.segment import Segmenter, SegmenterConfig

OUTPUT_NAMES: dict[str, tuple[str, ...]] = {
    "detect": ("boxes", "scores", "labels"),
    "segment": ("boxes", "scores", "labels", "masks"),
    "semantic": ("logits",),
    "pose": ("heatmaps",),
}


def head_options(config: TaskTrainConfig) -> dict[str, Any]:
    """The arguments of a head that a training configuration names; what CheckpointInfo.head keeps."""
    if config.task in ("detect", "segment"):
        names = ("anchor_scale", "head_width", "mask_width", "mask_layers", "proposals", "sampled", "detections")
        head = DetectorConfig(masks=config.task == "segment", **{name: getattr(config, name) for name in names})
        return {"channels": config.channels, **to_dict(head)}
    if config.task == "semantic":
        return to_dict(SegmenterConfig(config.decoder, config.decoder_width, dice=config.dice))
    return to_dict(PoseConfig(config.decoder_width))


def build_network(info: CheckpointInfo) -> nn.Module:
    """The network of a task with random weights, on the CPU.

    Raises CheckpointError for a task that is none, UnknownModelError, ConfigError.
    """
    options = dict(info.head)
    channels = options.pop("channels", 256)
    backbone = BackboneConfig(info.architecture, info.preprocess.input_size, channels, info.kwargs)
    if info.task in ("detect", "segment"):
        return Detector(backbone, len(info.labels), from_dict(DetectorConfig, options, "head"))
    if info.task == "semantic":
        return Segmenter(backbone, len(info.labels), from_dict(SegmenterConfig, options, "head"))
    if info.task == "pose" and info.keypoints:
        return PoseNetwork(backbone, len(info.keypoints["names"]), from_dict(PoseConfig, options, "head"))
    raise CheckpointError(f"the checkpoint is for task '{info.task}', expected detect, segment, semantic or pose.")


def features_of(network: nn.Module) -> Features:
    """The backbone of a task's network."""
    part = network.pyramid if isinstance(network, Detector) else network
    return cast(Features, part.features)


def keypoints_of(scheme: KeypointScheme | None) -> dict[str, Any] | None:
    """A scheme as CheckpointInfo keeps it."""
    return asdict(scheme) if scheme else None


def load_network(path: str | Path) -> tuple[nn.Module, CheckpointInfo]:
    """Network (eval mode, CPU) and info of a task's checkpoint or run folder.

    Raises CheckpointError where it is missing, damaged, or of a classifier.
    """
    path = find_checkpoint(path)
    tensors, metadata = read_tensors(path)
    if "leanvit" not in metadata:
        raise CheckpointError(f"{path}: a safetensors file without leanvit's metadata, expected one of leanvit train.")
    info = info_from_metadata(metadata["leanvit"], path)
    network = build_network(info)
    load_weights(network, tensors, path)
    return network.eval(), info


@torch.inference_mode()
def raw_answers(network: nn.Module, task: Task, x: Tensor) -> Outputs:
    """Answers of a network in eval mode for x (B, 3, H, W) float32 normalised, as a bundle gives them."""
    found = network(x)
    if task in ("detect", "segment"):
        return _padded(found, cast(Detector, network).config, masks=task == "segment")
    return {OUTPUT_NAMES[task][0]: found.float().cpu().numpy()}


def _padded(found: list[dict[str, Tensor]], config: DetectorConfig, *, masks: bool) -> Outputs:
    """torchvision's lists as arrays of `detections` rows; labels count from 0."""
    count, places = len(found), config.detections
    outputs: Outputs = {
        "boxes": np.zeros((count, places, 4), np.float32),
        "scores": np.zeros((count, places), np.float32),
        "labels": np.zeros((count, places), np.int64),
    }
    if masks:
        outputs["masks"] = np.zeros((count, places, 28, 28), np.float32)
    for row, answer in enumerate(found):
        kept = len(answer["scores"])
        for name in outputs:
            value = answer[name].float().cpu().numpy()
            outputs[name][row, :kept] = value[:, 0] if name == "masks" else value - (name == "labels")
    return outputs
