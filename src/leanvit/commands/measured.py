"""Quantize a network of any task on its training data and measure what that costs on its validation data."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from leanvit.annotations import SceneSet
from leanvit.checkpoint import CheckpointInfo
from leanvit.commands.inputs import measured_before, read_own_data
from leanvit.config import MPTQConfig, QuantizeConfig
from leanvit.data.loader import Loader
from leanvit.evaluation.readable import readable
from leanvit.export.data import Data, calibration_inputs, differ_in_kind
from leanvit.export.explain import explain
from leanvit.export.onnx.profiles import find, scheme_for
from leanvit.export.simulated import PROFILE_KEY, PROFILE_LOSSES_KEY, measured_form, profile_losses
from leanvit.progress import note
from leanvit.quant import QuantizedModel
from leanvit.quant.block_journal import SUFFIX
from leanvit.quant.costs import read_latency_table
from leanvit.quant.elsewhere import Elsewhere
from leanvit.quant.parts import QuantizedNetwork, quantize_any, save_network
from leanvit.quant.plan import load_plan
from leanvit.quant.store import save_quantized
from leanvit.runtime.task import task_named
from leanvit.tasks.measure import measure_images, measure_network
from leanvit.train import evaluate

Quantized = QuantizedModel | QuantizedNetwork


def measure_in_torch(network: nn.Module, info: CheckpointInfo, data: Data, batch_size: int) -> dict[str, Any]:
    """The task's metrics of a torch network, `batch_size` images a step."""
    if isinstance(data, SceneSet):
        return measure_network(network, info, data, batch_size)
    if task_named(info.task).returns != "label":
        return measure_images(network, info, data, batch_size)
    return asdict(evaluate(network, Loader(data, info.preprocess, batch_size)))


def quantize_and_measure(
    network: nn.Module,
    info: CheckpointInfo,
    config: QuantizeConfig,
    scheme: MPTQConfig | None = None,
    elsewhere: Elsewhere | None = None,
) -> Quantized:
    """Quantize on training data; measure the float network and what the profile runs on validation data.
    A search of bits keeps its journals in `config.output`, so that a killed one goes on where it was; `elsewhere`
    computes its losses in other processes.
    The report holds both measurements, under float_metrics and metrics (and for a classifier under float_accuracy and
    accuracy, as 0.1 had them). Raises DataError, ConfigError, CalibrationError, ImageError.
    """
    scheme = scheme_for(scheme or config.scheme(), config.profile)
    train, val = (read_own_data(info, config.data, split)[1] for split in ("train", "val"))
    if config.bad_images == "skip":
        val = readable(info.task, val, info.preprocess)
    step = min(config.batch_size, 64)
    x = calibration_inputs(info, train, config.calibration_images, config.seed, step, config.bad_images)
    unlike = differ_in_kind(info, x, val, config.seed)
    plan = load_plan(config.plan) if config.plan else None
    task = task_named(info.task)
    quantized = quantize_any(network, info, x, scheme, plan=plan, folder=config.output, elsewhere=elsewhere)
    before = measure_in_torch(network, info, val, config.batch_size)
    form, profile = measured_form(quantized, config.profile)
    after = measure_in_torch(form, info, val, config.batch_size)
    if profile:
        table = read_latency_table(config.latency_table) if config.latency_table else None
        quantized.report["explain"] = explain(quantized, network, x, find(profile), table=table, seed=config.seed)
    quantized.report[PROFILE_LOSSES_KEY] = profile_losses(quantized, network, x, config.seed)
    told: dict[str, Any] = {"task": info.task, "data": config.data, "metric": task.metric, PROFILE_KEY: profile}
    told["unlike_validation"] = unlike
    quantized.report |= told | {"float_metrics": before, "metrics": after}
    if task.returns == "label":
        quantized.report |= {"float_accuracy": before, "accuracy": after}
    return quantized


def save(folder: str | Path, quantized: Quantized, info: CheckpointInfo) -> Path:
    """Write a quantized network of any task, its plan and its report; what was kept of its blocks goes then."""
    if isinstance(quantized, QuantizedNetwork):
        save_network(folder, quantized, info)
    else:
        save_quantized(folder, quantized, info)
    for kept in Path(folder).glob(f"*{SUFFIX}"):
        kept.unlink()
    return Path(folder)


def float_metric(model: Any, info: CheckpointInfo, data: Data, name: str, batch_size: int | None) -> float | None:
    """The float network's metric on an export's data: as it was measured before, else measured now where it is at hand.

    batch_size: images a step. Says where the drop can't be checked.
    """
    known = measured_before(model, info, name)
    if known is not None:
        return known
    if not isinstance(model, nn.Module):
        note(f"the float network was not measured on {name}: the drop is not checked. Quantize with --data {name}")
        return None
    note(f"the float network was not measured on {name}: measuring it")
    task = task_named(info.task)
    return float(measure_in_torch(model, info, data, batch_size or task.batch_size)[task.metric])
