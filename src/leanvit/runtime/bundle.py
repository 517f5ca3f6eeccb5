"""The artifact folder: model.onnx, bundle.json, golden.npz, verify.json; written whole, read checked. No torch."""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leanvit._version import __version__
from leanvit.config import Preprocess, from_dict, to_dict
from leanvit.errors import BundleError, ConfigError, VerificationError
from leanvit.files import sha256, write_atomic, write_json

SCHEMA_VERSION = 1


MANIFEST_NAME = "bundle.json"


MODEL_NAME = "model.onnx"


GOLDEN_NAME = "golden.npz"


VERIFY_NAME = "verify.json"


SERVED_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
"""Names under which a bundle can be served: they stand in paths of folders and of URLs."""


_UNSIGNED = "0" * 64


Logits = NDArray[np.float32]


@dataclass(frozen=True)
class Manifest:
    """What bundle.json holds.

    profile: execution profile of model.onnx. labels: class names in the order of the logits.
    minimum_sqnr_db: how close golden logits must be. plan: {site: [weight_bits, activation_bits]}, empty
    for float. accuracy: what was measured in the runtime and on what; None where no labelled data was
    given. data: training data, its split and seed. simulated: written for a compiler, no speed on a CPU is
    claimed. runtimes: {runtime: least SQNR of its golden logits in dB}, those that the gate has proved.
    files: SHA-256 of every other file. sha256: of this file, written with zeros in its place. task: "classify", or
    what else the network does (docs/tasks.md). answers: how its outputs are read: their names, for a pose network
    also `keypoints`, for one of several labels an image `thresholds`, the least probability of each.
    """

    architecture: str
    profile: str
    labels: tuple[str, ...]
    preprocess: Preprocess
    minimum_sqnr_db: float
    plan: dict[str, tuple[int, int]] = field(default_factory=dict)
    quantization: dict[str, Any] = field(default_factory=dict)
    accuracy: dict[str, Any] | None = None
    data: dict[str, Any] = field(default_factory=dict)
    input: dict[str, Any] = field(default_factory=dict)
    opset: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    simulated: bool = False
    runtimes: dict[str, float] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    sha256: str = _UNSIGNED
    task: str = "classify"
    answers: dict[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write bundle.json with its own digest inside."""
    values = to_dict(manifest)
    values["sha256"] = _UNSIGNED
    text = json.dumps(values, indent=2, allow_nan=False) + "\n"
    digest = hashlib.sha256(text.encode()).hexdigest()
    write_atomic(folder / MANIFEST_NAME, text.replace(_UNSIGNED, digest).encode())


def _bundle_to_take(folder: Path) -> str:
    """What to give in the place of a folder that is no bundle: the one inside it, as `optimize` leaves it."""
    inside = sorted(path.parent for path in folder.glob(f"*/{MANIFEST_NAME}"))
    return f"Give {inside[0]}" if inside else "Make one: leanvit export CHECKPOINT --output FOLDER"


def read_manifest(folder: str | Path) -> Manifest:
    """Read a bundle's manifest and check every file against its SHA-256.

    Raises BundleError where the folder or a file is missing or the schema is another, VerificationError
    where a byte has changed.
    """
    folder = Path(folder)
    path = folder / MANIFEST_NAME
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path}: {error.strerror}, expected a bundle folder. {_bundle_to_take(folder)}") from error
    _check_own_digest(path, raw)
    values = json.loads(raw)
    if values.get("schema_version") != SCHEMA_VERSION:
        raise BundleError(
            f"{path}: schema version {values.get('schema_version')}, this leanvit reads {SCHEMA_VERSION}. "
            "Export the model again."
        )
    manifest = from_dict(Manifest, values, str(path))
    for name, digest in manifest.files.items():
        file = folder / name
        if not file.is_file():
            raise BundleError(f"{file}: missing, bundle.json lists it. Copy the whole folder again.")
        if sha256(file) != digest:
            raise VerificationError(
                f"{file}: its SHA-256 differs from bundle.json; the file was changed or damaged. "
                "Copy the bundle again or export the model again."
            )
    return manifest


def _check_own_digest(path: Path, raw: bytes) -> None:
    found = re.search(rb'"sha256": "([0-9a-f]{64})"', raw)
    digest = found.group(1) if found else b""
    expected = hashlib.sha256(raw.replace(digest, _UNSIGNED.encode())).hexdigest() if digest else None
    if expected is None or expected != digest.decode():
        raise VerificationError(
            f"{path}: its SHA-256 differs from the one inside; the file was changed or damaged. "
            "Copy the bundle again or export the model again."
        )


def load_golden(folder: str | Path) -> tuple[list[bytes], Logits]:
    """Encoded golden images and the logits (N, classes) that the model returned for them at export.

    Raises BundleError where golden.npz was damaged before it was signed.
    """
    path = Path(folder) / GOLDEN_NAME
    try:
        with np.load(path, allow_pickle=False) as golden:
            count = len(golden["logits"])
            return [golden[f"image_{i}"].tobytes() for i in range(count)], golden["logits"].astype(np.float32)
    except Exception as error:  # a damaged archive makes NumPy raise what it likes
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise BundleError(f"{path}: not readable ({reason}). Export the model again.") from error


def save_golden(folder: Path, images: Sequence[bytes], logits: Logits, **records: NDArray[Any]) -> None:
    """Write golden.npz: `image_0`... (encoded bytes as uint8), `logits` (N, classes) float32, and `records`."""
    buffer = io.BytesIO()
    arrays = {f"image_{i}": np.frombuffer(image, np.uint8) for i, image in enumerate(images)}
    np.savez(buffer, allow_pickle=False, logits=logits.astype(np.float32), **arrays, **records)
    write_atomic(folder / GOLDEN_NAME, buffer.getvalue())


def load_golden_records(folder: str | Path) -> dict[str, NDArray[Any]]:
    """What golden.npz holds beside images and logits; empty in bundles of the first versions."""
    with np.load(Path(folder) / GOLDEN_NAME, allow_pickle=False) as golden:
        return {name: golden[name] for name in golden.files if name != "logits" and not name.startswith("image_")}


def sqnr_db(truth: NDArray[Any], value: NDArray[Any]) -> float:
    """Signal to noise ratio in dB: 10 log10(sum truth^2 / sum (value - truth)^2), at most 200."""
    with np.errstate(invalid="ignore"):
        signal = float(np.square(truth.astype(np.float64)).sum())
        noise = float(np.square(value.astype(np.float64) - truth.astype(np.float64)).sum())
    if not np.isfinite(noise):
        return -200.0
    if noise == 0.0 or signal == 0.0:
        return 200.0 if noise == 0.0 else -200.0
    return float(np.clip(10 * np.log10(signal / noise), -200.0, 200.0))


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

    records: further arrays for golden.npz that the gate compares with (leanvit.export.gate.golden.records).
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
    move_into_place(folder, target)
    return target


def move_into_place(folder: Path, target: Path) -> None:
    """Move a whole folder to `target`, which may exist: a crash on the way loses neither."""
    if not target.exists():
        os.replace(folder, target)
        return
    # The old folder is moved aside first.
    aside = target.with_name(f".{target.name}.{os.getpid()}.old")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(target, aside)
    os.replace(folder, target)
    shutil.rmtree(aside)
