"""export(): lower a model, write it as a bundle, and let the gate decide whether it may exist."""

from __future__ import annotations

import dataclasses
import functools
import math
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from leanvit import imaging
from leanvit.checkpoint import preprocess_for
from leanvit.config import ExportOptions, Opset, Preprocess
from leanvit.data.loader import Loader, to_input
from leanvit.data.sets import ImageSet
from leanvit.errors import ConfigError, require
from leanvit.export.gate.check import Check, require_passed
from leanvit.export.gate.golden import golden_images, records, synthetic_images
from leanvit.export.gate.rounding import in_double, least_sqnr_db, some_tensor
from leanvit.export.gate.speed import check_speed
from leanvit.export.gate.verify import (
    FLOAT_SQNR_DB,
    Evaluation,
    Origin,
    least_ratios,
    leave_out_failed,
    run_logits,
    top1_percent,
    verify_bundle,
)
from leanvit.export.onnx.lower import lower
from leanvit.export.onnx.profiles import Profile, pick
from leanvit.export.onnx.simulation import executed_form
from leanvit.export.simulated import profile_for, say_other_profile
from leanvit.progress import Bar, note
from leanvit.quant import QuantizedModel
from leanvit.quant.calibration_images import repeat_probe
from leanvit.quant.graph import QuantGraph, trace
from leanvit.quant.plan import Plan
from leanvit.runtime.bundle import Logits, Manifest, finish, sign, sqnr_db, staging_folder, versions, write_bundle
from leanvit.runtime.engines import available
from leanvit.runtime.predictor import Predictor


def export(
    model: nn.Module | QuantizedModel,
    output: str | Path,
    options: ExportOptions | None = None,
    *,
    labels: Sequence[str] | None = None,
    preprocess: Preprocess | None = None,
    images: ImageSet | None = None,
    float_top1: float | None = None,
    architecture: str | None = None,
    data: dict[str, Any] | None = None,
    **old: Any,
) -> Path:
    """Write `model` as a bundle folder that passes the gate (leanvit.export.gate.verify).

    model: float network or QuantizedModel. options: profile, runtimes, opset and what is asked of accuracy and speed,
    see ExportOptions. labels: class names in the order of the logits.
    preprocess: default is that of the model's pretrained_cfg. images: labelled images; with them accuracy
    is measured in the runtime. float_top1: accuracy in percent of the float model on the same images; then
    the drop must be at most `options.max_drop` points (0.1 for a float model): where it is more, the sites that lost
    most in quantization run in float, 1, 2, 4, ... of them, until it holds (profiles w8a8, w4a8, mixed, openvino).
    data: where the model's own split comes from, kept for later checks. old: fields of ExportOptions, as 0.1 took them.
    Returns the folder. Raises VerificationError (the draft stays as OUTPUT.rejected), ExportError,
    ConfigError, MissingDependencyError.
    """
    options = with_old_keywords(options or ExportOptions(), old)
    for module in ("onnx", "onnxscript", "onnxruntime"):
        require(module)
    output = Path(output)
    chosen = _pick_profile(model, options.profile)
    preprocess = preprocess or _default_preprocess(model)
    job = _Job(model, chosen, preprocess, staging_folder(output), images, float_top1, options.max_drop, options.opset)
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        with Bar(f"exporting {chosen.name}", 4) as bar:
            manifest, evaluation = _write_within_drop(job, labels, architecture, data or {}, bar)
            bar.advance(detail="measured")
            least = least_ratios(options.runtimes or available(), manifest.minimum_sqnr_db)
            manifest = sign(job.staging, dataclasses.replace(manifest, runtimes=least))
            checks = verify_bundle(job.staging, evaluation, _origin(model), _own_checks(job, options.min_speedup))
            if not options.runtimes:
                manifest, checks = leave_out_failed(manifest, checks)
            bar.advance(detail="verified")
        target = finish(job.staging, output, manifest, checks)
    except BaseException:
        shutil.rmtree(job.staging, ignore_errors=True)
        raise
    require_passed(checks, target)
    return target


def with_old_keywords(options: ExportOptions, old: dict[str, Any]) -> ExportOptions:
    """The options with keywords of 0.1 in their place, which is warned of. Raises TypeError for others."""
    names = {field.name for field in dataclasses.fields(ExportOptions)}
    if unknown := sorted(set(old) - names):
        raise TypeError(f"export() got an unexpected keyword argument '{unknown[0]}'")
    if not old:
        return options
    words = ", ".join(f"{name}=..." for name in old)
    warnings.warn(f"export({words}) is of leanvit 0.1: give ExportOptions({words})", FutureWarning, stacklevel=3)
    given: dict[str, Any] = {name: tuple(value or ()) if name == "runtimes" else value for name, value in old.items()}
    return dataclasses.replace(options, **given)


