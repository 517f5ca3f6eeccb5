"""The gate: what a bundle must prove when it is written, and can prove again on any machine. CHECKS is all of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from leanvit.config import Runtime
from leanvit.errors import LeanvitError
from leanvit.export.gate.calibration import check_disjoint, check_facts
from leanvit.export.gate.check import Check, run_steps, verdict, verdict_of
from leanvit.export.gate.evaluation import Evaluation, Origin
from leanvit.export.gate.given import Given, Opened
from leanvit.export.gate.labels import check_labels, check_predicted_labels
from leanvit.export.gate.limits import BF16_SQNR_DB
from leanvit.export.gate.metric import ONLY_ONNXRUNTIME, check_metric, check_metric_beside
from leanvit.export.gate.onnx_file import check_file
from leanvit.export.gate.outputs import check_agreement, check_golden, check_golden_file
from leanvit.export.gate.preprocessing import check_preprocessing
from leanvit.export.gate.vectors import check_cosine, check_neighbours
from leanvit.export.onnx.profiles import find
from leanvit.progress import note
from leanvit.runtime.bundle import Manifest, read_manifest
from leanvit.runtime.engines import PACKAGES, RUNTIMES, available
from leanvit.runtime.predictor import Predictor

COUNTED = (".onnx", ".npz", ".data", ".xml", ".bin")
"""Files that hold what a network computes."""


def always(given: Given) -> bool:
    """A check that needs the bundle alone."""
    return True


def quantized(given: Given) -> bool:
    """A check of what is known of quantization."""
    return bool(given.manifest.plan)


def with_data(given: Given) -> bool:
    """A check on images that have labels or annotations."""
    return given.evaluation is not None and given.evaluation.measure is not None


def with_network(given: Given) -> bool:
    """A check against the network before export, on some images."""
    return given.evaluation is not None and given.evaluation.expected is not None


def one_label(given: Given) -> bool:
    """A check of a classifier's labels."""
    return given.task.returns == "label"


def a_vector(given: Given) -> bool:
    """A check of embeddings."""
    return given.task.returns == "vector"


@dataclass(frozen=True)
class Row:
    """One row of the gate. needs: whether it can be made. beside: it is made in every runtime, not in ONNX Runtime
    alone; `only`: in the others alone.
    """

    name: str
    check: Callable[[Given], list[Check]]
    needs: Callable[[Given], bool] = always
    beside: bool = False
    only: bool = False


CHECKS = (
    Row("the file", check_file),
    Row("golden.npz", check_golden_file),
    Row("preprocessing", check_preprocessing),
    Row("golden images", check_golden, beside=True),
    Row("golden embeddings", check_cosine, a_vector, beside=True),
    Row("calibration and quantizers", check_facts, quantized),
    Row("labels", check_labels, lambda given: not a_vector(given)),
    Row("metric", check_metric),
    Row("agreement", check_agreement, with_network, beside=True),
    Row("neighbours", check_neighbours, lambda given: a_vector(given) and with_network(given), beside=True),
    Row("metric beside ONNX Runtime", check_metric_beside, with_data, beside=True, only=True),
    Row("images that were calibrated on", check_disjoint, lambda given: quantized(given) and with_data(given)),
    Row("predicted labels", check_predicted_labels, lambda given: one_label(given) and with_data(given)),
)
"""A new check is one function and one row; what it finds is told under its own names."""


def verify_bundle(
    folder: str | Path,
    evaluation: Evaluation | None = None,
    origin: Origin | None = None,
    more: Iterable[Callable[[], list[Check]]] = (),
) -> dict[str, Any]:
    """Run every check that a bundle of any task allows; never raises for a bad bundle, the result says which failed.

    evaluation: labelled data, or images with what the network before export says of them. origin: of the model, and
    `more` checks that need it, at export; later nobody has it at hand.
    Returns {"passed": bool, "checks": [...]}; what can't be verified without data is `passed: None`.
    """
    folder = Path(folder)
    checks: list[Check] = []
    try:
        manifest = read_manifest(folder)
        checks.append(_check_listed(folder, manifest))
        given = Given(open_bundle(folder), evaluation, origin or Origin())
    except LeanvitError as error:
        name, expected = ("load", "the runtime opens it") if checks else ("integrity", "every file as it was written")
        return verdict([*checks, Check(name, False, str(error), expected, "Export again.")])
    steps = [functools.partial(_made, row, given) for row in CHECKS if not row.only]
    beside = [functools.partial(_check_runtime, given, runtime) for runtime in others(manifest)]
    return verdict([*checks, *run_steps([*steps, *beside, *more])])


def open_bundle(folder: str | Path, runtime: Runtime = "onnxruntime") -> Opened:
    """A bundle of any task, not yet checked."""
    return Predictor(folder, runtime=runtime, check=False)


def _made(row: Row, given: Given) -> list[Check]:
    return row.check(given) if row.needs(given) else []


def _check_listed(folder: Path, manifest: Manifest) -> Check:
    """Every file that counts has a hash: one that bundle.json forgot could be any file."""
    files = {p.name for p in folder.iterdir() if p.suffix in COUNTED}
    unlisted = sorted(files - set(manifest.files))
    found = f"not listed: {', '.join(unlisted[:3])}" if unlisted else f"{len(manifest.files)} files match"
    return Check("integrity", not unlisted, found, "SHA-256 of every file in bundle.json", "Export again.")


# --- other runtimes ---


def least_ratios(runtimes: Iterable[Runtime], minimum: float) -> dict[str, float]:
    """Least SQNR of golden outputs in dB by runtime: `minimum`, or what bfloat16 leaves of it.

    ONNX Runtime, in which all checks are made, is always among them.
    """
    least: dict[str, float] = dict.fromkeys(("onnxruntime", *runtimes), minimum)
    if "openvino-bf16" in least:
        least["openvino-bf16"] = min(minimum, BF16_SQNR_DB)
    return least


def others(manifest: Manifest) -> list[Runtime]:
    """Runtimes that a bundle names beside ONNX Runtime, in which all other checks are made."""
    return [runtime for runtime in RUNTIMES if runtime in manifest.runtimes and runtime != "onnxruntime"]


def _check_runtime(given: Given, runtime: Runtime) -> list[Check]:
    """The rows that hold beside ONNX Runtime again: a runtime that computes otherwise is caught here."""
    if runtime not in available():
        hint = f'pip install "leanvit[{PACKAGES[runtime]}]"'
        return [Check(f"runs in {runtime}", None, "NOT verified: it is not on this machine", "the same outputs", hint)]
    try:
        there = replace(given, bundle=open_bundle(given.folder, runtime))
        checks = [check for row in CHECKS if row.beside for check in _made(row, there)]
    except LeanvitError as error:
        return [Check(f"runs in {runtime}", False, str(error), "the runtime opens and runs it", ONLY_ONNXRUNTIME)]
    return [replace(check, name=f"{check.name} in {runtime}") for check in checks]


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
