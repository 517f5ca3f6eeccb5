"""The gate for bundles of the tasks: hashes, file, preprocessing, golden answers at several batch sizes, metric."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np

from leanvit.annotations import SceneSet
from leanvit.config import Runtime, Task
from leanvit.errors import LeanvitError
from leanvit.export.gate.calibration import check_facts, with_worst_sites
from leanvit.export.gate.check import Check, run_steps, verdict
from leanvit.export.gate.onnx_file import check_file
from leanvit.export.gate.verify import (
    BATCH_SIZES,
    Origin,
    check_listed,
    check_preprocessing,
    others,
)
from leanvit.runtime.answers import METRICS
from leanvit.runtime.bundle import MODEL_NAME, Manifest, load_golden, load_golden_records, read_manifest
from leanvit.runtime.engines import available
from leanvit.runtime.task_golden import golden_values, matched_share, worst_sqnr_db
from leanvit.runtime.task_predictor import TaskPredictor

SAME_METRIC = 0.005
"""How far the metric may be from the one measured at export, on the same pictures."""


@dataclass(frozen=True)
class Measured:
    """The task's metrics of a bundle in the runtime, as measured a moment ago on the same pictures.

    sha256: of the model.onnx that was run; metrics of another file are not believed.
    """

    metrics: dict[str, Any]
    sha256: str


def verify_task_bundle(
    folder: str | Path, scenes: SceneSet | None = None, measured: Measured | None = None
) -> dict[str, Any]:
    """Run every check; never raises for a bad bundle, the result says which failed.

    scenes: annotated pictures, on which the metric is measured, unless it is `measured` already, at export.
    Returns {"passed": bool, "checks": [...]}.
    """
    folder = Path(folder)
    checks: list[Check] = []
    try:
        manifest = read_manifest(folder)
        checks.append(check_listed(folder, manifest))
        predictor = TaskPredictor(folder, check=False)
    except LeanvitError as error:
        return verdict([*checks, Check("load", False, str(error), "every file as written, and it opens", "")])
    steps: list[Callable[[], list[Check]]] = [
        lambda: check_file(folder, manifest),
        lambda: check_preprocessing(predictor, Origin()),
        lambda: [_check_labels(predictor, scenes)],
        lambda: check_golden(predictor),
        lambda: [_check_answers(folder)],
        lambda: check_facts(manifest)[:-1] if manifest.plan else [],
        lambda: _check_metric(predictor, scenes, measured),
        *(partial(_check_runtime, folder, runtime) for runtime in others(manifest)),
    ]
    return verdict([*checks, *run_steps(steps)])


def check_golden(predictor: TaskPredictor) -> list[Check]:
    """Golden pictures give the recorded values and objects, at batch 1, 3 and 8 alike."""
    manifest = predictor.manifest
    images, expected = load_golden(predictor.folder)
    records = load_golden_records(predictor.folder)
    pixels = np.stack([predictor.prepare(image, f"golden picture {i}") for i, image in enumerate(images)])
    hint = with_worst_sites("The file computes something else than the network: export again.", manifest)
    checks = []
    for size in BATCH_SIZES:
        parts = [predictor.outputs(pixels[i : i + size]) for i in range(0, len(pixels), size)]
        outputs = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        ratio = worst_sqnr_db(expected, golden_values(outputs, manifest.task))
        share = matched_share(outputs, records, len(images))
        checks += [
            Check(
                f"golden pictures at batch {size}", ratio >= predictor.minimum_sqnr_db,
                f"{ratio:.1f} dB in the worst",
                f"at least {predictor.minimum_sqnr_db:.0f} dB against the network before export", hint,
            ),
            Check(
                f"golden objects at batch {size}", None if share is None else share >= predictor.minimum_share,
                "NOT verified: no object" if share is None else f"{share:.1%} of the clear ones found again",
                f"at least {predictor.minimum_share:.0%}", hint,
            ),
        ]  # fmt: skip
    return checks if "found_boxes" in records else checks[::2]


def _check_labels(predictor: TaskPredictor, scenes: SceneSet | None) -> Check:
    """Class names are those of export, in their order, and those of the annotated pictures."""
    labels = predictor.manifest.labels
    known = {"golden.npz": tuple(load_golden_records(predictor.folder)["labels"].tolist())}
    if scenes is not None:
        known[scenes.name] = scenes.classes
    others = [where for where, names in known.items() if names != labels]
    found = f"{', '.join(labels[:4])}... ({len(labels)})" + (
        f", another order or others in {others[0]}" if others else ""
    )
    return Check("label order", not others, found, f"as in {' and '.join(known)}", "Give the data it was trained on.")


def _check_answers(folder: Path) -> Check:
    """Answers depend on the picture."""
    _, values = load_golden(folder)
    finite = bool(np.isfinite(values).all())
    different = finite and bool(np.ptp(values, axis=0).max() > 1e-5 * np.abs(values).max())
    found = "they differ" if different else "all the same" if finite else "NaN or infinity"
    return Check("golden answers", different, found, "answers that depend on the picture", "Train the network first.")


def _check_metric(predictor: TaskPredictor, scenes: SceneSet | None, measured: Measured | None) -> list[Check]:
    manifest, recorded = predictor.manifest, predictor.manifest.accuracy
    name = METRICS[cast(Task, manifest.task)]
    if scenes is None:
        found = "no annotated pictures given"
        if recorded:
            found += f"; at export {recorded['metric']} {recorded['value']:.4f} on {recorded['data']}"
        return [Check(name, None, f"NOT verified: {found}", "annotated pictures", "Give --data.")]
    compared = recorded if recorded and recorded["data"] == scenes.name else {}
    if measured is not None and measured.sha256 == manifest.files[MODEL_NAME]:
        value, before = measured.metrics[name], None
    else:
        from leanvit.tasks.measure import measure_bundle

        value, before = measure_bundle(predictor, scenes)[name], compared.get("value")
    checks = [Check(name, True, f"{value:.4f} on {len(scenes.scenes)} pictures", "measured in the runtime")]
    if before is not None:
        checks[0] = Check(
            name, abs(value - before) <= SAME_METRIC, f"{value:.4f}", f"{before:.4f} as at export",
            "The runtime or the machine computes otherwise; export again here.",
        )  # fmt: skip
    if "float" in compared:
        checks.append(_check_drop(manifest, name, value))
    return checks


def _check_drop(manifest: Manifest, name: str, value: float) -> Check:
    recorded = manifest.accuracy or {}
    drop = 100 * (recorded["float"] - value)
    return Check(
        f"{name} drop", drop <= recorded["max_drop"] + 1e-9,
        f"{value:.4f} in the runtime against {recorded['float']:.4f} in float, {drop:+.2f} points",
        f"at most {recorded['max_drop']} points",
        with_worst_sites("Quantize with more bits or more pictures.", manifest),
    )  # fmt: skip


def _check_runtime(folder: Path, runtime: Runtime) -> list[Check]:
    """Golden checks again in another runtime."""
    if runtime not in available():
        return [Check(f"runs in {runtime}", None, "NOT verified: it is not on this machine", "the same answers")]
    predictor = TaskPredictor(folder, runtime=runtime, check=False)
    return [replace(one, name=f"{one.name} in {runtime}") for one in check_golden(predictor)]
