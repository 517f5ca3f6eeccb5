"""Checks of decoding, resizing and normalising: they are those of export, to half a grey level. Torch-free."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import PIL

from leanvit.config import to_dict
from leanvit.export.gate.check import Check
from leanvit.export.gate.given import Given
from leanvit.export.gate.limits import MAX_PIXEL_DIFFERENCE
from leanvit.runtime.bundle import load_golden, load_golden_records


def check_preprocessing(given: Given) -> list[Check]:
    """Decoding, resizing and normalising are those that the golden outputs were made with, to the pixel."""
    found = to_dict(given.manifest.preprocess)
    records = load_golden_records(given.folder)
    name, hint = "preprocessing", "Export again with the preprocessing that the model was trained with."
    if not records:
        return [Check(name, None, "NOT verified: written by an older leanvit", "a copy in golden.npz", hint)]
    written = json.loads(str(records["preprocess"]))
    checks = [
        Check(name, found == written, _differences(found, written), "as in golden.npz", hint),
        _check_pixels(given, records["pixels"]),
        *_check_pillow(given.manifest.versions.get("pillow")),
    ]
    if given.origin.preprocess is not None:
        own = to_dict(given.origin.preprocess) | {"input_size": found["input_size"]}
        differences = _differences(found, own)
        said = f"NOT verified: export was told otherwise than the model says; {differences}"
        same = own == found
        checks.append(
            Check(
                "preprocessing of the model", True if same else None, differences if same else said,
                "as in its pretrained_cfg", hint,
            )
        )  # fmt: skip
    return checks


def _differences(found: dict[str, Any], expected: dict[str, Any]) -> str:
    different = [f"{k} is {found.get(k)}, not {expected.get(k)}" for k in expected if found.get(k) != expected[k]]
    return "; ".join(different) or "equal"


def _check_pillow(made_with: str | None) -> list[Check]:
    """Pillow 13 shrinks some pictures along the height first (its pull request 9549), and rounds in between."""
    here = PIL.__version__
    if made_with is None or made_with.partition(".")[0] == here.partition(".")[0]:
        return []
    return [
        Check(
            "Pillow", None, f"made with Pillow {made_with}, here {here}: tall pictures round otherwise",
            f"Pillow {made_with.partition('.')[0]}",
            f"Where every pixel counts, run: pip install \"pillow=={made_with}\"; or export again here.",
        )
    ]  # fmt: skip


def _check_pixels(given: Given, expected: np.ndarray[Any, Any]) -> Check:
    """Pixels are compared too, because a network may hardly mind a wrong filter that costs accuracy elsewhere."""
    images = load_golden(given.folder)[0][: len(expected)]
    worst = 0.0
    for image, wanted in zip(images, expected, strict=True):
        pixels = given.bundle.prepare(image, "golden image").astype(np.float64)
        worst = max(worst, float(np.abs(pixels - wanted).mean()) if pixels.shape == wanted.shape else 255.0)
    return Check(
        "prepared pixels", worst <= MAX_PIXEL_DIFFERENCE, f"{worst:.2f} grey levels apart in the mean",
        f"at most {MAX_PIXEL_DIFFERENCE} in each of {len(expected)} golden images",
        "Resize, crop or channel order differ from export, or Pillow's version does: export again here.",
    )  # fmt: skip
