"""export(): write a network of any task as a bundle, and let the gate decide whether it may exist."""

from __future__ import annotations

import dataclasses
import functools
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from leanvit.checkpoint import CheckpointInfo, preprocess_for
from leanvit.config import ExportOptions, Preprocess
from leanvit.errors import ConfigError, require
from leanvit.export.data import Data
from leanvit.export.draft import Job, write_within_drop
from leanvit.export.gate.check import Check, require_passed
from leanvit.export.gate.evaluation import Origin
from leanvit.export.gate.golden import synthetic_images
from leanvit.export.gate.rounding import some_tensor
from leanvit.export.gate.speed import check_speed
from leanvit.export.gate.verify import least_ratios, leave_out_failed, verify_bundle
from leanvit.export.network import Exported, Model, exported, network_outputs
from leanvit.load.labels import task_for
from leanvit.load.modules import as_network, unwrapped
from leanvit.load.own import PLAIN_TASKS
from leanvit.progress import Bar
from leanvit.quant import QuantizedModel
from leanvit.quant.parts import QuantizedNetwork
from leanvit.runtime.bundle import finish, sign, staging_folder
from leanvit.runtime.engines import available
from leanvit.runtime.task import task_named

OLD_KEYWORDS = {"float_top1": "float_metric"}
"""Keywords of 0.1 that are no options, and what they are called now."""


def export(
    model: Model,
    output: str | Path,
    options: ExportOptions | None = None,
    *,
    labels: Sequence[str] | None = None,
    preprocess: Preprocess | None = None,
    images: Data | None = None,
    float_metric: float | None = None,
    architecture: str | None = None,
    data: dict[str, Any] | None = None,
    info: CheckpointInfo | None = None,
    batch_size: int | None = None,
    **old: Any,
) -> Path:
    """Write a network of any task as a bundle folder that passes the gate (leanvit.export.gate.verify).

    model: float network, QuantizedModel or QuantizedNetwork. options: profile, runtimes, opset and what is asked of
    accuracy and speed, see ExportOptions. labels: class names in the order of the outputs.
    preprocess: default is that of the model's pretrained_cfg. images: labelled images or annotated pictures; with them
    the task's metric is measured in the runtime, batch_size at a time (None: as the task usually does). float_metric:
    the metric of the float network on the same data, top-1 in percent, all else as measured; then the drop must be at
    most `options.max_drop` points (0.1 for a float network): where it is more, the sites that lost most in
    quantization run in float, 1, 2, 4, ... of them, until it holds (profiles w8a8, w4a8, mixed, openvino).
    architecture, data: name of the network and where its own split comes from, kept in bundle.json. info: of the
    checkpoint, which says all of this at once, and the task where that is not to classify images.
    old: keywords of 0.1, with a FutureWarning.
    A network that returns a dictionary, a dataclass or a tuple, or is wrapped or in half precision, is taken as in
    leanvit.quantize.
    Returns the folder. Raises VerificationError (the draft stays as OUTPUT.rejected), ExportError, ConfigError,
    MissingDependencyError.
    """
    options, float_metric = with_old_keywords(options or ExportOptions(), float_metric, old)
    for module in ("onnx", "onnxscript", "onnxruntime"):
        require(module)
    output = Path(output)
    if isinstance(model, nn.Module):
        model = unwrapped(model)
    told = info or _info_of(model, preprocess)
    told = dataclasses.replace(
        told, preprocess=preprocess or told.preprocess, architecture=architecture or told.architecture
    )
    model = _checked(model, told)
    if labels is None and info is not None:
        labels = info.labels
    if data is None:
        data = {} if info is None else {"name": info.data, "val_fraction": info.val_fraction, "seed": info.seed}
    if options.normalize and task_named(told.task).returns != "vector":
        raise ConfigError(f"normalize does not fit task {told.task}, expected embed. Leave it out.")
    subject = exported(model, told, options.profile)
    job = Job(subject, staging_folder(output), options, labels, images, float_metric, batch_size, data)
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        target, checks = _write(job, output, _origin(model, info))
    except BaseException:
        shutil.rmtree(job.staging, ignore_errors=True)
        raise
    require_passed(checks, target)
    return target


