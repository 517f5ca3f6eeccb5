"""Drafts of a bundle: graph, golden outputs and manifest, each with more sites in float until the drop holds."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from leanvit import imaging
from leanvit.annotations import Outputs
from leanvit.config import ExportOptions
from leanvit.errors import ConfigError
from leanvit.export.data import Data, evaluation_of
from leanvit.export.gate.evaluation import Evaluation, Measured
from leanvit.export.gate.given import Given
from leanvit.export.gate.golden import GOLDEN_IMAGES, GOLDEN_PICTURES, golden_images, records
from leanvit.export.gate.limits import FLOAT_MAX_DROP, FLOAT_SQNR_DB
from leanvit.export.gate.rounding import in_double, least_sqnr_db
from leanvit.export.gate.verify import open_bundle
from leanvit.export.network import Exported, network_outputs
from leanvit.progress import Bar, note
from leanvit.quant import QuantizedModel
from leanvit.quant.calibration_images import repeat_probe
from leanvit.quant.parts import QuantizedNetwork, models_of, site_name
from leanvit.runtime.bundle import MODEL_NAME, Manifest, sign, versions, write_bundle
from leanvit.runtime.golden_objects import MATCHED_SHARE, golden_records, least_share
from leanvit.runtime.task import Task, compare_values, kept_values, task_named

INPUT = {"name": "images", "dtype": "uint8", "layout": "NHWC", "channels": "RGB", "batch": "dynamic"}


@dataclass(frozen=True)
class Job:
    """What does not change while sites are lifted.

    staging: folder of the drafts. options: what is asked of accuracy. labels: class names, None for those of the data.
    images: labelled data. before: the task's metric of the float network on them. data: where the model's own split
    comes from.
    """

    subject: Exported
    staging: Path
    options: ExportOptions
    labels: Sequence[str] | None = None
    images: Data | None = None
    before: float | None = None
    batch_size: int | None = None
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def task(self) -> Task:
        """What the network does."""
        return task_named(self.subject.info.task)

    @property
    def max_drop(self) -> float:
        """Points that the file may lose."""
        return self.options.max_drop if self.subject.is_quantized else FLOAT_MAX_DROP


def write_within_drop(job: Job, bar: Bar) -> tuple[Manifest, Evaluation | None]:
    """Write drafts, each with more sites in float, until the drop holds or there is nothing left to lift."""
    order, lifted = worst_first(job), list[str]()
    subject, preprocess = job.subject, job.subject.info.preprocess
    count = GOLDEN_IMAGES if job.task.data == "images" else GOLDEN_PICTURES
    evaluation: Evaluation | None = None
    if job.images is not None:  # first, as it names an image that can't be read
        evaluation = evaluation_of(job.task.name, job.images, preprocess, job.before, job.batch_size)
    golden = golden_images(job.images, preprocess, count)
    pixels = np.stack([imaging.load(image, preprocess, "golden image") for image in golden])
    while True:
        network = subject.in_torch(lifted)
        manifest = _write(job, network, lifted, golden, pixels)
        if not lifted:
            bar.advance(detail="lowered")
        if evaluation is None:
            return manifest, None
        manifest, evaluation = _measure(job, network, manifest, evaluation)
        drop = 0.0 if job.before is None else job.task.drop(job.before, _value(manifest))
        if drop <= job.max_drop or len(lifted) >= len(order):
            bar.advance(detail="written")
            if lifted:
                note(f"{len(lifted)} sites run in float: leanvit val measures that of the bundle, not of QUANTIZED")
            return manifest, evaluation
        lifted = order[: max(1, 2 * len(lifted))]
        note(f"{drop:.2f} points lost, at most {job.max_drop:g} wanted: {len(lifted)} of {len(order)} sites in float")


def worst_first(job: Job) -> list[str]:
    """Sites that can be lifted, those first that lost most when they were quantized."""
    model = job.subject.model
    if isinstance(model, nn.Module) or not job.subject.profile.fast or job.before is None:
        return []
    found: dict[str, float] = {}
    for part, quantized in models_of(model).items():
        ratios = {site["name"]: site["sqnr_db"] for site in quantized.report.get("sites", [])}
        graph = quantized.graph
        for name in quantized.plan:
            if graph.sites[name].kind == "linear" or name in graph.outputs:
                found[site_name(model, part, name)] = ratios.get(name, 0.0)
    return sorted(found, key=lambda name: found[name])


def _write(job: Job, network: nn.Module, lifted: list[str], golden: list[bytes], pixels: imaging.Pixels) -> Manifest:
    """One draft, whose golden outputs are those of the torch network in the form that the profile runs."""
    info = job.subject.info
    proto = job.subject.in_onnx(lifted, job.options.opset, smallest=job.options.smallest)
    outputs = network_outputs(network, info, pixels)
    values = kept_values(job.task, outputs)
    objects = golden_records(outputs) if job.task.matched else {}
    labels = _labels(job, values.shape[1])
    least, share = _asked(job, network, outputs, pixels)
    manifest = _manifest(job, labels, lifted, least, share)
    kept = records(pixels, labels, info.preprocess) | objects
    return write_bundle(job.staging, proto.SerializeToString(), golden, values, manifest, **kept)


def _asked(job: Job, network: nn.Module, outputs: Outputs, pixels: imaging.Pixels) -> tuple[float, float]:
    """What the gate asks of golden outputs: SQNR in dB, and the share of objects that are found again."""
    if not job.subject.is_quantized:
        return FLOAT_SQNR_DB, MATCHED_SHARE

    @functools.cache
    def exact() -> Outputs:
        return in_double(network, lambda copied: network_outputs(copied, job.subject.info, pixels))

    def own_db() -> float:
        return compare_values(job.task, kept_values(job.task, exact()), kept_values(job.task, outputs))

    share = least_share(exact(), golden_records(outputs), len(pixels)) if job.task.matched else MATCHED_SHARE
    return least_sqnr_db(network, own_db), share


def _labels(job: Job, count: int) -> tuple[str, ...]:
    """Class names in the order of the outputs. Raises ConfigError where they are not one for each."""
    given = job.labels if job.labels is not None else job.images.classes if job.images else None
    if job.task.returns == "vector":
        return ()
    if job.task.data != "images":
        return tuple(given or ())
    # One logit stands between two labels.
    count = 2 if job.task.name == "binary" else count
    names = tuple(given) if given is not None else tuple(str(i) for i in range(count))
    if len(names) != count or len(set(names)) != len(names):
        raise ConfigError(
            f"{len(names)} labels ({len(set(names))} different) for {count} logits, expected one name a class."
        )
    return names


def _value(manifest: Manifest) -> float:
    return float((manifest.accuracy or {})["value"])


def _measure(job: Job, network: nn.Module, manifest: Manifest, evaluation: Evaluation) -> tuple[Manifest, Evaluation]:
    """The manifest that says what was measured in ONNX Runtime, and the same for the gate."""
    if evaluation.measure is None:
        return manifest, evaluation
    metrics = evaluation.measure(Given(open_bundle(job.staging), evaluation).run)
    name = job.task.metric
    accuracy: dict[str, Any] = {"data": evaluation.name, "metric": name, "value": metrics[name], "metrics": metrics}
    accuracy["runtime"] = "onnxruntime"
    accuracy |= {
        key: metrics[key] for key in (name, "images", "correct") if job.task.data == "images" and key in metrics
    }
    if job.before is not None:
        accuracy |= {"float": job.before, f"float_{name}": job.before, "max_drop": job.max_drop}
    answers = manifest.answers | {kept: metrics[key] for kept, key in job.task.answers.items()}
    manifest = sign(job.staging, replace(manifest, accuracy=accuracy, answers=answers))
    measured = Measured(metrics, manifest.files[MODEL_NAME])
    expected = network_outputs(network, job.subject.info, evaluation.pixels)
    return manifest, replace(evaluation, expected=expected, measured=measured)


def _manifest(job: Job, labels: tuple[str, ...], lifted: list[str], minimum: float, share: float) -> Manifest:
    subject = job.subject
    answers: dict[str, Any] = {"matched_share": share} if job.task.matched else {}
    known = subject.info.metrics  # of the training, until the file itself is measured
    answers |= {kept: known[key] for kept, key in job.task.answers.items() if key in known}
    if job.task.returns == "vector":
        answers["normalize"] = job.options.normalize
    if subject.info.keypoints:
        answers["keypoints"] = subject.info.keypoints
    model = subject.model
    return Manifest(
        architecture=subject.info.architecture,
        profile=subject.profile.name,
        labels=labels,
        preprocess=subject.info.preprocess,
        minimum_sqnr_db=minimum,
        simulated=subject.profile.simulated,
        plan={} if isinstance(model, nn.Module) else model.plan,
        quantization={} if isinstance(model, nn.Module) else _quantization(model, job, lifted),
        data=job.data,
        input={**INPUT, "channels": subject.info.preprocess.channel_order},
        opset=subject.opset(job.options.opset),
        versions=versions(),
        task=job.task.name,
        answers=answers,
    )


def _quantization(model: QuantizedModel | QuantizedNetwork, job: Job, lifted: list[str]) -> dict[str, Any]:
    """Settings and calibration facts of the first part, which reads the images; what was left out, of all parts."""
    parts = models_of(model)
    first = next(iter(parts.values())).report
    kept: dict[str, Any] = {key: first[key] for key in ("config", "calibration")}
    for key in ("smoothing_left_out", "unquantized"):
        kept[key] = [site_name(model, name, site) for name, part in parts.items() for site in part.report[key]]
    if isinstance(model, QuantizedModel):
        kept["average_weight_bits"] = first["average_weight_bits"]
    return kept | {"max_drop": job.options.max_drop, **_quality(model), "lifted": lifted}


def _quality(model: QuantizedModel | QuantizedNetwork) -> dict[str, Any]:
    """SQNR of every site when it was quantized, and of the part that changed most since, on its probe, then and now."""
    sites: dict[str, float] = {}
    probes: list[dict[str, float]] = []
    for name, part in models_of(model).items():
        for site in part.report.get("sites", []):
            # JSON has no NaN, and a site without a finite number is as bad as can be.
            ratio = site["sqnr_db"] if math.isfinite(site["sqnr_db"]) else -200.0
            sites[site_name(model, name, site["name"])] = round(ratio, 2)
        if probe := part.report.get("probe"):
            now = repeat_probe(part.module, probe["logits"], tuple(part.example.shape[1:]))
            probes.append({"quantized_db": probe["sqnr_db"], "exported_db": now})
    if not probes:
        return {"site_sqnr_db": sites}
    return {"site_sqnr_db": sites, "probe": max(probes, key=lambda one: one["quantized_db"] - one["exported_db"])}
