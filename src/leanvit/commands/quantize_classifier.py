"""Quantize a checkpoint on its training images and measure what it costs on its validation images."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from leanvit.checkpoint import CheckpointInfo
from leanvit.config import MPTQConfig, QuantizeConfig
from leanvit.data.loader import Loader, check_classes, to_input
from leanvit.data.sets import load_split
from leanvit.export.simulated import PROFILE_KEY, measured_form
from leanvit.quant.mptq import QuantizedModel, quantize
from leanvit.quant.plan import load_plan
from leanvit.train import evaluate


def quantize_and_measure(
    model: nn.Module,
    info: CheckpointInfo,
    config: QuantizeConfig,
    scheme: MPTQConfig,
    journal: Path | None = None,
) -> tuple[QuantizedModel, dict[str, Any]]:
    """Quantize on training images and measure float and quantized accuracy on validation images.

    journal: file that keeps the evaluations of a search, so that a killed one goes on where it was.
    Returns the QuantizedModel, whose report holds both accuracies, and the quantized accuracy.
    """
    train_images, val_images = (
        load_split(config.data, split, val_fraction=info.val_fraction, seed=info.seed) for split in ("train", "val")
    )
    check_classes(train_images.classes, info.labels, config.data)
    chosen = np.random.default_rng(config.seed).permutation(len(train_images))[: config.calibration_images]
    calibration = Loader(train_images.subset(chosen), info.preprocess, config.batch_size)
    batches = [to_input(pixels, info.preprocess) for pixels, _ in calibration]
    plan = load_plan(config.plan) if config.plan else None
    quantized = quantize(model, torch.cat(batches), scheme, plan=plan, journal=journal)
    loader = Loader(val_images, info.preprocess, config.batch_size)
    float_accuracy = asdict(evaluate(model, loader))
    form, profile = measured_form(quantized, config.profile)
    accuracy = asdict(evaluate(form, loader))
    quantized.report |= {"accuracy": accuracy, "float_accuracy": float_accuracy, "data": config.data}
    quantized.report[PROFILE_KEY] = profile
    return quantized, accuracy