def _write(job: Job, output: Path, origin: Origin) -> tuple[Path, dict[str, Any]]:
    """Draft, gate, and the bundle in its place; returns where that is and what the gate said."""
    with Bar(f"exporting {job.subject.profile.name}", 4) as bar:
        manifest, evaluation = write_within_drop(job, bar)
        bar.advance(detail="measured")
        least = least_ratios(job.options.runtimes or available(), manifest.minimum_sqnr_db)
        manifest = sign(job.staging, dataclasses.replace(manifest, runtimes=least))
        checks = verify_bundle(job.staging, evaluation, origin, _own_checks(job))
        if not job.options.runtimes:
            manifest, checks = leave_out_failed(manifest, checks)
        bar.advance(detail="verified")
    return finish(job.staging, output, manifest, checks), checks


def _own_checks(job: Job) -> list[Callable[[], list[Check]]]:
    """What can only be checked while the model is at hand."""
    if isinstance(job.subject.model, nn.Module):
        return []
    return [functools.partial(check_speed, job.staging, job.subject, job.options.opset, job.options.min_speedup)]


def with_old_keywords(
    options: ExportOptions, float_metric: float | None, old: dict[str, Any]
) -> tuple[ExportOptions, float | None]:
    """Options and float metric with keywords of 0.1 in their place, which is warned of. Raises TypeError for others."""
    names = {field.name for field in dataclasses.fields(ExportOptions)}
    if unknown := sorted(set(old) - names - set(OLD_KEYWORDS)):
        raise TypeError(f"export() got an unexpected keyword argument '{unknown[0]}'")
    if not old:
        return options, float_metric
    moved = {name: tuple(value or ()) if name == "runtimes" else value for name, value in old.items() if name in names}
    words = [f"ExportOptions({', '.join(f'{name}=...' for name in moved)})"] if moved else []
    words += [f"{OLD_KEYWORDS[name]}=..." for name in old if name in OLD_KEYWORDS]
    said = ", ".join(f"{name}=..." for name in old)
    warnings.warn(f"export({said}) is of leanvit 0.1: give {', '.join(words)}", FutureWarning, stacklevel=3)
    given: dict[str, Any] = {field: getattr(options, field) for field in names} | moved
    return ExportOptions(**given), old.get("float_top1", float_metric)


def _info_of(model: Model, preprocess: Preprocess | None) -> CheckpointInfo:
    """What is known of a classifier that comes without a checkpoint's info."""
    if isinstance(model, QuantizedNetwork):
        raise ConfigError(
            "a quantized network of another task needs its checkpoint's info. Give export(..., info=...)."
        )
    name = getattr(model, "pretrained_cfg", {}).get("architecture") or type(model).__name__
    # timm's networks say of themselves that they have no classifier or one logit, and quantize keeps that.
    if isinstance(model, QuantizedModel):
        task = str(model.report.get("task", "classify"))
    else:
        task = task_for(int(getattr(model, "num_classes", 2)))
    return CheckpointInfo(name, (), preprocess or _default_preprocess(model), task=task)


def _checked(model: Model, info: CheckpointInfo) -> Model:
    """The network in float32 with one output, or a quantized one as it is, where they fit the preprocessing.

    Raises ConfigError that names both sides where a quantized one does not, ShapeError where a network can't run.
    """
    height, width = info.preprocess.input_size
    wanted = (info.preprocess.channels, height, width)
    if isinstance(model, QuantizedModel):
        if tuple(model.example.shape[1:]) != wanted:
            raise ConfigError(
                f"the network was quantized with images of {_shape(model.example.shape[1:])} (channels, height, "
                f"width), the preprocessing is for {_shape(wanted)}. Export with the one that it was calibrated with."
            )
        return model
    if isinstance(model, QuantizedNetwork) or info.task not in PLAIN_TASKS:
        return model
    return as_network(model, torch.zeros(1, *wanted, device=some_tensor(model).device))


def _shape(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))


def _default_preprocess(model: nn.Module | QuantizedModel) -> Preprocess:
    if isinstance(model, QuantizedModel):
        if model.preprocess is None:
            raise ConfigError("the quantized model has no preprocessing of its own. Give export(..., preprocess=...).")
        return model.preprocess
    return preprocess_for(model)


def _origin(model: Model, info: CheckpointInfo | None) -> Origin:
    """What the model itself says of its labels and its preprocessing.

    info: of the checkpoint. Where there is one, timm's names are of other weights of the same architecture.
    """
    if isinstance(model, QuantizedModel):
        return Origin(preprocess=model.preprocess)
    claims: Any = getattr(model, "pretrained_cfg", None)
    if not claims or isinstance(model, QuantizedNetwork):
        return Origin()
    names = claims.get("label_names") if info is None else None
    return Origin(tuple(names or ()) or None, preprocess_for(model))


__all__ = ["Exported", "export", "network_outputs", "synthetic_images"]
