"""export(): lower a model, write it as a bundle, and let the gate decide whether it may exist."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from leanvit import imaging
from leanvit.config import Preprocess
from leanvit.data import ImageSet, Loader, preprocess_for, to_input
from leanvit.errors import ConfigError, require
from leanvit.export.bundle import finish, staging_folder, versions, write_bundle
from leanvit.export.golden import golden_images, records, synthetic_images
from leanvit.export.lower import lower
from leanvit.export.operators import OPSET
from leanvit.export.verify import (
    FLOAT_SQNR_DB,
    QUANTIZED_SQNR_DB,
    Evaluation,
    Origin,
    require_passed,
    run_logits,
    top1_percent,
    verify_bundle,
)
from leanvit.progress import Bar
from leanvit.quant import QuantizedModel
from leanvit.quant.check import repeat_probe
from leanvit.quant.graph import trace
from leanvit.quant.plan import Plan
from leanvit.runtime import Logits, Manifest, Predictor

Profile = Literal["auto", "fp32", "w8a8"]


def export(
    model: nn.Module | QuantizedModel,
    output: str | Path,
    *,
    labels: Sequence[str] | None = None,
    profile: Profile = "auto",
    preprocess: Preprocess | None = None,
    images: ImageSet | None = None,
    float_top1: float | None = None,
    max_drop: float = 1.0,
    architecture: str | None = None,
    data: dict[str, Any] | None = None,
) -> Path:
    """Write `model` as a bundle folder that passes the gate (leanvit.export.verify).

    model: float network or QuantizedModel. labels: class names in the order of the logits.
    preprocess: default is that of the model's pretrained_cfg. images: labelled images; with them accuracy
    is measured in the runtime. float_top1: accuracy in percent of the float model on the same images; then
    the drop must be at most `max_drop` points (0.1 for a float model). data: where the model's own split
    comes from, kept for later checks.
    Returns the folder. Raises VerificationError (the draft stays as OUTPUT.rejected), ExportError,
    ConfigError, MissingDependencyError.
    """
    for module in ("onnx", "onnxscript", "onnxruntime"):
        require(module)
    output = Path(output)
    profile = _pick_profile(model, profile)
    network = model.module if isinstance(model, QuantizedModel) else model.eval().cpu()
    preprocess = preprocess or _default_preprocess(model)
    staging = staging_folder(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        with Bar(f"exporting {profile}", 4) as bar:
            graph = model.graph if isinstance(model, QuantizedModel) else trace(network, _zeros(preprocess))
            proto = lower(graph, preprocess)
            bar.advance(detail="lowered")
            golden = golden_images(images, preprocess)
            pixels = np.stack([imaging.load(image, preprocess, "golden image") for image in golden])
            expected = torch_logits(network, pixels, preprocess)
            names = _labels(images.classes if labels is None and images else labels, expected.shape[1])
            manifest = dataclasses.replace(
                _manifest(model, profile, names, preprocess, architecture, max_drop), data=data or {}
            )
            kept = records(pixels, names, preprocess)
            manifest = write_bundle(staging, proto.SerializeToString(), golden, expected, manifest, **kept)
            bar.advance(detail="written")
            evaluation = _evaluation(network, images, preprocess, float_top1)
            if evaluation is not None:
                manifest = dataclasses.replace(manifest, accuracy=_measure(staging, evaluation))
            bar.advance(detail="measured")
            checks = verify_bundle(staging, evaluation, _origin(model))
            bar.advance(detail="verified")
        target = finish(staging, output, manifest, checks)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    require_passed(checks, target)
    return target


def _zeros(preprocess: Preprocess) -> Tensor:
    return torch.zeros(2, 3, *preprocess.input_size)


def _default_preprocess(model: nn.Module | QuantizedModel) -> Preprocess:
    if isinstance(model, QuantizedModel):
        if model.preprocess is None:
            raise ConfigError("the quantized model has no preprocessing of its own. Give export(..., preprocess=...).")
        return model.preprocess
    return preprocess_for(model)


def _pick_profile(model: nn.Module | QuantizedModel, profile: Profile) -> Literal["fp32", "w8a8"]:
    quantized = isinstance(model, QuantizedModel)
    if profile == "auto":
        return "w8a8" if quantized else "fp32"
    if (profile == "w8a8") != quantized:
        found = "a quantized" if quantized else "a float"
        raise ConfigError(
            f"profile {profile} does not fit {found} model. Quantize it first: leanvit quantize CHECKPOINT"
        )
    return profile


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
    """Logits (N, classes) of a torch network for prepared images (N, H, W, 3) uint8."""
    device = next((t.device for t in (*network.parameters(), *network.buffers())), torch.device("cpu"))
    parts = [
        network(to_input(torch.from_numpy(pixels[i : i + 64]), preprocess, device)).float().cpu().numpy()
        for i in range(0, len(pixels), 64)
    ]
    return np.concatenate(parts)


def _evaluation(
    network: nn.Module, images: ImageSet | None, preprocess: Preprocess, float_top1: float | None
) -> Evaluation | None:
    if images is None:
        return None
    batches = list(Loader(images, preprocess, 64))
    pixels = np.concatenate([x.numpy() for x, _ in batches])
    labels = np.concatenate([y.numpy() for _, y in batches])
    expected = torch_logits(network, pixels, preprocess)
    return Evaluation(pixels, labels, images.name, expected, float_top1, images.classes)


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
    model: nn.Module | QuantizedModel,
    profile: str,
    labels: tuple[str, ...],
    preprocess: Preprocess,
    architecture: str | None,
    max_drop: float,
) -> Manifest:
    quantization: dict[str, Any] = {}
    plan: Plan = {}
    if isinstance(model, QuantizedModel):
        kept = ("config", "calibration", "smoothing_left_out", "unquantized", "average_weight_bits")
        quantization = {key: model.report[key] for key in kept} | {"max_drop": max_drop} | _quality(model)
        plan = model.plan
    name = architecture or getattr(model, "pretrained_cfg", {}).get("architecture") or type(model).__name__
    return Manifest(
        architecture=name,
        profile=profile,
        labels=labels,
        preprocess=preprocess,
        minimum_sqnr_db=QUANTIZED_SQNR_DB if plan else FLOAT_SQNR_DB,
        plan=plan,
        quantization=quantization,
        input={"name": "images", "dtype": "uint8", "layout": "NHWC", "channels": "RGB", "batch": "dynamic"},
        opset=OPSET,
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
