"""A static folder that runs a bundle in the browser: the page, onnxruntime-web, and the bundle as it is. No torch."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from leanvit import imaging
from leanvit._version import __version__
from leanvit.errors import BundleError, ConfigError
from leanvit.files import write_atomic, write_json
from leanvit.runtime.bundle import (
    GOLDEN_NAME,
    MANIFEST_NAME,
    MODEL_NAME,
    VERIFY_NAME,
    Manifest,
    load_golden,
    move_into_place,
    read_manifest,
)
from leanvit.web.onnxruntime_web import PACKAGE, read_files

STATIC = Path(__file__).with_name("static")

SITE_NAME = "web.json"
"""What the page reads first; also the mark of a folder that may be replaced."""

TASKS = ("classify", "multilabel", "binary", "embed", "detect", "segment", "semantic", "pose")
"""Rows of static/tasks.js."""

BROWSER_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "AVIF")
"""What every browser of today decodes; TIFF and JPEG 2000 are not among them."""

POLICY = (
    "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; style-src 'self'; img-src 'self' blob: data:; "
    "media-src 'self' blob:; connect-src 'self'; worker-src 'self'; base-uri 'none'; form-action 'none'"
)
"""Nothing is loaded from elsewhere; WebAssembly is compiled, no text becomes a program."""


@dataclass(frozen=True)
class Site:
    """A folder that was written. rewritten: golden images that became PNG because browsers read them otherwise."""

    folder: Path
    manifest: Manifest
    bytes: int
    rewritten: int


def write_site(
    bundle: str | Path,
    output: str | Path,
    *,
    float_bundle: str | Path | None = None,
    onnxruntime_web: str | None = None,
) -> Site:
    """Write the folder `output` that runs `bundle` in the browser, whole or not at all.

    float_bundle: of the same network, to compare milliseconds with. onnxruntime_web: see `read_files`.
    Raises BundleError and VerificationError for a bundle that can't be served, ConfigError where `output` holds
    something else, and what `read_files` raises.
    """
    bundle, output = Path(bundle), Path(output)
    manifest = _servable(bundle)
    other = _float_of(Path(float_bundle), manifest) if float_bundle else None
    _require_replaceable(output)
    staging = output.with_name(f".{output.name}.{os.getpid()}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        _copy_bundle(bundle, staging / "bundle")
        if other:
            _copy_bundle(other, staging / "float")
        for name, data in read_files(onnxruntime_web).items():
            write_atomic(staging / "ort" / name, data)
        rewritten = _write_golden(bundle, staging)
        _write_page(staging, has_float=other is not None, golden=rewritten)
        size = sum(path.stat().st_size for path in staging.rglob("*") if path.is_file())
        move_into_place(staging, output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return Site(output, manifest, size, len(rewritten))


def _servable(bundle: Path) -> Manifest:
    """The checked manifest of a bundle that the page can run."""
    manifest = read_manifest(bundle)
    if manifest.task not in TASKS:
        raise BundleError(
            f"{bundle}: task '{manifest.task}' is unknown to the page, expected one of {', '.join(TASKS)}. Run it with "
            "leanvit predict."
        )
    if manifest.preprocess.channels not in (1, 3):
        raise BundleError(
            f"{bundle}: the network takes {manifest.preprocess.channels} bands, expected 3 or 1: browsers decode "
            "pictures to red, green and blue. Run it with leanvit predict."
        )
    return manifest


def _float_of(folder: Path, manifest: Manifest) -> Path:
    """The folder of a float bundle of the same network. Raises ConfigError for another one."""
    other = read_manifest(folder)
    for name in ("task", "labels", "preprocess"):
        found, expected = getattr(other, name), getattr(manifest, name)
        if found != expected:
            raise ConfigError(
                f"float bundle {folder}: {name} is {found}, expected {expected} as in the bundle. Give the float "
                "bundle of the same network."
            )
    return folder


def _require_replaceable(output: Path) -> None:
    if output.exists() and not (output / SITE_NAME).is_file() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(
            f"{output} exists and is not a folder of leanvit web; it is not overwritten. Choose another one."
        )


def _copy_bundle(bundle: Path, target: Path) -> None:
    for name in (MANIFEST_NAME, MODEL_NAME, GOLDEN_NAME, VERIFY_NAME):
        if (bundle / name).is_file():
            write_atomic(target / name, (bundle / name).read_bytes())


def _write_golden(bundle: Path, folder: Path) -> dict[str, str]:
    """Write golden images that browsers read otherwise, or not at all, as PNG; returns SHA-256 by path."""
    images, _ = load_golden(bundle)
    written = {}
    for index, image in enumerate(images):
        decoded = imaging.decode(image, f"golden image {index}")
        kind, _ = imaging.read_header(image)
        # Notes tell of a conversion (16 bits, CMYK, transparency) that browsers round in another way.
        if kind not in BROWSER_FORMATS or decoded.notes:
            name = f"golden/{index}.png"
            data = imaging.encode_png(decoded.pixels)
            write_atomic(folder / name, data)
            written[name] = hashlib.sha256(data).hexdigest()
    return written


def _write_page(folder: Path, *, has_float: bool, golden: dict[str, str]) -> None:
    """The page's own files, web.json with their SHA-256, and the service worker that knows this version."""
    for path in sorted(STATIC.iterdir()):
        if path.name != "sw.js":
            text = path.read_text(encoding="utf-8").replace("@POLICY@", POLICY)
            write_atomic(folder / path.name, text.encode())
    files = {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    values = {"leanvit": __version__, "runtime": PACKAGE, "float": has_float, "golden": golden, "files": files}
    write_json(folder / SITE_NAME, values)
    shell = ["./", SITE_NAME, *(name for name in files if "/" not in name and name != "index.html")]
    worker = (STATIC / "sw.js").read_text(encoding="utf-8").replace("@POLICY@", POLICY)
    digest = hashlib.sha256((folder / SITE_NAME).read_bytes() + worker.encode()).hexdigest()
    worker = worker.replace("@SITE@", digest).replace("@SHELL@", json.dumps(shell))
    write_atomic(folder / "sw.js", worker.encode())
