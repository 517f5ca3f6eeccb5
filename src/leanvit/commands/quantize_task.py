"""Quantization of a task's network on its pictures, with the metric before and after."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from leanvit.annotations import SceneSet
from leanvit.annotations.load import SceneSplit
from leanvit.checkpoint import CheckpointInfo
from leanvit.config import MPTQConfig, QuantizeConfig
from leanvit.data.loader import to_input
from leanvit.data.scene_loader import SceneLoader
from leanvit.errors import ConfigError
from leanvit.export.simulated import PROFILE_KEY, measured_form
from leanvit.quant.parts import QuantizedNetwork, quantize_network
from leanvit.quant.plan import load_plan
from leanvit.runtime.answers import METRICS
from leanvit.tasks.build import task_of_network
from leanvit.tasks.measure import kind_of, measure_network

SPLITS: tuple[SceneSplit, ...] = ("train", "val")


def calibration_inputs(info: CheckpointInfo, scenes: SceneSet, count: int, seed: int) -> Tensor:
    """Prepared training pictures (or crops, for pose) without augmentation: (count, 3, H, W) float32 normalised."""
    if count < 1:
        raise ConfigError(f"calibration_images is {count}, expected at least 1")
    picks = np.sort(np.random.default_rng(seed).permutation(len(scenes.scenes))[:count])
    chosen = replace(scenes, scenes=tuple(scenes.scenes[i] for i in picks))
    loader = SceneLoader(
        chosen, kind_of(task_of_network(info)), info.preprocess.input_size, 16, train=False, on_bad="skip"
    )
    batches = [to_input(images.permute(0, 2, 3, 1), info.preprocess) for images, _ in loader]
    return torch.cat(batches)[:count]


def quantize_and_measure(
    network: nn.Module, info: CheckpointInfo, config: QuantizeConfig, scheme: MPTQConfig
) -> QuantizedNetwork:
    """Quantize on training pictures and measure the task's metrics before and after on validation pictures.

    The report holds both, under float_metrics and metrics. Raises DataError, ConfigError, CalibrationError.
    """
    train, val = (task_of_network(info).load(config.data, split) for split in SPLITS)
    x = calibration_inputs(info, train, config.calibration_images, config.seed)
    plan = dict(load_plan(config.plan)) if config.plan else None
    quantized = quantize_network(network, info, x, scheme, plan=plan, folder=config.output)
    before = measure_network(network, info, val, config.batch_size)
    form, profile = measured_form(quantized, config.profile)
    after = measure_network(form, info, val, config.batch_size)
    quantized.report |= {
        "task": info.task, "data": config.data, "metric": METRICS[info.task], "float_metrics": before,
        "metrics": after, PROFILE_KEY: profile,
    }  # fmt: skip
    return quantized