def _own_checks(job: _Job, min_speedup: float) -> list[Callable[[], list[Check]]]:
    """What can only be checked while the model is at hand."""
    if not isinstance(job.model, QuantizedModel):
        return []
    how = (job.staging, job.model, job.preprocess, job.profile, job.opset, min_speedup)
    return [functools.partial(check_speed, *how)]


@dataclasses.dataclass(frozen=True)
class _Job:
    """What does not change while sites are lifted."""

    model: nn.Module | QuantizedModel
    profile: Profile
    preprocess: Preprocess
    staging: Path
    images: ImageSet | None
    float_top1: float | None
    max_drop: float
    opset: Opset


def _write_within_drop(
    job: _Job, labels: Sequence[str] | None, architecture: str | None, data: dict[str, Any], bar: Bar
) -> tuple[Manifest, Evaluation | None]:
    """Write drafts, each with more sites in float, until the drop holds or there is nothing left to lift."""
    order = _worst_first(job)
    graph = job.model.graph if isinstance(job.model, QuantizedModel) else _traced(job.model, job.preprocess)
    golden = golden_images(job.images, job.preprocess)
    pixels = np.stack([imaging.load(image, job.preprocess, "golden image") for image in golden])
    lifted: list[str] = []
    batches: Evaluation | None = None
    while True:
        # The truth for a float file is the model itself, not the graph that the file is made of.
        network = executed_form(graph, job.profile, lifted) if isinstance(job.model, QuantizedModel) else job.model
        proto = lower(graph, job.preprocess, job.profile, lifted, opset=job.opset)
        expected = torch_logits(network, pixels, job.preprocess)
        names = _labels(job.images.classes if labels is None and job.images else labels, expected.shape[1])
        least = FLOAT_SQNR_DB
        if isinstance(job.model, QuantizedModel):
            least = least_sqnr_db(network, functools.partial(_own_sqnr_db, network, expected, pixels, job.preprocess))
        manifest = dataclasses.replace(_manifest(job, names, architecture, lifted, least), data=data)
        kept = records(pixels, names, job.preprocess)
        manifest = write_bundle(job.staging, proto.SerializeToString(), golden, expected, manifest, **kept)
        if not lifted:
            bar.advance(detail="lowered")
            batches = _evaluation(job.images, job.preprocess, job.float_top1)
        if batches is None:
            return manifest, None
        evaluation = dataclasses.replace(batches, expected=torch_logits(network, batches.pixels, job.preprocess))
        manifest = dataclasses.replace(manifest, accuracy=_measure(job.staging, evaluation))
        drop = (job.float_top1 or 0.0) - manifest.accuracy["top1"]  # type: ignore[index]
        if drop <= job.max_drop or len(lifted) >= len(order):
            bar.advance(detail="written")
            return manifest, evaluation
        lifted = order[: max(1, 2 * len(lifted))]
        note(f"{drop:.2f} points lost, at most {job.max_drop:g} wanted: {len(lifted)} of {len(order)} sites in float")


def _own_sqnr_db(network: nn.Module, expected: Logits, pixels: imaging.Pixels, preprocess: Preprocess) -> float:
    """Of a simulation's logits to those of the same in float64."""
    return sqnr_db(in_double(network, lambda copied: torch_logits(copied, pixels, preprocess)), expected)


def _worst_first(job: _Job) -> list[str]:
    """Sites that can be lifted, those first that lost most when they were quantized."""
    if not isinstance(job.model, QuantizedModel) or not job.profile.fast or job.float_top1 is None:
        return []
    ratios = {site["name"]: site["sqnr_db"] for site in job.model.report.get("sites", [])}
    graph = job.model.graph
    integer = [name for name in job.model.plan if graph.sites[name].kind == "linear" or name in graph.outputs]
    return sorted(integer, key=lambda name: ratios.get(name, 0.0))


def _traced(model: nn.Module, preprocess: Preprocess) -> QuantGraph:
    return trace(model.eval().cpu(), torch.zeros(2, 3, *preprocess.input_size))


def _default_preprocess(model: nn.Module | QuantizedModel) -> Preprocess:
    if isinstance(model, QuantizedModel):
        if model.preprocess is None:
            raise ConfigError("the quantized model has no preprocessing of its own. Give export(..., preprocess=...).")
        return model.preprocess
    return preprocess_for(model)


