"""Checks of the task's metric: in the runtime, against float, and the same wherever it is measured. Torch-free."""

from __future__ import annotations

from typing import Any

from leanvit.export.gate.calibration import with_worst_sites
from leanvit.export.gate.check import Check
from leanvit.export.gate.evaluation import Evaluation
from leanvit.export.gate.given import Given
from leanvit.export.gate.limits import FLOAT_MAX_DROP, SAME_POINTS
from leanvit.runtime.bundle import MODEL_NAME, Manifest
from leanvit.runtime.task import Task

ONLY_ONNXRUNTIME = "Use the bundle in ONNX Runtime only: export with --runtimes onnxruntime."


def metric_name(task: Task) -> str:
    """What checks call the metric of a task."""
    return "accuracy" if task.returns == "label" else task.metric


def in_words(task: Task, value: float) -> str:
    """A value of the task's metric: shares from 0 to 1 with four places, all else with two."""
    return f"{value:.4f}" if task.points != 1 else f"{value:.2f}%" if task.returns == "label" else f"{value:.2f}"


def recorded_value(task: Task, accuracy: dict[str, Any], of: str = "value") -> float | None:
    """The metric in bundle.json ("value"), or that of the float network ("float"); bundles of 0.1 name it top1."""
    old = {"value": task.metric, "float": f"float_{task.metric}"}[of]
    value = accuracy.get(of, accuracy.get(old))
    return None if value is None else float(value)


def allowed_drop(manifest: Manifest) -> float:
    """Points that a bundle's metric may be below that of the float network."""
    recorded = (manifest.accuracy or {}).get("max_drop", manifest.quantization.get("max_drop"))
    return FLOAT_MAX_DROP if recorded is None else float(recorded)


def recorded_on(manifest: Manifest, evaluation: Evaluation) -> dict[str, Any]:
    """What bundle.json says was measured, where that was on the same data; empty else."""
    recorded = manifest.accuracy or {}
    same = recorded.get("data") == evaluation.name
    if same and evaluation.labels is not None and "images" in recorded:
        same = recorded["images"] == len(evaluation.labels)
    return recorded if same else {}


def check_metric(given: Given) -> list[Check]:
    """The metric in ONNX Runtime is that of export, and as near to the float network's as was promised."""
    task, evaluation, name = given.task, given.evaluation, metric_name(given.task)
    if evaluation is None or evaluation.measure is None:
        return [_not_measured(given)]
    compared = recorded_on(given.manifest, evaluation)
    measured, before = evaluation.measured, recorded_value(task, compared)
    if measured is not None and measured.sha256 == given.manifest.files[MODEL_NAME]:
        value, before = float(measured.metrics[task.metric]), None
    else:
        value = float(evaluation.measure(given.run)[task.metric])
    checks = [Check(name, True, f"{in_words(task, value)} on {evaluation.name}", "measured in the runtime")]
    if before is not None:
        checks[0] = Check(
            name, abs(task.drop(before, value)) <= SAME_POINTS, in_words(task, value),
            f"{in_words(task, before)} as at export",
            "The runtime or the machine computes otherwise; export again here.",
        )  # fmt: skip
    of_float = evaluation.before if evaluation.before is not None else recorded_value(task, compared, "float")
    return checks if of_float is None else [*checks, _check_drop(given, of_float, value)]


def _not_measured(given: Given) -> Check:
    task, recorded = given.task, given.manifest.accuracy
    found = "no labelled data given"
    if recorded and (value := recorded_value(task, recorded)) is not None:
        found += f"; at export {in_words(task, value)} on {recorded['data']}"
    name = metric_name(task)
    return Check(name, None, f"{name} NOT verified: {found}", "labelled data", "Give --data.")


def _check_drop(given: Given, before: float, value: float) -> Check:
    task, limit = given.task, allowed_drop(given.manifest)
    drop = task.drop(before, value)
    hint = "Quantize with more bits, more calibration images, or raise --max-drop."
    return Check(
        f"{metric_name(task)} drop", drop <= limit + 1e-9,
        f"{in_words(task, value)} in the runtime against {in_words(task, before)} in float, {drop:+.2f} points",
        f"at most {limit:g} points", with_worst_sites(hint, given.manifest),
    )  # fmt: skip


def check_metric_beside(given: Given) -> list[Check]:
    """The metric in another runtime is that in ONNX Runtime."""
    task, evaluation = given.task, given.evaluation
    if evaluation is None or evaluation.measure is None:
        return []
    before = recorded_value(task, recorded_on(given.manifest, evaluation))
    if before is None:
        return []
    value = float(evaluation.measure(given.run)[task.metric])
    return [
        Check(
            metric_name(task), task.drop(before, value) <= SAME_POINTS, in_words(task, value),
            f"{in_words(task, before)} as in ONNX Runtime, at most {SAME_POINTS} points less", ONLY_ONNXRUNTIME,
        )
    ]  # fmt: skip
