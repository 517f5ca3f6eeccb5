"""Checks of what the graph computes: golden images, and agreement with the network before export. Torch-free."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from leanvit.errors import BundleError
from leanvit.export.gate.calibration import hint_of_difference
from leanvit.export.gate.check import Check
from leanvit.export.gate.evaluation import in_batches
from leanvit.export.gate.given import Given
from leanvit.export.gate.limits import (
    AGREEMENT,
    BATCH_SIZES,
    SMALLEST_CHANGE,
    SURE_MARGIN,
    TIED_NOISE,
)
from leanvit.runtime.bundle import load_golden, load_golden_records, sqnr_db
from leanvit.runtime.golden_objects import golden_records, matched_share
from leanvit.runtime.task import compare_values, kept_values

Values = NDArray[np.float32]


def check_golden_file(given: Given) -> list[Check]:
    """golden.npz is whole, finite, has as many logits as labels, and its outputs depend on the image."""
    name, hint = "golden file", "Export the model again."
    try:
        images, values = load_golden(given.folder)
    except BundleError as error:
        return [Check(name, False, str(error), "encoded images and their outputs", hint)]
    finite = bool(np.isfinite(values).all())
    different = finite and bool(np.ptp(values, axis=0).max() > SMALLEST_CHANGE * np.abs(values).max())
    shape, kind = (len(images), *values.shape[1:]), given.task.continuous
    expected = f"finite {kind} of every image"
    if given.task.returns == "label":
        shape, expected = (
            (len(images), len(given.manifest.labels)),
            f"finite {kind} of {len(given.manifest.labels)} labels",
        )
    return [
        Check(
            name, finite and values.shape == shape,
            f"{len(images)} images, {kind} {values.shape}{'' if finite else ' with NaN or infinity'}", expected, hint,
        ),
        Check(
            "golden outputs", different, "they differ" if different else f"all images have the same {kind}",
            f"{kind} that depend on the image", "Train the model, or load its weights, before it is exported.",
        ),
    ]  # fmt: skip


def check_golden(given: Given) -> list[Check]:
    """Golden images have the recorded outputs, objects and labels, at batch 1, 3 and 8 alike."""
    images, expected = load_golden(given.folder)
    records = load_golden_records(given.folder)
    pixels = np.stack([given.bundle.prepare(image, f"golden image {i}") for i, image in enumerate(images)])
    minimum = given.bundle.minimum_sqnr_db
    hint = hint_of_difference(given)
    checks = []
    for size in BATCH_SIZES:
        outputs = in_batches(given.bundle.outputs, pixels, size)
        found = kept_values(given.task, outputs)
        ratio = compare_values(given.task, expected, found)
        checks.append(
            Check(
                f"golden images at batch {size}", ratio >= minimum,
                f"{ratio:.1f} dB{' in the worst' if given.task.each_picture else ''}",
                f"at least {minimum:.0f} dB against the model before export", hint,
            )
        )  # fmt: skip
        share = matched_share(outputs, records, len(images))
        if "found_boxes" in records:
            checks.append(
                Check(
                    f"golden objects at batch {size}", None if share is None else share >= given.bundle.minimum_share,
                    "NOT verified: no object" if share is None else f"{share:.1%} of the clear ones found again",
                    f"at least {given.bundle.minimum_share:.0%}", hint,
                )
            )  # fmt: skip
    if given.task.returns == "label":
        checks.append(check_golden_labels(expected, found, minimum, hint))
    return checks


def check_golden_labels(expected: Values, found: Values, minimum_db: float, hint: str) -> Check:
    """The most probable labels are those recorded. Near ties may flip under rounding and count as no failure.

    minimum_db: the SQNR that is asked of the outputs. What it leaves room for may move two logits apart or together.
    """
    same = int((expected.argmax(1) == found.argmax(1)).sum())
    ordered = np.sort(expected, axis=1)
    noise = float(np.sqrt(np.mean(np.square(expected)))) * 10 ** (-minimum_db / 20)
    tie = max(SURE_MARGIN * float(np.abs(expected).max()), TIED_NOISE * 2**0.5 * noise)
    sure = ordered[:, -1] - ordered[:, -2] > tie
    wrong = int(((expected.argmax(1) != found.argmax(1)) & sure).sum())
    return Check(
        "golden labels", wrong == 0, f"{same} of {len(expected)} equal, {wrong} clear ones differ", "0 differ", hint
    )


def check_agreement(given: Given) -> list[Check]:
    """On the evaluation's images the graph computes what the network before export did."""
    evaluation, task = given.evaluation, given.task
    if evaluation is None or evaluation.expected is None:
        return []
    expected, found = (kept_values(task, outputs) for outputs in (evaluation.expected, given.evaluated))
    ratio, minimum = sqnr_db(expected, found), given.bundle.minimum_sqnr_db
    hint = hint_of_difference(given)
    checks = []
    if task.returns == "label":
        same = 100.0 * float((expected.argmax(1) == found.argmax(1)).mean())
        checks.append(Check("agreement", same >= AGREEMENT, f"{same:.2f}% same top-1", f"at least {AGREEMENT}%", hint))
    if task.returns == "labels":
        same = 100.0 * float(((expected > 0) == (found > 0)).mean())
        text = f"{same:.2f}% of the decisions at 0.5 are the same"
        checks.append(Check("agreement", same >= AGREEMENT, text, f"at least {AGREEMENT}%", hint))
    if task.matched:
        share = matched_share(given.evaluated, golden_records(evaluation.expected), len(expected))
        text = "NOT verified: no object" if share is None else f"{share:.1%} of the clear objects found again"
        passed = None if share is None else share >= given.bundle.minimum_share
        checks.append(Check("agreement", passed, text, f"at least {given.bundle.minimum_share:.0%}", hint))
    return [*checks, Check(task.continuous, ratio >= minimum, f"{ratio:.1f} dB", f"at least {minimum:.0f} dB", hint)]
