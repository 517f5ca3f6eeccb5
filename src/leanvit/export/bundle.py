"""The artifact folder: model.onnx, bundle.json, golden.npz, verify.json. Torch-free."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from leanvit._version import __version__
from leanvit.errors import ConfigError
from leanvit.files import sha256, write_atomic, write_json
from leanvit.runtime import (
    GOLDEN_NAME,
    MANIFEST_NAME,
    MODEL_NAME,
    VERIFY_NAME,
    Logits,
    Manifest,
    save_golden,
    write_manifest,
)

_FILES = (MODEL_NAME, GOLDEN_NAME, VERIFY_NAME)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that shaped the artifact, without importing them."""
    found = {"leanvit": __version__, "python": platform.python_version()}
    for package in ("torch", "timm", "onnx", "onnxscript", "onnxruntime", "numpy", "pillow"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def staging_folder(output: Path) -> Path:
    """A fresh folder beside `output`; the bundle is moved to its place when the gate has passed.

    Raises ConfigError where `output` is a folder with other files in it.
    """
    if output.exists() and not is_bundle(output) and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output} exists and is not a bundle; it is not overwritten. Choose another --output.")
    folder = output.with_name(f".{output.name}.{os.getpid()}.partial")
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def is_bundle(folder: Path) -> bool:
    """Whether `folder` holds a bundle's manifest."""
    return (folder / MANIFEST_NAME).is_file()


def write_bundle(
    folder: Path, model: bytes, images: Sequence[bytes], logits: Logits, manifest: Manifest, **records: NDArray[Any]
) -> Manifest:
    """Write a bundle without verify.json: a draft that the gate can load. Returns the signed manifest.

    records: further arrays for golden.npz that the gate compares with (leanvit.export.golden.records).
    """
    write_atomic(folder / MODEL_NAME, model)
    save_golden(folder, images, logits, **records)
    return sign(folder, manifest)


def sign(folder: Path, manifest: Manifest) -> Manifest:
    """Write bundle.json with the SHA-256 of the files that are there."""
    files = {name: sha256(folder / name) for name in _FILES if (folder / name).is_file()}
    manifest = replace(manifest, files=files)
    write_manifest(folder, manifest)
    return manifest


def finish(folder: Path, output: Path, manifest: Manifest, checks: dict[str, Any]) -> Path:
    """Add verify.json, sign, and move the folder to `output`, or to OUTPUT.rejected where a check failed."""
    write_json(folder / VERIFY_NAME, checks)
    sign(folder, manifest)
    target = output if checks["passed"] else output.with_name(f"{output.name}.rejected")
    if target.exists():
        # The old bundle is moved aside first: a crash between the two renames loses neither.
        aside = target.with_name(f".{target.name}.{os.getpid()}.old")
        os.replace(target, aside)
        os.replace(folder, target)
        shutil.rmtree(aside)
    else:
        os.replace(folder, target)
    return target
