"""The gate: what a bundle must prove when it is written, and can prove again on any machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leanvit.errors import LeanvitError, VerificationError, is_installed, require
from leanvit.runtime import MODEL_NAME, Logits, Manifest, Predictor, load_golden, read_manifest, sqnr_db

FLOAT_SQNR_DB = 80.0
QUANTIZED_SQNR_DB = 35.0
AGREEMENT = 99.5
MIN_CALIBRATION_IMAGES = 32
MIN_NEIGHBOUR_CORRELATION = 0.2
BATCH_SIZES = (1, 3, 8)


@dataclass(frozen=True)
class Check:
    """One line of verify.json; passed is None where the check could not be made."""

    name: str
    passed: bool | None
    found: str
    expected: str
    hint: str = ""


@dataclass(frozen=True)
class Evaluation:
    """Labelled, prepared images and what the model before export says of them.

    pixels: (N, H, W, 3) uint8. labels: (N,) int64. expected: logits of the simulated or float model that
    was exported, or None. float_top1: accuracy in percent of the float model, or None. name: the data set.
    """

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    name: str
    expected: Logits | None = None
    float_top1: float | None = None


def verify_bundle(folder: str | Path, evaluation: Evaluation | None = None) -> dict[str, Any]:
    """Run every check that the folder allows; never raises for a bad bundle, the result says which failed.

    Returns {"passed": bool, "checks": [...]}; checks that need labelled data are `passed: None` without.
    """
    folder = Path(folder)
    checks: list[Check] = []
    try:
        manifest = read_manifest(folder)
        checks.append(Check("integrity", True, f"{len(manifest.files)} files match", "SHA-256 of every file"))
        predictor = Predictor(folder, check=False)
    except LeanvitError as error:
        checks.append(Check("integrity", False, str(error), "every file as it was written", "Export again."))
        return _result(checks)
    steps: list[Callable[[], list[Check]]] = [
        lambda: check_file(folder, manifest),
        lambda: check_golden(predictor),
        lambda: check_calibration_facts(manifest),
        lambda: check_evaluation(predictor, evaluation),
    ]
    for step in steps:
        try:
            checks += step()
        except LeanvitError as error:
            checks.append(Check("run", False, str(error), "the bundle runs", "Export the model again."))
    return _result(checks)


def _result(checks: list[Check]) -> dict[str, Any]:
    return {"passed": all(c.passed is not False for c in checks), "checks": [asdict(c) for c in checks]}


def require_passed(result: dict[str, Any], where: str | Path) -> None:
    """Raise VerificationError naming the failed checks, where any failed."""
    failed = [c for c in result["checks"] if c["passed"] is False]
    if failed:
        first = failed[0]
        others = f" (and {', '.join(c['name'] for c in failed[1:])})" if len(failed) > 1 else ""
        raise VerificationError(
            f"{where}: check '{first['name']}'{others} failed: {first['found']}, expected {first['expected']}. "
            f"{first['hint']}".rstrip()
        )


def check_file(folder: Path, manifest: Manifest) -> list[Check]:
    """onnx.checker, finite weights, one self-contained file with the stated opset."""
    if not is_installed("onnx"):
        return [Check("onnx", None, "onnx is not installed", "a valid model", 'pip install "leanvit[onnx]"')]
    onnx = require("onnx")
    model = onnx.load(str(folder / MODEL_NAME))
    try:
        onnx.checker.check_model(model, full_check=True)
        problem = ""
    except Exception as error:
        problem = " ".join(str(error).split())[:200]
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    not_finite = [
        t.name
        for t in model.graph.initializer
        if t.data_type == onnx.TensorProto.FLOAT and not np.isfinite(onnx.numpy_helper.to_array(t)).all()
    ]
    return [
        Check("onnx", not problem, problem or f"valid, opset {opset}", "onnx.checker accepts it", "Report this model."),
        Check("opset", opset == manifest.opset, f"opset {opset}", f"opset {manifest.opset}", "Export again."),
        Check(
            "finite weights", not not_finite,
            f"{len(not_finite)} tensors with NaN or infinity {' '.join(not_finite[:3])}".rstrip(),
            "0 tensors with NaN or infinity", "Train again with a lower --lr, or use an earlier checkpoint.",
        ),
    ]  # fmt: skip


def check_golden(predictor: Predictor) -> list[Check]:
    """Golden images give the recorded logits and labels, at batch 1, 3 and 8 alike."""
    minimum = predictor.manifest.minimum_sqnr_db
    images, expected = load_golden(predictor.folder)
    pixels = np.stack([predictor.prepare(image, f"golden image {i}") for i, image in enumerate(images)])
    checks = []
    for size in BATCH_SIZES:
        found = np.concatenate([predictor.logits(pixels[i : i + size]) for i in range(0, len(pixels), size)])
        ratio = sqnr_db(expected, found)
        checks.append(
            Check(
                f"golden images at batch {size}",
                ratio >= minimum,
                f"{ratio:.1f} dB",
                f"at least {minimum:.0f} dB against the model before export",
                "Preprocessing, label order or a quantizer differs from the model; export again.",
            )
        )
    same = int((expected.argmax(1) == found.argmax(1)).sum())
    # Near ties may flip under rounding: only an image that the model is sure of counts as a failure.
    margin = np.sort(expected, axis=1)
    sure = margin[:, -1] - margin[:, -2] > 0.05 * np.abs(expected).max()
    wrong = int(((expected.argmax(1) != found.argmax(1)) & sure).sum())
    checks.append(
        Check(
            "golden labels",
            wrong == 0,
            f"{same} of {len(images)} equal, {wrong} clear ones differ",
            "0 differ",
        )
    )
    return checks


def check_calibration_facts(manifest: Manifest) -> list[Check]:
    """Calibration saw enough images, and images rather than noise."""
    facts = manifest.quantization.get("calibration")
    if not facts:
        return []
    correlation = facts["neighbour_correlation"]
    return [
        Check(
            "calibration images", facts["images"] >= MIN_CALIBRATION_IMAGES, f"{facts['images']} images",
            f"at least {MIN_CALIBRATION_IMAGES}", "Give more calibration images.",
        ),
        Check(
            "calibration content", correlation >= MIN_NEIGHBOUR_CORRELATION,
            f"correlation of neighbouring pixels {correlation:.2f}",
            f"at least {MIN_NEIGHBOUR_CORRELATION} as in images, noise has 0",
            "Calibrate on images of the task.",
        ),
    ]  # fmt: skip


def check_evaluation(predictor: Predictor, evaluation: Evaluation | None) -> list[Check]:
    """Accuracy in the runtime, its drop, and agreement with the model before export."""
    recorded = predictor.manifest.accuracy
    if evaluation is None:
        found = "no labelled images given"
        if recorded:
            found += f"; at export {recorded['top1']:.2f}% of {recorded['images']} images of {recorded['data']}"
        return [Check("accuracy", None, f"accuracy NOT verified: {found}", "labelled images", "Give --data.")]
    logits = run_logits(predictor, evaluation.pixels)
    top1 = top1_percent(logits, evaluation.labels)
    checks = []
    if recorded and recorded["data"] == evaluation.name and recorded["images"] == len(evaluation.labels):
        checks.append(
            Check(
                "accuracy",
                abs(top1 - recorded["top1"]) <= 0.5,
                f"{top1:.2f}%",
                f"{recorded['top1']:.2f}% as at export",
                "The runtime or the machine computes otherwise; export again here.",
            )
        )
    if evaluation.float_top1 is not None:
        limit = predictor.manifest.quantization.get("max_drop", 0.1)
        drop = evaluation.float_top1 - top1
        checks.append(
            Check(
                "accuracy drop",
                drop <= limit + 1e-9,
                f"{top1:.2f}% in the runtime against {evaluation.float_top1:.2f}% in float, {drop:+.2f} points "
                f"on {len(evaluation.labels)} images",
                f"at most {limit} points",
                "Quantize with more bits, more calibration images, or raise --max-drop.",
            )
        )
    if evaluation.expected is not None:
        checks += _check_agreement(predictor, evaluation.expected, logits)
    return checks or [Check("accuracy", True, f"{top1:.2f}% of {len(evaluation.labels)} images", "labelled images")]


def _check_agreement(predictor: Predictor, expected: Logits, logits: Logits) -> list[Check]:
    agreement = 100.0 * float((expected.argmax(1) == logits.argmax(1)).mean())
    ratio = sqnr_db(expected, logits)
    minimum = predictor.manifest.minimum_sqnr_db
    hint = "The exported graph computes something else than the model; export again and report this."
    return [
        Check(
            "agreement",
            agreement >= AGREEMENT,
            f"{agreement:.2f}% same top-1",
            f"at least {AGREEMENT}%",
            hint,
        ),
        Check("logits", ratio >= minimum, f"{ratio:.1f} dB", f"at least {minimum:.0f} dB", hint),
    ]


def run_logits(predictor: Predictor, pixels: NDArray[np.uint8], batch_size: int = 64) -> Logits:
    """Logits (N, classes) of prepared images, in batches."""
    parts = [predictor.logits(pixels[i : i + batch_size]) for i in range(0, len(pixels), batch_size)]
    return np.concatenate(parts)


def top1_percent(logits: Logits, labels: NDArray[np.int64]) -> float:
    """Share of images whose highest logit is that of the label, in percent."""
    return 100.0 * float((logits.argmax(1) == labels).mean())
