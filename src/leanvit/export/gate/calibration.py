"""What bundle.json says of calibration and quantization, judged. Torch-free, like the rest of the gate."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from leanvit import imaging
from leanvit.config import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from leanvit.export.gate.check import Check
from leanvit.export.gate.given import Given
from leanvit.export.gate.limits import QUANTIZED_SQNR_DB
from leanvit.export.onnx.profiles import PROFILES
from leanvit.files import fingerprint
from leanvit.runtime.bundle import Manifest
from leanvit.runtime.engines import lacks_vnni
from leanvit.runtime.golden_objects import MATCHED_SHARE

MIN_CALIBRATION_IMAGES = 32
"""As many as quantize asks for: with fewer, ranges hang on single images."""

MIN_NEIGHBOUR_CORRELATION = 0.2
"""Of neighbouring pixels, which is 0 in noise and near 1 in most images: nearer to noise, so that textures pass."""

MAX_NOISY_SHARE = 0.1
"""Of the calibration images; a few may be textures that look like noise."""

MIN_GREY_LEVELS = 4.0
"""Spread of the pixels, below which images are all but black or one colour."""

LEVELS_BEYOND = 64.0
"""Grey levels that a resize in float may overshoot 0 and 255 by."""

MIN_SITE_SQNR_DB = 0.0
"""Noise of a site with 8 bits must not exceed its signal: vitae_micro is accurate with 4 dB at one site."""

MAX_PROBE_LOSS_DB = 3.0
"""Twice the noise power that quantization made: the same quantizers elsewhere differ by float rounding alone."""

MAX_SHARED_SHARE = 0.01
"""Of the evaluation images: data sets hold a few images twice."""

NORMALISATIONS = {
    "ImageNet": (IMAGENET_MEAN, IMAGENET_STD),
    "Inception": ((0.5,) * 3, (0.5,) * 3),
    "CLIP": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "no": ((0.0,) * 3, (1.0,) * 3),
    "0..255": ((0.0,) * 3, (1 / 255.0,) * 3),
}
"""What images that do not fit the preprocessing were most likely normalised with."""


def check_facts(given: Given) -> list[Check]:
    """Calibration saw enough images of the right kind, and the quantized network is the one that was measured."""
    manifest = given.manifest
    facts = manifest.quantization.get("calibration") or {}
    checks = _check_calibration(facts, manifest.preprocess) if facts else []
    return [*checks, _check_sites(manifest), _check_probe(manifest.quantization.get("probe"))]


def _check_calibration(facts: dict[str, Any], preprocess: Preprocess) -> list[Check]:
    count, correlation, noisy = facts["images"], facts["neighbour_correlation"], facts.get("noisy", 0)
    different = len(set(facts["fingerprints"])) if "fingerprints" in facts else count
    return [
        Check(
            "calibration images", different >= MIN_CALIBRATION_IMAGES, f"{different} different images of {count}",
            f"at least {MIN_CALIBRATION_IMAGES}", "Give more calibration images.",
        ),
        Check(
            "calibration content",
            correlation >= MIN_NEIGHBOUR_CORRELATION and noisy <= MAX_NOISY_SHARE * count,
            f"correlation of neighbouring pixels {correlation:.2f}, {noisy} of {count} images are noise",
            f"at least {MIN_NEIGHBOUR_CORRELATION} as in images (noise has 0), at most {MAX_NOISY_SHARE:.0%} noise",
            "Calibrate on images of the task.",
        ),
        _check_range(facts, preprocess),
        _check_normalisation(facts, preprocess),
    ]  # fmt: skip


def _check_range(facts: dict[str, Any], preprocess: Preprocess) -> Check:
    """Extremes and spread in grey levels, as the preprocessing of the bundle translates them back."""
    name, expected = "calibration range", f"grey levels 0 to 255 that spread by at least {MIN_GREY_LEVELS:.0f}"
    if "minimum" not in facts:
        return Check(name, None, "NOT verified: quantized by an older leanvit", expected, "Quantize again.")
    mean, std = np.array(preprocess.mean), np.array(preprocess.std)
    low = float(((np.array(facts["minimum"]) * std + mean) * 255).min())
    high = float(((np.array(facts["maximum"]) * std + mean) * 255).max())
    spread = float((np.array(facts["channel_std"]) * std * 255).max())
    inside = low >= -LEVELS_BEYOND and high <= 255 + LEVELS_BEYOND
    return Check(
        name, inside and spread >= MIN_GREY_LEVELS,
        f"grey levels {low:.4g} to {high:.4g} that spread by {spread:.3g}, with mean {preprocess.mean} and std "
        f"{preprocess.std}", expected,
        "Normalise the calibration images once, as the preprocessing says, and look for damaged ones.",
    )  # fmt: skip


def _check_normalisation(facts: dict[str, Any], preprocess: Preprocess) -> Check:
    """Pixels of 8-bit images are whole grey levels, but only under their own normalisation."""
    name, expected = "calibration normalisation", f"8-bit images, mean {preprocess.mean}, std {preprocess.std}"
    if not facts.get("pixels"):
        return Check(name, None, "NOT verified: quantized by an older leanvit", expected, "Quantize again.")
    pixels = np.array([[float(value) for value in pixel.split()] for pixel in facts["pixels"]])
    if _on_grid(pixels, preprocess.mean, preprocess.std):
        return Check(name, True, "whole grey levels", expected)
    others = {
        **NORMALISATIONS,
        "BGR": (preprocess.mean[::-1], preprocess.std[::-1]),
        "twofold": (preprocess.mean, tuple(255 * s for s in preprocess.std)),
    }
    for other, (mean, std) in others.items():
        if _on_grid(pixels, mean, std):
            return Check(
                name, False, f"images with {other} normalisation, mean {mean}, std {std}", expected,
                "Calibrate with leanvit.data.to_input(images, preprocess), or export with the preprocessing that "
                "the model was trained with.",
            )  # fmt: skip
    found = "NOT verified: pixels are no whole grey levels under any known normalisation (resized in float?)"
    return Check(name, None, found, expected, "Resize 8-bit images before they are normalised.")


def _on_grid(pixels: NDArray[np.float64], mean: tuple[float, ...], std: tuple[float, ...]) -> bool:
    if len(mean) != pixels.shape[1]:
        return False  # of another number of channels
    levels = (pixels * np.array(std) + np.array(mean)) * 255.0
    whole = (np.abs(levels - np.rint(levels)) < 0.02) & (levels > -0.5) & (levels < 255.5)
    return bool(whole.mean() >= 0.95)


def _check_sites(manifest: Manifest) -> Check:
    """Noise of every quantized site, as it was measured on the calibration images."""
    name, hint = "site SQNR", "Give these sites more bits, or leave them out with --ignored-scope."
    ratios: dict[str, float] = manifest.quantization.get("site_sqnr_db") or {}
    if not ratios:
        return Check(name, None, "NOT verified: quantized by an older leanvit", "SQNR of every site", "Quantize again.")
    judged = [site for site in ratios if min(bits for bits in (*manifest.plan.get(site, ()), 8) if bits) == 8]
    low = [site for site in judged if not ratios[site] >= MIN_SITE_SQNR_DB]
    return Check(
        name, not low, f"{len(low)} of {len(judged)} sites with 8 bits are mostly noise; {worst_sites(manifest)}",
        f"at least {MIN_SITE_SQNR_DB:.0f} dB with 8 bits; fewer bits are judged by accuracy", hint,
    )  # fmt: skip


def worst_sites(manifest: Manifest, count: int = 3) -> str:
    """The sites with the lowest SQNR, as one phrase; empty where none was measured."""
    ratios: dict[str, float] = manifest.quantization.get("site_sqnr_db") or {}
    named = [f"{site} {ratios[site]:.1f} dB" for site in sorted(ratios, key=lambda site: ratios[site])[:count]]
    return f"worst sites: {', '.join(named)}" if named else ""


def with_worst_sites(hint: str, manifest: Manifest) -> str:
    """A hint that also says where quantization costs most."""
    return f"{hint} (In quantization the {worst_sites(manifest)}.)" if worst_sites(manifest) else hint


def hint_of_difference(given: Given) -> str:
    """The advice where a file's outputs are not those of the network before export: a wrong file, or rounding.

    Less than QUANTIZED_SQNR_DB and MATCHED_SHARE is asked of those networks alone whose own outputs differ by it in
    float64 (gate.rounding), and of few bits: there it is noise of quantization that moved on, and no wrong file.
    """
    if _saturates(given):
        return (
            "This CPU has no VNNI, and OpenVINO's int8 products saturate there: the file may be right. Export with "
            "--runtimes onnxruntime, which is told not to, or run OpenVINO on a CPU with AVX512-VNNI or AVX-VNNI."
        )
    decibels, share = given.bundle.minimum_sqnr_db, given.bundle.minimum_share
    if decibels >= QUANTIZED_SQNR_DB and share >= MATCHED_SHARE:
        return with_worst_sites("The file computes something else than the network: export again.", given.manifest)
    objects = f" and {share:.0%} of its objects" if given.task.matched else ""
    hint = (
        f"No more than {decibels:.0f} dB{objects} are asked of this quantized network, whose outputs move by rounding "
        "alone: much of them may be noise, and the file as right as the network. Train it if its weights are random or "
        "hardly trained, calibrate with images like those it will see, or quantize with more bits."
    )
    return with_worst_sites(hint, given.manifest)


def _saturates(given: Given) -> bool:
    row = PROFILES.get(given.manifest.profile)
    is_integer = row is not None and row.has_integer_kernels
    return is_integer and given.bundle.runtime.startswith("openvino") and lacks_vnni()


def _check_probe(probe: dict[str, float] | None) -> Check:
    """Whether the quantized network still has the outputs that it had when it was quantized."""
    name = "quantizers"
    if not probe:
        return Check(name, None, "NOT verified: quantized by an older leanvit", "as when quantized", "Quantize again.")
    before, now = probe["quantized_db"], probe["exported_db"]
    return Check(
        name, now >= before - MAX_PROBE_LOSS_DB, f"{now:.1f} dB against the float network on the probe images",
        f"{before:.1f} dB as when it was quantized, at most {MAX_PROBE_LOSS_DB:.0f} dB less",
        "Scales or weights were changed after calibration: quantize again.",
    )  # fmt: skip


def check_disjoint(given: Given) -> list[Check]:
    """No evaluation image was calibrated on; images are equal where every prepared pixel is."""
    if given.evaluation is None:
        return []
    manifest, pixels = given.manifest, given.evaluation.pixels
    facts = manifest.quantization.get("calibration") or {}
    if "fingerprints" not in facts:
        return []
    known = set(facts["fingerprints"])
    batches = (imaging.normalize(pixels[i : i + 64], manifest.preprocess) for i in range(0, len(pixels), 64))
    shared = sum(fingerprint(image.tobytes()) in known for batch in batches for image in batch)
    found = f"{shared} of {len(pixels)} were calibrated on"
    passed: bool | None = shared <= MAX_SHARED_SHARE * len(pixels)
    if passed and not _check_normalisation(facts, manifest.preprocess).passed:
        passed = None
        found += "; NOT verified: calibration images were prepared otherwise, so equal ones can't be told"
    return [
        Check(
            "evaluation images", passed, found, f"at most {MAX_SHARED_SHARE:.0%} of them",
            "Evaluate on images that were held out of calibration.",
        )
    ]  # fmt: skip