def _pick_profile(model: nn.Module | QuantizedModel, name: str) -> Profile:
    if not isinstance(model, QuantizedModel):
        return pick(name)
    say_other_profile(model, chosen := profile_for(model, name))
    return chosen


def _origin(model: nn.Module | QuantizedModel) -> Origin:
    """What the model itself says of its labels and its preprocessing."""
    if isinstance(model, QuantizedModel):
        return Origin(preprocess=model.preprocess)
    claims: Any = getattr(model, "pretrained_cfg", None)
    if not claims:
        return Origin()
    return Origin(tuple(claims.get("label_names") or ()) or None, preprocess_for(model))


def _labels(labels: Sequence[str] | None, count: int) -> tuple[str, ...]:
    names = tuple(labels) if labels is not None else tuple(str(i) for i in range(count))
    if len(names) != count or len(set(names)) != len(names):
        raise ConfigError(
            f"{len(names)} labels ({len(set(names))} different) for {count} logits, expected one name a class."
        )
    return names


@torch.inference_mode()
def torch_logits(network: nn.Module, pixels: imaging.Pixels, preprocess: Preprocess) -> Logits:
    """Logits (N, classes) float32 of a torch network, of float32 or float64, for prepared images (N, H, W, 3) uint8."""
    like = some_tensor(network)
    parts = [
        network(to_input(torch.from_numpy(pixels[i : i + 64]), preprocess, like.device).to(like.dtype))
        for i in range(0, len(pixels), 64)
    ]
    return torch.cat(parts).float().cpu().numpy()


def _evaluation(images: ImageSet | None, preprocess: Preprocess, float_top1: float | None) -> Evaluation | None:
    if images is None:
        return None
    batches = list(Loader(images, preprocess, 64))
    pixels = np.concatenate([x.numpy() for x, _ in batches])
    labels = np.concatenate([y.numpy() for _, y in batches])
    return Evaluation(pixels, labels, images.name, None, float_top1, images.classes)


def _measure(folder: Path, evaluation: Evaluation) -> dict[str, Any]:
    logits = run_logits(Predictor(folder, check=False), evaluation.pixels)
    correct = int((logits.argmax(1) == evaluation.labels).sum())
    measured = {
        "data": evaluation.name,
        "images": len(evaluation.labels),
        "correct": correct,
        "top1": top1_percent(logits, evaluation.labels),
        "runtime": "onnxruntime",
    }
    return measured | ({"float_top1": evaluation.float_top1} if evaluation.float_top1 is not None else {})


def _manifest(
    job: _Job, labels: tuple[str, ...], architecture: str | None, lifted: list[str], minimum_sqnr_db: float
) -> Manifest:
    model, preprocess = job.model, job.preprocess
    quantization: dict[str, Any] = {}
    plan: Plan = {}
    if isinstance(model, QuantizedModel):
        kept = ("config", "calibration", "smoothing_left_out", "unquantized", "average_weight_bits")
        quantization = {key: model.report[key] for key in kept} | {"max_drop": job.max_drop} | _quality(model)
        quantization["lifted"] = lifted
        plan = model.plan
    name = architecture or getattr(model, "pretrained_cfg", {}).get("architecture") or type(model).__name__
    return Manifest(
        architecture=name,
        profile=job.profile.name,
        labels=labels,
        preprocess=preprocess,
        minimum_sqnr_db=minimum_sqnr_db,
        simulated=job.profile.simulated,
        plan=plan,
        quantization=quantization,
        input={"name": "images", "dtype": "uint8", "layout": "NHWC", "channels": "RGB", "batch": "dynamic"},
        opset=job.opset,
        versions=versions(),
    )


def _quality(model: QuantizedModel) -> dict[str, Any]:
    """SQNR of every site when it was quantized, and of the whole network on the probe then and now."""
    # JSON has no NaN, and a site without a finite number is as bad as can be.
    ratios = {site["name"]: site["sqnr_db"] for site in model.report.get("sites", [])}
    sites = {name: round(ratio, 2) if math.isfinite(ratio) else -200.0 for name, ratio in ratios.items()}
    probe = model.report.get("probe")
    if probe is None:
        return {"site_sqnr_db": sites}
    now = repeat_probe(model.module, probe["logits"], tuple(model.example.shape[1:]))
    return {"site_sqnr_db": sites, "probe": {"quantized_db": probe["sqnr_db"], "exported_db": now}}


__all__ = ["export", "synthetic_images", "torch_logits"]
