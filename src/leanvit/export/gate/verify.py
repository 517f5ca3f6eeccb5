"""The gate: what a bundle must prove when it is written, and can prove again on any machine."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from leanvit.config import Preprocess, Runtime, to_dict
from leanvit.errors import BundleError, LeanvitError
from leanvit.export.gate.calibration import check_disjoint, check_facts, with_worst_sites
from leanvit.export.gate.check import Check, run_steps, verdict, verdict_of
from leanvit.export.gate.onnx_file import check_file
from leanvit.export.onnx.profiles import find
from leanvit.progress import note
from leanvit.runtime.bundle import Logits, Manifest, load_golden, load_golden_records, read_manifest, sqnr_db
from leanvit.runtime.engines import PACKAGES, RUNTIMES, available
from leanvit.runtime.predictor import Predictor

FLOAT_SQNR_DB = 80.0
QUANTIZED_SQNR_DB = 35.0
LOW_BIT_SQNR_DB = 20.0
"""With activations below 8 bits a rounding error of the last place moves some values by a whole coarse step."""

BF16_SQNR_DB = 25.0
"""What bfloat16 between int8 products leaves; unquantized bfloat16 gives about 38 dB on ViT-S."""

AGREEMENT = 99.5
MAX_PIXEL_DIFFERENCE = 0.5
MAX_RUNTIME_DROP = 0.5
_ONLY_ONNXRUNTIME = "Use the bundle in ONNX Runtime only: export with --runtimes onnxruntime."
BATCH_SIZES = (1, 3, 8)
"""At which golden answers must be the same."""

COUNTED = (".onnx", ".npz", ".data", ".xml", ".bin")


@dataclass(frozen=True)
class Evaluation:
    """Labelled, prepared images and what the model before export says of them.

    pixels: (N, H, W, 3) uint8. labels: (N,) int64, -1 where unknown. expected: logits of the simulated or
    float model that was exported, or None. float_top1: accuracy in percent of the float model, or None.
    name: the data set. classes: its class names in the order of the indices, or None.
    """

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    name: str
    expected: Logits | None = None
    float_top1: float | None = None
    classes: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Origin:
    """What the exported model says of itself, whatever export was told; None where it says nothing."""

    labels: tuple[str, ...] | None = None
    preprocess: Preprocess | None = None


def verify_bundle(
    folder: str | Path,
    evaluation: Evaluation | None = None,
    origin: Origin | None = None,
    more: Iterable[Callable[[], list[Check]]] = (),
) -> dict[str, Any]:
    """Run every check that the folder allows; never raises for a bad bundle, the result says which failed.

    origin: of the model, and `more` checks that need it, at export; later nobody has it at hand.
    Returns {"passed": bool, "checks": [...]}; checks that need labelled data are `passed: None` without.
    """
    folder, origin = Path(folder), origin or Origin()
    checks: list[Check] = []
    try:
        manifest = read_manifest(folder)
        checks.append(check_listed(folder, manifest))
        predictor = Predictor(folder, check=False)
    except LeanvitError as error:
        name, expected = ("load", "the runtime opens it") if checks else ("integrity", "every file as it was written")
        return verdict([*checks, Check(name, False, str(error), expected, "Export again.")])
    steps: list[Callable[[], list[Check]]] = [
        lambda: check_file(folder, manifest),
        lambda: check_golden_file(folder, manifest),
        lambda: check_preprocessing(predictor, origin),
        lambda: check_golden(predictor),
        lambda: check_facts(manifest),
        lambda: check_labels(predictor, evaluation, origin),
        lambda: check_evaluation(predictor, evaluation),
        *(functools.partial(check_runtime, folder, runtime, evaluation) for runtime in others(manifest)),
        *more,
    ]
    return verdict([*checks, *run_steps(steps)])


def check_listed(folder: Path, manifest: Manifest) -> Check:
    """Every file that counts has a hash: one that bundle.json forgot could be any file."""
    files = {p.name for p in folder.iterdir() if p.suffix in COUNTED}
    unlisted = sorted(files - set(manifest.files))
    found = f"not listed: {', '.join(unlisted[:3])}" if unlisted else f"{len(manifest.files)} files match"
    return Check("integrity", not unlisted, found, "SHA-256 of every file in bundle.json", "Export again.")


def check_golden_file(folder: Path, manifest: Manifest) -> list[Check]:
    """golden.npz is whole, and its answers are those of a classifier with these labels."""
    name, hint = "golden file", "Export the model again."
    try:
        images, logits = load_golden(folder)
    except BundleError as error:
        return [Check(name, False, str(error), "encoded images and their logits", hint)]
    finite = bool(np.isfinite(logits).all())
    different = finite and bool(np.ptp(logits, axis=0).max() > 1e-5 * np.abs(logits).max())
    return [
        Check(
            name, finite and logits.shape == (len(images), len(manifest.labels)),
            f"{len(images)} images, logits {logits.shape}{'' if finite else ' with NaN or infinity'}",
            f"finite logits of {len(manifest.labels)} labels", hint,
        ),
        Check(
            "golden answers", different, "they differ" if different else "all images have the same logits",
            "logits that depend on the image", "Train the model, or load its weights, before it is exported.",
        ),
    ]  # fmt: skip


def check_preprocessing(predictor: Preparing, origin: Origin) -> list[Check]:
    """Decoding, resizing and normalising are those that the golden logits were made with, to the pixel."""
    found = predictor.manifest.preprocess
    records = load_golden_records(predictor.folder)
    name, hint = "preprocessing", "Export again with the preprocessing that the model was trained with."
    if not records:
        return [Check(name, None, "NOT verified: written by an older leanvit", "a copy in golden.npz", hint)]
    written = json.loads(str(records["preprocess"]))
    checks = [
        Check(name, to_dict(found) == written, _differences(to_dict(found), written), "as in golden.npz", hint),
        check_pixels(predictor, records["pixels"]),
    ]
    if origin.preprocess is not None:
        own = to_dict(origin.preprocess) | {"input_size": list(found.input_size)}
        same = own == to_dict(found)
        differences = _differences(to_dict(found), own)
        checks.append(
            Check(
                "preprocessing of the model", True if same else None,
                differences if same else f"NOT verified: export was told otherwise than the model says; {differences}",
                "as in its pretrained_cfg", hint,
            )
        )  # fmt: skip
    return checks


def _differences(found: dict[str, Any], expected: dict[str, Any]) -> str:
    different = [f"{k} is {found.get(k)}, not {expected.get(k)}" for k in expected if found.get(k) != expected[k]]
    return "; ".join(different) or "equal"


class Preparing(Protocol):
    """A predictor of any task, as far as its preprocessing is checked."""

    folder: Path
    manifest: Manifest

    def prepare(self, source: bytes, name: str | None = None) -> NDArray[np.uint8]:
        """Decode one image and bring it to the input size."""


def check_pixels(predictor: Preparing, expected: NDArray[np.uint8]) -> Check:
    """Pixels are compared too, because a network may hardly mind a wrong filter that costs accuracy elsewhere."""
    images = load_golden(predictor.folder)[0][: len(expected)]
    worst = 0.0
    for image, wanted in zip(images, expected, strict=True):
        pixels = predictor.prepare(image, "golden image").astype(np.float64)
        worst = max(worst, float(np.abs(pixels - wanted).mean()) if pixels.shape == wanted.shape else 255.0)
    return Check(
        "prepared pixels", worst <= MAX_PIXEL_DIFFERENCE, f"{worst:.2f} grey levels apart in the mean",
        f"at most {MAX_PIXEL_DIFFERENCE} in each of {len(expected)} golden images",
        "Resize, crop or channel order differ from export, or Pillow's version does: export again here.",
    )  # fmt: skip


def check_golden(predictor: Predictor) -> list[Check]:
    """Golden images give the recorded logits and labels, at batch 1, 3 and 8 alike."""
    minimum = predictor.minimum_sqnr_db
    images, expected = load_golden(predictor.folder)
    pixels = np.stack([predictor.prepare(image, f"golden image {i}") for i, image in enumerate(images)])
    hint = with_worst_sites("The file computes something else than the model: export again.", predictor.manifest)
    checks = []
    for size in BATCH_SIZES:
        found = run_logits(predictor, pixels, size)
        ratio = sqnr_db(expected, found)
        checks.append(
            Check(
                f"golden images at batch {size}", ratio >= minimum, f"{ratio:.1f} dB",
                f"at least {minimum:.0f} dB against the model before export", hint,
            )
        )  # fmt: skip
    same = int((expected.argmax(1) == found.argmax(1)).sum())
    # Near ties may flip under rounding: only an image that the model is sure of counts as a failure.
    margin = np.sort(expected, axis=1)
    sure = margin[:, -1] - margin[:, -2] > 0.05 * np.abs(expected).max()
    wrong = int(((expected.argmax(1) != found.argmax(1)) & sure).sum())
    found_labels = f"{same} of {len(images)} equal, {wrong} clear ones differ"
    return [*checks, Check("golden labels", wrong == 0, found_labels, "0 differ", hint)]


def check_labels(predictor: Predictor, evaluation: Evaluation | None, origin: Origin) -> list[Check]:
    """Labels stand where golden.npz, the data set and the model have them, as far as those name the same classes."""
    name, labels = "label order", predictor.manifest.labels
    hint = "Give the labels in the order of the logits, which is that of the training data's class folders."
    records = load_golden_records(predictor.folder)
    copy = tuple(records["labels"].tolist()) if records else labels
    data = evaluation.classes if evaluation else None
    known = {"golden.npz": copy, "the data set": data or (), "the model": origin.labels or ()}
    for where, names in known.items():
        for index, label in enumerate(labels):
            if label in names and names.index(label) != index:
                found = f"'{label}' is label {index}, {where} has it at {names.index(label)}"
                return [Check(name, False, found, f"the order of {where}", hint)]
    if copy != labels:
        return [Check(name, False, "other names than in golden.npz", "the labels of export", hint)]
    same = [where for where, names in known.items() if names == labels and where != "golden.npz"]
    found = f"as in {' and '.join(same)}" if same else "NOT verified: neither data nor model name these classes"
    return [Check(name, True if same else None, found, "the order of the logits", hint)]


def check_evaluation(predictor: Predictor, evaluation: Evaluation | None) -> list[Check]:
    """Accuracy in the runtime, its drop, and agreement with the model before export."""
    manifest = predictor.manifest
    recorded = manifest.accuracy
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
                "accuracy", abs(top1 - recorded["top1"]) <= 0.5, f"{top1:.2f}%",
                f"{recorded['top1']:.2f}% as at export",
                "The runtime or the machine computes otherwise; export again here.",
            )
        )  # fmt: skip
    if evaluation.float_top1 is not None:
        limit = manifest.quantization.get("max_drop", 0.1)
        drop = evaluation.float_top1 - top1
        hint = "Quantize with more bits, more calibration images, or raise --max-drop."
        checks.append(
            Check(
                "accuracy drop", drop <= limit + 1e-9,
                f"{top1:.2f}% in the runtime against {evaluation.float_top1:.2f}% in float, {drop:+.2f} points "
                f"on {len(evaluation.labels)} images",
                f"at most {limit} points", with_worst_sites(hint, manifest),
            )
        )  # fmt: skip
    if evaluation.expected is not None:
        checks += _check_agreement(manifest, evaluation.expected, logits, predictor.minimum_sqnr_db)
    checks += check_disjoint(manifest, evaluation.pixels)
    checks += _check_predicted_labels(manifest, logits, evaluation.labels)
    return checks or [Check("accuracy", True, f"{top1:.2f}% of {len(evaluation.labels)} images", "labelled images")]


def least_ratios(runtimes: Iterable[Runtime], minimum: float) -> dict[str, float]:
    """Least SQNR of golden answers in dB by runtime: `minimum`, or what bfloat16 leaves of it.

    ONNX Runtime, in which all checks are made, is always among them.
    """
    least: dict[str, float] = dict.fromkeys(("onnxruntime", *runtimes), minimum)
    if "openvino-bf16" in least:
        least["openvino-bf16"] = min(minimum, BF16_SQNR_DB)
    return least


def others(manifest: Manifest) -> list[Runtime]:
    """Runtimes that a bundle names beside ONNX Runtime, in which all other checks are made."""
    return [runtime for runtime in RUNTIMES if runtime in manifest.runtimes and runtime != "onnxruntime"]


def check_runtime(folder: Path, runtime: Runtime, evaluation: Evaluation | None) -> list[Check]:
    """Golden images, agreement and accuracy again in another runtime: one that computes otherwise is caught here."""
    if runtime not in available():
        hint = f'pip install "leanvit[{PACKAGES[runtime]}]"'
        return [Check(f"runs in {runtime}", None, "NOT verified: it is not on this machine", "the same answers", hint)]
    try:
        predictor = Predictor(folder, runtime=runtime, check=False)
        checks = [*check_golden(predictor), *_check_other_answers(predictor, evaluation)]
    except LeanvitError as error:
        return [Check(f"runs in {runtime}", False, str(error), "the runtime opens and runs it", _ONLY_ONNXRUNTIME)]
    return [replace(check, name=f"{check.name} in {runtime}") for check in checks]


def _check_other_answers(predictor: Predictor, evaluation: Evaluation | None) -> list[Check]:
    """Agreement with the model before export, and accuracy beside that in ONNX Runtime."""
    if evaluation is None:
        return []
    checks: list[Check] = []
    logits = run_logits(predictor, evaluation.pixels)
    if evaluation.expected is not None:
        checks += _check_agreement(predictor.manifest, evaluation.expected, logits, predictor.minimum_sqnr_db)
    if predictor.manifest.accuracy:
        top1, recorded = top1_percent(logits, evaluation.labels), predictor.manifest.accuracy["top1"]
        checks.append(
            Check(
                "accuracy", top1 >= recorded - MAX_RUNTIME_DROP, f"{top1:.2f}%",
                f"{recorded:.2f}% as in ONNX Runtime, at most {MAX_RUNTIME_DROP} points less", _ONLY_ONNXRUNTIME,
            )
        )  # fmt: skip
    return checks


def leave_out_failed(manifest: Manifest, result: dict[str, Any]) -> tuple[Manifest, dict[str, Any]]:
    """Manifest and checks without the runtimes beside ONNX Runtime in which a check failed; says which and why.

    The runtime that the profile is made for stays, so that what failed there rejects the bundle.
    """
    kept, rows = dict(manifest.runtimes), result["checks"]
    for runtime in others(manifest):
        failed = [row for row in rows if row["passed"] is False and row["name"].endswith(f" in {runtime}")]
        if failed and runtime != find(manifest.profile).runtime:
            note(f"{runtime} is left out: {failed[0]['name']}: {failed[0]['found']}, expected {failed[0]['expected']}")
            del kept[runtime]
            rows = [row for row in rows if not row["name"].endswith(f" in {runtime}")]
    return replace(manifest, runtimes=kept), verdict_of(rows)


def _check_agreement(manifest: Manifest, expected: Logits, logits: Logits, minimum: float) -> list[Check]:
    agreement = 100.0 * float((expected.argmax(1) == logits.argmax(1)).mean())
    ratio = sqnr_db(expected, logits)
    hint = "The exported graph computes something else than the model; export again and report this."
    hint = with_worst_sites(hint, manifest)
    return [
        Check("agreement", agreement >= AGREEMENT, f"{agreement:.2f}% same top-1", f"at least {AGREEMENT}%", hint),
        Check("logits", ratio >= minimum, f"{ratio:.1f} dB", f"at least {minimum:.0f} dB", hint),
    ]


def _check_predicted_labels(manifest: Manifest, logits: Logits, labels: NDArray[np.int64]) -> list[Check]:
    """Whether predictions fit the labels of the images, but in another order: then a list was sorted otherwise."""
    present = np.unique(labels[labels >= 0])
    if len(present) < 2:
        return []
    predicted = logits.argmax(1)
    counts = np.stack([np.bincount(predicted[labels == c], minlength=logits.shape[1]) for c in present])
    likely = counts.argmax(1)
    own = int((likely == present).sum())
    fits = counts.max(1).sum() >= 0.5 * counts.sum() and len(set(likely.tolist())) == len(present)
    passed = False if fits and own < len(present) / 2 else True if own >= len(present) / 2 else None
    found = f"{own} of {len(present)} classes are mostly called by their own label"
    if passed is None:
        found = f"NOT verified: predictions fit the labels in no order; {found}"
    elif not passed:
        first = int(np.flatnonzero(likely != present)[0])
        names = manifest.labels[present[first]], manifest.labels[likely[first]]
        found += f"; images of '{names[0]}' are mostly called '{names[1]}'"
    hint = "Model and data number the classes differently: give labels and data in the order of training."
    return [Check("predicted labels", passed, found, "most of them", hint)]


def run_logits(predictor: Predictor, pixels: NDArray[np.uint8], batch_size: int = 64) -> Logits:
    """Logits (N, classes) of prepared images, in batches."""
    parts = [predictor.logits(pixels[i : i + batch_size]) for i in range(0, len(pixels), batch_size)]
    return np.concatenate(parts)


def top1_percent(logits: Logits, labels: NDArray[np.int64]) -> float:
    """Share of images whose highest logit is that of the label, in percent."""
    return 100.0 * float((logits.argmax(1) == labels).mean())
